"""Handshakes: message layout, authentication, replay, retries, simultaneous starts."""

from __future__ import annotations

import itertools

import pytest
from wireguard_pair import PSK, UNIX_EPOCH, Pair, ipv4

from fz_core.crypto import PrivateKey
from fz_core.packet import DropReason
from fz_core.wireguard import (
    Expired,
    RateLimiter,
    SessionEstablished,
    Tunnel,
    initiator_static_key_untrusted,
    receiver_index,
)


@pytest.mark.shows("connectivity", 44)
def test_message_types_and_sizes() -> None:
    pair = Pair().connect()
    pair.send(pair.a, ipv4(b"x" * 7))
    assert [(d[:4].hex(), len(d)) for _, d in pair.a.sent] == [
        ("01000000", 148),
        ("04000000", 32),
        ("04000000", 32 + 27),
    ]
    assert [(d[:4].hex(), len(d)) for _, d in pair.b.sent] == [("02000000", 92)]
    assert not pair.a.drops
    assert not pair.b.drops


def test_indices_are_the_base_and_a_counter_from_one() -> None:
    pair = Pair().connect()
    initiation, keepalive = (d for _, d in pair.a.sent)
    response = pair.b.sent[0][1]
    assert int.from_bytes(initiation[4:8], "little") == 0xAAAAAA01
    assert int.from_bytes(response[4:8], "little") == 0xBBBBBB01
    assert receiver_index(initiation) is None
    assert receiver_index(response) == 0xAAAAAA01
    assert receiver_index(keepalive) == 0xBBBBBB01


def test_the_index_counter_wraps_within_its_byte() -> None:
    pair = Pair()
    for _ in range(257):
        pair.a.tunnel.start_handshake(pair.now, force=True)
        pair.exchange()
        pair.now += 0.5
    indices = [int.from_bytes(d[4:8], "little") for _, d in pair.a.sent if d[0] == 1]
    assert indices[254:257] == [0xAAAAAAFF, 0xAAAAAA00, 0xAAAAAA01]


def test_the_initiation_names_its_sender() -> None:
    pair = Pair()
    pair.a.tunnel.start_handshake(pair.now)
    initiation = pair.a.tunnel.poll_datagram()
    assert initiation is not None
    assert initiator_static_key_untrusted(pair.keys[1], initiation) == pair.keys[0].public
    assert initiator_static_key_untrusted(bytes(pair.keys[1]), initiation) == pair.keys[0].public
    assert initiator_static_key_untrusted(pair.keys[0], initiation) is None
    assert initiator_static_key_untrusted(pair.keys[1], initiation[:-1]) is None
    assert initiator_static_key_untrusted(pair.keys[1], b"\x02" + initiation[1:]) is None


def test_both_report_the_session_when_they_can_use_it() -> None:
    pair = Pair()
    pair.a.tunnel.start_handshake(pair.now)
    pair.lossy = lambda sender, datagram: datagram[0] == 4
    pair.exchange()
    assert pair.a.events == [SessionEstablished(pair.now, True)]
    assert pair.b.events == []
    assert not pair.b.tunnel.has_session
    assert pair.b.tunnel.seal(ipv4(), pair.now) is DropReason.WG_NO_SESSION
    pair.lossy = lambda sender, datagram: False
    pair.send(pair.a, ipv4())
    assert pair.b.events == [SessionEstablished(pair.now, False)]
    assert pair.a.tunnel.is_initiator_of_session
    assert not pair.b.tunnel.is_initiator_of_session
    assert pair.send(pair.b, ipv4(b"back")) is None
    assert pair.a.received == [ipv4(b"back")]


def test_a_second_start_is_suppressed_unless_forced() -> None:
    pair = Pair()
    pair.a.tunnel.start_handshake(pair.now)
    pair.a.tunnel.start_handshake(pair.now)
    assert pair.a.tunnel.handshake_in_progress
    pair.collect(pair.a)
    assert pair.a.sent_kinds() == [1]
    pair.a.tunnel.start_handshake(pair.now, force=True)
    pair.collect(pair.a)
    assert pair.a.sent_kinds() == [1, 1]


@pytest.mark.shows("connectivity", 44)
def test_another_preshared_key_fails() -> None:
    pair = Pair(psk_b=bytes(32))
    pair.a.tunnel.start_handshake(pair.now)
    pair.exchange()
    assert pair.b.sent_kinds() == [2]
    assert pair.a.drops == [DropReason.WG_BAD_HANDSHAKE]
    assert not pair.a.tunnel.has_session


