"""Channel numbers: order, re-use, refresh (spec/connectivity.md section 11, items 17 and 18)."""

from __future__ import annotations

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


def test_a_refused_number_is_forgotten() -> None:
    channels = Channels()
    number = bind(channels, 1, 0.0)
    channels.reject(number)
    assert channels.number_to(peer(1), 0.0) is None
    assert channels.receive(number, 0.0) is None
    assert len(channels) == 0
