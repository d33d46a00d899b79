"""The resources a client was given, and which of them a packet is for (`spec/tunnel.md` §4, §5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, NamedTuple

from fz_core.dns import NameEntry, ProxyNames
from fz_core.portal.types import CidrResource, DnsResource, InternetResource, StaticDevicePool
from fz_core.tunnel.filters import FilterSet
from fz_core.tunnel.ranges import DEFAULT_ROUTES, PEER_RANGE, PEERS, PROXIES, PROXY_RANGE, SENTINELS, Network
from fz_core.tunnel.routing import Route, RoutingTable

MAX_SETTLED = 1024
FIXED_ROUTES = (*PEERS, *PROXIES, *SENTINELS)


class Via(Enum):
    """How traffic to a resource travels."""

    GATEWAY = auto()
    NAME = auto()
    DEVICE = auto()


class Target(NamedTuple):
    """The resource traffic is for, and whether its filters allow it. `name` only with `Via.NAME`."""

    via: Via
    resource_id: str
    allowed: bool
    name: NameEntry | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """A resource as people see it."""

    id: str
    name: str
    address: str


@dataclass(frozen=True, slots=True)
class Change:
    """What an upsert did.

    `replaced` is the id of a resource that must be released first; `added` is set if it is new or was
    replaced. Of a static pool, `departed` are the addresses that left with their owners, and `filters`
    the new filters if they changed.
    """

    replaced: str | None = None
    added: Summary | None = None
    departed: tuple[tuple[str, bytes], ...] = ()
    filters: FilterSet | None = None


class Resources:
    """Resources by id with their routes. Of DNS resources the table of names knows the addresses."""

    def __init__(self, names: ProxyNames) -> None:
        self._by_id: dict[str, Any] = {}
        self._filters: dict[str, FilterSet] = {}
        self._names = names
        self._cidr = RoutingTable()
        self._devices = RoutingTable()
        self._internet_id: str | None = None
        self._internet_wanted = False
        self._settled: dict[tuple[bytes, int, int], Target] = {}

    def __iter__(self) -> Iterator[Any]:
        return iter(self._by_id.values())

    @property
    def ids(self) -> set[str]:
        """Ids of all resources."""
        return set(self._by_id)

    def get(self, resource_id: str) -> Any | None:
        """The portal's resource object."""
        return self._by_id.get(resource_id)

    def upsert(self, resource: Any) -> Change:
        """Add a resource. A change of more than its texts replaces it; of a static pool only what differs."""
        self._settled.clear()
        old = self._by_id.get(resource.id)
        if isinstance(old, StaticDevicePool) and isinstance(resource, StaticDevicePool):
            return self._update_pool(old, resource)
        if old is not None and _essence(old) == _essence(resource):
            self._by_id[resource.id] = resource
            return Change()
        if old is not None:
            self.remove(resource.id)
        self._by_id[resource.id] = resource
        filters = self._filters[resource.id] = FilterSet(getattr(resource, "filters", ()))
        match resource:
            case CidrResource():
                self._cidr.add(Route(resource.address, resource.id, filters))
            case DnsResource():
                self._names.add_resource(resource.id, resource.address, resource.ip_stack)
            case InternetResource():
                self._internet_id = resource.id
            case StaticDevicePool():
                self._add_members(resource, filters)
        return Change(None if old is None else resource.id, summary(resource))

    def remove(self, resource_id: str) -> Summary | None:
        """Forget a resource; what it was, or None if unknown."""
        self._settled.clear()
        resource = self._by_id.pop(resource_id, None)
        if resource is None:
            return None
        del self._filters[resource_id]
        self._cidr.remove_resource(resource_id)
        self._devices.remove_resource(resource_id)
        self._names.remove_resource(resource_id)
        if resource_id == self._internet_id:
            self._internet_id = None
        return summary(resource)

    def set_internet_active(self, active: bool) -> str | None:
        """Switch the internet resource, present or future; its id if this ended its use."""
        self._settled.clear()
        was_active, self._internet_wanted = self._internet_wanted, active
        return self._internet_id if was_active and not active else None

    @property
    def is_internet_active(self) -> bool:
        """Whether an internet resource is there and switched on."""
        return self._internet_id is not None and self._internet_wanted

    def settled(self, dst: bytes, protocol: int, port: int) -> Target | None:
        """A gateway's resource that `route` found and allowed before; None says nothing. For packet rates."""
        return self._settled.get((dst, protocol, port))

    def route(self, dst: bytes, protocol: int, port: int) -> Target | None:
        """What this traffic is for. The first kind that covers the destination decides, even if it denies."""
        target = self._route(dst, protocol, port)
        is_plain = dst not in PEER_RANGE and dst not in PROXY_RANGE  # what these mean changes with peers and names
        if is_plain and target is not None and target.allowed and target.via is Via.GATEWAY:
            if len(self._settled) >= MAX_SETTLED:
                self._settled.clear()
            self._settled[dst, protocol, port] = target
        return target

    def _route(self, dst: bytes, protocol: int, port: int) -> Target | None:
        verdict = self._devices.lookup(dst, protocol, port)
        if verdict is not None:
            return Target(Via.DEVICE, verdict.route.resource_id, verdict.allowed)
        if dst in PROXY_RANGE:
            named = self._route_name(dst, protocol, port)
            if named is not None:
                return named
        verdict = self._cidr.lookup(dst, protocol, port)
        if verdict is not None:
            return Target(Via.GATEWAY, verdict.route.resource_id, verdict.allowed)
        if self._internet_id is not None and self._internet_wanted and dst not in PEER_RANGE:
            return Target(Via.GATEWAY, self._internet_id, True)
        return None

    def _route_name(self, dst: bytes, protocol: int, port: int) -> Target | None:
        """The most specific resource that allows the traffic, or else the most specific one (§5, §9.2)."""
        entry = self._names.entry_of(dst)
        if entry is None:
            return None
        blamed = None
        for match in entry.matches:
            if match.has_v4 if len(dst) == 4 else match.has_v6:
                if self._filters[match.resource_id].allows(protocol, port):
                    return Target(Via.NAME, match.resource_id, True, entry)
                blamed = blamed or match
        return None if blamed is None else Target(Via.NAME, blamed.resource_id, False, entry)

    def covers(self, ip: bytes) -> bool:
        """Whether queries to a name server at this address belong into the tunnel (§8)."""
        return self.is_internet_active or self._cidr.covers(ip)

    def member_of(self, ip: bytes) -> bool:
        """Whether the address is that of a static pool's device."""
        return self._devices.covers(ip)

    def pools_of(self, client_id: str) -> tuple[str, ...]:
        """Names of the static pools that list this client, in the order of their ids."""
        pools = sorted((r.id, r.name) for r in self if isinstance(r, StaticDevicePool) and _lists(r, client_id))
        return tuple(name for _, name in pools)

    def routes(self) -> frozenset[Network]:
        """Every network the TUN device must attract."""
        routes = {*FIXED_ROUTES, *self._cidr.networks()}
        if self.is_internet_active:
            routes.update(DEFAULT_ROUTES)
        return frozenset(routes)

    def networks_of(self, resource_id: str) -> tuple[Network, ...]:
        """The networks a gateway serving this resource may send from."""
        resource = self._by_id.get(resource_id)
        if isinstance(resource, CidrResource):
            return (resource.address,)
        return DEFAULT_ROUTES if isinstance(resource, InternetResource) else ()

    def _add_members(self, pool: StaticDevicePool, filters: FilterSet) -> None:
        for device in pool.devices:
            for network in (device.ipv4, device.ipv6):
                self._devices.add(Route(network, pool.id, filters))

    def _update_pool(self, old: StaticDevicePool, new: StaticDevicePool) -> Change:
        """Members come and go one by one; only new filters touch them all."""
        self._by_id[new.id] = new
        changed_filters = frozenset(old.filters) != frozenset(new.filters)
        before, after = _members(old), _members(new)
        if changed_filters or before != after:
            filters = self._filters[new.id] = FilterSet(new.filters)
            self._devices.remove_resource(new.id)
            self._add_members(new, filters)
        departed = before - after if not changed_filters else before
        return Change(departed=tuple(sorted(departed)), filters=self._filters[new.id] if changed_filters else None)


def summary(resource: Any) -> Summary:
    """A resource as people see it; the internet resource has no address."""
    return Summary(resource.id, resource.name, str(getattr(resource, "address", "") or ""))


def _members(pool: StaticDevicePool) -> set[tuple[str, bytes]]:
    return {(d.client_id, n.network_address.packed) for d in pool.devices for n in (d.ipv4, d.ipv6)}


def _lists(pool: StaticDevicePool, client_id: str) -> bool:
    return any(device.client_id == client_id for device in pool.devices)


def _essence(resource: Any) -> Any:
    """The resource without texts and order: what decides whether connections survive an update."""
    neutral: dict[str, Any] = {name: "" for name in ("name", "address_description") if hasattr(resource, name)}
    if hasattr(resource, "sites"):
        neutral["sites"] = frozenset(site.id for site in resource.sites)
    if hasattr(resource, "filters"):
        neutral["filters"] = frozenset(resource.filters)
    return replace(resource, **neutral)
