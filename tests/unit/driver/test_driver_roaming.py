"""Which changes of the host's network make a client start over (spec/io.md 10 and 14, item 47)."""

from __future__ import annotations

import pytest

from fz_core.driver.roaming import ANYWHERE, RESETS, Change, RouteWatch
from fz_core.linux import RouteCache

HOME4, HOME6 = bytes([192, 168, 1, 5]), bytes.fromhex("20010db8") + bytes(11) + b"\x05"
OTHER4 = bytes([10, 0, 0, 9])
OWN = bytes([100, 64, 0, 1])
RELAY, PORTAL = bytes([203, 0, 113, 101]), bytes([203, 0, 113, 10])


class Scene:
    """A watch over routes that a test changes."""

    def __init__(self, v4: bytes | None = HOME4, v6: bytes | None = HOME6) -> None:
        self.v4, self.v6, self.only = v4, v6, dict[bytes, bytes]()
        self.targets = [RELAY]
        self.watch = RouteWatch(RouteCache(self._look_up), lambda: self.targets, lambda: (OWN,))
        self.watch.learn(0.0)

    def _look_up(self, destination: bytes) -> bytes | None:
        return self.only.get(destination, self.v4 if len(destination) == 4 else self.v6)

    def at(self, now: float) -> Change:
        return self.watch.judge(now)


def test_nothing_that_concerns_us() -> None:
    assert Scene().at(1.0) is Change.NONE
    assert Scene(None, None).at(1.0) is Change.NONE


@pytest.mark.shows("io", 47)
def test_another_source_counts_once() -> None:
    scene = Scene()
    scene.v4 = OTHER4
    assert scene.at(1.0) is Change.MOVED
    assert Change.MOVED in RESETS
    assert scene.at(2.0) is Change.NONE


def test_a_route_of_its_own_to_one_relay_counts() -> None:
    scene = Scene()
    scene.only[RELAY] = OTHER4
    assert scene.at(1.0) is Change.MOVED


def test_a_second_family_is_welcome_and_no_reason_to_start_over() -> None:
    scene = Scene(v6=None)
    scene.v6 = HOME6
    assert scene.at(1.0) is Change.GAINED
    assert Change.GAINED not in RESETS
    assert scene.at(2.0) is Change.NONE


def test_a_family_that_goes_is_a_loss_until_it_is_back_or_taken_as_it_is() -> None:
    scene = Scene()
    scene.v6 = None
    assert [scene.at(1.0), scene.at(1.5)] == [Change.LOST] * 2
    assert Change.LOST in RESETS
    scene.v6 = HOME6
    assert scene.at(2.0) is Change.NONE
    scene.v6 = None
    assert scene.at(3.0) is Change.LOST
    scene.watch.learn(3.0)
    assert scene.at(4.0) is Change.NONE


@pytest.mark.parametrize(("away", "outcome"), [(9.0, Change.BACK), (11.0, Change.BACK_LATE)])
def test_the_same_network_after_none_at_all(away: float, outcome: Change) -> None:
    scene = Scene()
    scene.v4 = scene.v6 = None
    assert scene.at(1.0) is Change.GONE
    assert scene.at(1.5) is Change.GONE
    assert Change.GONE not in RESETS
    scene.v4, scene.v6 = HOME4, HOME6
    assert scene.at(1.0 + away) is outcome
    assert (outcome in RESETS) is (away > 10)
    assert scene.at(60.0) is Change.NONE


def test_another_network_after_none_at_all() -> None:
    scene = Scene()
    scene.v4 = scene.v6 = None
    assert scene.at(1.0) is Change.GONE
    scene.v4 = OTHER4
    assert scene.at(2.0) is Change.MOVED
    scene.watch.learn(2.0)
    assert scene.at(3.0) is Change.NONE


def test_a_network_that_comes_back_one_family_after_the_other() -> None:
    scene = Scene()
    scene.v4 = scene.v6 = None
    assert scene.at(1.0) is Change.GONE
    scene.v4 = HOME4
    assert scene.at(3.0) is Change.LOST
    scene.v6 = HOME6
    assert scene.at(4.0) is Change.BACK


def test_a_start_without_any_network() -> None:
    scene = Scene(None, None)
    scene.v4 = HOME4
    assert scene.at(5.0) is Change.BACK


def test_our_own_device_is_no_way_out() -> None:
    scene = Scene(v4=OWN, v6=None)
    scene.v4 = None
    assert scene.at(1.0) is Change.NONE


def test_new_targets_are_compared_from_when_they_were_noted() -> None:
    scene = Scene()
    scene.targets.append(PORTAL)
    assert scene.at(1.0) is Change.NONE
    scene.targets.append(bytes([203, 0, 113, 102]))
    scene.watch.note_targets()
    scene.only[scene.targets[-1]] = OTHER4
    assert scene.at(2.0) is Change.MOVED


def test_noting_targets_hides_no_change() -> None:
    scene = Scene()
    scene.v4 = OTHER4
    scene.watch.note_targets()
    assert scene.at(1.0) is Change.MOVED


def test_the_internet_is_asked_about_in_both_families() -> None:
    assert sorted(len(ip) for ip in ANYWHERE) == [4, 16]
