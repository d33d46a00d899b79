"""Channels of an allocation over the wire: kept, bound, refused, refreshed (spec/connectivity.md section 3.7)."""

from __future__ import annotations

import pytest
from turn_scene import (
    ALLOCATE,
    BINDING,
    CHANNEL_BIND,
    PEER,
    PEER2,
    PEER_V6,
    REFRESH,
    RELAY4,
    RELAYED4,
    RELAYED6,
    Scene,
    allocated,
    answer_keepalives,
    bound,
    receive,
)

from fz_core.packet import Address, DropReason
from fz_core.stun import build_channel_data


@pytest.mark.shows("connectivity", 15)
def test_early_binds_are_kept_and_sent_once() -> None:
    scene = Scene()
    for peer in (PEER, PEER2, PEER, PEER_V6):
        scene.allocation.bind_channel(peer, scene.now)
    scene.answer_binding(scene.take(BINDING))
    scene.answer_allocate(scene.take(ALLOCATE), RELAYED4)
    peers = [scene.take(CHANNEL_BIND).xor_peer_address for _ in range(2)]
    assert peers == [PEER, PEER2]
    assert scene.sent == []


@pytest.mark.shows("connectivity", 15)
@pytest.mark.parametrize(("relayed", "peer", "other"), [(RELAYED4, PEER, PEER_V6), (RELAYED6, PEER_V6, PEER)])
def test_early_binds_to_another_family_are_dropped(relayed: Address, peer: Address, other: Address) -> None:
    scene = Scene()
    scene.allocation.bind_channel(other, scene.now)
    scene.allocation.bind_channel(peer, scene.now)
    scene.answer_binding(scene.take(BINDING))
    scene.answer_allocate(scene.take(ALLOCATE), relayed)
    assert scene.take(CHANNEL_BIND).xor_peer_address == peer
    assert scene.sent == []
    assert scene.allocation.channel_to(other, scene.now) is None


@pytest.mark.shows("connectivity", 15)
@pytest.mark.parametrize(("relayed", "peer"), [(RELAYED4, PEER_V6), (RELAYED6, PEER)])
def test_peers_of_another_family_are_never_bound(relayed: Address, peer: Address) -> None:
    scene = allocated(relayed)
    scene.allocation.bind_channel(peer, scene.now)
    assert scene.allocation.encapsulate(peer, b"data", scene.now) is DropReason.NO_CHANNEL
    scene.drain()
    assert scene.sent == []


def test_the_hundred_newest_early_binds_are_kept() -> None:
    scene = Scene()
    for port in range(1, 151):
        scene.allocation.bind_channel(Address(PEER.ip, port), scene.now)
    scene.answer_binding(scene.take(BINDING))
    scene.answer_allocate(scene.take(ALLOCATE), RELAYED4)
    ports = [message.xor_peer_address.port for _, message, _ in scene.sent if message.xor_peer_address]
    assert ports == list(range(51, 151))


@pytest.mark.shows("connectivity", 16)
def test_data_over_confirmed_and_in_flight_channels() -> None:
    scene = allocated()
    assert scene.allocation.encapsulate(PEER, b"data", scene.now) is DropReason.NO_CHANNEL
    scene.drain()
    request = scene.take(CHANNEL_BIND)
    transmit = scene.allocation.encapsulate(PEER, b"data", scene.now, 1)
    assert not isinstance(transmit, DropReason)
    assert (transmit.payload, transmit.remote, transmit.ecn) == (b"\x40\x00\x00\x04data", RELAY4, 1)
    unconfirmed = scene.allocation.decapsulate(RELAY4, build_channel_data(0x4000, b"in"), scene.now)
    assert unconfirmed is DropReason.UNKNOWN_CHANNEL
    scene.answer_bind(request)
    received = scene.allocation.decapsulate(RELAY4, build_channel_data(0x4000, b"in"), scene.now)
    assert not isinstance(received, DropReason)
    assert (received[0], bytes(received[1]), received[2]) == (PEER, b"in", RELAYED4)
    assert scene.allocation.encapsulate(PEER, b"data", scene.now, 1) == transmit


def test_data_from_elsewhere_or_unbound_is_refused() -> None:
    scene = allocated()
    number = bound(scene)
    data = build_channel_data(number, b"in")
    assert isinstance(scene.allocation.decapsulate(PEER, data, scene.now), DropReason)
    assert isinstance(scene.allocation.decapsulate(RELAY4, data + b"x", scene.now), DropReason)
    unbound = build_channel_data(number + 1, b"in")
    assert isinstance(scene.allocation.decapsulate(RELAY4, unbound, scene.now), DropReason)


