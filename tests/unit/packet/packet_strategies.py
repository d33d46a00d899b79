"""Packets for property tests, and a checksum written independently of the code under test."""

from __future__ import annotations

from struct import pack

from hypothesis import strategies as st

from fz_core.packet import Packet, build_echo, build_icmp, build_ip, build_tcp, build_udp

ports = st.integers(0, 65535)
payloads = st.binary(max_size=64)
address_pairs = st.one_of(
    st.tuples(st.binary(min_size=4, max_size=4), st.binary(min_size=4, max_size=4)),
    st.tuples(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16)),
)


@st.composite
def packets(draw: st.DrawFn) -> Packet:
    """UDP, TCP, echo, other ICMP and other protocols, with IPv4 options or IPv6 extension headers."""
    src, dst = draw(address_pairs)
    kind = draw(st.sampled_from(["udp", "tcp", "echo", "icmp", "other"]))
    payload = draw(payloads)
    if kind == "udp":
        packet = build_udp(src, dst, draw(ports), draw(ports), payload)
    elif kind == "tcp":
        options = draw(st.integers(0, 10)) * b"\1\1\1\1"
        packet = build_tcp(
            src, dst, draw(ports), draw(ports), draw(st.integers(0, 255)), 1, 2, payload, options=options
        )
    elif kind == "echo":
        packet = build_echo(src, dst, draw(ports), draw(ports), payload, reply=draw(st.booleans()))
    elif kind == "icmp":
        packet = build_icmp(src, dst, draw(st.integers(0, 255)), draw(st.integers(0, 255)), bytes(4) + payload)
    else:
        packet = build_ip(src, dst, draw(st.sampled_from([2, 47, 50, 51, 132])), payload)
    return widen(packet, draw(st.integers(0, 3)))


def widen(packet: Packet, words: int) -> Packet:
    """The same packet with IPv4 options, or with IPv6 destination options, `words` long."""
    data = bytearray(packet.data)
    if not words:
        return packet
    if packet.version == 4:
        data[0] += words
        data[20:20] = bytes([1]) * (4 * words)
        data[2:4] = pack("!H", len(data))
    else:
        data[40:40] = bytes([data[6], words - 1]) + bytes(8 * words - 2)
        data[6] = 60
        data[4:6] = pack("!H", len(data) - 40)
    wide = Packet.parse_untrusted(bytes(data))
    assert isinstance(wide, Packet)
    wide.update_checksums()
    return wide


def words_sum(data: bytes) -> int:
    total = 0
    for at in range(0, len(data), 2):
        total += int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def wrong_checksums(packet: Packet) -> list[str]:
    """Which of the packet's checksums do not sum to all ones."""
    data, at = packet.data, packet.l4_offset
    wrong = []
    if packet.version == 4 and words_sum(data[:at]) != 0xFFFF:
        wrong.append("ip")
    if packet.protocol not in (1, 6, 17, 58):
        return wrong
    if packet.version == 4 and packet.protocol == 17 and data[at + 6 : at + 8] == b"\0\0":
        return wrong
    pseudo = packet.src + packet.dst + pack("!II", len(data) - at, packet.protocol)
    if packet.protocol == 1:
        pseudo = b""
    if words_sum(pseudo + data[at:]) != 0xFFFF:
        wrong.append("l4")
    return wrong
