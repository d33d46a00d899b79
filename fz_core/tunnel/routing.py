"""Best entry for an address and a kind of traffic (`spec/tunnel.md` §5).

An entry whose filter allows the traffic beats one that does not; then the longer prefix, then the
higher resource id. The best entry is returned even when its filter denies, so that the caller can name
the resource that refused.
"""

from __future__ import annotations

from typing import NamedTuple

from fz_core.tunnel.filters import FilterSet
from fz_core.tunnel.ranges import Network

CACHE_SIZE = 1024


class Route(NamedTuple):
    """One network of one resource."""

    network: Network
    resource_id: str
    filters: FilterSet


class Verdict(NamedTuple):
    """The chosen route and whether its filter lets the traffic pass."""

    route: Route
    allowed: bool


class RoutingTable:
    """Routes by prefix; lookups cost one dict access per distinct prefix length, or one when cached."""

    def __init__(self) -> None:
        self._routes: dict[tuple[int, int], dict[int, list[Route]]] = {}
        self._cache: dict[tuple[bytes, int, int], Verdict | None] = {}

    def add(self, route: Route) -> None:
        """Insert a route; one with the same network and resource is replaced."""
        self._cache.clear()
        bucket = self._routes.setdefault((len(route.network.network_address.packed), route.network.prefixlen), {})
        same_network = bucket.setdefault(int(route.network.network_address), [])
        same_network[:] = [r for r in same_network if r.resource_id != route.resource_id]
        same_network.append(route)

    def remove_resource(self, resource_id: str) -> None:
        """Drop every route of one resource."""
        self._cache.clear()
        for key, bucket in list(self._routes.items()):
            for prefix, routes in list(bucket.items()):
                routes[:] = [r for r in routes if r.resource_id != resource_id]
                if not routes:
                    del bucket[prefix]
            if not bucket:
                del self._routes[key]

    def networks(self) -> set[Network]:
        """All networks, each once."""
        return {r.network for bucket in self._routes.values() for routes in bucket.values() for r in routes}

    def covers(self, ip: bytes) -> bool:
        """Whether any route leads to this address, whatever its filter."""
        return self.lookup(ip, 0, 0) is not None

    def lookup(self, ip: bytes, protocol: int, port: int) -> Verdict | None:
        """The best route for traffic of this protocol and port with this address, or None."""
        key = (ip, protocol, port)
        try:
            return self._cache[key]
        except KeyError:
            pass
        found = self._best(ip, protocol, port)
        if len(self._cache) >= CACHE_SIZE:
            del self._cache[next(iter(self._cache))]
        self._cache[key] = found
        return found

    def _best(self, ip: bytes, protocol: int, port: int) -> Verdict | None:
        size, number = len(ip), int.from_bytes(ip, "big")
        best: Verdict | None = None
        best_key: tuple[object, ...] = ()
        for (family, length), bucket in self._routes.items():
            if family != size:
                continue
            shift = size * 8 - length
            for route in bucket.get(number >> shift << shift, ()):
                allowed = route.filters.allows(protocol, port)
                key = (allowed, length, route.resource_id)
                if best is None or key > best_key:
                    best, best_key = Verdict(route, allowed), key
        return best