@pytest.mark.shows("connectivity", 16)
def test_a_refused_bind_leaves_no_state() -> None:
    scene = allocated()
    scene.allocation.bind_channel(PEER, scene.now)
    scene.drain()
    scene.answer_error(scene.take(CHANNEL_BIND), 400)
    assert scene.allocation.channel_to(PEER, scene.now) is None
    scene.advance(20)
    assert scene.sent == []


@pytest.mark.shows("connectivity", 16)
def test_binding_again_sends_nothing_and_peers_bind_in_parallel() -> None:
    scene = allocated()
    scene.allocation.bind_channel(PEER, scene.now)
    scene.allocation.bind_channel(PEER, scene.now)
    scene.allocation.bind_channel(PEER2, scene.now)
    scene.drain()
    first, second = scene.take(CHANNEL_BIND), scene.take(CHANNEL_BIND)
    assert scene.sent == []
    scene.answer_bind(second)
    scene.answer_bind(first)
    scene.allocation.bind_channel(PEER, scene.now)
    scene.drain()
    assert scene.sent == []


@pytest.mark.shows("connectivity", 18)
def test_a_used_channel_is_refreshed_after_five_minutes() -> None:
    scene = allocated()
    number = bound(scene)
    start = scene.now
    receive(scene, number)
    while scene.now < start + 320:
        answer_keepalives(scene)
        for entry in [entry for entry in scene.sent if entry[1].method == REFRESH]:
            scene.sent.remove(entry)
            scene.answer_refresh(entry[1])
        scene.advance(1)
    binds = [(at - start, m.channel_number) for at, m, _ in scene.sent if m.method == CHANNEL_BIND]
    assert binds[0] == (300, number)


def changes(scene: Scene) -> list[Address]:
    found = []
    while (peer := scene.allocation.poll_channel_change()) is not None:
        found.append(peer)
    return found


def test_only_a_confirmed_channel_is_offered_to_others() -> None:
    scene = allocated()
    scene.allocation.bind_channel(PEER, scene.now)
    scene.drain()
    assert scene.allocation.channel_to(PEER, scene.now) is not None
    assert scene.allocation.confirmed_channel_to(PEER) is None
    assert changes(scene) == []
    request = scene.take(CHANNEL_BIND)
    scene.answer_bind(request)
    assert request.channel_number is not None
    assert changes(scene) == [PEER]
    assert scene.allocation.confirmed_channel_to(PEER) == (request.channel_number, scene.now + 600.0)
    assert scene.allocation.ends_of(request.channel_number) == (RELAYED4, PEER)
    assert scene.allocation.ends_of(request.channel_number + 1) is None


def test_a_refresh_and_a_refusal_are_told() -> None:
    scene = allocated()
    number = bound(scene)
    assert changes(scene) == [PEER]
    scene.advance(1.0)
    scene.allocation.note_data_received(PEER, scene.now)
    while scene.now < 1300.0:
        answer_keepalives(scene)
        scene.advance(1.0)
    refresh = next(entry[1] for entry in scene.sent if entry[1].method == CHANNEL_BIND)
    assert scene.allocation.confirmed_channel_to(PEER) == (number, 1600.0)
    scene.answer_bind(refresh)
    assert changes(scene) == [PEER]
    assert scene.allocation.confirmed_channel_to(PEER) == (number, scene.now + 600.0)
    scene.allocation._channels.reject(number)
    assert changes(scene) == [PEER]
    assert scene.allocation.confirmed_channel_to(PEER) is None


def test_the_end_of_an_allocation_is_told_for_each_channel() -> None:
    scene = allocated()
    bound(scene, PEER)
    bound(scene, PEER2)
    changes(scene)
    scene.allocation.restart(scene.now)
    assert sorted(changes(scene)) == [PEER, PEER2]
    assert scene.allocation.confirmed_channel_to(PEER) is None


def test_data_sent_by_others_is_a_sign_of_life() -> None:
    scene = allocated()
    bound(scene)
    scene.advance(20.0)
    scene.allocation.note_data_sent(scene.now)
    scene.allocation.note_data_sent(scene.now - 15.0)
    scene.advance(24.9)
    assert [entry[1].method for entry in scene.sent] == []
    scene.advance(0.2)
    assert [entry[1].method for entry in scene.sent] == [BINDING]
