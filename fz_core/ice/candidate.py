"""ICE candidates: kinds, priorities, and the text in which peers tell each other theirs.

Text: `candidate:<foundation> 1 udp <priority> <ip> <port> typ <kind>[ raddr <ip> rport <port>][ ufrag <f>]`.
Sources: RFC 8445 section 5.1.2, RFC 8839 section 5.1, spec/connectivity.md sections 4.1 to 4.4.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from enum import StrEnum

from fz_core.packet import Address

COMPONENT = 1
CROSS_FAMILY_PENALTY = 1000
MAX_TEXT = 512
UNSPECIFIED = {4: Address(bytes(4), 0), 16: Address(bytes(16), 0)}


class CandidateKind(StrEnum):
    """How an address was learnt."""

    HOST = "host"
    SRFLX = "srflx"
    PRFLX = "prflx"
    RELAY = "relay"


TYPE_PREFERENCE = {
    CandidateKind.HOST: 126,
    CandidateKind.PRFLX: 110,
    CandidateKind.SRFLX: 100,
    CandidateKind.RELAY: 2,
}
LOCAL_PREFERENCE = {
    CandidateKind.HOST: 65535,
    CandidateKind.PRFLX: 49151,
    CandidateKind.SRFLX: 32767,
    CandidateKind.RELAY: 16383,
}
# What the official peers put into the text that withdraws a candidate: it was never ranked.
UNRANKED_PREFERENCE = 65535
RANK_ABOVE_ALL = 127 << 24


def priority_of(kind: CandidateKind, local_preference: int) -> int:
    """RFC 8445 section 5.1.2.1."""
    return TYPE_PREFERENCE[kind] << 24 | local_preference << 8 | (256 - COMPONENT)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One address of one side. `base` is what datagrams leave from; for a remote one it is the address.

    `is_cross_family` (ours only): a relayed address of another family than the one we talk to the relay in.
    """

    kind: CandidateKind
    address: Address
    base: Address
    priority: int
    foundation: str
    ufrag: str | None = field(default=None, compare=False)
    is_cross_family: bool = field(default=False, compare=False)

    @classmethod
    def host(cls, address: Address) -> Candidate:
        """A local address."""
        return cls._local(CandidateKind.HOST, address, address)

    @classmethod
    def srflx(cls, address: Address, base: Address) -> Candidate:
        """Our address as a relay sees it."""
        if len(address.ip) != len(base.ip):
            raise ValueError(f"{address} and its base {base} are of different families")
        return cls._local(CandidateKind.SRFLX, address, base)

    @classmethod
    def relay(cls, address: Address, server_is_ipv4: bool = True) -> Candidate:
        """An address on a relay, which we reach over IPv4 or not."""
        is_cross_family = address.is_ipv4 != server_is_ipv4
        penalty = CROSS_FAMILY_PENALTY if is_cross_family else 0
        candidate = cls._local(CandidateKind.RELAY, address, address, penalty)
        return replace(candidate, is_cross_family=True) if is_cross_family else candidate

    @classmethod
    def prflx(cls, address: Address, priority: int) -> Candidate:
        """A remote address learnt from a check."""
        return cls(CandidateKind.PRFLX, address, address, priority, "prflx")

    @classmethod
    def _local(cls, kind: CandidateKind, address: Address, base: Address, penalty: int = 0) -> Candidate:
        preference = LOCAL_PREFERENCE[kind] - (1 if address.is_ipv4 else 0) - penalty
        return cls(kind, address, base, priority_of(kind, preference), foundation_of(kind, base))

    def ranked_after(self, earlier: int) -> Candidate:
        """The same with the priority it has as the n-th of its kind and family."""
        return replace(self, priority=self.priority - (2 * earlier << 8))

    @property
    def check_priority(self) -> int:
        """What a check from this candidate says: the priority as if peer reflexive."""
        return TYPE_PREFERENCE[CandidateKind.PRFLX] << 24 | (self.priority & 0xFFFFFF)

    def to_sdp(self, ufrag: str | None = None) -> str:
        """The text that announces this candidate; `ufrag` is our own."""
        text = (
            f"candidate:{self.foundation} {COMPONENT} udp {self.priority} "
            f"{self.address.host} {self.address.port} typ {self.kind.value}"
        )
        if self.kind is not CandidateKind.HOST:
            # never the true base: the peer matches additions and withdrawals by this text
            related = UNSPECIFIED[len(self.address.ip)]
            text += f" raddr {related.host} rport {related.port}"
        return text if ufrag is None else f"{text} ufrag {ufrag}"

    def retold(self, generation: int, ufrag: str | None, *, above_all: bool = False) -> str:
        """The same address as another candidate: server-reflexive, and told apart by the port of `raddr`.

        Official peers keep what they know of a pair until its candidate is withdrawn, and recognise a candidate that
        they have withdrawn before. `above_all` gives it a rank with which it replaces any other of the same address.
        """
        related = UNSPECIFIED[len(self.address.ip)]
        priority = RANK_ABOVE_ALL + generation if above_all else self.priority
        port = 2 * generation + above_all
        text = (
            f"candidate:{self.foundation} {COMPONENT} udp {priority} {self.address.host} {self.address.port} "
            f"typ srflx raddr {related.host} rport {port}"
        )
        return text if ufrag is None else f"{text} ufrag {ufrag}"

    def to_invalidation(self) -> str:
        """The text that withdraws it: no ufrag, and the priority of an unranked candidate."""
        preference = UNRANKED_PREFERENCE - (1 if self.address.is_ipv4 else 0)
        return replace(self, priority=priority_of(self.kind, preference)).to_sdp()

    @staticmethod
    def parse_untrusted(text: str) -> Candidate | None:
        """A remote candidate, or None if this is not one."""
        words = text.split()
        if len(text) > MAX_TEXT or len(words) < 8 or not words[0].startswith("candidate:"):
            return None
        foundation = words[0].removeprefix("candidate:")
        priority = parse_number(words[3], 0xFFFFFFFF)
        address = parse_address(words[4], words[5])
        if not foundation or words[1] != "1" or words[2].lower() != "udp" or words[6] != "typ":
            return None
        if priority is None or address is None or words[7] not in KINDS:
            return None
        extensions = dict(zip(words[8::2], words[9::2], strict=False))
        return Candidate(KINDS[words[7]], address, address, priority, foundation, extensions.get("ufrag"))


