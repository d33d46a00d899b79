"""Which relay is chosen, and what is remembered of dropped ones (section 11, items 21 and 22)."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from fz_core.packet import Address
from fz_core.turn import Allocation, Relays, choose_relay, rtt_threshold


@pytest.mark.shows("connectivity", 21)
@pytest.mark.parametrize(
    ("rtts", "threshold"),
    [
        ([40], 60),
        ([40, 60], 60),
        ([30, 35, 40], 50),
        ([30, 30, 30, 31], 36),
        ([30, 40, 50, 60], 75),
    ],
)
def test_threshold(rtts: list[int], threshold: int) -> None:
    assert rtt_threshold(ms / 1000 for ms in rtts) == pytest.approx(threshold / 1000)


def draws(rtts: dict[str, float | None], count: int) -> Counter[str | None]:
    rng = random.Random(21)
    return Counter(choose_relay(rtts, rng.randbytes) for _ in range(count))


@pytest.mark.shows("connectivity", 21)
def test_an_outlier_is_never_chosen() -> None:
    chosen = draws({"a": 0.030, "b": 0.031, "c": 0.032, "d": 0.033, "slow": 0.4}, 1000)
    assert chosen["slow"] == 0
    assert set(chosen) == {"a", "b", "c", "d"}


@pytest.mark.shows("connectivity", 21)
def test_near_equals_share_the_load() -> None:
    chosen = draws({"a": 0.030, "b": 0.031}, 10_000)
    assert 4500 <= chosen["a"] <= 5500


@pytest.mark.shows("connectivity", 21)
def test_slow_alone_is_chosen_beside_fast_is_not() -> None:
    assert draws({"a": 0.030, "b": 0.200}, 1000)["b"] == 0
    assert draws({"a": 0.5}, 10)["a"] == 10
    assert draws({"a": None, "b": None}, 10)[None] == 10
    assert draws({}, 1)[None] == 1


def allocation(relay_id: str, address: str) -> Allocation:
    rng = random.Random(1)
    return Allocation(relay_id, (Address.parse(address), None), "1:a", "p", "firezone", 0.0, rng.randbytes)


@pytest.mark.shows("connectivity", 22)
def test_dropped_and_readdressed_relays_are_remembered() -> None:
    relays = Relays(random.Random(1).randbytes)
    relays.add(allocation("1", "198.51.100.1:3478"))
    replaced = relays.add(allocation("1", "198.51.100.2:3478"))
    assert replaced is not None
    assert relays.is_disconnected(Address.parse("198.51.100.1:3478"))
    assert not relays.is_disconnected(Address.parse("198.51.100.2:3478"))
    relays.remove("1")
    assert relays.is_disconnected(Address.parse("198.51.100.2:3478"))
    assert not relays.is_disconnected(Address.parse("198.51.100.9:3478"))
    for last in range(100, 170):
        relays.add(allocation("1", f"198.51.100.{last}:3478"))
    assert not relays.is_disconnected(Address.parse("198.51.100.1:3478"))


@pytest.mark.shows("connectivity", 22)
def test_the_last_one_gone_is_reported_once() -> None:
    relays = Relays(random.Random(1).randbytes)
    first, second = allocation("1", "198.51.100.1:3478"), allocation("2", "198.51.100.2:3478")
    relays.add(first)
    relays.add(second)
    die(first)
    dead, last = relays.remove_useless()
    assert (dead, last) == ([(first, "no response received")], False)
    die(second)
    assert relays.remove_useless() == ([(second, "no response received")], True)
    assert relays.remove_useless() == ([], False)
    assert relays.choose() is None


def die(allocation: Allocation) -> None:
    while (at := allocation.poll_timeout()) is not None:
        allocation.handle_timeout(at)
