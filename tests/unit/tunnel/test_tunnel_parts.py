"""Buffers, pending authorizations, held candidates, gateways, control events."""

from __future__ import annotations

import json
from ipaddress import ip_address, ip_network

import pytest

from fz_core.packet import Packet, build_tcp, build_udp
from fz_core.tunnel import control
from fz_core.tunnel.authorizations import BUFFERED_QUERIES, MAX_PENDING, AccessKey, PendingAuthorizations
from fz_core.tunnel.buffers import PacketBuffer
from fz_core.tunnel.candidates import CandidateOutbox
from fz_core.tunnel.gateways import Gateways

SRC, DST = ip_address("100.64.0.1").packed, ip_address("10.0.0.1").packed
SYN, ACK = 0x02, 0x10


def udp_packet(payload: bytes) -> Packet:
    return build_udp(SRC, DST, 1000, 2000, payload)


def syn(sequence: int, payload: bytes = b"", flags: int = SYN) -> Packet:
    return build_tcp(SRC, DST, 1000, 80, flags=flags, seq=sequence, payload=payload)


def test_identical_packets_are_stored_once_and_order_is_kept() -> None:
    buffer = PacketBuffer(4)
    for payload in (b"a", b"b", b"a", b"c"):
        buffer.push(udp_packet(payload))
    assert [p.payload for p in buffer.drain()] == [b"a", b"b", b"c"]
    assert buffer.drain() == []


def test_a_retransmitted_syn_replaces_the_stored_one() -> None:
    buffer = PacketBuffer(4)
    buffer.push(syn(7, b"old"))
    buffer.push(syn(7, b"new"))
    buffer.push(syn(8))
    buffer.push(syn(7, b"later", flags=ACK))
    assert [p.payload for p in buffer.drain()] == [b"new", b"", b"later"]


def test_a_full_buffer_overwrites_the_oldest() -> None:
    buffer = PacketBuffer(3)
    for number in range(5):
        buffer.push(udp_packet(bytes([number])))
    assert [p.payload for p in buffer.drain()] == [b"\x02", b"\x03", b"\x04"]
    assert buffer.overwritten == 2


def test_access_is_requested_at_once_and_then_every_two_seconds_of_traffic() -> None:
    pending = PendingAuthorizations()
    key = AccessKey("r")
    asked = [pending.trigger(key, 100.0 + n * 0.5, packet=udp_packet(bytes([n]))) for n in range(10)]
    assert [n * 0.5 for n, was in enumerate(asked) if was] == [0.0, 2.0, 4.0]
    waiting = pending.resolve(key)
    assert waiting is not None
    assert (len(waiting.packets), waiting.queries) == (10, [])
    assert pending.resolve(key) is None


def test_resources_are_requested_independently() -> None:
    pending = PendingAuthorizations()
    a, b = AccessKey("a"), AccessKey("b")
    assert pending.trigger(a, 1.0)
    assert pending.trigger(b, 1.1)
    pending.drop(a)
    assert pending.trigger(a, 1.2)
    assert not pending.trigger(b, 1.3)


@pytest.mark.shows("tunnel", 22, 24)
def test_devices_are_requested_independently_of_their_pool_and_of_each_other() -> None:
    pending = PendingAuthorizations()
    keys = [AccessKey("pool", b"\x64\x40\0\1"), AccessKey("pool", b"\x64\x40\0\2"), AccessKey("other", b"\x64\x40\0\1")]
    assert all(pending.trigger(key, 1.0) for key in (*keys, AccessKey("resource")))
    assert set(pending.devices(b"\x64\x40\0\1")) == {keys[0], keys[2]}
    pending.drop(keys[0])
    assert pending.trigger(keys[0], 1.1)
    assert not pending.trigger(AccessKey("resource"), 1.2)
    pending.drop_resource("pool")
    assert [key in pending for key in keys] == [False, False, True]
    assert not pending.trigger(AccessKey("resource"), 2.9)
    assert pending.trigger(AccessKey("resource"), 3.0)


def test_queries_wait_too_and_everything_is_bounded() -> None:
    pending = PendingAuthorizations()
    for number in range(BUFFERED_QUERIES + 1):
        pending.trigger(AccessKey("r"), 1.0, query=number)
    waiting = pending.resolve(AccessKey("r"))
    assert waiting is not None
    assert waiting.queries == list(range(1, BUFFERED_QUERIES + 1))
    for number in range(MAX_PENDING + 5):
        pending.trigger(AccessKey("pool", number.to_bytes(4, "big")), 1.0)
    assert AccessKey("pool", (4).to_bytes(4, "big")) not in pending
    assert AccessKey("pool", (5).to_bytes(4, "big")) in pending


A = "candidate:1 1 udp 100 10.0.0.1 5 typ host"
B = "candidate:2 1 udp 300 10.0.0.2 5 typ host"
C = "candidate:3 1 udp 200 10.0.0.3 5 typ host"


