"""The relay's protocol in virtual time (relay sheet section 14, items 1 to 19)."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from relay_scene import (
    ALLOCATE,
    BINDING,
    CLIENT,
    CLIENT2,
    CLIENT6,
    DUAL,
    EXPIRY,
    IP4,
    IP6,
    PEER,
    PEER2,
    PEER6,
    PERMISSION,
    REFRESH,
    SECRET,
    UDP4,
    UNIX_NOW,
    WANT4,
    WANT6,
    Relay,
    code_of,
)

from fz_core.packet import Address, DropReason
from fz_core.stun import (
    build,
    build_channel_data,
    long_term_key,
    u8_value,
    u32_value,
)
from fz_core.turn import (
    Allocation,
    ChannelBound,
    ChannelUnbound,
    PortFreed,
    RelayedAdded,
    SendToClient,
    SendToPeer,
    relay_credentials,
    relay_id,
    relay_password,
)


# 1
def test_passwords() -> None:
    assert relay_password(2000000000, "relaytest", SECRET) == "2UenLi1wA5Jc3kA3SEjWF+5iLFdyYfmiNkVPB51k2TE"
    assert relay_credentials(5, "x", SECRET)[0] == "5:x"
    assert relay_id(SECRET) == "60e05bd1-b195-4f2f-9411-2fa7197a5c88"


# 2
@pytest.mark.parametrize(
    ("expiry", "secret", "code"),
    [(UNIX_NOW, SECRET, None), (UNIX_NOW - 1, SECRET, 401), (EXPIRY, "1" * 64, 401)],
)
def test_expiry_and_secret(expiry: int, secret: str, code: int | None) -> None:
    relay = Relay()
    assert code_of(relay.request(CLIENT, ALLOCATE, UDP4, expiry=expiry, secret=secret)) == code


@pytest.mark.parametrize("username", [b"nocolon", b"1:2:3", b"x:y", b":y", b"99999999999999999999:y", b"\xff:x"])
def test_a_malformed_username_gets_no_signed_reply(username: bytes) -> None:
    relay = Relay()
    data = build(ALLOCATE, 0, bytes(12), [UDP4, (0x06, username)], integrity_key=b"k")
    reply = relay.ask(CLIENT, data)
    assert reply is None or (reply.error_code == 400 and not reply.has_integrity)


# 3
def test_a_nonce_wears_out() -> None:
    relay = Relay()
    for _ in range(10_000):
        assert relay.request(CLIENT, PERMISSION).is_success
    reply = relay.request(CLIENT, PERMISSION)
    assert code_of(reply) == 438
    assert reply.nonce is not None
    assert reply.nonce != relay.nonces[CLIENT]
    assert relay.request(CLIENT, PERMISSION, nonce=reply.nonce).is_success


def test_nonces_belong_to_sockets() -> None:
    relay = Relay()
    first, second = relay.challenge(CLIENT), relay.challenge(CLIENT2)
    assert first == relay.challenge(CLIENT)
    assert first != second
    assert code_of(relay.request(CLIENT2, PERMISSION, nonce=first)) == 438
    assert code_of(relay.request(CLIENT, PERMISSION, nonce="00000000-0000-0000-0000-000000000000")) == 438
    assert code_of(relay.request(CLIENT, PERMISSION, nonce="not a uuid")) == 401
    assert relay.request(CLIENT, PERMISSION, nonce="{" + first.upper() + "}").is_success


# 4
def test_challenge_and_success() -> None:
    relay = Relay()
    addresses = relay.allocate(CLIENT, DUAL)
    assert [a.ip for a in addresses] == [IP4, IP6]
    assert addresses[0].port == addresses[1].port
    assert 49152 <= addresses[0].port <= 65535


def test_a_known_user_gets_a_signed_challenge() -> None:
    relay = Relay()
    username, password = relay_credentials(EXPIRY, "s", SECRET)
    key = long_term_key(username, "firezone", password)
    named = [UDP4, (0x06, username.encode()), (0x14, b"firezone")]
    reply = relay.ask(CLIENT, build(ALLOCATE, 0, bytes(12), named, integrity_key=key))
    assert reply is not None
    assert code_of(reply) == 401
    assert reply.check_integrity(key)


# 5
@pytest.mark.parametrize("client", [CLIENT, CLIENT6])
def test_binding(client: Address) -> None:
    reply = Relay().ask(client, build(BINDING, 0, bytes(12), []))
    assert reply is not None
    assert reply.is_success
    assert reply.xor_mapped_address == client
    assert not reply.has_integrity


def test_port_zero_is_not_answered() -> None:
    assert Relay().ask(Address(CLIENT.ip, 0), build(BINDING, 0, bytes(12), [])) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80hello",
        b"\x04" + bytes(30),
        build(BINDING, 1, bytes(12), []),
        build(ALLOCATE, 2, bytes(12), []),
        build(BINDING, 0, bytes(12), []) + b"extra",
    ],
)
def test_what_gets_no_reply(data: bytes) -> None:
    assert Relay().ask(CLIENT, data) is None


# 6
def test_an_allocation_ends() -> None:
    relay = Relay()
    port = relay.allocate(CLIENT, (0x0D, u32_value(100)))[0].port
    assert relay.deadline() == 100
    relay.advance(99)
    assert relay.commands == []
    relay.advance(1)
    assert relay.commands == [PortFreed(port)]
    assert relay.deadline() is None
    assert relay.server.allocation_count == 0


# 7
def test_refresh_replaces_the_expiry() -> None:
    relay = Relay()
    relay.allocate(CLIENT)
    assert relay.deadline() == 600
    relay.advance(300)
    assert relay.request(CLIENT, REFRESH, (0x0D, u32_value(1000))).lifetime == 1000
    assert relay.deadline() == 1000
    relay.advance(999)
    assert relay.server.allocation_count == 1
    relay.request(CLIENT, REFRESH, (0x0D, u32_value(10)))
    assert relay.deadline() == 10


# 8
def test_refresh_with_zero_frees() -> None:
    relay = Relay()
    port = relay.allocate(CLIENT)[0].port
    assert relay.request(CLIENT, REFRESH, (0x0D, u32_value(0))).lifetime == 0
    assert relay.commands == [PortFreed(port)]
    relay.commands.clear()
    relay.advance(5000)
    assert relay.commands == []
    assert code_of(relay.request(CLIENT, REFRESH, (0x0D, u32_value(0)))) == 437


# 9
def test_freeing_takes_the_channels_along() -> None:
    relay = Relay()
    port = relay.allocate(CLIENT)[0].port
    relay.bind(CLIENT, 0x4000, PEER)
    relay.bind(CLIENT, 0x4001, PEER2)
    relay.commands.clear()
    relay.request(CLIENT, REFRESH, (0x0D, u32_value(0)))
    assert relay.commands == [
        ChannelUnbound(CLIENT, 0x4000, port, PEER),
        ChannelUnbound(CLIENT, 0x4001, port, PEER2),
        PortFreed(port),
    ]
    assert relay.server.channel_count == 0
    assert relay.to_peer(CLIENT, 0x4000, b"x") is None
    assert relay.to_client(port, PEER, b"x") is None
    relay.allocate(CLIENT)
    assert relay.bind(CLIENT, 0x4000, PEER2) is None


# 10
def test_lifetimes_are_capped() -> None:
    relay = Relay()
    assert relay.request(CLIENT, ALLOCATE, UDP4, (0x0D, u32_value(99999))).lifetime == 3600
    assert relay.request(CLIENT2, ALLOCATE, UDP4, salt="t").lifetime == 600


@pytest.mark.parametrize(
    ("v4", "v6", "wishes", "outcome"),
    [
        (True, True, [], [IP4]),
        (True, True, [WANT4], [IP4]),
        (True, True, [WANT6], [IP6]),
        (True, True, [DUAL], [IP4, IP6]),
        (True, False, [DUAL], [IP4]),
        (False, True, [DUAL], [IP6]),
        (False, True, [WANT6], [IP6]),
        (True, True, [WANT4, DUAL], 400),
        (True, True, [(0x8000, u8_value(1))], 400),
        (True, True, [(0x17, u8_value(3))], 400),
        (False, True, [], 440),
        (False, True, [WANT4], 440),
        (True, False, [WANT6], 440),
    ],
)
def test_address_families(v4: bool, v6: bool, wishes: list[tuple[int, bytes]], outcome: object) -> None:
    relay = Relay(v4=v4, v6=v6)
    reply = relay.request(CLIENT, ALLOCATE, UDP4, *wishes)
    assert (reply.error_code or [a.ip for a in reply.xor_relayed_addresses]) == outcome


@pytest.mark.parametrize("transport", [[], [(0x19, u8_value(6))]])
def test_only_udp(transport: list[tuple[int, bytes]]) -> None:
    assert code_of(Relay().request(CLIENT, ALLOCATE, *transport)) == 400


def test_a_second_allocate_is_a_mismatch_but_a_repetition_is_not() -> None:
    relay = Relay()
    txid = bytes(range(12))
    first = relay.allocate(CLIENT, txid=txid)
    assert relay.allocate(CLIENT, txid=txid) == first
    assert code_of(relay.request(CLIENT, ALLOCATE, UDP4)) == 437
    assert relay.server.allocation_count == 1


# 11
def test_the_newest_socket_of_a_user_wins() -> None:
    relay = Relay()
    port = relay.allocate(CLIENT)[0].port
    relay.bind(CLIENT, 0x4000, PEER)
    relay.commands.clear()
    new_port = relay.allocate(CLIENT2)[0].port
    assert relay.commands == [ChannelUnbound(CLIENT, 0x4000, port, PEER), PortFreed(port)]
    assert new_port != port
    assert relay.bind(CLIENT, 0x4000, PEER) == 437
    assert code_of(relay.request(CLIENT, REFRESH)) == 437
    assert relay.bind(CLIENT2, 0x4000, PEER) is None
    relay.allocate(CLIENT)
    assert relay.server.allocation_count == 1


# 12
def test_a_full_range() -> None:
    relay = Relay(lowest_port=50000, highest_port=50003)
    ports = {relay.allocate(Address(CLIENT.ip, n), salt=str(n))[0].port for n in range(1, 5)}
    assert ports == {50000, 50001, 50002, 50003}
    assert code_of(relay.request(CLIENT2, ALLOCATE, UDP4, salt="last")) == 508


def test_ports_that_do_not_open_are_passed_over() -> None:
    tried: list[int] = []

    def opens(port: int, families: tuple[int, ...]) -> bool:
        tried.append(port)
        return port == 50001

    relay = Relay(lowest_port=50000, highest_port=50003, open_port=opens)
    assert relay.allocate(CLIENT)[0].port == 50001
    assert code_of(relay.request(CLIENT2, ALLOCATE, UDP4, salt="t")) == 508
    assert len(tried) <= 8


# 13
@pytest.mark.parametrize(("wish", "peer", "ip"), [(WANT4, PEER, IP4), (WANT6, PEER6, IP6), (DUAL, PEER6, IP4)])
def test_ping_pong(wish: tuple[int, bytes], peer: Address, ip: bytes) -> None:
    relay = Relay()
    relayed = relay.allocate(CLIENT, wish, (0x0D, u32_value(3600)))
    assert relayed[0].ip == ip
    relay.commands.clear()
    assert relay.bind(CLIENT, 0x4000, peer) is None
    assert relay.commands == [ChannelBound(CLIENT, 0x4000, relayed[0].port, peer)]
    assert relay.deadline() == 600
    assert relay.to_peer(CLIENT, 0x4000, b"ping") == SendToPeer(relayed[0].port, peer, b"ping")
    answer = relay.to_client(relayed[0].port, peer, b"pong")
    assert answer == SendToClient(CLIENT, b"\x40\x00\x00\x04pong")
    assert relay.to_peer(CLIENT, 0x4000, b"") == SendToPeer(relayed[0].port, peer, b"")


# 14 to 16
def test_a_channel_ends_and_rests() -> None:
    relay = Relay()
    port = relay.allocate(CLIENT, (0x0D, u32_value(3600)))[0].port
    relay.bind(CLIENT, 0x4000, PEER)
    relay.commands.clear()
    relay.advance(600)
    assert relay.commands == [ChannelUnbound(CLIENT, 0x4000, port, PEER)]
    assert relay.deadline() == 300
    assert relay.to_peer(CLIENT, 0x4000, b"x") is None
    assert relay.to_client(port, PEER, b"x") is None
    relay.commands.clear()
    relay.advance(299)
    assert relay.commands == []
    assert relay.bind(CLIENT, 0x4000, PEER2) == 400
    assert relay.bind(CLIENT, 0x4001, PEER) == 400
    relay.advance(1)
    assert relay.bind(CLIENT, 0x4000, PEER2) is None
    assert relay.bind(CLIENT, 0x4001, PEER) is None


def test_a_resting_channel_is_revived_both_ways() -> None:
    relay = Relay()
    port = relay.allocate(CLIENT, (0x0D, u32_value(3600)))[0].port
    relay.bind(CLIENT, 0x4000, PEER)
    relay.advance(700)
    relay.commands.clear()
    assert relay.bind(CLIENT, 0x4000, PEER) is None
    assert relay.commands == [ChannelBound(CLIENT, 0x4000, port, PEER)]
    assert relay.to_peer(CLIENT, 0x4000, b"x") is not None
    assert relay.to_client(port, PEER, b"x") is not None
    assert relay.deadline() == 600


def test_a_refreshed_channel_lives_on_and_does_not_spin() -> None:
    relay = Relay()
    relay.allocate(CLIENT, (0x0D, u32_value(3600)))
    relay.bind(CLIENT, 0x4000, PEER)
    relay.advance(500)
    relay.bind(CLIENT, 0x4000, PEER)
    assert relay.deadline() == 600
    relay.commands.clear()
    for _ in range(599):
        relay.advance(1)
    assert relay.commands == []
    for _ in range(50):
        relay.advance(1)
    assert len(relay.commands) == 1


def test_conflicts_while_bound() -> None:
    relay = Relay()
    relay.allocate(CLIENT)
    assert relay.bind(CLIENT, 0x4000, PEER) is None
    assert relay.bind(CLIENT, 0x4000, PEER2) == 400
    assert relay.bind(CLIENT, 0x4001, PEER) == 400
    assert relay.bind(CLIENT, 0x3FFF, PEER2) == 400
    assert relay.bind(CLIENT, 0x5000, PEER2) == 400


# 17
def test_two_peers_are_kept_apart() -> None:
    relay = Relay()
    port = relay.allocate(CLIENT)[0].port
    relay.bind(CLIENT, 0x4000, PEER)
    relay.bind(CLIENT, 0x4001, PEER2)
    assert relay.to_peer(CLIENT, 0x4001, b"2") == SendToPeer(port, PEER2, b"2")
    assert relay.to_client(port, PEER, b"1") == SendToClient(CLIENT, b"\x40\x00\x00\x011")
    assert relay.to_client(port, Address(PEER.ip, 9), b"x") is None
    assert relay.bind(CLIENT, 0x4002, PEER6) == 443


def test_binding_without_an_allocation() -> None:
    assert Relay().bind(CLIENT, 0x4000, PEER) == 437


@pytest.mark.parametrize("peer", ["127.0.0.1:5", "224.0.0.1:5", "0.0.0.0:5", "192.0.2.1:0", "198.51.100.1:3478"])
def test_peers_that_are_refused(peer: str) -> None:
    relay = Relay()
    relay.allocate(CLIENT)
    assert relay.bind(CLIENT, 0x4000, Address.parse(peer)) == 403


# 18
@given(st.integers(0x4000, 0x4FFF), st.binary(max_size=1400))
def test_channel_data_round_trip(number: int, payload: bytes) -> None:
    relay = Relay()
    port = relay.allocate(CLIENT)[0].port
    relay.bind(CLIENT, number, PEER)
    assert relay.to_peer(CLIENT, number, payload) == SendToPeer(port, PEER, payload)
    assert relay.to_client(port, PEER, payload) == SendToClient(CLIENT, build_channel_data(number, payload))


@pytest.mark.parametrize(
    "data", [b"\x40", b"\x40\x00\x00", b"\x40\x00\x00\x05abcd", b"\x40\x01\x00\x01a", b"\x50\x00\x00\x00"]
)
def test_bad_channel_data(data: bytes) -> None:
    relay = Relay()
    relay.allocate(CLIENT)
    relay.bind(CLIENT, 0x4000, PEER)
    relay.commands.clear()
    assert isinstance(relay.server.handle_client_input(CLIENT, data, relay.now), DropReason)
    relay.drain()
    assert relay.commands == []


def test_bytes_beyond_the_length_are_ignored() -> None:
    relay = Relay()
    port = relay.allocate(CLIENT)[0].port
    relay.bind(CLIENT, 0x4000, PEER)
    relay.commands.clear()
    relay.server.handle_client_input(CLIENT, b"\x40\x00\x00\x02abXX", relay.now)
    relay.drain()
    assert relay.commands == [SendToPeer(port, PEER, b"ab")]


# 19
def test_a_broken_datagram_does_not_spoil_the_next() -> None:
    relay = Relay()
    good = build(BINDING, 0, bytes(12), [])
    assert relay.ask(CLIENT, good[:12]) is None
    assert relay.ask(CLIENT, good) is not None


def test_random_input_is_survived() -> None:
    relay = Relay()
    rng = random.Random(8)
    relay.allocate(CLIENT)
    for _ in range(5000):
        data = bytearray(build(rng.choice((1, 3, 4, 8, 9)), 0, rng.randbytes(12), [UDP4, (0x0C, rng.randbytes(4))]))
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        relay.server.handle_client_input(CLIENT, data, relay.now)
        relay.server.handle_peer_input(rng.randrange(65536), PEER, data, relay.now)
    relay.drain()
    assert relay.server.allocation_count == 1


def test_unauthenticated_replies_are_bounded_per_source() -> None:
    relay = Relay()
    for port in range(1, 3000):
        relay.server.handle_client_input(Address(CLIENT.ip, port), build(BINDING, 0, bytes(12), []), relay.now)
    relay.drain()
    assert len(relay.commands) == 1000
    relay.now += 1
    assert relay.ask(CLIENT, build(BINDING, 0, bytes(12), [])) is not None


def test_the_timer_heap_stays_small() -> None:
    relay = Relay()
    relay.allocate(CLIENT)
    for n in range(3000):
        relay.request(CLIENT, REFRESH, (0x0D, u32_value(600 + n % 7)))
    assert len(relay.server._state._heap) < 100
    assert relay.server.poll_timeout() == 600 + 2999 % 7


# our client against our relay, two allocations on one relay (items 22 of the service and 20 of the client)
def test_two_of_our_clients_reach_each_other_through_one_relay() -> None:
    relay = Relay()
    rng = random.Random(2)
    listen = Address(IP4, 3478)

    def client_of(salt: str) -> Allocation:
        credentials = relay_credentials(EXPIRY, salt, SECRET)
        return Allocation("r", (listen, None), *credentials, "firezone", 0.0, rng.randbytes)

    clients = {CLIENT: client_of("a"), CLIENT2: client_of("b")}
    received: list[tuple[Address, Address, bytes]] = []

    def settle() -> None:
        for _ in range(10):
            for address, client in clients.items():
                while (transmit := client.poll_transmit()) is not None:
                    relay.server.handle_client_input(address, transmit.payload, relay.now)
            relay.drain()
            for command in relay.commands:
                if isinstance(command, SendToClient):
                    client = clients[command.client]
                    if not client.handle_input(command.client, listen, command.payload, relay.now):
                        opened = client.decapsulate(listen, command.payload, relay.now)
                        assert not isinstance(opened, DropReason)
                        received.append((command.client, opened[0], bytes(opened[1])))
            relay.commands.clear()

    settle()
    relayed = {}
    for address, client in clients.items():
        events = []
        while (event := client.poll_event()) is not None:
            events.append(event)
        assert isinstance(events[-1], RelayedAdded)
        relayed[address] = events[-1].address
    clients[CLIENT].bind_channel(relayed[CLIENT2], 0.0)
    clients[CLIENT2].bind_channel(relayed[CLIENT], 0.0)
    settle()
    for here, there in ((CLIENT, CLIENT2), (CLIENT2, CLIENT)):
        transmit = clients[here].encapsulate(relayed[there], b"hello", 0.0)
        assert not isinstance(transmit, DropReason)
        relay.server.handle_client_input(here, transmit.payload, 0.0)
    settle()
    assert received == [(CLIENT2, relayed[CLIENT], b"hello"), (CLIENT, relayed[CLIENT2], b"hello")]
