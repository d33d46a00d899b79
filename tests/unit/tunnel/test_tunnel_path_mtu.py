"""Limits of narrow paths: learnt, asked for, raised and forgotten; what senders are told."""

from __future__ import annotations

import pytest

from fz_core.packet import Address, IcmpErrorKind, Packet, build_echo, build_icmp_too_big, build_tcp, build_udp
from fz_core.tunnel.path_mtu import Hop, PathMtus

V4, V6 = Address(bytes([203, 0, 113, 1]), 52625), Address(bytes(15) + b"\1", 52625)
LOCAL = Address(bytes([192, 0, 2, 1]), 52625)
A4, B4 = bytes([100, 64, 0, 1]), bytes([10, 20, 0, 80])
A6, B6 = bytes(15) + b"\3", bytes(15) + b"\4"
SYN, ACK = 2, 16


def reached(hop: Hop, mtu: int, now: float = 0.0) -> PathMtus:
    mtus = PathMtus()
    mtus.use_path("peer", hop, now)
    mtus.set_mtu(hop.remote, mtu, now)
    return mtus


@pytest.mark.parametrize(
    ("remote", "extra", "mtu", "limit"),
    [
        (V4, 0, 1340, None),
        (V4, 0, 1339, 1279),
        (V4, 4, 1344, None),
        (V4, 4, 1343, 1279),
        (V4, 0, 1124, 1064),
        (V4, 4, 1124, 1060),
        (V6, 0, 1360, None),
        (V6, 0, 1359, 1279),
        (V6, 4, 1280, 1196),
        (V4, 0, 552, 492),
        (V4, 0, 100, 196),
        (V6, 0, 100, 1200),
    ],
)
def test_the_limit_leaves_room_for_the_headers(remote: Address, extra: int, mtu: int, limit: int | None) -> None:
    assert reached(Hop(remote, None, extra), mtu).limits.get("peer") == limit


def test_a_new_path_is_asked_about_for_two_seconds() -> None:
    mtus, hop = PathMtus(), Hop(V4, LOCAL, 0)
    assert mtus.take_questions(5.0) == []
    mtus.use_path("peer", hop, 5.0)
    assert mtus.asks_at == 5.0
    assert mtus.take_questions(5.0) == [hop]
    assert mtus.take_questions(5.001) == []
    assert mtus.take_questions(5.005) == [hop]
    assert mtus.take_questions(6.9) == [hop]
    assert mtus.take_questions(7.5) == [hop]  # a last time
    assert mtus.take_questions(1000.0) == []


def test_a_narrow_path_is_asked_about_now_and_then_and_may_grow() -> None:
    hop = Hop(V4, None, 0)
    mtus = reached(hop, 1124)
    while mtus.asks_at < 10.0:
        mtus.take_questions(mtus.asks_at)
    again_at = mtus.asks_at
    assert again_at < 40.0
    assert mtus.take_questions(again_at) == [hop]
    assert mtus.set_mtu(V4, 1124, again_at) == []
    assert mtus.set_mtu(V4, 1500, again_at) == ["peer"]
    assert mtus.limits == {}
    assert mtus.take_changes() == [("peer", 1064), ("peer", 1280)]
    assert mtus.take_questions(again_at + 1) == [hop]  # is it true?


def test_many_paths_at_once_are_asked_about_in_turns() -> None:
    mtus = PathMtus()
    peers = [f"peer{n}" for n in range(40)]
    for n, peer in enumerate(peers):
        mtus.use_path(peer, Hop(Address(bytes([10, 0, 0, n]), 1), None, 0), 0.0)
    rounds = [mtus.take_questions(at) for at in (0.0, 0.005, 0.010)]
    assert [len(asked) for asked in rounds] == [16, 16, 16]
    assert len({hop for asked in rounds for hop in asked}) == 40


def test_a_refused_datagram_raises_the_question_for_paths_there_only() -> None:
    hop = Hop(V4, None, 0)
    mtus = reached(hop, 1500)
    mtus.take_questions(10.0)
    assert mtus.take_questions(20.0) == []
    mtus.doubt(V6, 20.0)
    assert mtus.take_questions(20.0) == []
    mtus.doubt(V4, 20.0)
    assert mtus.take_questions(20.0) == [hop]


def test_limits_end_with_the_path_the_peer_or_the_network() -> None:
    narrow, wide = Hop(V4, None, 0), Hop(V6, None, 0)
    mtus = reached(narrow, 1124)
    mtus.use_path("peer", wide, 1.0)
    assert mtus.limits == {}
    mtus.use_path("peer", narrow, 2.0)
    assert mtus.limits == {}  # a path left is a path forgotten
    mtus.set_mtu(V4, 1124, 2.0)
    mtus.forget("peer")
    assert mtus.limits == {}
    mtus.use_path("peer", narrow, 3.0)
    assert mtus.limits == {}  # nor is what was known of a peer that left
    mtus = reached(narrow, 1124)
    mtus.clear()
    assert mtus.limits == {}
    assert mtus.take_questions(100.0) == []


