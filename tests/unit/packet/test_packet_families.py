"""Packets and ICMP errors in the other family (RFC 7915)."""

from __future__ import annotations

from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packet_strategies import packets, ports, widen, words_sum, wrong_checksums

from fz_core.packet import (
    DropReason,
    IcmpError,
    IcmpErrorKind,
    Packet,
    TooBig,
    build_echo,
    build_icmp,
    build_icmp_too_big,
    build_icmp_unreachable,
    build_ip,
    build_tcp,
    build_udp,
    to_family,
    translate_error,
)

A4, B4, C4 = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]), bytes([100, 96, 0, 1])
A6, B6, C6 = bytes(15) + b"\1", bytes(15) + b"\2", bytes(15) + b"\3"
UNSUPPORTED = DropReason.UNSUPPORTED_PROTOCOL


def parsed(data: bytes) -> Packet:
    packet = Packet.parse_untrusted(data)
    assert isinstance(packet, Packet)
    return packet


def moved(packet: Packet, identification: int = 0) -> Packet:
    """In the other family, from A to B."""
    src, dst = (A6, B6) if packet.version == 4 else (A4, B4)
    result = to_family(packet, src, dst, identification)
    assert isinstance(result, Packet)
    assert (result.src, result.dst) == (src, dst)
    return result


def with_bytes(packet: Packet, at: int, new: bytes) -> Packet:
    return parsed(packet.data[:at] + new + packet.data[at + len(new) :])


def has_ports(packet: Packet) -> bool:
    return packet.src_port >= 0


@given(packets().filter(has_ports), st.integers(0, 0xFFFF))
def test_ports_payload_and_marks_survive_with_valid_checksums(packet: Packet, identification: int) -> None:
    before = packet.data
    other = moved(packet, identification)
    assert packet.data == before
    assert wrong_checksums(other) == []
    assert other.version == 10 - packet.version
    assert (other.src_port, other.dst_port) == (packet.src_port, packet.dst_port)
    assert other.payload == packet.payload
    assert other.tcp_flags == packet.tcp_flags
    assert other.is_echo == packet.is_echo
    assert other.ecn == packet.ecn


@given(packets().filter(has_ports))
def test_there_and_back_is_the_same_transport(packet: Packet) -> None:
    src, dst = packet.src, packet.dst
    back = to_family(moved(packet), src, dst)
    assert isinstance(back, Packet)
    assert wrong_checksums(back) == []
    assert (back.src, back.dst, back.protocol) == (src, dst, packet.protocol)
    assert without_checksum(back) == without_checksum(packet)


def without_checksum(packet: Packet) -> bytes:
    """The transport, with 0xFFFF and 0x0000 in its checksum made equal."""
    at = {1: 2, 58: 2, 6: 16, 17: 6}[packet.protocol]
    l4 = packet.data[packet.l4_offset :]
    return l4[:at] + (b"\0\0" if l4[at : at + 2] == b"\xff\xff" else l4[at : at + 2]) + l4[at + 2 :]


@pytest.mark.parametrize(
    "packet",
    [
        build_tcp(A4, B4, 1, 2, 16, 3, 4, b"payload"),
        build_udp(A6, B6, 1, 2, b"payload"),
        build_echo(A4, B4, 1, 2, b"payload"),
        build_echo(A6, B6, 1, 2, b"payload"),
    ],
)
def test_damage_is_not_repaired(packet: Packet) -> None:
    last = packet.data[-1] ^ 0x40
    assert wrong_checksums(moved(with_bytes(packet, len(packet) - 1, bytes([last])))) == ["l4"]


def test_the_v6_header() -> None:
    packet = with_bytes(build_udp(B4, A4, 7, 9, b"abcd"), 1, b"\xb9")
    packet = with_bytes(packet, 8, b"\x21")
    assert moved(packet).data[:40] == bytes.fromhex("6b900000 000c 11 21") + A6 + B6


def test_the_v4_header() -> None:
    packet = with_bytes(build_udp(B6, A6, 7, 9, b"abcd"), 0, bytes.fromhex("6b9abcde"))
    packet = with_bytes(packet, 7, b"\x21")
    data = moved(packet, 0x1234).data
    # DSCP and ECN; identification as given; may be split on the way (section 5.1); hop limit kept.
    assert data[:10] == bytes.fromhex("45b9 0020 1234 0000 2111")
    assert words_sum(data[:20]) == 0xFFFF