def test_candidates_come_out_once_by_priority_and_cancelled_ones_never() -> None:
    outbox = CandidateOutbox()
    for line in (A, B, C, B):
        outbox.add("p", line)
    outbox.remove("p", C)
    outbox.remove("q", A)
    released = {b.peer_id: (b.added, b.removed) for b in outbox.release()}
    assert released == {"p": ((B, A), ()), "q": ((), (A,))}
    assert list(outbox.release()) == []


def test_a_forgotten_peer_hears_nothing() -> None:
    outbox = CandidateOutbox()
    outbox.add("p", A)
    outbox.forget("p")
    assert list(outbox.release()) == []


IPS = (ip_address("100.64.0.9").packed, ip_address("fd00:2021:1111::9").packed)
NET = ip_network("10.0.0.0/24")


def test_a_gateway_may_send_from_what_it_was_authorized_for_only() -> None:
    gateways = Gateways()
    gateways.authorize("g", IPS, "r", [NET])
    assert gateways.serving("r") == "g"
    assert gateways.may_send("g", ip_address("10.0.0.7").packed)
    assert gateways.may_send("g", IPS[1])
    assert not gateways.may_send("g", ip_address("10.0.1.7").packed)
    assert not gateways.may_send("other", ip_address("10.0.0.7").packed)
    assert gateways.revoke("r") == "g"
    assert not gateways.may_send("g", ip_address("10.0.0.7").packed)


def test_a_gateway_with_another_resource_stays() -> None:
    gateways = Gateways()
    gateways.authorize("g", IPS, "r1", [NET])
    gateways.authorize("g", IPS, "r2", [NET])
    assert gateways.revoke("r1") is None
    assert gateways.may_send("g", ip_address("10.0.0.7").packed)
    assert gateways.revoke("r1") is None
    assert gateways.revoke("r2") == "g"


def test_preferred_gateways_remember_the_gone() -> None:
    gateways = Gateways()
    other = (ip_address("100.64.0.8").packed, ip_address("fd00:2021:1111::8").packed)
    gateways.authorize("c", IPS, "r1", [NET])
    gateways.authorize("b", other, "r2", [NET])
    gateways.authorize("a", (b"\x64\x40\x00\x07", b"\x00" * 16), "r3", [NET])
    gateways.forget("a")
    assert gateways.preferred("r1") == ("c", "b", "a")
    assert gateways.preferred("r3") == ("a", "b", "c")
    assert gateways.preferred("unknown") == ("b", "c", "a")


def test_the_same_gateway_with_other_addresses_starts_anew() -> None:
    gateways = Gateways()
    gateways.authorize("g", IPS, "r1", [NET])
    moved = (ip_address("100.64.0.77").packed, IPS[1])
    gateways.authorize("g", moved, "r2", [NET])
    assert gateways.by_tunnel_ip(IPS[0]) is None
    assert gateways.by_tunnel_ip(moved[0]) == "g"
    assert gateways.serving("r1") is None


def read(packet: Packet) -> object:
    assert packet.is_fz_control
    return control.parse_untrusted(packet.control_event_type, packet.control_body)


def test_control_events_survive_the_wire() -> None:
    ips = tuple(ip_address(i) for i in ("100.96.0.1", "fd00:2021:1111:8000::1"))
    events = (
        control.AssignedIps("00000000-0000-0000-0000-000000000065", "a." * 120 + "example", ips),
        control.DomainStatus("00000000-0000-0000-0000-000000000065", "example.com", active=True),
        control.DomainStatus("00000000-0000-0000-0000-000000000065", "example.com", active=False),
        control.Goodbye(),
    )
    assert tuple(read(event.build()) for event in events) == events


def test_the_published_bytes_of_status_and_goodbye() -> None:
    status = control.DomainStatus("00000000-0000-0000-0000-000000000065", "example.com", active=True).build()
    body = b'{"resource":"00000000-0000-0000-0000-000000000065","domain":"example.com","status":"Active"}'
    assert status.data == bytes.fromhex("600000000064ff00" + "00" * 32 + "0100000000000000") + body
    assert control.Goodbye().build().data == bytes.fromhex("600000000008ff00" + "00" * 32 + "0200000000000000")


def test_garbage_is_no_event_and_an_unknown_status_is_inactive() -> None:
    for body in (b"", b"[]", b"{}", b"\xff", b'{"resource":1,"domain":"x","status":"Active"}', b"[" * 1200):
        assert control.parse_untrusted(control.DOMAIN_STATUS, body) is None
        assert control.parse_untrusted(control.ASSIGNED_IPS, body) is None
    assert control.parse_untrusted(9, b"") is None
    odd = control.parse_untrusted(control.DOMAIN_STATUS, b'{"resource":"r","domain":"x","status":"Later","more":1}')
    assert odd == control.DomainStatus("r", "x", active=False)


@pytest.mark.shows("tunnel", 8)
def test_a_status_never_heard_of_is_inactive() -> None:
    for text, active in (("Active", True), ("Inactive", False), ("active", False), ("Pending", False), ("", False)):
        body = json.dumps({"resource": "r", "domain": "a.example", "status": text, "new": 1}).encode()
        assert control.parse_untrusted(1, body) == control.DomainStatus("r", "a.example", active)
