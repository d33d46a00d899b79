"""Addresses of names a gateway has resolved, for as long as the servers allow (RFC 2308 for what does not exist)."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import dns.exception
import dns.message
import dns.name
from dns.rcode import Rcode
from dns.rdataclass import RdataClass
from dns.rdatatype import RdataType

from fz_core.dns.patterns import fold

MAX_ENTRIES = 512
MAX_ADDRESSES = 64
MAX_CHAIN = 16
MAX_TTL = 86_400  # RFC 8767 §4 allows a week
MAX_NEGATIVE_TTL = 3 * 3600  # RFC 2308 §5


class _Entry(NamedTuple):
    ips: tuple[bytes, ...]
    expires_at: float


class AddressCache:
    """By name and type; an empty tuple says that there are no addresses. The least recently used makes room."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._entries: OrderedDict[tuple[str, int], _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def lookup(self, name: str, rdtype: int, now: float) -> tuple[bytes, ...] | None:
        """The addresses known, packed; None: ask."""
        key = fold(name), rdtype
        entry = self._entries.get(key)
        if entry is None:
            return None
        if now >= entry.expires_at:
            del self._entries[key]
            return None
        self._entries.move_to_end(key)
        return entry.ips

    def store(self, name: str, rdtype: int, response: dns.message.Message, now: float) -> tuple[bytes, ...]:
        """The addresses in a response to this question, at most 64; they are kept unless their TTL is 0."""
        ips, ttl = _addresses(name, RdataType(rdtype), response)
        key = fold(name), rdtype
        self._entries.pop(key, None)
        if ttl > 0:
            self._entries[key] = _Entry(ips, now + ttl)
            if len(self._entries) > self._max_entries:
                self._entries.popitem(last=False)
        return ips


def _addresses(name: str, rdtype: RdataType, response: dns.message.Message) -> tuple[tuple[bytes, ...], int]:
    """Addresses and how long they hold: the smallest TTL on the way through the CNAMEs of the answer."""
    if response.rcode() not in (Rcode.NOERROR, Rcode.NXDOMAIN):
        return (), 0
    try:
        owner = dns.name.from_text(name, dns.name.root)
    except (dns.exception.DNSException, ValueError):
        return (), 0
    rrsets = {(rrset.name, rrset.rdtype): rrset for rrset in response.answer if rrset.rdclass == RdataClass.IN}
    ttl = MAX_TTL
    for _ in range(MAX_CHAIN):
        found = rrsets.get((owner, rdtype))
        if found is not None:
            return tuple([rdata.to_wire() or b"" for rdata in found][:MAX_ADDRESSES]), min(ttl, found.ttl)
        alias = rrsets.get((owner, RdataType.CNAME))
        if alias is None:
            return (), min(ttl, _negative_ttl(response))
        owner, ttl = alias[0].target, min(ttl, alias.ttl)
    return (), 0


def _negative_ttl(response: dns.message.Message) -> int:
    """How long to believe that there is nothing; not at all without an SOA record."""
    for rrset in response.authority:
        if rrset.rdtype == RdataType.SOA:
            return min(int(rrset.ttl), int(rrset[0].minimum), MAX_NEGATIVE_TTL)
    return 0