@pytest.mark.parametrize(("v4_type", "v6_type"), [(8, 128), (0, 129)])
def test_echo_types(v4_type: int, v6_type: int) -> None:
    there = moved(build_echo(A4, B4, 5, 6, b"abc", reply=v4_type == 0))
    assert (there.protocol, there.icmp_type, there.icmp_code, there.src_port) == (58, v6_type, 0, 5)
    back = moved(there)
    assert (back.protocol, back.icmp_type, back.icmp_code, back.src_port) == (1, v4_type, 0, 5)


def test_a_udp_checksum_left_out_is_computed_for_v6() -> None:
    packet = with_bytes(build_udp(A4, B4, 1, 2, b"abc"), 26, b"\0\0")
    other = moved(packet)
    assert other.data[46:48] != b"\0\0"
    assert wrong_checksums(other) == []


def test_a_udp_checksum_of_zero_from_v6_stays_left_out() -> None:
    other = moved(with_bytes(build_udp(A6, B6, 1, 2, b"abc"), 46, b"\0\0"))
    assert other.data[26:28] == b"\0\0"


@pytest.mark.parametrize("packet", [build_icmp(A4, B4, 13, 0, bytes(16)), build_ip(A6, B6, 47, bytes(8))])
def test_other_protocols_stay_in_their_family(packet: Packet) -> None:
    src, dst = (A6, B6) if packet.version == 4 else (A4, B4)
    assert to_family(packet, src, dst) is UNSUPPORTED


def test_icmp_errors_need_their_quote_translated() -> None:
    error = build_icmp_unreachable(build_udp(A4, B4, 1, 2))
    assert to_family(error, A6, B6) is UNSUPPORTED


@pytest.mark.parametrize(("src", "dst"), [(A4, B4), (A4, B6), (A6, B4)])
def test_the_same_or_a_mixed_family_is_the_callers_mistake(src: bytes, dst: bytes) -> None:
    with pytest.raises(ValueError, match="bytes"):
        to_family(build_udp(A4, B4, 1, 2), src, dst)


def test_what_grows_beyond_the_tunnel_is_too_big() -> None:
    assert len(moved(build_udp(A4, B4, 1, 2, bytes(1260 - 28)))) == 1280
    assert to_family(build_udp(A4, B4, 1, 2, bytes(1261 - 28)), A6, B6) == TooBig(1260)
    assert to_family(build_udp(A4, B4, 1, 2, bytes(1280 - 28)), A6, B6) == TooBig(1260)
    assert len(moved(build_udp(A6, B6, 1, 2, bytes(1280 - 48)))) == 1260


def test_options_are_left_behind() -> None:
    plain = build_tcp(A4, B4, 1, 2, 16, payload=b"abc")
    assert moved(widen(plain, 3)) == moved(plain)
    assert moved(widen(build_udp(A6, B6, 1, 2, b"abc"), 2)) == moved(build_udp(A6, B6, 1, 2, b"abc"))


def with_options(options: bytes) -> Packet:
    data = bytearray(build_udp(A4, B4, 1, 2).data)
    data[20:20] = options
    data[0] = 0x45 + len(options) // 4
    data[2:4] = pack("!H", len(data))
    packet = parsed(bytes(data))
    packet.update_checksums()
    return packet


@pytest.mark.parametrize("kind", [131, 137])
def test_a_source_route_is_followed_nowhere(kind: int) -> None:
    unexpired, used_up = bytes([1, kind, 7, 4]) + B4, bytes([1, kind, 7, 8]) + B4
    assert to_family(with_options(unexpired), A6, B6) is UNSUPPORTED
    assert moved(with_options(used_up)) == moved(build_udp(A4, B4, 1, 2))


@given(st.integers(1, 10).flatmap(lambda n: st.binary(min_size=4 * n, max_size=4 * n)))
def test_any_options_are_survived(options: bytes) -> None:
    assert isinstance(to_family(with_options(options), A6, B6), Packet | DropReason)


def with_headers(*headers: tuple[int, bytes]) -> Packet:
    """`headers` are (protocol, bytes after the next-header byte), before a UDP header."""
    l4 = build_udp(A6, B6, 7, 9).data[40:]
    following = [number for number, _ in headers[1:]] + [17]
    body = b"".join(bytes([n]) + rest for n, (_, rest) in zip(following, headers, strict=True)) + l4
    return parsed(pack("!IHBB", 0x60000000, len(body), headers[0][0], 64) + A6 + B6 + body)


