"""What a relay bears: many allocations, greedy users, floods from nobody, and those who reuse what is not theirs."""

from __future__ import annotations

import tracemalloc

import pytest
from relay_scene import ALLOCATE, BINDING, CLIENT, CLIENT2, DUAL, PEER, REFRESH, UDP4, UNIX_NOW, Relay, code_of

from fz_core.packet import Address, DropReason
from fz_core.stun import build
from fz_core.turn import PortFreed, SendToClient


def source(number: int, port: int = 40_000) -> Address:
    """One of many IPv4 addresses."""
    return Address(bytes([100, number >> 16 & 0xFF, number >> 8 & 0xFF, number & 0xFF]), port)


# quotas


def test_a_thousand_allocations_work_side_by_side_and_end() -> None:
    relay = Relay()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    ports = set()
    for n in range(1000):
        ports.add(relay.allocate(source(n), DUAL, salt=str(n))[0].port)
        assert relay.bind(source(n), 0x4000, PEER, salt=str(n)) is None
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert (len(ports), relay.server.allocation_count, relay.server.channel_count) == (1000, 1000, 1000)
    assert used < 4_000_000, f"{used} bytes"
    sent = relay.to_peer(source(500), 0x4000, b"x")
    assert sent is not None
    back = relay.to_client(sent.port, PEER, b"y")
    assert back is not None
    assert back.client == source(500)
    relay.commands.clear()
    relay.advance(900.0)
    assert sum(isinstance(c, PortFreed) for c in relay.commands) == 1000
    assert (relay.server.allocation_count, relay.server.channel_count) == (0, 0)
    assert relay.server.poll_timeout() is None


def test_a_source_has_a_quota() -> None:
    relay = Relay(allocations_per_source=3)
    for n in range(3):
        relay.allocate(Address(CLIENT.ip, n + 1), salt=str(n))
    assert code_of(relay.request(Address(CLIENT.ip, 9), ALLOCATE, UDP4, salt="more")) == 486
    relay.allocate(CLIENT2, salt="another source")
    relay.request(Address(CLIENT.ip, 1), REFRESH, (0x0D, bytes(4)), salt="0")
    relay.allocate(Address(CLIENT.ip, 9), salt="more")
    assert relay.server.allocation_count == 4


def test_all_of_a_slash_64_is_one_source() -> None:
    relay = Relay(allocations_per_source=1)
    first, second, other = (Address.parse(f"[2001:db8:0:{n}::{m}]:7") for n, m in ((1, 1), (1, 2), (2, 1)))
    relay.allocate(first, DUAL, salt="a")
    assert code_of(relay.request(second, ALLOCATE, UDP4, DUAL, salt="b")) == 486
    relay.allocate(other, DUAL, salt="c")


def test_a_user_who_moves_replaces_its_own_within_the_quota() -> None:
    relay = Relay(allocations_per_source=1)
    relay.allocate(CLIENT)
    relay.allocate(Address(CLIENT.ip, 50_000))
    assert relay.server.allocation_count == 1
    relay.allocate(CLIENT2)
    relay.allocate(CLIENT, salt="somebody else")
    assert relay.server.allocation_count == 2


def test_a_user_name_has_one_allocation_wherever_it_comes_from() -> None:
    relay = Relay()
    for n in range(100):
        relay.allocate(source(n))
        assert relay.server.allocation_count == 1


def test_a_socket_has_4096_channels() -> None:
    relay = Relay()
    relay.allocate(CLIENT)
    for n in range(4096):
        assert relay.bind(CLIENT, 0x4000 + n, Address(PEER.ip, 1000 + n)) is None
    assert relay.server.channel_count == 4096
    assert relay.bind(CLIENT, 0x5000, Address(PEER.ip, 9)) == 400, "there are no more numbers"
    assert relay.bind(CLIENT, 0x4000, Address(PEER.ip, 9)) == 400, "and each is taken"
    assert relay.to_peer(CLIENT, 0x4FFF, b"x") is not None


# floods of those who show no password