def test_all_peers_behind_one_address_share_its_mtu() -> None:
    mtus = PathMtus()
    mtus.use_path("peer", Hop(V4, None, 4), 0.0)
    mtus.use_path("other", Hop(V4, None, 0), 0.0)
    mtus.set_mtu(V4, 1124, 0.0)
    assert mtus.limits == {"peer": 1060, "other": 1064}
    mtus.forget("peer")
    assert mtus.limits == {"other": 1064}
    mtus.use_path("peer", Hop(V4, None, 0), 1.0)
    assert mtus.limits == {"peer": 1064, "other": 1064}  # the other one kept it known


def test_another_way_to_the_same_address_changes_the_limit_alone() -> None:
    mtus = reached(Hop(V4, None, 0), 1124)
    before = mtus.limits
    mtus.use_path("peer", Hop(V4, LOCAL, 0), 1.0)
    assert mtus.limits is before  # others compare by identity
    mtus.use_path("peer", Hop(V4, None, 4), 2.0)
    assert mtus.limits == {"peer": 1060}
    assert mtus.limits is not before
    assert mtus.take_changes() == [("peer", 1064), ("peer", 1060)]


def mss_of(packet: Packet) -> int:
    at = packet.l4_offset + 20
    assert packet.data[at : at + 2] == b"\2\4"
    return int.from_bytes(packet.data[at + 2 : at + 4], "big")


@pytest.mark.parametrize(("src", "dst", "mss"), [(A4, B4, 1024), (A6, B6, 1004)], ids=["v4", "v6"])
def test_syns_are_clamped_both_ways(src: bytes, dst: bytes, mss: int) -> None:
    mtus = reached(Hop(V4, None, 0), 1124)
    leaving = build_tcp(src, dst, 1, 2, SYN, options=b"\2\4\x05\xb4")
    assert mtus.fit("peer", leaving) is None
    assert mss_of(leaving) == mss
    coming = build_tcp(src, dst, 1, 2, SYN | ACK, options=b"\2\4\x05\xb4")
    mtus.clamp("peer", coming)
    assert mss_of(coming) == mss
    strange = build_tcp(src, dst, 1, 2, SYN, options=b"\2\4\x05\xb4")
    mtus.clamp("other", strange)
    assert mss_of(strange) == 1460


def test_large_segments_are_cut_and_other_large_packets_dropped() -> None:
    mtus = reached(Hop(V4, None, 0), 1124)
    assert mtus.fit("peer", build_udp(A4, B4, 1, 2, bytes(1064 - 28))) is None
    assert mtus.fit("peer", build_udp(A4, B4, 1, 2, bytes(1065 - 28))) == ()
    assert mtus.fit("other", build_udp(A4, B4, 1, 2, bytes(1280 - 28))) is None
    pieces = mtus.fit("peer", build_tcp(A4, B4, 1, 2, ACK, payload=bytes(1240)))
    assert pieces is not None
    assert [len(p) for p in pieces] == [1064, 40 + 1240 - 1024]


@pytest.mark.parametrize(("src", "dst"), [(A4, B4), (A6, B6)], ids=["v4", "v6"])
def test_the_sender_is_told_what_fits(src: bytes, dst: bytes) -> None:
    mtus = reached(Hop(V4, None, 0), 1124)
    packet = build_udp(src, dst, 7, 8, bytes(1280 - 48))
    complaint = mtus.complaint("peer", packet, 20, 0.0)
    assert complaint is not None
    error = complaint.icmp_error()
    assert error is not None
    assert not isinstance(error, str)
    assert error.kind is IcmpErrorKind.PACKET_TOO_BIG
    assert error.mtu == 1044  # translation made it 20 larger
    assert (error.src_port, error.dst_port) == (7, 8)
    assert (complaint.src, complaint.dst) == (dst, src)


def test_nobody_is_told_about_errors_multicast_and_ipv6_segments_that_passed() -> None:
    mtus = reached(Hop(V4, None, 0), 1124)
    large = build_udp(A6, B6, 1, 2, bytes(1200))
    silent = [
        build_icmp_too_big(large, 1280),
        build_udp(A4, bytes([224, 0, 0, 251]), 1, 2, bytes(1200)),
        build_udp(bytes(4), B4, 1, 2, bytes(1200)),
        build_tcp(A6, B6, 1, 2, ACK, payload=bytes(1200)),
    ]
    for packet in silent:
        assert mtus.complaint("peer", packet, 0, 0.0) is None
    assert mtus.complaint("other", large, 0, 0.0) is None
    assert mtus.complaint("peer", build_tcp(A4, B4, 1, 2, ACK, payload=bytes(1200)), 0, 0.0) is not None


def test_complaints_are_few() -> None:
    mtus = reached(Hop(V4, None, 0), 1124)
    large = build_echo(A4, B4, 1, 1, bytes(1200))
    told = [mtus.complaint("peer", large, 0, 0.5 + n / 1000) is not None for n in range(300)]
    assert sum(told) == 100
    assert mtus.complaint("peer", large, 0, 1.6) is not None


def test_a_long_error_about_a_packet_gets_through_shortened() -> None:
    mtus = reached(Hop(V4, None, 0), 1124)
    error = build_icmp_too_big(build_udp(A6, B6, 1, 2, bytes(1232)), 1280)
    assert len(error) == 1280
    fitting = mtus.fit("peer", error)
    assert fitting is not None
    assert [len(p) for p in fitting] == [1064]