@pytest.mark.shows("connectivity", 44)
def test_a_stranger_is_refused() -> None:
    pair = Pair()
    stranger = Tunnel(
        PrivateKey(b"\x07" * 32), pair.keys[1].public, PSK, 1, pair.now, UNIX_EPOCH, pair.random.randbytes
    )
    stranger.start_handshake(pair.now)
    initiation = stranger.poll_datagram()
    assert initiation is not None
    assert pair.deliver(pair.b, initiation) is DropReason.WG_BAD_HANDSHAKE
    assert pair.b.sent == []


@pytest.mark.shows("connectivity", 44)
def test_an_initiation_to_another_key_has_a_wrong_mac1() -> None:
    pair = Pair()
    misled = Tunnel(pair.keys[0], PrivateKey(b"\x08" * 32).public, PSK, 1, pair.now, UNIX_EPOCH, pair.random.randbytes)
    misled.start_handshake(pair.now)
    initiation = misled.poll_datagram()
    assert initiation is not None
    assert pair.deliver(pair.b, initiation) is DropReason.WG_BAD_MAC


@pytest.mark.shows("connectivity", 44)
def test_a_replayed_initiation_is_refused() -> None:
    pair = Pair().connect()
    initiation = pair.a.sent[0][1]
    assert pair.deliver(pair.b, initiation) is DropReason.WG_REPLAYED_HANDSHAKE
    assert pair.b.sent_kinds() == [2]


def test_timestamps_increase_even_when_the_clock_stands_still() -> None:
    pair = Pair()
    for _ in range(5):
        pair.a.tunnel.start_handshake(pair.now, force=True)
        pair.exchange()
    assert pair.b.drops == []
    assert pair.b.sent_kinds() == [2] * 5


@pytest.mark.shows("connectivity", 44)
def test_a_late_response_to_the_superseded_initiation_succeeds() -> None:
    pair = Pair()
    pair.a.inbox.append(late_response(pair, initiations=2))
    pair.exchange()
    assert pair.a.tunnel.has_session
    assert pair.b.tunnel.has_session
    assert not pair.a.tunnel.handshake_in_progress


def test_a_response_older_than_the_superseded_initiation_fails() -> None:
    pair = Pair()
    late = late_response(pair, initiations=3)
    assert pair.deliver(pair.a, late) is DropReason.WG_BAD_HANDSHAKE


@pytest.mark.shows("connectivity", 44)
@pytest.mark.parametrize("crossing", [1, 2])
def test_simultaneous_initiations_converge(crossing: int) -> None:
    """`crossing` messages are on the wire each way before anything arrives."""
    pair = Pair()
    for end in (pair.a, pair.b):
        end.tunnel.start_handshake(pair.now)
    for _ in range(crossing):
        pair.collect(pair.a)
        pair.collect(pair.b)
        arriving = [(pair.a, list(pair.a.inbox)), (pair.b, list(pair.b.inbox))]
        for end, datagrams in arriving:
            end.inbox.clear()
            for datagram in datagrams:
                end.tunnel.handle_untrusted(datagram, None, pair.now)
    pair.exchange()
    for end in (pair.a, pair.b):
        assert end.tunnel.has_session
        assert not end.tunnel.handshake_in_progress
        assert pair.send(end, ipv4(end.name.encode())) is None
        assert pair.other(end).received == [ipv4(end.name.encode())]


@pytest.mark.parametrize("kind", [1, 2])
def test_every_flipped_bit_of_a_handshake_message_is_noticed(kind: int) -> None:
    pair = Pair()
    held: list[bytes] = []
    pair.lossy = lambda sender, datagram: datagram[0] == kind and not held.append(datagram)  # type: ignore[func-returns-value]
    pair.a.tunnel.start_handshake(pair.now)
    pair.exchange()
    (message,) = held
    receiver = pair.b if kind == 1 else pair.a
    # mac2 is not looked at without load, hence its 16 bytes may be anything.
    for at in range(len(message) - 16):
        forged = bytearray(message)
        forged[at] ^= 1 << at % 8
        got = receiver.tunnel.handle_untrusted(bytes(forged), None, pair.now)
        assert isinstance(got, DropReason), at
    assert receiver.tunnel.poll_datagram() is None
    assert pair.deliver(receiver, message) is None


def test_a_changed_field_is_noticed_with_valid_macs_too() -> None:
    """An attacker knows the mac1 key, which is public."""
    pair = Pair()
    pair.a.tunnel.start_handshake(pair.now)
    initiation = pair.a.tunnel.poll_datagram()
    assert initiation is not None
    for at in (8, 40, 87, 88, 115):
        forged = bytearray(initiation[:116])
        forged[at] ^= 1
        got = pair.b.tunnel.handle_untrusted(with_mac1(bytes(forged), pair.keys[1].public), None, pair.now)
        assert got is DropReason.WG_BAD_HANDSHAKE
    assert pair.b.tunnel.poll_datagram() is None


