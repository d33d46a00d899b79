"""What is accepted as a packet and how it is classified (spec/tunnel.md section 2.1, 2.2)."""

from __future__ import annotations

from struct import pack

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from packet_strategies import packets

from fz_core.packet import (
    DropReason,
    IcmpClass,
    Packet,
    build_control,
    build_echo,
    build_icmp,
    build_ip,
    build_tcp,
    build_udp,
    classify_icmp,
)

A4, B4 = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
A6, B6 = bytes(15) + b"\1", bytes(15) + b"\2"
MALFORMED = DropReason.MALFORMED_PACKET
FRAGMENTED = DropReason.FRAGMENTED


@given(packets())
def test_every_built_packet_parses_back_from_every_kind_of_buffer(packet: Packet) -> None:
    data = packet.data
    for form in (data, bytearray(data), memoryview(data), packet):
        again = Packet.parse_untrusted(form)
        assert again == packet
        assert bytes(packet) == data


@pytest.mark.shows("tunnel", 1)
@given(st.binary(max_size=1400), st.sampled_from([0x45, 0x46, 0x60, 0x00]))
@example(b"", 0x45)
def test_any_bytes_are_refused_or_every_accessor_works(data: bytes, first: int) -> None:
    parsed = Packet.parse_untrusted(bytes([first]) + data if data else b"")
    if isinstance(parsed, DropReason):
        return
    assert parsed.src_port >= -1
    assert 0 <= parsed.payload_length == len(parsed.payload)
    assert parsed.icmp_error() is None or parsed.icmp_type >= 0
    assert len(parsed.src) == len(parsed.dst) == (4 if parsed.version == 4 else 16)
    assert repr(parsed)


@pytest.mark.shows("tunnel", 1)
@given(packets(), st.data())
def test_a_damaged_packet_never_raises(packet: Packet, data: st.DataObject) -> None:
    raw = bytearray(packet.data)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    for size in (len(raw), data.draw(st.integers(0, len(raw)))):
        parsed = Packet.parse_untrusted(raw[:size])
        if isinstance(parsed, Packet):
            assert parsed.payload_length == len(parsed.payload)
            parsed.icmp_error()


def test_1280_bytes_are_the_limit() -> None:
    largest = build_udp(A6, B6, 1, 2, bytes(1280 - 48))
    assert len(largest) == 1280
    raw = bytearray(largest.data + b"\0")
    raw[4:6] = pack("!H", 1241)
    raw[44:46] = pack("!H", 1241)
    assert Packet.parse_untrusted(raw) is DropReason.TOO_BIG
    with pytest.raises(ValueError, match="too_big"):
        build_udp(A6, B6, 1, 2, bytes(1280 - 47))


@pytest.mark.parametrize("data", [b"", b"\x45", bytes(20), b"\x50" + bytes(39), b"\x45" + bytes(19)])
def test_no_packet_at_all(data: bytes) -> None:
    assert Packet.parse_untrusted(data) is MALFORMED


@pytest.mark.parametrize("packet", [build_udp(A4, B4, 1, 2, b"abc"), build_tcp(A6, B6, 1, 2, 16, 0, 0, b"abc")])
@pytest.mark.parametrize("change", [-1, 1])
def test_length_field_must_equal_the_byte_count(packet: Packet, change: int) -> None:
    raw = packet.data[:-1] if change < 0 else packet.data + b"\0"
    assert Packet.parse_untrusted(raw) is MALFORMED


def with_bytes(packet: Packet, at: int, new: bytes) -> bytes:
    return packet.data[:at] + new + packet.data[at + len(new) :]


def test_header_lengths_must_fit() -> None:
    udp, tcp = build_udp(A4, B4, 1, 2), build_tcp(A4, B4, 1, 2)
    assert Packet.parse_untrusted(with_bytes(udp, 0, b"\x44")) is MALFORMED
    assert Packet.parse_untrusted(with_bytes(udp, 0, b"\x4f")) is MALFORMED
    assert Packet.parse_untrusted(with_bytes(udp, 24, b"\0\x07")) is MALFORMED
    assert Packet.parse_untrusted(with_bytes(udp, 24, b"\0\x09")) is MALFORMED
    assert Packet.parse_untrusted(with_bytes(tcp, 32, b"\x40")) is MALFORMED
    assert Packet.parse_untrusted(with_bytes(tcp, 32, b"\x60")) is MALFORMED


def test_icmp_belongs_to_its_family_and_has_eight_bytes() -> None:
    assert Packet.parse_untrusted(with_bytes(build_echo(A4, B4, 1), 9, b"\x3a")) is MALFORMED
    assert Packet.parse_untrusted(with_bytes(build_echo(A6, B6, 1), 6, b"\x01")) is MALFORMED
    with pytest.raises(ValueError, match="malformed"):
        build_icmp(A4, B4, 8, 0, b"abc")


@pytest.mark.shows("tunnel", 6)
@pytest.mark.parametrize("flags", [0x2000, 0x0001, 0x1FFF, 0x6000])
def test_ipv4_fragments_are_refused(flags: int) -> None:
    assert Packet.parse_untrusted(with_bytes(build_udp(A4, B4, 1, 2), 6, pack("!H", flags))) is FRAGMENTED


@pytest.mark.parametrize("flags", [0x4000, 0x8000])
def test_other_ipv4_flags_are_no_fragment(flags: int) -> None:
    assert isinstance(Packet.parse_untrusted(with_bytes(build_udp(A4, B4, 1, 2), 6, pack("!H", flags))), Packet)


