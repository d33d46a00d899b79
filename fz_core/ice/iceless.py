"""Candidate text of ICE-less peers: as in ICE, but with the true base in `raddr` and an FNV-1a foundation.

A relayed address needs a `raddr` too. The official programs name the socket they talk to the relay from, which is
of no use to the peer; ours name the relayed address again, so the text that withdraws it is sure to be the same.
Source: spec/connectivity.md section 4.2, second dialect.
"""

from __future__ import annotations

from fz_core.ice.candidate import (
    KINDS,
    MAX_TEXT,
    Candidate,
    CandidateKind,
    is_usable,
    parse_address,
    parse_number,
)
from fz_core.packet import Address

KIND_BYTE = {CandidateKind.HOST: 0, CandidateKind.SRFLX: 1, CandidateKind.RELAY: 2}
PRIORITY = {CandidateKind.HOST: 2130706431, CandidateKind.SRFLX: 1694498815, CandidateKind.RELAY: 16777215}
FNV_OFFSET = 0xCBF29CE484222325
FNV_PRIME = 0x100000001B3


def iceless_text(candidate: Candidate) -> str:
    """Announces and withdraws this candidate of ours."""
    return to_iceless_sdp(
        candidate.kind,
        candidate.address,
        None if candidate.kind is CandidateKind.HOST else candidate.base,
    )


def parse_iceless_candidate_untrusted(text: str) -> Candidate | None:
    """A remote candidate with what `raddr` says as its base, or None if this is no usable one."""
    parsed = parse_iceless_untrusted(text)
    if parsed is None:
        return None
    kind, address, base = parsed
    if not is_usable(address.ip) or (kind is CandidateKind.SRFLX and address.is_ipv4 != base.is_ipv4):
        return None
    return Candidate(kind, address, base, PRIORITY[kind], str(foundation_of(kind, address, base)))


def to_iceless_sdp(kind: CandidateKind, address: Address, base: Address | None = None) -> str:
    """Announces and withdraws alike. `base` is needed for srflx and relay, and absent for host."""
    if (base is None) != (kind is CandidateKind.HOST) or kind not in KIND_BYTE:
        raise ValueError(f"an ICE-less {kind} candidate {'has no' if base else 'needs a'} base")
    text = (
        f"candidate:{foundation_of(kind, address, base)} 1 udp {PRIORITY[kind]} "
        f"{address.host} {address.port} typ {kind.value}"
    )
    return text if base is None else f"{text} raddr {base.host} rport {base.port}"


def parse_iceless_untrusted(text: str) -> tuple[CandidateKind, Address, Address] | None:
    """(kind, address, base), or None if this is not such a candidate."""
    words = text.split()
    if len(text) > MAX_TEXT or len(words) < 8 or not words[0].startswith("candidate:"):
        return None
    kind = KINDS.get(words[7])
    address = parse_address(words[4], words[5])
    if words[2].lower() != "udp" or words[6] != "typ" or address is None or kind not in KIND_BYTE:
        return None
    if parse_number(words[3], 0xFFFFFFFF) is None:
        return None
    if kind is CandidateKind.HOST:
        return kind, address, address
    extensions = dict(zip(words[8::2], words[9::2], strict=False))
    base = parse_address(extensions.get("raddr", ""), extensions.get("rport", ""))
    return None if base is None else (kind, address, base)


def foundation_of(kind: CandidateKind, address: Address, base: Address | None) -> int:
    """FNV-1a-64 over kind, address and base."""
    data = bytes((KIND_BYTE[kind],)) + address.ip + address.port.to_bytes(2, "big")
    if base is not None:
        data += base.ip + base.port.to_bytes(2, "big")
    value = FNV_OFFSET
    for byte in data:
        value = (value ^ byte) * FNV_PRIME & 0xFFFFFFFFFFFFFFFF
    return value