@pytest.mark.parametrize("length", [0, 1, 3, 4, 16, 31, 32, 63, 64, 65, 91, 92, 93, 147, 148, 149, 1500, 65535])
@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 5, 255])
def test_any_garbage_is_a_drop(kind: int, length: int) -> None:
    pair = Pair().connect()
    garbage = (bytes((kind, 0, 0, 0)) + b"\xa5" * length)[:length]
    for data in (garbage, bytearray(garbage), memoryview(garbage)):
        assert isinstance(pair.b.tunnel.handle_untrusted(data, b"\x01\x02\x03\x04", pair.now), DropReason)
    assert receiver_index(garbage) is None or length >= 12


def test_reserved_bytes_must_be_zero() -> None:
    pair = Pair().connect()
    sealed = bytearray(sealed_by(pair))
    sealed[1] = 1
    assert pair.deliver(pair.b, bytes(sealed)) is DropReason.WG_MALFORMED


@pytest.mark.shows("connectivity", 45)
def test_retransmission_gaps_and_the_end_of_the_attempt() -> None:
    """Item 45: gaps in 5 to 5.333 s, expiry at the attempt limit, and an explicit start revives."""
    pair = Pair(rekey_attempt_time=20.0)
    start = pair.now
    pair.lossy = lambda sender, datagram: True
    pair.a.tunnel.start_handshake(pair.now)
    pair.exchange()
    while pair.step():
        pass
    times = pair.a.sent_at(1)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(times) == 4
    assert all(5.0 <= gap <= 5.3331 for gap in gaps), gaps
    assert len(set(gaps)) > 1
    assert pair.a.events == [Expired(start + 20.0)]
    assert not pair.a.tunnel.handshake_in_progress
    pair.lossy = lambda sender, datagram: False
    pair.connect()
    assert pair.send(pair.a, ipv4()) is None


def test_every_retransmission_is_a_new_initiation() -> None:
    pair = Pair()
    pair.lossy = lambda sender, datagram: True
    pair.a.tunnel.start_handshake(pair.now)
    pair.exchange()
    pair.run_until(pair.now + 30)
    messages = [d for _, d in pair.a.sent]
    assert len(messages) >= 5
    for field in (slice(4, 8), slice(8, 40), slice(88, 116)):
        assert len({m[field] for m in messages}) == len(messages)


def test_wrong_arguments_are_the_callers_mistake() -> None:
    key, public = PrivateKey(b"\x01" * 32), PrivateKey(b"\x02" * 32).public
    random = Pair().random.randbytes
    with pytest.raises(ValueError, match="32 bytes"):
        Tunnel(key, public[:-1], PSK, 1, 0.0, 0.0, random)
    with pytest.raises(ValueError, match="32 bytes"):
        Tunnel(key, public, PSK[:-1], 1, 0.0, 0.0, random)
    with pytest.raises(ValueError, match="24 bits"):
        Tunnel(key, public, PSK, 1 << 24, 0.0, 0.0, random)
    with pytest.raises(ValueError, match="low order"):
        Tunnel(key, bytes(32), PSK, 1, 0.0, 0.0, random)
    with pytest.raises(ValueError, match="positive"):
        Tunnel(key, public, PSK, 1, 0.0, 0.0, random, persistent_keepalive=0.0)


def test_text_never_shows_a_key() -> None:
    pair = Pair().connect()
    secrets = [bytes(pair.keys[0]).hex(), PSK.hex(), pair.keys[1].public.hex()]
    session = pair.a.tunnel.current_session()
    for thing in (pair.a.tunnel, session, RateLimiter(pair.keys[0], 0.0, pair.random.randbytes)):
        assert not any(secret in repr(thing) for secret in secrets)


def sealed_by(pair: Pair) -> bytes:
    sealed = pair.a.tunnel.seal(ipv4(), pair.now)
    assert isinstance(sealed, bytes)
    return sealed


def with_mac1(body: bytes, public: bytes) -> bytes:
    """Append the MACs a sender without a cookie would."""
    from hashlib import blake2s

    key = blake2s(b"mac1----" + public).digest()
    return body + blake2s(body, key=key, digest_size=16).digest() + bytes(16)


def late_response(pair: Pair, initiations: int) -> bytes:
    """The response to the first of so many initiations, all that was lost; from now on nothing is."""
    late: list[bytes] = []
    pair.lossy = lambda sender, datagram: sender is pair.b and not late.append(datagram)  # type: ignore[func-returns-value]
    pair.a.tunnel.start_handshake(pair.now)
    pair.exchange()
    pair.lossy = lambda sender, datagram: True
    while len(pair.a.sent) < initiations:
        pair.step()
    pair.lossy = lambda sender, datagram: False
    return late[0]