def test_extension_headers_of_a_whole_packet_are_skipped() -> None:
    packet = with_headers((0, bytes(7)), (60, b"\1" + bytes(14)), (43, bytes(7)), (60, bytes(7)))
    assert moved(packet) == moved(build_udp(A6, B6, 7, 9))


def test_an_atomic_fragment_keeps_its_identification() -> None:
    data = moved(with_headers((44, b"\0" + pack("!HI", 0, 0x1234ABCD))), 99).data
    assert data[4:8] == bytes.fromhex("abcd 0000")


@pytest.mark.parametrize("header", [(43, b"\0\0\1" + bytes(4)), (135, bytes(7)), (139, bytes(7)), (253, bytes(7))])
def test_headers_without_place_in_v4(header: tuple[int, bytes]) -> None:
    assert to_family(with_headers(header), A4, B4) is UNSUPPORTED


# -- ICMP errors: the resource's side quotes (A, B); the client's side is (C, D) of the other family

D4, D6 = bytes([100, 64, 0, 9]), bytes(15) + b"\4"


def error_about(packet: Packet, icmp_type: int, icmp_code: int, rest: bytes = bytes(4)) -> IcmpError:
    router, host = (B4, A4) if packet.version == 4 else (B6, A6)
    quote = packet.data[: 1232 if packet.version == 6 else 1252]
    error = build_icmp(router, host, icmp_type, icmp_code, rest + quote).icmp_error()
    assert isinstance(error, IcmpError)
    return error


def crossed(error: IcmpError, port: int = 77) -> Packet | DropReason:
    proxy, client = (C6, D6) if len(error.src) == 4 else (C4, D4)
    return translate_error(error, proxy, client, quoted_src=client, quoted_dst=proxy, quoted_src_port=port)


V4_TO_V6 = {
    (3, 0): (1, 0), (3, 1): (1, 0), (3, 2): (4, 1), (3, 3): (1, 4), (3, 4): (2, 0), (3, 5): (1, 0),
    (3, 6): (1, 0), (3, 7): (1, 0), (3, 8): (1, 0), (3, 9): (1, 1), (3, 10): (1, 1), (3, 11): (1, 0),
    (3, 12): (1, 0), (3, 13): (1, 1), (3, 14): None, (3, 15): (1, 1), (3, 16): None, (3, 255): None,
    (11, 0): (3, 0), (11, 1): (3, 1), (11, 2): None,
}  # fmt: skip
V6_TO_V4 = {
    (1, 0): (3, 1), (1, 1): (3, 10), (1, 2): (3, 1), (1, 3): (3, 1), (1, 4): (3, 3), (1, 5): None,
    (1, 255): None, (2, 0): (3, 4), (3, 0): (11, 0), (3, 1): (11, 1), (3, 2): None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("version", "old", "new"), [(4, *x) for x in V4_TO_V6.items()] + [(6, *x) for x in V6_TO_V4.items()]
)
def test_error_types(version: int, old: tuple[int, int], new: tuple[int, int] | None) -> None:
    src, dst = (A4, B4) if version == 4 else (A6, B6)
    result = crossed(error_about(build_udp(src, dst, 5, 6), *old))
    if new is None:
        assert result is UNSUPPORTED
        return
    assert isinstance(result, Packet)
    assert (result.icmp_type, result.icmp_code) == new
    assert result.data[8 if version == 6 else 7] == 20
    assert wrong_checksums(result) == []


def test_protocol_unreachable_points_at_the_next_header() -> None:
    result = crossed(error_about(build_tcp(A4, B4, 5, 6), 3, 2))
    assert isinstance(result, Packet)
    assert result.data[44:48] == pack("!I", 6)


