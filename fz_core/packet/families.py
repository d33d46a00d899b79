"""Packets moved to the other IP family: stateless 4-to-6 and 6-to-4 translation, with ICMP errors and their quotes.

Not here: which packet is moved and to what addresses (that is `tunnel/nat`), and rewriting inside a family
(`Packet`). Source: RFC 7915 sections 4 and 5. Chosen among what it leaves open: hop limits are kept (the host's
forwarding counts the hop), flow labels are 0, an RFC 4884 extension is cut off, and no packet is ever split.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import pack, unpack_from

from fz_core.packet.build import build_icmp
from fz_core.packet.checksum import checksum, ones_complement_sum, update_checksum
from fz_core.packet.drops import DropReason
from fz_core.packet.icmp import ERROR_TTL, IcmpError, IcmpErrorKind
from fz_core.packet.packet import Packet


@dataclass(frozen=True, slots=True)
class TooBig:
    """A packet would not fit once translated; its sender may send up to `mtu` bytes (see `build_icmp_too_big`)."""

    mtu: int


def to_family(packet: Packet, src: bytes, dst: bytes, identification: int = 0) -> Packet | DropReason | TooBig:
    """The TCP, UDP or echo packet as one of the other family, from `src` to `dst`; ports stay.

    Its checksum is patched, not computed anew, so damage stays visible; only a UDP checksum that IPv4 left out
    is computed for IPv6. `identification` is the IPv4 field: routers behind may split what came as IPv6
    (RFC 7915 section 5.1), so it should differ from packet to packet. UNSUPPORTED_PROTOCOL for everything else,
    and for source routes.
    """
    if len(src) != len(dst) or len(src) != (16 if packet.version == 4 else 4):
        raise ValueError(f"addresses of {len(src)} and {len(dst)} bytes for an IPv{packet.version} packet to leave")
    if packet.src_port < 0:
        return DropReason.UNSUPPORTED_PROTOCOL
    return _to_v6(packet, src, dst) if packet.version == 4 else _to_v4(packet, src, dst, identification)


def growth_limit(packet: Packet) -> TooBig | None:
    """Why the packet cannot move to the other family for its size, or None."""
    if packet.version == 4 and V6_HEADER + len(packet) - packet.l4_offset > MAX_PACKET:
        return TooBig(MAX_PACKET - V6_HEADER + V4_HEADER)
    return None


def translate_error(
    error: IcmpError, src: bytes, dst: bytes, *, quoted_src: bytes, quoted_dst: bytes, quoted_src_port: int
) -> Packet | DropReason:
    """The error in the other family, from `src` to `dst`, quoting the packet as that side had sent it.

    UNSUPPORTED_PROTOCOL for an error without equivalent, MALFORMED_PACKET for a quote that contradicts itself.
    """
    if not len(src) == len(dst) == len(quoted_src) == len(quoted_dst) == 20 - len(error.src):
        raise ValueError("addresses of both families, use those of the family that the quoted packet is not of")
    to_v6 = len(src) == 16
    header = _error_to_v6(error) if to_v6 else _error_to_v4(error)
    if header is None:
        return DropReason.UNSUPPORTED_PROTOCOL
    quote = _translated_quote(error, quoted_src, quoted_dst, quoted_src_port)
    if quote is None:
        return DropReason.MALFORMED_PACKET
    icmp_type, icmp_code, rest = header
    limit = MAX_V6_QUOTE if to_v6 else MAX_V4_QUOTE
    return build_icmp(src, dst, icmp_type, icmp_code, rest + quote[:limit], ttl=ERROR_TTL)


def _to_v6(packet: Packet, src: bytes, dst: bytes) -> Packet | DropReason | TooBig:
    too_big = growth_limit(packet)
    if too_big is not None:
        return too_big
    data = packet.data
    if _has_source_route(data[V4_HEADER : packet.l4_offset]):
        return DropReason.UNSUPPORTED_PROTOCOL
    l4 = bytearray(data[packet.l4_offset :])
    protocol = ICMPV6 if packet.protocol == ICMP else packet.protocol
    if protocol == UDP and not any(l4[6:8]):
        pseudo = ones_complement_sum(src + dst + pack("!II", len(l4), UDP))
        l4[6:8] = pack("!H", checksum(l4, pseudo) or 0xFFFF)
    else:
        _patch(l4, len(l4), packet.protocol, packet.src + packet.dst, src + dst)
    return _parsed(_v6_header(data[1], len(l4), protocol, data[8], src, dst) + l4)


def _to_v4(packet: Packet, src: bytes, dst: bytes, identification: int) -> Packet | DropReason:
    data = packet.data
    if packet.l4_offset > V6_HEADER:
        fragment = _walk_extensions(data, packet.l4_offset)
        if fragment is None:
            return DropReason.UNSUPPORTED_PROTOCOL
        identification = fragment if fragment >= 0 else identification
    l4 = bytearray(data[packet.l4_offset :])
    protocol = ICMP if packet.protocol == ICMPV6 else packet.protocol
    _patch(l4, len(l4), packet.protocol, packet.src + packet.dst, src + dst)
    traffic_class = unpack_from("!H", data)[0] >> 4 & 0xFF
    return _parsed(_v4_header(traffic_class, len(l4), identification & 0xFFFF, protocol, data[7], src, dst) + l4)


def _patch(l4: bytearray, size: int, protocol: int, old: bytes, new: bytes) -> None:
    """Turn echo types around and patch the checksum for addresses that change from `old` to `new` with their family.

    `l4` may be cut short; `size` is what it was. `protocol` is the old one.
    """
    old_words, new_words = old, new
    if protocol == ICMP:  # only ICMPv6 covers a pseudo-header
        old_words = bytes((l4[0], 0))
        l4[0] = ECHO_TO_V6[l4[0]]
        new_words = new + pack("!IIBB", size, ICMPV6, l4[0], 0)
    elif protocol == ICMPV6:
        old_words = old + pack("!IIBB", size, ICMPV6, l4[0], 0)
        l4[0] = ECHO_TO_V4[l4[0]]
        new_words = bytes((l4[0], 0))
    at = CHECKSUM_AT[protocol]
    if at + 2 > len(l4):
        return
    (current,) = unpack_from("!H", l4, at)
    if protocol == UDP and current == 0:
        return
    updated = update_checksum(current, ones_complement_sum(old_words), ones_complement_sum(new_words))
    l4[at : at + 2] = updated.to_bytes(2, "big")


def _parsed(data: bytes) -> Packet:
    packet = Packet.parse_untrusted(data)
    if isinstance(packet, DropReason):  # the headers above were written around a transport that had been parsed
        raise AssertionError(f"translated to no packet: {packet.value}")
    return packet


def _v6_header(traffic_class: int, size: int, protocol: int, hop_limit: int, src: bytes, dst: bytes) -> bytes:
    return pack("!IHBB16s16s", 6 << 28 | traffic_class << 20, size, protocol, hop_limit, src, dst)


def _v4_header(tos: int, size: int, identification: int, protocol: int, ttl: int, src: bytes, dst: bytes) -> bytes:
    fields = (0x45, tos, V4_HEADER + size, identification, 0, ttl, protocol)
    partial = pack("!BBHHHBBH4s4s", *fields, 0, src, dst)
    return pack("!BBHHHBBH4s4s", *fields, checksum(partial), src, dst)


def _has_source_route(options: bytes) -> bool:
    """Whether IPv4 options hold a source route that is not used up (RFC 7915 section 4.1)."""
    at = 0
    while at < len(options) and options[at] != 0:
        if options[at] == 1:
            at += 1
            continue
        if at + 3 > len(options) or options[at + 1] < 2:
            return False
        if options[at] in (131, 137) and options[at + 2] <= options[at + 1]:
            return True
        at += options[at + 1]
    return False


def _walk_extensions(data: bytes, l4_offset: int) -> int | None:
    """Identification in a fragment header, -1 without one, None if a header has no place in IPv4.

    The chain up to `l4_offset` was walked when the packet was parsed.
    """
    identification, kind, at = -1, data[6], V6_HEADER
    while at < l4_offset:
        if kind == 44:
            identification = int.from_bytes(data[at + 6 : at + 8], "big")
            kind, at = data[at], at + 8
            continue
        if kind not in (0, 43, 60) or (kind == 43 and data[at + 3]):  # a routing header with segments left
            return None
        kind, at = data[at], at + 8 + 8 * data[at + 1]
    return identification


def _error_to_v6(error: IcmpError) -> tuple[int, int, bytes] | None:
    """Type, code and second word in ICMPv6 (RFC 7915 section 4.2)."""
    if error.icmp_type == 11:
        return (3, error.icmp_code, bytes(4)) if error.icmp_code <= 1 else None
    if error.kind is IcmpErrorKind.PACKET_TOO_BIG:
        # An IPv6 link carries 1280 bytes, the tunnel no more: whatever the report says, this is the answer.
        return 2, 0, pack("!I", MAX_PACKET)
    if error.icmp_code == 2:  # protocol unreachable: the next header field at byte 6 was not understood
        return 4, 1, pack("!I", 6)
    code = UNREACHABLE_TO_V6.get(error.icmp_code)
    return None if code is None else (1, code, bytes(4))


def _error_to_v4(error: IcmpError) -> tuple[int, int, bytes] | None:
    """Type, code and second word in ICMPv4 (RFC 7915 section 5.2)."""
    if error.icmp_type == 3:
        return (11, error.icmp_code, bytes(4)) if error.icmp_code <= 1 else None
    if error.kind is IcmpErrorKind.PACKET_TOO_BIG:
        growth = V6_HEADER - V4_HEADER
        mtu = max(MIN_V4_MTU, min(error.mtu or 0, MAX_PACKET) - growth)
        return 3, 4, pack("!HH", 0, mtu)
    code = UNREACHABLE_TO_V4.get(error.icmp_code)
    return None if code is None else (3, code, bytes(4))


def _translated_quote(error: IcmpError, src: bytes, dst: bytes, src_port: int) -> bytes | None:
    """The quoted packet in the other family, as much of it as is there; None if its length is impossible."""
    quote, v4 = error.quote, len(error.src) == 4
    size = unpack_from("!H", quote, 2 if v4 else 4)[0] - (error.l4_offset if v4 else error.l4_offset - V6_HEADER)
    if not MIN_TRANSPORT <= size <= MAX_TRANSPORT:
        return None
    l4 = bytearray(quote[error.l4_offset : min(_quoted_length(error), error.l4_offset + size)])
    _set_port(l4, error.protocol, src_port)
    _patch(l4, size, error.protocol, error.src + error.dst, src + dst)
    if v4:
        protocol = ICMPV6 if error.protocol == ICMP else error.protocol
        return _v6_header(quote[1], size, protocol, quote[8], src, dst) + l4
    protocol = ICMP if error.protocol == ICMPV6 else error.protocol
    return _v4_header(unpack_from("!H", quote)[0] >> 4 & 0xFF, size, 0, protocol, quote[7], src, dst) + l4


def _quoted_length(error: IcmpError) -> int:
    """Where the quote ends; behind it RFC 4884 may have put extensions. Never before the ports."""
    v4 = len(error.src) == 4
    if error.kind is IcmpErrorKind.PACKET_TOO_BIG and not v4:
        return len(error.quote)
    length = error.rest[1] * 4 if v4 else error.rest[0] * 8
    return max(length, error.l4_offset + MIN_TRANSPORT) if length else len(error.quote)


def _set_port(l4: bytearray, protocol: int, port: int) -> None:
    at, new = (4 if protocol in (ICMP, ICMPV6) else 0), port.to_bytes(2, "big")
    old, field = int.from_bytes(l4[at : at + 2], "big"), CHECKSUM_AT[protocol]
    l4[at : at + 2] = new
    current = int.from_bytes(l4[field : field + 2], "big")
    if field + 2 <= len(l4) and (current or protocol != UDP):
        l4[field : field + 2] = update_checksum(current, old, port).to_bytes(2, "big")


ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
V4_HEADER, V6_HEADER, MAX_PACKET = 20, 40, 1280
MIN_V4_MTU = 68
MAX_V4_QUOTE = 576 - V4_HEADER - 8  # RFC 1812 section 4.3.2.3
MAX_V6_QUOTE = MAX_PACKET - V6_HEADER - 8
MIN_TRANSPORT, MAX_TRANSPORT = 8, 0xFFFF - V4_HEADER
CHECKSUM_AT = {ICMP: 2, ICMPV6: 2, TCP: 16, UDP: 6}
ECHO_TO_V6 = {8: 128, 0: 129}
ECHO_TO_V4 = {128: 8, 129: 0}
UNREACHABLE_TO_V6 = {0: 0, 1: 0, 3: 4, 5: 0, 6: 0, 7: 0, 8: 0, 9: 1, 10: 1, 11: 0, 12: 0, 13: 1, 15: 1}
UNREACHABLE_TO_V4 = {0: 1, 1: 10, 2: 1, 3: 1, 4: 3}
