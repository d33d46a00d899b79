"""ICMP errors: built, read back, translated (spec/tunnel.md section 2.6)."""

from __future__ import annotations

from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packet_strategies import packets, words_sum, wrong_checksums

from fz_core.packet import (
    DropReason,
    IcmpError,
    IcmpErrorKind,
    Packet,
    build_echo,
    build_icmp,
    build_icmp_prohibited,
    build_icmp_unreachable,
    build_ip,
    build_tcp,
    build_udp,
)

A4, B4, C4 = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]), bytes([100, 96, 0, 1])
A6, B6, C6 = bytes(15) + b"\1", bytes(15) + b"\2", bytes(15) + b"\3"


def error_in(packet: Packet) -> IcmpError:
    error = packet.icmp_error()
    assert isinstance(error, IcmpError)
    return error


@pytest.mark.shows("tunnel", 4)
@given(packets())
def test_errors_about_any_packet_swap_addresses_and_read_back(packet: Packet) -> None:
    for build, kind in (
        (build_icmp_prohibited, IcmpErrorKind.PROHIBITED),
        (build_icmp_unreachable, IcmpErrorKind.UNREACHABLE),
    ):
        answer = build(packet)
        assert (answer.src, answer.dst) == (packet.dst, packet.src)
        assert wrong_checksums(answer) == []
        assert answer.data[8 if answer.version == 4 else 7] == 20
        if packet.protocol in (6, 17):
            error = error_in(answer)
            assert error.kind is kind
            assert (error.src, error.dst) == (packet.src, packet.dst)
            assert (error.src_port, error.dst_port) == (packet.src_port, packet.dst_port)


def test_types_and_codes_on_the_wire() -> None:
    v4, v6 = build_udp(A4, B4, 1, 2, bytes(30)), build_udp(A6, B6, 1, 2)
    codes = [(p.icmp_type, p.icmp_code) for p in map(build_icmp_prohibited, (v4, v6))]
    codes += [(p.icmp_type, p.icmp_code) for p in map(build_icmp_unreachable, (v4, v6))]
    assert codes == [(3, 13), (1, 1), (3, 0), (1, 3)]
    assert build_icmp_prohibited(v4).data[28:] == v4.data[:28]
    assert build_icmp_prohibited(v6).data[48:] == v6.data


@pytest.mark.shows("tunnel", 4)
def test_a_maximal_v6_packet_is_quoted_up_to_the_mtu() -> None:
    packet = build_udp(A6, B6, 1, 2, bytes(1280 - 48))
    answer = build_icmp_unreachable(packet)
    assert len(answer) == 1280
    assert answer.data[48:] == packet.data[:1232]


def error_packet(version: int, icmp_type: int, code: int, quote: bytes, rest: bytes = bytes(4)) -> Packet:
    src, dst = (C4, A4) if version == 4 else (C6, A6)
    return build_icmp(src, dst, icmp_type, code, rest + quote)


@pytest.mark.shows("tunnel", 5)
@pytest.mark.parametrize(
    ("version", "icmp_type", "code", "kind", "mtu"),
    [
        (4, 3, 0, IcmpErrorKind.UNREACHABLE, None),
        (4, 3, 1, IcmpErrorKind.OTHER_UNREACHABLE, None),
        (4, 3, 3, IcmpErrorKind.OTHER_UNREACHABLE, None),
        (4, 3, 13, IcmpErrorKind.PROHIBITED, None),
        (4, 3, 200, IcmpErrorKind.OTHER_UNREACHABLE, None),
        (4, 3, 4, IcmpErrorKind.PACKET_TOO_BIG, 0x0304),
        (4, 11, 0, IcmpErrorKind.TIME_EXCEEDED, None),
        (6, 1, 3, IcmpErrorKind.UNREACHABLE, None),
        (6, 1, 1, IcmpErrorKind.PROHIBITED, None),
        (6, 1, 4, IcmpErrorKind.OTHER_UNREACHABLE, None),
        (6, 2, 0, IcmpErrorKind.PACKET_TOO_BIG, 0x01020304),
        (6, 3, 1, IcmpErrorKind.TIME_EXCEEDED, None),
    ],
)
def test_kinds_and_mtu(version: int, icmp_type: int, code: int, kind: IcmpErrorKind, mtu: int | None) -> None:
    src, dst = (A4, B4) if version == 4 else (A6, B6)
    quoted = build_tcp(src, dst, 5, 6, 2)
    packet = error_packet(version, icmp_type, code, quoted.data, rest=bytes([1, 2, 3, 4]))
    error = error_in(packet)
    assert (error.kind, error.mtu) == (kind, mtu)
    assert (error.src, error.dst, error.protocol) == (src, dst, 6)
    assert (error.src_port, error.dst_port) == (5, 6)
    same = error.translated(C4 if version == 4 else C6, src, quoted_dst=dst, quoted_src_port=5)
    same_icmp = same.data[same.l4_offset :]
    assert same_icmp == packet.data[packet.l4_offset :]


@pytest.mark.shows("tunnel", 5)
@given(st.sampled_from([(4, 3), (4, 11), (6, 1), (6, 3)]), st.integers(0, 255), st.binary(min_size=4, max_size=4))
def test_every_code_survives_translation(family_and_type: tuple[int, int], code: int, rest: bytes) -> None:
    version, icmp_type = family_and_type
    src, dst = (A4, B4) if version == 4 else (A6, B6)
    packet = error_packet(version, icmp_type, code, build_tcp(src, dst, 5, 6, 2).data, rest)
    error = error_in(packet)
    assert (error.icmp_type, error.icmp_code, error.rest) == (icmp_type, code, rest)
    again = error.translated(packet.src, packet.dst, quoted_dst=dst, quoted_src_port=5)
    assert again.data[again.l4_offset :] == packet.data[packet.l4_offset :]