@pytest.mark.parametrize("method", [BINDING, ALLOCATE, REFRESH, 8, 9])
def test_answers_to_strangers_are_limited_per_source_and_counted(method: int) -> None:
    relay = Relay()
    question = build(method, 0, bytes(12), [UDP4] if method == ALLOCATE else [])
    reasons = [relay.server.handle_client_input(Address(CLIENT.ip, n), question, 0.0) for n in range(1, 2001)]
    relay.drain()
    assert sum(isinstance(c, SendToClient) for c in relay.commands) == 1000
    assert reasons[1000:] == [DropReason.RATE_LIMITED] * 1000
    assert relay.ask(CLIENT2, question) is not None, "others are not concerned"
    relay.now += 1.0
    assert relay.ask(CLIENT, question) is not None, "and it is over in a second"


def test_who_has_a_password_is_served_while_its_neighbour_floods() -> None:
    relay = Relay()
    relay.allocate(CLIENT)
    for n in range(1, 3000):
        relay.server.handle_client_input(Address(CLIENT.ip, n), build(BINDING, 0, bytes(12), []), 0.0)
    relay.drain()
    relay.commands.clear()
    assert relay.request(CLIENT, REFRESH).is_success


def test_a_flood_from_everywhere_leaves_bounded_tables_and_proven_clients_alone() -> None:
    relay = Relay()
    relay.allocate(CLIENT)
    question = build(ALLOCATE, 0, bytes(12), [UDP4])
    for n in range(70_000):
        relay.server.handle_client_input(source(n), question, relay.now)
        if n % 1000 == 0:
            relay.drain()
            relay.commands.clear()
    relay.drain()
    relay.commands.clear()
    authenticator = relay.server._authenticator
    assert len(authenticator._nonces) <= 65_536
    assert len(relay.server._rated) <= 65_537
    reply = relay.request(CLIENT, REFRESH)
    assert reply.is_success, "its nonce was not pushed out"


# abuse


def test_a_nonce_is_no_use_to_another_socket() -> None:
    relay = Relay()
    nonce = relay.challenge(CLIENT)
    relay.challenge(CLIENT2)
    assert code_of(relay.request(CLIENT2, ALLOCATE, UDP4, nonce=nonce)) == 438


def test_a_nonce_tried_with_wrong_passwords_wears_out_too() -> None:
    relay = Relay()
    nonce = relay.nonces[CLIENT] = relay.challenge(CLIENT)
    codes = set()
    for _ in range(11):
        relay.now += 1.0
        codes |= {code_of(relay.request(CLIENT, ALLOCATE, UDP4, nonce=nonce, secret="f" * 64)) for _ in range(1000)}
    assert codes == {401, 438}
    assert relay.server.allocation_count == 0


def test_a_proven_nonce_wears_out_as_others_do() -> None:
    relay = Relay()
    relay.allocate(CLIENT)
    codes = [code_of(relay.request(CLIENT, REFRESH)) for _ in range(9_999)]
    assert set(codes) == {None}
    assert code_of(relay.request(CLIENT, REFRESH)) == 438
    relay.nonces[CLIENT] = relay.challenge(CLIENT)
    assert code_of(relay.request(CLIENT, REFRESH)) is None


def test_credentials_end_but_what_they_made_lives_on_until_its_time() -> None:
    relay = Relay()
    soon = UNIX_NOW + 100
    relay.allocate(CLIENT, expiry=soon)
    assert relay.bind(CLIENT, 0x4000, PEER, expiry=soon) is None
    relay.advance(101.0)
    assert code_of(relay.request(CLIENT, REFRESH, expiry=soon)) == 401
    assert relay.to_peer(CLIENT, 0x4000, b"x") is not None
    assert code_of(relay.request(CLIENT2, ALLOCATE, UDP4, expiry=soon)) == 401
    relay.advance(500.0)
    assert relay.to_peer(CLIENT, 0x4000, b"x") is None


def test_drops_have_reasons() -> None:
    relay = Relay()
    handle = relay.server.handle_client_input
    nobody = build(REFRESH, 0, bytes(12), [(0x06, b"no colon")])
    assert handle(CLIENT, nobody, 0.0) is DropReason.STUN_UNAUTHENTICATED
    assert handle(CLIENT, build(BINDING, 1, bytes(12), []), 0.0) is DropReason.STUN_UNEXPECTED
    assert handle(CLIENT, b"\x40\x00\x00\x01x", 0.0) is DropReason.UNKNOWN_CHANNEL
    assert handle(CLIENT, b"\xffnoise", 0.0) is DropReason.UNKNOWN_DATAGRAM
    assert relay.server.handle_peer_input(50_000, PEER, b"x", 0.0) is DropReason.UNKNOWN_CHANNEL
