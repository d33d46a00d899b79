"""Which name servers are asked, and the sentinel address that stands for each (`spec/tunnel.md` §1, §8)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

SENTINELS_V4 = ip_address("100.100.111.0").packed[:3]
SENTINELS_V6 = ip_address("fd00:2021:1111:8000:100:100:111:0").packed[:15]
MAX_PER_FAMILY = 127  # so that two mappings one after the other never share a sentinel


@dataclass(frozen=True, slots=True)
class Upstream:
    """A name server: an address (packed, port 53), or the URL of a DoH server."""

    ip: bytes | None = None
    url: str | None = None
    is_system: bool = False


def effective_upstreams(
    portal_do53: Iterable[bytes], portal_doh: Iterable[str], system: Iterable[bytes]
) -> tuple[Upstream, ...]:
    """The first class that is not empty, in order, without sentinels and without repetitions."""
    classes = (
        [Upstream(ip=ip) for ip in portal_do53 if not is_sentinel(ip)],
        [Upstream(url=url) for url in portal_doh],
        [Upstream(ip=ip, is_system=True) for ip in system if not is_sentinel(ip)],
    )
    return next((tuple(dict.fromkeys(upstreams)) for upstreams in classes if upstreams), ())


def is_sentinel(ip: bytes) -> bool:
    """Whether the address lies in a range of sentinels."""
    return ip[:-1] in (SENTINELS_V4, SENTINELS_V6)


class Sentinels:
    """One sentinel per upstream, of its family; DoH servers have IPv4 ones. Upstreams beyond 127 have none."""

    def __init__(self) -> None:
        self._upstreams: frozenset[Upstream] = frozenset()
        self._by_sentinel: dict[bytes, Upstream] = {}
        self._last_used: frozenset[bytes] = frozenset()

    def update(self, upstreams: Sequence[Upstream]) -> bool:
        """Take the effective upstreams. True: they are others than before, and so are all sentinels."""
        if frozenset(upstreams) == self._upstreams:
            return False
        self._upstreams = frozenset(upstreams)
        free_v4, free_v6 = self._free(SENTINELS_V4, 1, 254), self._free(SENTINELS_V6, 0, 255)
        self._by_sentinel = {}
        for upstream in dict.fromkeys(upstreams):
            sentinel = next(free_v4 if upstream.ip is None or len(upstream.ip) == 4 else free_v6, None)
            if sentinel is not None:
                self._by_sentinel[sentinel] = upstream
        if self._by_sentinel:
            self._last_used = frozenset(self._by_sentinel)
        return True

    @property
    def mapping(self) -> tuple[tuple[bytes, Upstream], ...]:
        """Sentinels and what they stand for, in the order of the upstreams."""
        return tuple(self._by_sentinel.items())

    def upstream_of(self, ip: bytes) -> Upstream | None:
        """What an address stands for now."""
        return self._by_sentinel.get(ip)

    def _free(self, prefix: bytes, first: int, last: int) -> Iterator[bytes]:
        unused = [ip for n in range(first, last + 1) if (ip := prefix + bytes([n])) not in self._last_used]
        return iter(unused[:MAX_PER_FAMILY])