@pytest.mark.shows("tunnel", 5)
@given(st.sampled_from([4, 6]), st.integers(0, 255), st.integers(0, 255), st.binary(min_size=4, max_size=64))
def test_every_type_and_code_reads_as_it_was_built(version: int, icmp_type: int, code: int, rest: bytes) -> None:
    src, dst = (A4, B4) if version == 4 else (A6, B6)
    packet = Packet.parse_untrusted(build_icmp(src, dst, icmp_type, code, rest).data)
    assert isinstance(packet, Packet)
    assert (packet.icmp_type, packet.icmp_code) == (icmp_type, code)
    assert packet.data[packet.l4_offset + 4 :] == rest
    assert wrong_checksums(packet) == []


def test_what_is_no_error_and_what_is_unreadable() -> None:
    assert build_udp(A4, B4, 1, 2).icmp_error() is None
    assert build_echo(A4, B4, 1).icmp_error() is None
    assert build_echo(A6, B6, 1, reply=True).icmp_error() is None
    quote = build_udp(A4, B4, 1, 2).data
    for icmp_type in (4, 5, 12, 13):
        assert error_packet(4, icmp_type, 0, quote).icmp_error() is DropReason.MALFORMED_PACKET
    for icmp_type, code in ((2, 1), (4, 0), (133, 0)):
        assert error_packet(6, icmp_type, code, quote).icmp_error() is DropReason.MALFORMED_PACKET


@pytest.mark.parametrize(("version", "whole"), [(4, 24), (6, 44)])
def test_quote_must_reach_the_ports(version: int, whole: int) -> None:
    src, dst = (A4, B4) if version == 4 else (A6, B6)
    quote = build_tcp(src, dst, 5, 6, 2).data
    kind = 3 if version == 4 else 1
    assert error_in(error_packet(version, kind, 0, quote[:whole])).src_port == 5
    for cut in (0, 1, whole - 20, whole - 4, whole - 1):
        assert error_packet(version, kind, 0, quote[:cut]).icmp_error() is DropReason.MALFORMED_PACKET


@pytest.mark.parametrize(("version", "whole"), [(4, 28), (6, 48)])
def test_quoted_icmp_must_be_a_whole_echo_request(version: int, whole: int) -> None:
    src, dst = (A4, B4) if version == 4 else (A6, B6)
    kind = 3 if version == 4 else 1
    request, reply = build_echo(src, dst, 9).data, build_echo(src, dst, 9, reply=True).data
    error = error_in(error_packet(version, kind, 0, request))
    assert (error.src_port, error.dst_port) == (9, 9)
    assert error_packet(version, kind, 0, request[: whole - 1]).icmp_error() is DropReason.MALFORMED_PACKET
    assert error_packet(version, kind, 0, reply).icmp_error() is DropReason.MALFORMED_PACKET
    other = build_ip(src, dst, 47, bytes(8)).data
    assert error_packet(version, kind, 0, other).icmp_error() is DropReason.MALFORMED_PACKET


def test_a_quoted_later_fragment_or_wrong_family_has_no_ports() -> None:
    quote = bytearray(build_udp(A4, B4, 1, 2).data)
    assert error_packet(6, 1, 0, bytes(quote)).icmp_error() is DropReason.MALFORMED_PACKET
    quote[6:8] = pack("!H", 5)
    assert error_packet(4, 3, 0, bytes(quote)).icmp_error() is DropReason.MALFORMED_PACKET
    v6 = build_udp(A6, B6, 1, 2).data
    assert error_packet(4, 3, 0, v6).icmp_error() is DropReason.MALFORMED_PACKET


@given(packets(), st.integers(0, 65535), st.booleans())
def test_a_translated_error_quotes_the_packet_as_the_other_side_sent_it(
    packet: Packet, inside_port: int, cut: bool
) -> None:
    if packet.protocol not in (6, 17) and packet.icmp_type not in (8, 128):
        return
    if packet.icmp_type >= 0 and not packet.is_echo:
        return
    version = packet.version
    proxy, client = (C4, A4) if version == 4 else (C6, A6)
    quote = packet.data[: packet.l4_offset + 8] if cut else packet.data
    icmp_type = 3 if version == 4 else 1
    error = error_in(error_packet(version, icmp_type, 3, quote))
    translated = error.translated(proxy, client, quoted_dst=proxy, quoted_src_port=inside_port)
    assert (translated.src, translated.dst) == (proxy, client)
    assert wrong_checksums(translated) == []
    again = error_in(translated)
    assert (again.kind, again.icmp_code, again.src) == (error.kind, 3, packet.src)
    assert (again.dst, again.src_port) == (proxy, inside_port)
    if version == 4:
        assert words_sum(again.quote[: again.l4_offset]) == 0xFFFF
    if not cut:
        inner = Packet.parse_untrusted(again.quote)
        assert isinstance(inner, Packet)
        assert wrong_checksums(inner) == []


def test_translating_to_the_other_family_is_the_callers_mistake() -> None:
    error = error_in(build_icmp_unreachable(build_udp(A4, B4, 1, 2)))
    with pytest.raises(ValueError, match="16 bytes"):
        error.translated(C4, A4, quoted_dst=C6, quoted_src_port=1)
