"""Cookies and the handshake limit (spec section 11, item 49)."""

from __future__ import annotations

import pytest
from wireguard_pair import Pair, ipv4

from fz_core.crypto import PrivateKey
from fz_core.packet import DropReason
from fz_core.wireguard import RateLimiter


@pytest.mark.shows("connectivity", 44, 49)
def test_under_load_a_cookie_comes_back_and_helps() -> None:
    pair = Pair(limit=0)
    pair.b.inbox.clear()
    start = pair.now
    pair.a.tunnel.start_handshake(pair.now)
    # Only b is under load: a's own limiter would ask b for a cookie as well.
    first = pair.a.tunnel.poll_datagram()
    assert first is not None
    assert pair.deliver(pair.b, first) is DropReason.WG_UNDER_LOAD
    ((_, reply),) = pair.b.sent
    assert (reply[:4].hex(), len(reply), reply[4:8]) == ("03000000", 64, first[4:8])
    pair.exchange()
    assert pair.a.drops == []
    pair.run_until(start + 5.5)
    second = next(d for _, d in pair.a.sent if d[0] == 1)
    assert second[132:] != bytes(16)
    assert first[132:] == bytes(16)
    assert 2 in pair.b.sent_kinds()


def test_both_ends_under_load_still_connect() -> None:
    pair = Pair(limit=0)
    start = pair.now
    pair.a.tunnel.start_handshake(pair.now)
    pair.exchange()
    pair.run_until(start + 30)
    assert pair.a.tunnel.has_session
    assert pair.b.tunnel.has_session
    assert pair.send(pair.b, ipv4()) is None


@pytest.mark.shows("connectivity", 49)
def test_a_cookie_is_used_for_120_seconds() -> None:
    pair = Pair(limit=0)
    pair.a.tunnel.start_handshake(pair.now)
    pair.exchange()
    got_at = pair.now
    for age, fresh in ((1.0, True), (119.9, True), (120.0, False)):
        pair.now = got_at + age
        pair.a.tunnel.start_handshake(pair.now, force=True)
        initiation = pair.a.tunnel.poll_datagram()
        assert initiation is not None
        assert (initiation[132:] != bytes(16)) is fresh, age


def test_cookies_bind_to_the_address() -> None:
    pair = Pair(limit=0)
    pair.a.tunnel.start_handshake(pair.now)
    pair.exchange()
    pair.now += 1
    pair.a.tunnel.start_handshake(pair.now, force=True)
    initiation = pair.a.tunnel.poll_datagram()
    assert initiation is not None
    verdicts = [
        pair.b.tunnel.handle_untrusted(initiation, ip, pair.now)
        for ip in (b"\x0a\0\0\x09", bytes(16), None, pair.a.source_ip)
    ]
    assert verdicts == [DropReason.WG_UNDER_LOAD] * 3 + [None]
    replies = [d for d in iter(pair.b.tunnel.poll_datagram, None)]
    assert [d[0] for d in replies] == [3, 3, 2]


@pytest.mark.shows("connectivity", 44)
def test_an_unsolicited_or_altered_cookie_is_refused() -> None:
    pair = Pair(limit=0)
    pair.a.tunnel.start_handshake(pair.now)
    initiation = pair.a.tunnel.poll_datagram()
    assert initiation is not None
    pair.deliver(pair.b, initiation)
    reply = pair.b.sent[0][1]
    assert pair.deliver(pair.b, reply) is DropReason.WG_BAD_COOKIE
    for at in range(4, 64):
        forged = bytearray(reply)
        forged[at] ^= 1
        assert pair.deliver(pair.a, bytes(forged)) is DropReason.WG_BAD_COOKIE
    assert pair.deliver(pair.a, reply) is None
    assert pair.deliver(pair.a, reply) is DropReason.WG_BAD_COOKIE


def test_a_cookie_for_an_older_message_is_refused() -> None:
    pair = Pair(limit=0)
    pair.a.tunnel.start_handshake(pair.now)
    initiation = pair.a.tunnel.poll_datagram()
    assert initiation is not None
    pair.deliver(pair.b, initiation)
    pair.a.tunnel.start_handshake(pair.now, force=True)
    assert pair.deliver(pair.a, pair.b.sent[0][1]) is DropReason.WG_BAD_COOKIE


@pytest.mark.shows("connectivity", 49)
def test_the_hundred_and_first_message_is_too_many_and_time_alone_heals() -> None:
    pair = Pair()
    limiter = RateLimiter(pair.keys[1], 0.0, pair.random.randbytes)
    message = initiation_of(pair)
    verdicts = [limiter.verify_untrusted(message, b"\x01\x02\x03\x04", 0.5) for _ in range(102)]
    assert verdicts[:100] == [None] * 100
    assert all(isinstance(v, bytes) and len(v) == 64 for v in verdicts[100:])
    assert isinstance(limiter.verify_untrusted(message, b"\x01\x02\x03\x04", 0.999), bytes)
    assert limiter.verify_untrusted(message, b"\x01\x02\x03\x04", 1.0) is None


def test_a_message_the_caller_verified_is_not_counted_again() -> None:
    pair = Pair(limit=0)
    message = initiation_of(pair)
    assert pair.b.tunnel.handle_untrusted(message, pair.a.source_ip, pair.now, True) is None
    assert [d[0] for d in iter(pair.b.tunnel.poll_datagram, None)] == [2]


def test_only_valid_mac1_counts() -> None:
    pair = Pair()
    limiter = RateLimiter(bytes(pair.keys[1]), 0.0, pair.random.randbytes, limit=1)
    message = initiation_of(pair)
    for at in range(0, 132):
        forged = bytearray(message)
        forged[at] ^= 1
        assert limiter.verify_untrusted(bytes(forged), None, 0.0) is DropReason.WG_BAD_MAC
    assert limiter.verify_untrusted(message, None, 0.0) is None
    assert limiter.verify_untrusted(message, None, 0.0) is DropReason.WG_UNDER_LOAD


@pytest.mark.parametrize("length", [0, 64, 91, 93, 147, 149])
def test_the_limiter_takes_only_handshake_messages(length: int) -> None:
    limiter = RateLimiter(PrivateKey(b"\x01" * 32), 0.0, Pair().random.randbytes)
    assert limiter.verify_untrusted(bytes(length), None, 0.0) is DropReason.WG_MALFORMED


def test_the_cookie_secret_changes() -> None:
    """A cookie of one epoch is worthless in the next."""
    pair = Pair(limit=0)
    pair.now += 60
    pair.a.tunnel.start_handshake(pair.now)
    pair.exchange()
    outcomes = []
    for _ in range(2):
        pair.a.tunnel.start_handshake(pair.now, force=True)
        initiation = pair.a.tunnel.poll_datagram()
        assert initiation is not None
        assert initiation[132:] != bytes(16)
        outcomes.append(pair.b.tunnel.handle_untrusted(initiation, pair.a.source_ip, pair.now))
        pair.now += 70
    assert outcomes == [None, DropReason.WG_UNDER_LOAD]


def initiation_of(pair: Pair) -> bytes:
    pair.a.tunnel.start_handshake(pair.now)
    initiation = pair.a.tunnel.poll_datagram()
    assert initiation is not None
    return initiation
