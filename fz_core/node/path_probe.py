"""Probes: ICMPv6 echoes between two discard addresses that peers exchange inside WireGuard to measure a path.

48 bytes: IPv6 header 40 (hop limit 64), type 1 (128 request, 129 reply), code 1, checksum 2, id 2, seq 2. Both
directions carry the same source and destination. The addresses and the type alone make a packet a probe: it came
through WireGuard, so its checksum, hop limit and payload are not looked at. Source: `spec/connectivity.md` §7.3.
"""

from __future__ import annotations

from typing import NamedTuple

ECHO_REQUEST = 128
ECHO_REPLY = 129
ICMPV6 = 58
HEADER_SIZE = 40
PROBE_SIZE = 48
SOURCE = bytes.fromhex("01000000000000000000dead01ce0001")
DESTINATION = SOURCE[:-1] + b"\x02"
ADDRESSES = SOURCE + DESTINATION
HEADER = bytes.fromhex("6000000000083a40") + ADDRESSES


class Probe(NamedTuple):
    """A request or a reply; `id` and `seq` are the prober's, 16 bits each."""

    is_request: bool
    id: int
    seq: int


def is_probe(packet: bytes) -> bool:
    """Whether a decrypted packet is for the path agent and not for the TUN device. Called for every packet."""
    return (
        packet[8:40] == ADDRESSES
        and len(packet) >= PROBE_SIZE
        and packet[0] >> 4 == 6
        and packet[6] == ICMPV6
        and packet[HEADER_SIZE] in (ECHO_REQUEST, ECHO_REPLY)
    )


def parse_probe(packet: bytes) -> Probe | None:
    """The probe, or None if `packet` is none."""
    if not is_probe(packet):
        return None
    return Probe(
        packet[HEADER_SIZE] == ECHO_REQUEST,
        int.from_bytes(packet[44:46], "big"),
        int.from_bytes(packet[46:48], "big"),
    )


def build_probe(is_request: bool, id: int, seq: int) -> bytes:
    """The inner packet to encrypt."""
    kind = ECHO_REQUEST if is_request else ECHO_REPLY
    total = PSEUDO_SUM + (kind << 8) + id + seq
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return b"".join(
        (
            HEADER,
            bytes((kind, 0)),
            (total ^ 0xFFFF).to_bytes(2, "big"),
            id.to_bytes(2, "big"),
            seq.to_bytes(2, "big"),
        )
    )


# The words of the pseudo header (RFC 8200 section 8.1): addresses, length 8, next header.
PSEUDO_SUM = sum(int.from_bytes(ADDRESSES[at : at + 2], "big") for at in range(0, 32, 2)) + 8 + ICMPV6
