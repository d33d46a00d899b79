"""The replay window against a model that remembers everything."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fz_core.wireguard.replay import Window

WINDOW = 8192
LIMIT = 2**64 - 2**13 - 1


class Model:
    def __init__(self) -> None:
        self.highest = -1
        self.seen: set[int] = set()

    def accept(self, counter: int) -> bool:
        if counter in self.seen or counter <= self.highest - WINDOW or counter >= LIMIT:
            return False
        self.seen.add(counter)
        self.highest = max(self.highest, counter)
        return True


steps = st.one_of(
    st.integers(-20, 20),
    st.integers(-9000, 9000),
    st.sampled_from([-8193, -8192, -8191, -64, 64, 8191, 8192, 8193, 8256, 8257, 16384, 1 << 40]),
)


@given(st.integers(0, LIMIT), st.lists(steps, max_size=200))
def test_window_agrees_with_the_model(start: int, moves: list[int]) -> None:
    window, model = Window(), Model()
    counter = start
    for move in [0, *moves]:
        counter = min(max(counter + move, 0), LIMIT)
        assert window.accept(counter) == model.accept(counter)


def test_the_last_counters_are_never_accepted() -> None:
    window = Window()
    assert not window.accept(2**64 - 1)
    assert not window.accept(LIMIT)
    assert window.accept(LIMIT - 1)
    assert not window.accept(LIMIT - 1)
    assert window.accept(LIMIT - WINDOW)
    assert not window.accept(LIMIT - WINDOW - 1)


def test_a_jump_clears_what_lies_between() -> None:
    window = Window()
    for counter in range(9000):
        assert window.accept(counter)
    assert window.accept(20000)
    fresh = [c for c in range(20001) if window.accept(c)]
    assert fresh == list(range(20000 - 8191, 20000))
