"""Rewriting in place keeps checksums right (spec/tunnel.md section 2.3, 2.4)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packet_strategies import packets, ports, wrong_checksums

from fz_core.packet import Packet, build_echo, build_icmp, build_tcp, build_udp, verify_checksums

A4, B4 = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
A6, B6 = bytes(15) + b"\1", bytes(15) + b"\2"

changes = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["set_src_port", "set_dst_port"]), ports),
        st.tuples(st.sampled_from(["set_src", "set_dst"]), st.binary(min_size=16, max_size=16)),
        st.tuples(st.sampled_from(["set_ecn", "merge_ecn"]), st.integers(0, 3)),
    ),
    max_size=8,
)


@pytest.mark.shows("tunnel", 1)
@given(packets(), changes)
def test_any_sequence_of_rewrites_keeps_checksums_and_reads_back(
    packet: Packet, steps: list[tuple[str, int | bytes]]
) -> None:
    assert wrong_checksums(packet) == []
    had_port = packet.src_port >= 0
    for name, value in steps:
        if isinstance(value, bytes):
            value = value[: len(packet.src)]
        getattr(packet, name)(value)
        assert wrong_checksums(packet) == []
        assert verify_checksums(packet) == ()
        if name == "set_ecn" or name in ("set_src", "set_dst") or (had_port and name != "merge_ecn"):
            assert getattr(packet, name[4:]) == value
    again = Packet.parse_untrusted(packet.data)
    assert isinstance(again, Packet)
    for field in ("src", "dst", "src_port", "dst_port", "ecn"):
        assert getattr(again, field) == getattr(packet, field)


@given(packets(), st.data())
def test_verify_agrees_with_the_independent_sum(packet: Packet, data: st.DataObject) -> None:
    raw = bytearray(packet.data)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = Packet.parse_untrusted(raw)
    if isinstance(damaged, Packet):
        assert bool(verify_checksums(damaged)) == bool(wrong_checksums(damaged))


@pytest.mark.shows("tunnel", 1)
@pytest.mark.parametrize(("src", "dst"), [(A4, B4), (A6, B6)])
def test_a_udp_checksum_of_zero_stays_zero(src: bytes, dst: bytes) -> None:
    raw = bytearray(build_udp(src, dst, 1, 2, b"abc").data)
    at = 26 if len(src) == 4 else 46
    raw[at : at + 2] = b"\0\0"
    packet = Packet.parse_untrusted(raw)
    assert isinstance(packet, Packet)
    packet.set_src(dst)
    packet.set_dst_port(77)
    assert packet.data[at : at + 2] == b"\0\0"
    assert verify_checksums(packet) == (() if len(src) == 4 else ("udp",))


def test_a_computed_udp_checksum_of_zero_is_sent_as_all_ones() -> None:
    for last in range(0x10000):
        packet = build_udp(A4, B4, 1, 2, last.to_bytes(2, "big"))
        assert packet.data[26:28] != b"\0\0"
        if packet.data[26:28] == b"\xff\xff":
            assert verify_checksums(packet) == ()
            return
    raise AssertionError("some payload word must make the checksum all ones")


def test_icmpv4_has_no_pseudo_header() -> None:
    packet = build_echo(A4, B4, 1, 2, b"abc")
    before = packet.data[20:]
    packet.set_dst(bytes([1, 2, 3, 4]))
    assert packet.data[20:] == before


def test_only_echo_has_an_identifier_to_set() -> None:
    packet = build_icmp(A4, B4, 3, 1, bytes(32))
    before = packet.data
    packet.set_src_port(5)
    assert packet.data == before
    echo = build_echo(A6, B6, 1)
    echo.set_dst_port(5)
    assert (echo.src_port, echo.dst_port) == (5, 5)


def test_the_other_family_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="16 bytes in an IPv4 packet"):
        build_udp(A4, B4, 1, 2).set_src(A6)
    with pytest.raises(ValueError, match="4 bytes in an IPv6 packet"):
        build_udp(A6, B6, 1, 2).set_dst(A4)
    with pytest.raises(ValueError, match="65536"):
        build_udp(A6, B6, 1, 2).set_dst_port(65536)


@pytest.mark.shows("io", 21)
@pytest.mark.shows("tunnel", 3)
@pytest.mark.parametrize(("src", "dst"), [(A4, B4), (A6, B6)])
@pytest.mark.parametrize("inner", range(4))
@pytest.mark.parametrize("outer", range(4))
def test_all_sixteen_ecn_combinations(src: bytes, dst: bytes, inner: int, outer: int) -> None:
    packet = build_tcp(src, dst, 1, 2)
    packet.set_ecn(inner)
    assert packet.ecn == inner
    packet.merge_ecn(outer)
    assert packet.ecn == (3 if outer == 3 and inner in (1, 2) else inner)
    assert wrong_checksums(packet) == []


def test_ecn_leaves_dscp_and_flow_label_alone() -> None:
    raw = bytearray(build_udp(A6, B6, 1, 2).data)
    raw[0:4] = bytes.fromhex("6bcdef12")
    packet = Packet.parse_untrusted(raw)
    assert isinstance(packet, Packet)
    packet.set_ecn(1)
    assert packet.data[:4] == bytes.fromhex("6bddef12")
