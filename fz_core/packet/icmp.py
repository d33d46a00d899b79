"""ICMP errors: what a packet's failure looks like on the wire, read, built and translated.

Also the classification of ICMP messages. Not here: which situation deserves which error (that is policy,
`tunnel/`). Source: spec/tunnel.md section 2.6, RFC 792, RFC 4443. One deviation: the checksums inside a
translated quote are patched along, as RFC 5508 section 4.2 asks of a NAT; the reference leaves them stale.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from struct import pack, unpack_from

from fz_core.packet.build import build_icmp
from fz_core.packet.checksum import update_checksum
from fz_core.packet.drops import DropReason
from fz_core.packet.packet import Packet

ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
ERROR_TTL = 20
MAX_V6_QUOTE = 1280 - 40 - 8
EXTENSIONS = frozenset((0, 43, 44, 60, 135, 139, 140, 253, 254))
CHECKSUM_OFFSET = {ICMP: 2, ICMPV6: 2, TCP: 16, UDP: 6}


class IcmpClass(StrEnum):
    """What an ICMP message is to the tunnel."""

    ECHO = "echo"
    ERROR = "error"
    OTHER = "other"


class IcmpErrorKind(StrEnum):
    """What an ICMP error says, the same for both families."""

    PROHIBITED = "prohibited"
    UNREACHABLE = "unreachable"
    OTHER_UNREACHABLE = "other_unreachable"
    PACKET_TOO_BIG = "packet_too_big"
    TIME_EXCEEDED = "time_exceeded"


@dataclass(frozen=True, slots=True)
class IcmpError:
    """An ICMP error and the flow of the packet it quotes.

    `src`, `dst`, `protocol` and the ports are those of the quoted packet; for an echo request both ports
    are its identifier. `rest` is the second word of the ICMP header. `mtu` is set for PACKET_TOO_BIG.
    """

    kind: IcmpErrorKind
    icmp_type: int
    icmp_code: int
    mtu: int | None
    src: bytes
    dst: bytes
    protocol: int
    src_port: int
    dst_port: int
    rest: bytes
    quote: bytes
    l4_offset: int

    def translated(self, src: bytes, dst: bytes, *, quoted_dst: bytes, quoted_src_port: int) -> Packet:
        """The same error for the other side of a NAT.

        From `src` to `dst`, quoting the packet as that side had sent it: to `quoted_dst`, from
        `quoted_src_port` (or echo identifier).
        """
        if len(quoted_dst) != len(self.dst):
            raise ValueError(f"quoted destination of {len(quoted_dst)} bytes, use {len(self.dst)}")
        quote = bytearray(self.quote)
        rewrite(quote, self, quoted_destination_offset(len(self.dst)), quoted_dst, pseudo=True)
        port_at = self.l4_offset + (4 if self.protocol in (ICMP, ICMPV6) else 0)
        rewrite(quote, self, port_at, quoted_src_port.to_bytes(2, "big"), pseudo=False)
        return build_icmp(src, dst, self.icmp_type, self.icmp_code, self.rest + quote, ttl=ERROR_TTL)


def classify_icmp(packet: Packet) -> IcmpClass | None:
    """Echo, error or other; None for what is not ICMP."""
    if packet.icmp_type < 0:
        return None
    if packet.is_echo:
        return IcmpClass.ECHO
    return IcmpClass.ERROR if packet.is_icmp_error else IcmpClass.OTHER


def build_icmp_prohibited(packet: Packet) -> Packet:
    """Tell the sender of `packet` that policy forbids it."""
    return answer(packet, 3, 13) if packet.version == 4 else answer(packet, 1, 1)


def build_icmp_unreachable(packet: Packet) -> Packet:
    """Tell the sender of `packet` that there is no way to its destination."""
    return answer(packet, 3, 0) if packet.version == 4 else answer(packet, 1, 3)


def build_icmp_too_big(packet: Packet, mtu: int) -> Packet:
    """Tell the sender of `packet` that at most `mtu` bytes pass: "fragmentation needed" or "packet too big"."""
    if not 68 <= mtu <= 0xFFFF:
        raise ValueError(f"MTU {mtu} is out of range, use 68 to 65535")
    icmp_type, icmp_code = (3, 4) if packet.version == 4 else (2, 0)
    return answer(packet, icmp_type, icmp_code, pack("!I", mtu))


def parse_icmp_error(packet: Packet) -> IcmpError | DropReason | None:
    """The error in `packet`; None if it is not ICMP or an echo; MALFORMED_PACKET for everything else."""
    if packet.icmp_type < 0 or packet.is_echo:
        return None
    if not packet.is_icmp_error:
        return DropReason.MALFORMED_PACKET
    message = packet.data[packet.l4_offset :]
    rest, quote = message[4:8], message[8:]
    outline = outline_v4(quote) if packet.version == 4 else outline_v6(quote)
    if outline is None:
        return DropReason.MALFORMED_PACKET
    protocol, l4_offset = outline
    ports = quoted_ports(quote, protocol, l4_offset)
    if ports is None:
        return DropReason.MALFORMED_PACKET
    kind = kind_of(packet.version, packet.icmp_type, packet.icmp_code)
    at, size = (12, 4) if packet.version == 4 else (8, 16)
    return IcmpError(
        kind=kind,
        icmp_type=packet.icmp_type,
        icmp_code=packet.icmp_code,
        mtu=mtu_of(packet.version, rest) if kind is IcmpErrorKind.PACKET_TOO_BIG else None,
        src=quote[at : at + size],
        dst=quote[at + size : at + 2 * size],
        protocol=protocol,
        src_port=ports[0],
        dst_port=ports[1],
        rest=rest,
        quote=quote,
        l4_offset=l4_offset,
    )


def answer(packet: Packet, icmp_type: int, icmp_code: int, second_word: bytes = bytes(4)) -> Packet:
    quoted = packet.l4_offset + 8 if packet.version == 4 else MAX_V6_QUOTE
    rest = second_word + packet.data[:quoted]
    return build_icmp(packet.dst, packet.src, icmp_type, icmp_code, rest, ttl=ERROR_TTL)


def kind_of(version: int, icmp_type: int, icmp_code: int) -> IcmpErrorKind:
    """Meaning of a type and code that `Packet.is_icmp_error` accepted."""
    if version == 4:
        if icmp_type == 11:
            return IcmpErrorKind.TIME_EXCEEDED
        if icmp_code == 4:
            return IcmpErrorKind.PACKET_TOO_BIG
        prohibited, unreachable = 13, 0
    else:
        if icmp_type == 3:
            return IcmpErrorKind.TIME_EXCEEDED
        if icmp_type == 2:
            return IcmpErrorKind.PACKET_TOO_BIG
        prohibited, unreachable = 1, 3
    if icmp_code == prohibited:
        return IcmpErrorKind.PROHIBITED
    return IcmpErrorKind.UNREACHABLE if icmp_code == unreachable else IcmpErrorKind.OTHER_UNREACHABLE


def mtu_of(version: int, rest: bytes) -> int:
    return int.from_bytes(rest[2:] if version == 4 else rest, "big")


def outline_v4(quote: bytes) -> tuple[int, int] | None:
    """Transport protocol and offset in a possibly cut-short IPv4 packet."""
    if len(quote) < 20 or quote[0] >> 4 != 4:
        return None
    l4_offset = (quote[0] & 0x0F) * 4
    is_later_fragment = unpack_from("!H", quote, 6)[0] & 0x1FFF
    if l4_offset < 20 or l4_offset > len(quote) or is_later_fragment:
        return None
    return quote[9], l4_offset


def outline_v6(quote: bytes) -> tuple[int, int] | None:
    """Transport protocol and offset in a possibly cut-short IPv6 packet."""
    if len(quote) < 40 or quote[0] >> 4 != 6:
        return None
    protocol, at = quote[6], 40
    while protocol in EXTENSIONS:
        if at + 8 > len(quote):
            return None
        if protocol == 44:
            if unpack_from("!H", quote, at + 2)[0] & 0xFFF8:  # a later fragment has no ports
                return None
            protocol, at = quote[at], at + 8
        else:
            protocol, at = quote[at], at + 8 + 8 * quote[at + 1]
    return (protocol, at) if at <= len(quote) else None


def quoted_ports(quote: bytes, protocol: int, at: int) -> tuple[int, int] | None:
    """Ports, or an echo request's identifier twice; None where the quote does not reach that far."""
    if protocol in (TCP, UDP):
        if len(quote) < at + 4:
            return None
        src_port, dst_port = unpack_from("!HH", quote, at)
        return src_port, dst_port
    if protocol in (ICMP, ICMPV6):
        request = 8 if protocol == ICMP else 128
        if len(quote) < at + 8 or quote[at] != request or quote[at + 1] != 0:
            return None
        (identifier,) = unpack_from("!H", quote, at + 4)
        return identifier, identifier
    return None


def quoted_destination_offset(size: int) -> int:
    return 16 if size == 4 else 24


def rewrite(quote: bytearray, error: IcmpError, at: int, new: bytes, *, pseudo: bool) -> None:
    """Replace bytes at an even offset and patch every checksum of the quote that covers them.

    `pseudo` says that they are an address: part of the IPv4 header and of the pseudo-header.
    """
    fields = []
    l4_checksum_at = error.l4_offset + CHECKSUM_OFFSET[error.protocol]
    unused = error.protocol == UDP and quote[l4_checksum_at : l4_checksum_at + 2] == b"\0\0"
    if l4_checksum_at + 2 <= len(quote) and not unused and not (pseudo and error.protocol == ICMP):
        fields.append(l4_checksum_at)
    if pseudo and len(error.dst) == 4:
        fields.append(10)
    for offset in range(0, len(new), 2):
        (old_word,) = unpack_from("!H", quote, at + offset)
        (new_word,) = unpack_from("!H", new, offset)
        for field in fields:
            (current,) = unpack_from("!H", quote, field)
            quote[field : field + 2] = update_checksum(current, old_word, new_word).to_bytes(2, "big")
    quote[at : at + len(new)] = new
