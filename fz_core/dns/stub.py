"""What is answered without asking anybody: the canary, names of resources, PTR of proxy addresses (§8, §9.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fz_core.dns.messages import (
    AAAA,
    IN,
    NOERROR,
    NXDOMAIN,
    PTR,
    SERVFAIL,
    A,
    Query,
    build_addresses,
    build_error,
    build_ptr,
    parse_reverse_name,
)
from fz_core.dns.names import NameEntry, ProxyNames

CANARY: Final = "use-application-dns.net"
TXT, SRV, HTTPS = 16, 33, 65


@dataclass(frozen=True, slots=True)
class StubAnswer:
    """A reply, and the name whose proxy addresses were asked for, if that was the question."""

    reply: bytes = field(repr=False)
    entry: NameEntry | None = None


@dataclass(frozen=True, slots=True)
class SiteQuery:
    """The question goes to the site of this resource."""

    resource_id: str


class ResourceStub:
    """Answers from a table of names."""

    def __init__(self, names: ProxyNames) -> None:
        self._names = names

    def resolve(self, query: Query, is_in_use: Callable[[str], bool]) -> StubAnswer | SiteQuery | None:
        """The answer or the site to ask; None: not ours, recurse. Only class IN is ours."""
        if query.rdclass != IN or not query.is_lookup:
            return None
        if query.name == CANARY:
            return StubAnswer(build_error(query, NXDOMAIN))
        if query.rdtype == PTR:
            return self._resolve_ptr(query)
        if query.rdtype in (A, AAAA):
            return self._resolve_addresses(query, is_in_use)
        if query.rdtype not in (SRV, TXT, HTTPS):
            return None
        matches = self._names.resources_matching(query.name)
        if not matches:
            return None
        # An empty HTTPS answer leads the application back to A and AAAA.
        return StubAnswer(build_error(query, NOERROR)) if query.rdtype == HTTPS else SiteQuery(matches[0].resource_id)

    def _resolve_ptr(self, query: Query) -> StubAnswer | None:
        ip = parse_reverse_name(query.name)
        entry = None if ip is None else self._names.entry_of(ip)
        return None if entry is None else StubAnswer(build_ptr(query, entry.name))

    def _resolve_addresses(self, query: Query, is_in_use: Callable[[str], bool]) -> StubAnswer | None:
        matches = self._names.resources_matching(query.name)
        if not matches:
            return None
        entry = self._names.assign(query.name, is_in_use)
        if entry is None:
            return StubAnswer(build_error(query, SERVFAIL))
        if query.rdtype == A:
            ips = entry.v4 if any(match.has_v4 for match in matches) else ()
        else:
            ips = entry.v6 if any(match.has_v6 for match in matches) else ()
        return StubAnswer(build_addresses(query, ips), entry)
