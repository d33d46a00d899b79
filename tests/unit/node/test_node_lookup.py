"""Datagrams find their connection (spec/connectivity.md §2)."""

from __future__ import annotations

from random import Random

import pytest

from fz_core.crypto import PrivateKey
from fz_core.ice import Credentials
from fz_core.node import CLIENT_PROFILES, Parameters
from fz_core.node.connection import Connection
from fz_core.node.lookup import Connections
from fz_core.wireguard import RateLimiter

KEY = PrivateKey(b"\x01" * 32)
RANDOM = Random(1)


def connection(peer_id: str, local: str = "aaaa", remote: str = "bbbb", key: int = 9, index: int = 5) -> Connection:
    parameters = Parameters(
        bytes([key]) * 32, b"\x03" * 32, Credentials(local, "x" * 22), Credentials(remote, "y" * 22), True, False
    )
    limiter = RateLimiter(KEY, 0.0, RANDOM.randbytes)
    return Connection(peer_id, parameters, CLIENT_PROFILES, "relay", index, KEY, limiter, 1.7e9, RANDOM.randbytes, 0.0)


def test_requests_are_matched_by_both_ufrags() -> None:
    """Local ufrags have 20 bits and collide on a busy gateway."""
    known = Connections()
    first, second = connection("p", "aaaa", "bbbb", index=1), connection("q", "aaaa", "cccc", index=2)
    known.add(first)
    known.add(second)
    assert known.by_username("aaaa:bbbb") is first
    assert known.by_username("aaaa:cccc") is second
    for stranger in ("aaaa:dddd", "bbbb:aaaa", "aaaa", "aaaa:", "", ":", "aaaa:bbbb:cccc"):
        assert known.by_username(stranger) is None
    known.remove("p")
    assert known.by_username("aaaa:bbbb") is None
    assert known.by_username("aaaa:cccc") is second
    known.remove("q")
    assert known.by_username("aaaa:cccc") is None
    assert known._by_ufrag == {}


@pytest.mark.shows("connectivity", 26)
def test_answers_count_once_and_for_ten_seconds() -> None:
    """spec/connectivity.md §11 item 26."""
    known = Connections()
    peer = connection("p")
    known.add(peer)
    known.expect(b"1" * 12, peer, 100.0)
    known.expect(b"2" * 12, peer, 100.0)
    known.expect(b"3" * 12, peer, 100.0)
    assert known.answered(b"0" * 12, 101.0) is None
    assert known.answered(b"1" * 12, 101.0) is peer
    assert known.answered(b"1" * 12, 101.0) is None
    assert known.answered(b"2" * 12, 110.0) is peer
    assert known.answered(b"3" * 12, 110.1) is None


@pytest.mark.shows("connectivity", 26)
def test_transactions_of_one_instant_all_expire() -> None:
    known = Connections()
    peer = connection("p")
    known.add(peer)
    ids = [n.to_bytes(12, "big") for n in range(100)]
    for transaction in ids:
        known.expect(transaction, peer, 100.0)
    assert known.answered(ids[0], 110.0) is peer
    assert {known.answered(transaction, 110.1) for transaction in ids} == {None}


def test_old_transactions_are_forgotten_as_new_ones_come() -> None:
    known = Connections()
    peer = connection("p")
    known.add(peer)
    for n in range(10_000):
        known.expect(n.to_bytes(12, "big"), peer, n * 0.1)
    assert len(known._transactions) <= 110


@pytest.mark.shows("connectivity", 26)
def test_a_removed_connection_leaves_nothing() -> None:
    known = Connections()
    peer, other = connection("p", key=1, index=7), connection("q", key=2, index=8, remote="cccc")
    for one in (peer, other):
        known.add(one)
        known.expect(one.peer_id.encode() * 12, one, 0.0)
    assert known.remove("p") is peer
    assert known.remove("p") is None
    assert known.by_key(b"\x01" * 32) is None
    assert known.by_index.get(7) is None
    assert known.answered(b"p" * 12, 1.0) is None
    assert known.by_key(b"\x02" * 32) is other
    assert known.answered(b"q" * 12, 1.0) is other


def test_an_init_of_a_removed_connection_is_unknown() -> None:
    known = Connections()
    peer = connection("p")
    known.add(peer)
    known.remember_init(b"init", peer, 0.0)
    assert known.by_init(b"init") is peer
    known.remove("p")
    assert known.by_init(b"init") is None


def test_relays_are_in_use_as_long_as_any_connection_uses_them() -> None:
    known = Connections()
    first, second = connection("p", index=1), connection("q", index=2, remote="cccc")
    known.add(first)
    known.add(second)
    known.use_relay(first, "another")
    assert first.relay_id == "another"
    assert sorted(known.relay_ids) == ["another", "relay"]
    known.use_relay(second, "another")
    assert known.relay_ids == ["another"]
    known.remove("p")
    assert known.relay_ids == ["another"]
    known.remove("q")
    assert known.relay_ids == []


def test_indices_are_free_and_wrap_around() -> None:
    known = Connections()
    last = (1 << 24) - 1
    known.add(connection("p", index=last))
    known.add(connection("q", index=0))
    assert known.free_index(5) == 5
    assert known.free_index(last) == 1
    assert known.free_index(last + 6) == 5
    known.remove("p")
    assert known.free_index(last) == last