@pytest.mark.parametrize(
    ("version", "reported", "told"),
    [
        # A v6 link carries 1280 bytes and so does the tunnel: no other answer exists.
        (4, 0, 1280), (4, 576, 1280), (4, 1260, 1280), (4, 1500, 1280),
        # 20 bytes less, and never more than fits into the tunnel as v6.
        (6, 1280, 1260), (6, 1500, 1260), (6, 2**32 - 1, 1260), (6, 1000, 980), (6, 0, 68),
    ],
)  # fmt: skip
def test_mtu(version: int, reported: int, told: int) -> None:
    src, dst = (A4, B4) if version == 4 else (A6, B6)
    icmp_type, code = (3, 4) if version == 4 else (2, 0)
    result = crossed(error_about(build_udp(src, dst, 5, 6), icmp_type, code, pack("!I", reported)))
    assert isinstance(result, Packet)
    error = result.icmp_error()
    assert isinstance(error, IcmpError)
    assert (error.kind, error.mtu) == (IcmpErrorKind.PACKET_TOO_BIG, told)


def is_request_or_port(packet: Packet) -> bool:
    return packet.protocol in (6, 17) or (packet.is_echo and packet.icmp_type in (8, 128))


@given(packets().filter(is_request_or_port), ports, st.booleans())
def test_the_quote_is_the_packet_as_the_other_side_sent_it(packet: Packet, port: int, cut: bool) -> None:
    whole = packet
    if cut:
        router, host = (B4, A4) if packet.version == 4 else (B6, A6)
        quote = packet.data[: packet.l4_offset + 8]
        wire = build_icmp(router, host, 3 if packet.version == 4 else 1, 0, bytes(4) + quote)
        error = wire.icmp_error()
        assert isinstance(error, IcmpError)
    else:
        error = error_about(packet, 3 if packet.version == 4 else 1, 0)
    result = crossed(error, port)
    assert isinstance(result, Packet)
    assert wrong_checksums(result) == []
    again = result.icmp_error()
    assert isinstance(again, IcmpError)
    proxy, client = (C6, D6) if packet.version == 4 else (C4, D4)
    assert (result.src, result.dst) == (proxy, client)
    assert (again.src, again.dst, again.src_port) == (client, proxy, port)
    assert again.dst_port == (port if packet.is_echo else packet.dst_port)
    if not cut:
        sent = to_family(whole, client, proxy)
        assert isinstance(sent, Packet)
        sent.set_src_port(port)
        quoted = parsed(again.quote)
        if not (packet.protocol == 17 and packet.data[packet.l4_offset + 6 : packet.l4_offset + 8] == b"\0\0"):
            assert wrong_checksums(quoted) == []
        assert without_checksum(quoted) == without_checksum(sent)


def test_errors_fit_their_family() -> None:
    from_v4 = crossed(error_about(build_udp(A4, B4, 5, 6, bytes(1252)), 3, 3))
    from_v6 = crossed(error_about(build_udp(A6, B6, 5, 6, bytes(1232)), 1, 4))
    assert isinstance(from_v4, Packet)
    assert isinstance(from_v6, Packet)
    assert len(from_v4) == 1280
    assert len(from_v6) == 576  # RFC 1812 section 4.3.2.3


@pytest.mark.parametrize(("version", "rest"), [(4, b"\0\x20\0\0"), (6, b"\x10\0\0\0")])
def test_extensions_behind_the_quote_are_cut_off(version: int, rest: bytes) -> None:
    src, dst = (A4, B4) if version == 4 else (A6, B6)
    packet = build_udp(src, dst, 5, 6, b"abcd")
    quote = packet.data.ljust(128, b"\0") + bytes.fromhex("2000aaaa 0008 0101 00010203")
    icmp_type = 11 if version == 4 else 3
    wire = build_icmp(dst, src, icmp_type, 0, rest + quote)
    error = wire.icmp_error()
    assert isinstance(error, IcmpError)
    result = crossed(error)
    assert isinstance(result, Packet)
    at = 28 if version == 6 else 48
    assert result.data[at - 4 : at] == bytes(4)
    assert parsed(result.data[at:]).payload == b"abcd"


@pytest.mark.parametrize("version", [4, 6])
def test_an_extension_behind_a_cut_quote_is_no_payload(version: int) -> None:
    src, dst = (A4, B4) if version == 4 else (A6, B6)
    packet = build_udp(src, dst, 5, 6, b"x" * 300)
    quote = packet.data[:128] + bytes.fromhex("2000aaaa 0008 0101 00010203")
    rest = b"\0\x20\0\0" if version == 4 else b"\x10\0\0\0"
    error = build_icmp(dst, src, 11 if version == 4 else 3, 0, rest + quote).icmp_error()
    assert isinstance(error, IcmpError)
    result = crossed(error)
    assert isinstance(result, Packet)
    told = result.data[48 + 48 :] if version == 4 else result.data[28 + 28 :]
    assert told == b"x" * (128 - (28 if version == 4 else 48))