KINDS = {kind.value: kind for kind in CandidateKind}


def foundation_of(kind: CandidateKind, base: Address) -> str:
    """Equal for candidates of one kind from one base, as RFC 8445 section 5.1.1.3 has it."""
    return hashlib.blake2s(kind.value.encode() + base.ip, digest_size=8).hexdigest()


def parse_number(word: str, limit: int) -> int | None:
    """Decimal digits only, at most `limit`."""
    if not (word.isascii() and word.isdigit() and len(word) <= 20):
        return None
    number = int(word)
    return number if number <= limit else None


def parse_address(ip: str, port: str) -> Address | None:
    """An IP without brackets or zone, and a port."""
    number = parse_number(port, 0xFFFF)
    if number is None or "%" in ip:
        return None
    try:
        return Address(ipaddress.ip_address(ip).packed, number)
    except ValueError:
        return None


def is_usable(ip: bytes) -> bool:
    """Whether an IP of ours may become a candidate (loopback may)."""
    address = ipaddress.ip_address(ip)
    if address.is_multicast or address.is_unspecified:
        return False
    return address.version == 6 or not (address.is_link_local or ip == b"\xff\xff\xff\xff")


def optimistic_candidates(remote: Collection[Candidate], limit: int = 2) -> list[Candidate]:
    """Guesses at forwarded ports: the peer's public IPv4 with its host port, as far as unknown.

    Call it with all remote candidates each time one arrives; at most `limit` new ones come back.
    """
    known = {candidate.address for candidate in remote}
    found: list[Candidate] = []
    four = [c for c in remote if c.address.is_ipv4]
    ips = dict.fromkeys(c.address.ip for c in four if c.kind is CandidateKind.SRFLX)
    ports = dict.fromkeys(c.address.port for c in four if c.kind is CandidateKind.HOST)
    for ip in ips:
        for port in ports:
            address = Address(ip, port)
            if address not in known and len(found) < limit:
                known.add(address)
                found.append(Candidate.srflx(address, address))
    return found