def v6_with_headers(*headers: tuple[int, bytes], then: int, l4: bytes) -> bytes:
    """`headers` are (protocol, bytes after the next-header byte)."""
    following = [number for number, _ in headers[1:]] + [then]
    body = b"".join(bytes([n]) + rest for n, (_, rest) in zip(following, headers, strict=True)) + l4
    return pack("!IHBB", 0x60000000, len(body), headers[0][0], 64) + A6 + B6 + body


UDP_BYTES = pack("!HHHH", 7, 9, 8, 1)


@pytest.mark.shows("tunnel", 6)
def test_ipv6_fragments() -> None:
    for offset_and_flags in (0x0001, 0x0008, 0xFFF8):
        rest = b"\0" + pack("!HI", offset_and_flags, 99)
        assert Packet.parse_untrusted(v6_with_headers((44, rest), then=17, l4=UDP_BYTES)) is FRAGMENTED
    atomic = Packet.parse_untrusted(v6_with_headers((44, b"\xff" + pack("!HI", 0x0006, 99)), then=17, l4=UDP_BYTES))
    assert isinstance(atomic, Packet)
    assert (atomic.protocol, atomic.src_port, atomic.dst_port) == (17, 7, 9)


def test_every_extension_header_is_walked() -> None:
    chain = [(n, b"\1" + bytes(14)) for n in (0, 43, 60, 135, 139, 140, 253, 254)]
    packet = Packet.parse_untrusted(v6_with_headers(*chain, then=17, l4=UDP_BYTES))
    assert isinstance(packet, Packet)
    assert (packet.protocol, packet.src_port, packet.l4_offset) == (17, 7, 40 + 8 * 16)


@pytest.mark.parametrize("number", [50, 51, 59])
def test_other_headers_count_as_the_transport(number: int) -> None:
    packet = build_ip(A6, B6, number, UDP_BYTES)
    assert (packet.protocol, packet.src_port, packet.payload_length) == (number, -1, 8)


@pytest.mark.parametrize("rest", [b"\2" + bytes(14), b"\0" + bytes(3), b""])
def test_broken_extension_chain(rest: bytes) -> None:
    assert Packet.parse_untrusted(v6_with_headers((60, rest), then=50, l4=b"")) is MALFORMED


def test_ports_flags_and_payload_lengths() -> None:
    tcp = build_tcp(A4, B4, 5, 6, 0x12, 0, 0, b"abc", options=bytes(8))
    assert (tcp.src_port, tcp.dst_port, tcp.tcp_flags, tcp.payload) == (5, 6, 0x12, b"abc")
    udp = build_udp(A6, B6, 7, 8, b"abcd")
    assert (udp.src_port, udp.dst_port, udp.tcp_flags, udp.payload) == (7, 8, 0, b"abcd")
    echo = build_echo(A6, B6, 9, 1, b"abcde", reply=True)
    assert (echo.src_port, echo.dst_port, echo.icmp_type, echo.payload_length) == (9, 9, 129, 5)


def test_icmp_classes() -> None:
    assert classify_icmp(build_echo(A4, B4, 1)) is IcmpClass.ECHO
    assert classify_icmp(build_icmp(A4, B4, 8, 1, bytes(4))) is IcmpClass.OTHER
    assert classify_icmp(build_icmp(A4, B4, 11, 1, bytes(4))) is IcmpClass.ERROR
    assert classify_icmp(build_icmp(A6, B6, 2, 0, bytes(4))) is IcmpClass.ERROR
    assert classify_icmp(build_icmp(A6, B6, 2, 1, bytes(4))) is IcmpClass.OTHER
    assert classify_icmp(build_udp(A6, B6, 2, 1)) is None
    assert build_icmp(A4, B4, 8, 1, bytes(4)).src_port == -1


def test_control_packets_are_exactly_framed() -> None:
    goodbye = build_control(2)
    assert goodbye.data.hex() == "600000000008ff00" + "00" * 32 + "0200000000000000"
    assert (goodbye.is_fz_control, goodbye.control_event_type, goodbye.control_body) == (True, 2, b"")
    body = b'{"resource":"00000000-0000-0000-0000-000000000065","domain":"example.com","status":"Active"}'
    status = build_control(1, body)
    assert status.data == bytes.fromhex("600000000064ff00" + "00" * 32 + "0100000000000000") + body
    assert (status.control_event_type, status.control_body) == (1, body)


def test_what_only_looks_like_control() -> None:
    for packet in (
        build_ip(bytes(16), bytes(16), 255, bytes(7)),
        build_ip(bytes(16), B6, 255, bytes(8)),
        build_ip(A6, bytes(16), 255, bytes(8)),
        build_ip(bytes(4), bytes(4), 255, bytes(8)),
    ):
        assert (packet.is_fz_control, packet.control_event_type, packet.control_body) == (False, -1, b"")


def test_control_behind_an_extension_header() -> None:
    raw = bytearray(v6_with_headers((60, b"\0" + bytes(6)), then=255, l4=b"\5" + bytes(7) + b"x"))
    raw[8:40] = bytes(32)
    packet = Packet.parse_untrusted(raw)
    assert isinstance(packet, Packet)
    assert (packet.is_fz_control, packet.control_event_type, packet.control_body) == (True, 5, b"x")


def test_a_packet_owns_its_bytes() -> None:
    raw = bytearray(build_udp(A4, B4, 1, 2, b"abc").data)
    packet = Packet.parse_untrusted(raw)
    assert isinstance(packet, Packet)
    raw[:] = bytes(len(raw))
    assert packet.payload == b"abc"
    twin = packet.copy()
    twin.set_src_port(9)
    assert (packet.src_port, twin.src_port) == (1, 9)
    assert memoryview(packet).readonly
    with pytest.raises(TypeError):
        hash(packet)
