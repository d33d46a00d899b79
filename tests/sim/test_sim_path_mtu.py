"""A whole tunnel whose path turns out narrow, with translation in between: what passes, and who is told what."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from fz_core.packet import DropReason, IcmpErrorKind, Packet, build_tcp, build_udp, verify_checksums
from fz_core.tunnel.events import PathMtuChanged
from tests.sim.names import TCP, Names, named
from tests.sim.system import Peer, Scenario

ACK, SYN = 16, 2
NAME = "wiki.corp.example"


def reached(zone: str, rdtype: str, *, blocked: bool = False) -> tuple[Names, Packet]:
    """A system in which a UDP packet was answered, and that answer's request as the server saw it."""
    names = Names(named(1, "*.corp.example"), zone={NAME: (zone,)}, scenario=Scenario(blocked=blocked))
    assert len(names.talk(names.addresses(NAME, rdtype)[0])) == 1
    return names, names.seen[-1]


def narrow(peer: Peer, mtu: int) -> int:
    """What the kernel of one end says about all its paths; the limit that follows."""
    for hop in peer.state.path_mtus.take_questions(1e9):
        peer.state.handle_path_mtu(hop.remote, mtu, peer.world.now)
    peer.drain()
    changed = [e for e in peer.events if isinstance(e, PathMtuChanged)]
    return changed[-1].inner_mtu if changed else 1280


@pytest.mark.parametrize(("zone", "rdtype", "growth"), [("10.0.0.80", "A", 0), ("10.0.0.80", "AAAA", 20)])
def test_a_server_is_told_in_its_own_terms(zone: str, rdtype: str, growth: int) -> None:
    names, request = reached(zone, rdtype)
    gateway = names.gateways[0]
    assert narrow(gateway, 1124) == 1064
    large = build_udp(request.dst, request.src, request.dst_port, request.src_port, bytes(1100))
    before = len(names.client.packets)
    gateway.packets.clear()
    gateway.send(large)
    names.world.run_for(1.0)
    assert len(names.client.packets) == before
    complaint = gateway.packets[-1]
    assert (complaint.src, complaint.dst) == (request.src, request.dst)
    assert verify_checksums(complaint) == ()
    error = complaint.icmp_error()
    assert error is not None
    assert not isinstance(error, DropReason)
    assert error.kind is IcmpErrorKind.PACKET_TOO_BIG
    assert error.mtu == 1064 - growth
    assert (error.src, error.dst, error.src_port, error.dst_port) == (
        request.dst, request.src, request.dst_port, request.src_port,
    )  # fmt: skip
    names.client.packets.clear()
    fitting = build_udp(request.dst, request.src, request.dst_port, request.src_port, bytes(1064 - growth - 28))
    gateway.send(fitting)
    names.world.run_for(1.0)
    assert [len(p) for p in names.client.packets] == [1064]


@pytest.mark.parametrize("blocked", [False, True], ids=["direct", "relayed"])
@pytest.mark.parametrize("end", ["client", "gateway"])
def test_one_end_that_knows_makes_both_directions_fit(end: str, blocked: bool) -> None:
    """SYNs are clamped whichever way they pass the end that knows; the other needs to know nothing."""
    names, _ = reached("10.0.0.80", "A", blocked=blocked)
    knowing = names.client if end == "client" else names.gateways[0]
    limit = narrow(knowing, 1124)
    assert limit in ((1060, 1064) if blocked else (1064,))
    proxy = ip_address(names.addresses(NAME)[0]).packed
    names.client.send(build_tcp(names.own(), proxy, 9000, 80, SYN, options=b"\2\4\x05\xb4"))
    names.world.run_for(1.0)
    syn = names.seen[-1]
    assert syn.protocol == TCP
    assert mss_of(syn) == limit - 40
    answer = build_tcp(syn.dst, syn.src, 80, syn.src_port, SYN | ACK, ack=1, options=b"\2\4\x05\xb4")
    names.gateways[0].send(answer)
    names.world.run_for(1.0)
    assert mss_of(names.client.packets[-1]) == limit - 40


@pytest.mark.parametrize("rdtype", ["A", "AAAA"])
def test_large_segments_of_an_open_connection_arrive_in_pieces(rdtype: str) -> None:
    names, _ = reached("10.0.0.80", rdtype)
    assert narrow(names.client, 1124) == 1064
    proxy = ip_address(names.addresses(NAME, rdtype)[0]).packed
    own = names.own(4 if rdtype == "A" else 6)
    payload = bytes(i & 0xFF for i in range(1200))
    names.client.send(build_tcp(own, proxy, 9000, 80, SYN))
    names.world.run_for(1.0)
    names.seen.clear()
    names.client.send(build_tcp(own, proxy, 9000, 80, ACK, seq=1, payload=payload))
    names.world.run_for(1.0)
    assert len(names.seen) == 2
    assert b"".join(p.payload for p in names.seen) == payload
    assert all(verify_checksums(p) == () for p in names.seen)


def mss_of(packet: Packet) -> int:
    at = packet.l4_offset + 20
    assert packet.data[at : at + 2] == b"\2\4"
    return int.from_bytes(packet.data[at + 2 : at + 4], "big")