@pytest.mark.parametrize("packet", [build_echo(A4, B4, 9), build_echo(A6, B6, 9), build_tcp(A4, B4, 5, 6)])
def test_the_ports_stay_whatever_the_extension_claims(packet: Packet) -> None:
    rest = b"\1\1\1\1"  # a quote of 4 or 8 bytes
    result = crossed(error_about(packet, 11 if packet.version == 4 else 3, 0, rest))
    assert isinstance(result, Packet)
    again = result.icmp_error()
    assert isinstance(again, IcmpError)
    assert again.src_port == 77


def test_a_udp_checksum_left_out_stays_so_in_a_quote() -> None:
    packet = with_bytes(build_udp(A4, B4, 5, 6, b"abc"), 26, b"\0\0")
    result = crossed(error_about(packet, 3, 3))
    assert isinstance(result, Packet)
    assert result.data[48 + 46 : 48 + 48] == b"\0\0"


@pytest.mark.parametrize(("version", "length"), [(4, 0), (4, 27), (4, 65535), (6, 0), (6, 7), (6, 65535)])
def test_a_quote_of_impossible_length_is_malformed(version: int, length: int) -> None:
    src, dst = (A4, B4) if version == 4 else (A6, B6)
    quote = bytearray(build_udp(src, dst, 5, 6).data)
    at = 2 if version == 4 else 4
    quote[at : at + 2] = pack("!H", length)
    error = build_icmp(dst, src, 3 if version == 4 else 1, 0, bytes(4) + bytes(quote)).icmp_error()
    assert isinstance(error, IcmpError)
    expected = Packet if (version, length) == (4, 65535) else DropReason
    assert isinstance(crossed(error), expected)


@given(packets().filter(is_request_or_port), st.data())
def test_no_quote_raises(packet: Packet, data: st.DataObject) -> None:
    quote = bytearray(packet.data)
    for _ in range(data.draw(st.integers(0, 4))):
        quote[data.draw(st.integers(0, len(quote) - 1))] = data.draw(st.integers(0, 255))
    router, host = (B4, A4) if packet.version == 4 else (B6, A6)
    icmp_type = data.draw(st.sampled_from([3, 11] if packet.version == 4 else [1, 2, 3]))
    rest = data.draw(st.binary(min_size=4, max_size=4))
    cut = quote[: data.draw(st.integers(0, len(quote)))]
    error = build_icmp(router, host, icmp_type, 0, rest + bytes(cut)).icmp_error()
    if isinstance(error, IcmpError):
        result = crossed(error)
        assert isinstance(result, DropReason) or wrong_checksums(result) == []


def test_an_error_stays_out_of_its_own_family() -> None:
    error = error_about(build_udp(A4, B4, 5, 6), 3, 3)
    with pytest.raises(ValueError, match="both families"):
        translate_error(error, C4, D4, quoted_src=D4, quoted_dst=C4, quoted_src_port=1)


@pytest.mark.parametrize(("version", "mtu"), [(4, 1260), (6, 1280)])
def test_too_big_is_told_to_the_sender(version: int, mtu: int) -> None:
    src, dst = (A4, B4) if version == 4 else (A6, B6)
    packet = build_udp(src, dst, 5, 6, bytes(1280 - 28 if version == 4 else 1280 - 48))
    answer = build_icmp_too_big(packet, mtu)
    assert wrong_checksums(answer) == []
    assert (answer.src, answer.dst) == (dst, src)
    assert len(answer) <= 1280
    error = answer.icmp_error()
    assert isinstance(error, IcmpError)
    assert (error.kind, error.mtu) == (IcmpErrorKind.PACKET_TOO_BIG, mtu)
    assert (error.src, error.dst, error.src_port, error.dst_port) == (src, dst, 5, 6)


@pytest.mark.parametrize("mtu", [67, 65536])
def test_an_impossible_mtu_is_the_callers_mistake(mtu: int) -> None:
    with pytest.raises(ValueError, match=str(mtu)):
        build_icmp_too_big(build_udp(A4, B4, 1, 2), mtu)
