"""Channel numbers: order, re-use, refresh (spec/connectivity.md section 11, items 17 and 18)."""

from __future__ import annotations

from random import Random

import pytest

from fz_core.packet import Address
from fz_core.turn.channels import Channels

MINUTE = 60.0


def peer(number: int) -> Address:
    return Address(b"\x0a\0\0\x01", number)


def bind(channels: Channels, number: int, now: float) -> int:
    channel = channels.request(peer(number), now)
    assert channel is not None
    channels.confirm(channel.number, now)
    return channel.number


@pytest.mark.shows("connectivity", 17, 18)
def test_the_first_number_and_the_last() -> None:
    channels = Channels()
    numbers = [bind(channels, port, 0.0) for port in range(4096)]
    assert numbers == list(range(0x4000, 0x5000))
    assert channels.request(peer(5000), 0.0) is None
    assert channels.request(peer(5000), 10 * MINUTE + 1) is None
    channel = channels.request(peer(5000), 15 * MINUTE)
    assert channel is not None
    assert channel.number == 0x4000
    following = channels.request(peer(5001), 15 * MINUTE)
    assert following is not None
    assert following.number == 0x4001


@pytest.mark.shows("connectivity", 17)
def test_numbers_rotate_before_they_are_used_again() -> None:
    channels = Channels()
    assert bind(channels, 1, 0.0) == 0x4000
    assert bind(channels, 2, 16 * MINUTE) == 0x4001
    assert bind(channels, 3, 32 * MINUTE) == 0x4002


@pytest.mark.shows("connectivity", 18)
def test_the_same_peer_revives_its_number() -> None:
    channels = Channels()
    number = bind(channels, 1, 0.0)
    bind(channels, 2, 0.0)
    assert channels.number_to(peer(1), 10 * MINUTE) is None
    channel = channels.request(peer(1), 12 * MINUTE)
    assert channel is not None
    assert channel.number == number


def test_the_same_peer_gets_a_fresh_number_once_its_own_is_free() -> None:
    channels = Channels()
    number = bind(channels, 1, 0.0)
    channel = channels.request(peer(1), 16 * MINUTE)
    assert channel is not None
    assert channel.number != number


def test_late_data_keeps_a_number_blocked() -> None:
    channels = Channels()
    for port in range(4096):
        bind(channels, port, 0.0)
    channels.receive(0x4000, 14 * MINUTE)
    channel = channels.request(peer(5000), 15 * MINUTE)
    assert channel is not None
    assert channel.number == 0x4001


@pytest.mark.shows("connectivity", 18)
def test_refresh_needs_age_and_data() -> None:
    channels = Channels()
    number = bind(channels, 1, 0.0)
    assert channels.next_refresh_at() is None
    assert channels.due(6 * MINUTE) == []
    channels.receive(number, 1 * MINUTE)
    assert channels.next_refresh_at() == 5 * MINUTE
    assert channels.due(5 * MINUTE - 1) == []
    due = channels.due(5 * MINUTE)
    assert [channel.number for channel in due] == [number]
    channels.begin(due[0], 5 * MINUTE)
    assert channels.due(6 * MINUTE) == []
    channels.confirm(number, 6 * MINUTE)
    assert channels.due(20 * MINUTE) == []


def test_an_expired_channel_is_not_refreshed_by_a_timer() -> None:
    channels = Channels()
    number = bind(channels, 1, 0.0)
    channels.receive(number, 1.0)
    assert channels.due(11 * MINUTE) == []
    assert channels.next_refresh_at() is None


@pytest.mark.parametrize("seed", range(20))
def test_the_next_refresh_is_the_earliest_of_all(seed: int) -> None:
    random, channels, now = Random(seed), Channels(), 0.0
    for _ in range(1500):
        number, now = 0x4000 + random.randrange(20), now + random.choice((0.0, 1.0, 45.0))
        match random.randrange(7):
            case 0 | 1:
                channels.request(peer(random.randrange(20)), now)
            case 2 | 3:
                channels.confirm(number, now)
            case 4 | 5:
                channels.receive(number, now)
            case _ if random.randrange(4) == 0:
                channels.reject(number)
        for channel in channels.due(now):
            channels.begin(channel, now)
        refreshes = [channel.refresh_at() for channel in channels._by_number.values()]
        earliest = min((at for at in refreshes if at is not None), default=None)
        assert channels.next_refresh_at() == earliest, f"seed {seed}"


def test_where_all_numbers_are_taken_the_first_one_free_is_found_in_time() -> None:
    channels = Channels()
    for port in range(4095):
        bind(channels, port, 0.0)
    late = channels.request(peer(4095), 0.0)
    assert late is not None
    assert channels.request(peer(5000), 1.0) is None
    channels.reject(0x4001)  # free at once
    assert bind(channels, 5000, 2.0) == 0x4001
    assert channels.request(peer(5001), 3.0) is None
    channels.confirm(late.number, 4.0)
    channels.receive(0x4000, 14 * MINUTE)
    assert channels.request(peer(5001), 15 * MINUTE - 1) is None
    assert bind(channels, 5001, 15 * MINUTE) == 0x4002


def test_binds_that_are_all_in_flight_hold_their_numbers_until_they_end() -> None:
    channels = Channels()
    for port in range(4096):
        assert channels.request(peer(port), 0.0) is not None
    assert channels.request(peer(5000), 1.0) is None
    for number in range(0x4000, 0x5000):
        channels.confirm(number, 2.0)
    assert channels.request(peer(5000), 15 * MINUTE + 1) is None
    assert channels.request(peer(5000), 15 * MINUTE + 2) is not None


def test_a_refused_number_is_forgotten() -> None:
    channels = Channels()
    number = bind(channels, 1, 0.0)
    channels.reject(number)
    assert channels.number_to(peer(1), 0.0) is None
    assert channels.receive(number, 0.0) is None
    assert len(channels) == 0
