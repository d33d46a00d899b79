"""The resources a client was given, and which of them a packet is for (`spec/tunnel.md` §4, §5)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fz_core.portal.types import CidrResource, InternetResource
from fz_core.tunnel.filters import FilterSet
from fz_core.tunnel.ranges import DEFAULT_ROUTES, PEER_RANGE, PEERS, PROXIES, SENTINELS, Network
from fz_core.tunnel.routing import Route, RoutingTable

FIXED_ROUTES = (*PEERS, *PROXIES, *SENTINELS)


@dataclass(frozen=True, slots=True)
class Summary:
    """A resource as people see it."""

    id: str
    name: str
    address: str


@dataclass(frozen=True, slots=True)
class Change:
    """What an upsert did: a resource's id if it was replaced, a summary if it is new or was replaced."""

    replaced: str | None = None
    added: Summary | None = None


class Resources:
    """Resources by id with their routes."""

    def __init__(self) -> None:
        self._by_id: dict[str, Any] = {}
        self._cidr = RoutingTable()
        self._internet_id: str | None = None
        self._internet_wanted = False

    @property
    def ids(self) -> set[str]:
        """Ids of all resources."""
        return set(self._by_id)

    def get(self, resource_id: str) -> Any | None:
        """The portal's resource object."""
        return self._by_id.get(resource_id)

    def upsert(self, resource: Any) -> Change:
        """Add a resource. A change of more than its texts replaces it."""
        old = self._by_id.get(resource.id)
        if old is not None and _essence(old) == _essence(resource):
            self._by_id[resource.id] = resource
            return Change()
        if old is not None:
            self.remove(resource.id)
        self._by_id[resource.id] = resource
        if isinstance(resource, CidrResource):
            self._cidr.add(Route(resource.address, resource.id, FilterSet(resource.filters)))
        elif isinstance(resource, InternetResource):
            self._internet_id = resource.id
        return Change(None if old is None else resource.id, summary(resource))

    def remove(self, resource_id: str) -> Summary | None:
        """Forget a resource; what it was, or None if unknown."""
        resource = self._by_id.pop(resource_id, None)
        if resource is None:
            return None
        self._cidr.remove_resource(resource_id)
        if resource_id == self._internet_id:
            self._internet_id = None
        return summary(resource)

    def set_internet_active(self, active: bool) -> str | None:
        """Switch the internet resource, present or future; its id if this ended its use."""
        was_active, self._internet_wanted = self._internet_wanted, active
        return self._internet_id if was_active and not active else None

    def route(self, dst: bytes, protocol: int, port: int) -> tuple[str, bool] | None:
        """The resource this traffic is for and whether its filters allow it."""
        verdict = self._cidr.lookup(dst, protocol, port)
        if verdict is not None:
            return verdict.route.resource_id, verdict.allowed
        if self._internet_id is not None and self._internet_wanted and dst not in PEER_RANGE:
            return self._internet_id, True
        return None

    def routes(self) -> frozenset[Network]:
        """Every network the TUN device must attract."""
        routes = {*FIXED_ROUTES, *self._cidr.networks()}
        if self._internet_id is not None and self._internet_wanted:
            routes.update(DEFAULT_ROUTES)
        return frozenset(routes)

    def networks_of(self, resource_id: str) -> tuple[Network, ...]:
        """The networks a gateway serving this resource may send from."""
        resource = self._by_id.get(resource_id)
        if isinstance(resource, CidrResource):
            return (resource.address,)
        return DEFAULT_ROUTES if isinstance(resource, InternetResource) else ()


def summary(resource: Any) -> Summary:
    """A resource as people see it; the internet resource has no address."""
    return Summary(resource.id, resource.name, str(getattr(resource, "address", "") or ""))


def _essence(resource: Any) -> Any:
    """The resource without texts and order: what decides whether connections survive an update."""
    neutral: dict[str, Any] = {name: "" for name in ("name", "address_description") if hasattr(resource, name)}
    if hasattr(resource, "sites"):
        neutral["sites"] = frozenset(site.id for site in resource.sites)
    if hasattr(resource, "filters"):
        neutral["filters"] = frozenset(resource.filters)
    return replace(resource, **neutral)
