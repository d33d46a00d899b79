"""Builders of whole packets; each returns a `Packet` with all checksums right.

TTL or hop limit is 64, IPv4 identification 0, traffic class and flow label 0, unless asked otherwise.
A packet above 1280 bytes is the caller's mistake. Source: spec/tunnel.md section 2.5 and 3.
"""

from __future__ import annotations

from struct import pack

from fz_core.packet.drops import DropReason
from fz_core.packet.packet import Packet

ICMP, TCP, UDP, ICMPV6, FZ_CONTROL = 1, 6, 17, 58, 255


def build_udp(src: bytes, dst: bytes, src_port: int, dst_port: int, payload: bytes = b"", *, ttl: int = 64) -> Packet:
    """A UDP packet."""
    header = pack("!HHHH", src_port, dst_port, 8 + len(payload), 0)
    return build_ip(src, dst, UDP, header + payload, ttl=ttl)


def build_tcp(
    src: bytes,
    dst: bytes,
    src_port: int,
    dst_port: int,
    flags: int = 0,
    seq: int = 0,
    ack: int = 0,
    payload: bytes = b"",
    *,
    window: int = 65535,
    options: bytes = b"",
    ttl: int = 64,
) -> Packet:
    """A TCP segment; `options` is a multiple of 4 bytes, at most 40."""
    if len(options) % 4 or len(options) > 40:
        raise ValueError(f"TCP options of {len(options)} bytes, use a multiple of 4 up to 40")
    offset = (20 + len(options)) << 2
    header = pack("!HHIIBBHHH", src_port, dst_port, seq, ack, offset, flags, window, 0, 0)
    return build_ip(src, dst, TCP, header + options + payload, ttl=ttl)


def build_echo(
    src: bytes, dst: bytes, identifier: int, sequence: int = 0, payload: bytes = b"", *, reply: bool = False
) -> Packet:
    """An ICMP or ICMPv6 echo request, or reply."""
    if len(src) == 4:
        return build_icmp(src, dst, 0 if reply else 8, 0, pack("!HH", identifier, sequence) + payload)
    return build_icmp(src, dst, 129 if reply else 128, 0, pack("!HH", identifier, sequence) + payload)


def build_icmp(src: bytes, dst: bytes, icmp_type: int, icmp_code: int, rest: bytes, *, ttl: int = 64) -> Packet:
    """Any ICMP or ICMPv6 message; `rest` is everything after the checksum, 4 bytes or more."""
    protocol = ICMP if len(src) == 4 else ICMPV6
    return build_ip(src, dst, protocol, pack("!BBH", icmp_type, icmp_code, 0) + rest, ttl=ttl)


def build_control(event_type: int, body: bytes = b"") -> Packet:
    """A p2p control packet: event type, seven zero bytes, body; from `::` to `::`, hop limit 0."""
    return build_ip(bytes(16), bytes(16), FZ_CONTROL, pack("!B7x", event_type) + body, ttl=0)


def build_ip(src: bytes, dst: bytes, protocol: int, l4: bytes, *, ttl: int = 64) -> Packet:
    """A packet around a transport header and payload, whose checksum is computed here."""
    if len(src) != len(dst) or len(src) not in (4, 16):
        raise ValueError(f"addresses of {len(src)} and {len(dst)} bytes, use 4 and 4 or 16 and 16")
    if len(l4) > 1280 - 20:
        raise ValueError(f"IP payload of {len(l4)} bytes, a packet holds at most 1280 in all")
    if len(src) == 4:
        header = pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(l4), 0, 0, ttl, protocol, 0, src, dst)
    else:
        header = pack("!IHBB16s16s", 0x60000000, len(l4), protocol, ttl, src, dst)
    packet = Packet.parse_untrusted(header + l4)
    if isinstance(packet, DropReason):
        raise ValueError(f"cannot build this packet: {packet.value}")
    packet.update_checksums()
    return packet
