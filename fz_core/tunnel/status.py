"""Which sites are reachable, and the list of resources as people see it (`spec/tunnel.md` §13)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from fz_core.portal.types import CidrResource, DnsResource, InternetResource

OFFLINE_TIME = 300.0
KINDS = {InternetResource: "internet", DnsResource: "dns", CidrResource: "cidr"}


class ResourceStatus(StrEnum):
    """Whether a resource can be reached, as far as is known."""

    UNKNOWN = "Unknown"
    ONLINE = "Online"
    OFFLINE = "Offline"


@dataclass(frozen=True, slots=True)
class ResourceView:
    """A resource in a list for people. `type` is dns, cidr or internet; the internet resource has no address."""

    id: str
    type: str
    name: str
    address: str
    address_description: str | None
    sites: tuple[str, ...]
    status: ResourceStatus


@dataclass(frozen=True, slots=True)
class DeviceView:
    """Another client we are connected to, and through which static pools we know it."""

    id: str
    name: str
    tun_ipv4: IPv4Address
    tun_ipv6: IPv6Address
    pools: tuple[str, ...]


class Sites:
    """What is known of each site: online through which gateways, or offline until when."""

    def __init__(self) -> None:
        self._gateways: dict[str, str] = {}
        self._online: set[str] = set()
        self._offline_until: dict[str, float] = {}

    def assign(self, gateway_id: str, site_id: str) -> None:
        """A gateway stands in this site."""
        self._gateways[gateway_id] = site_id

    def handle_connected(self, gateway_id: str) -> None:
        """Its site is online."""
        if gateway_id in self._gateways:
            self._online.add(gateway_id)
            self._offline_until.pop(self._gateways[gateway_id], None)

    def handle_gone(self, gateway_id: str) -> None:
        """Nothing is known of its site, unless another gateway of it is connected."""
        self._online.discard(gateway_id)
        self._gateways.pop(gateway_id, None)

    def handle_offline(self, site_ids: Iterable[str], now: float) -> None:
        """The portal has no gateway for these sites."""
        for site_id in site_ids:
            self._offline_until[site_id] = now + OFFLINE_TIME

    def handle_timeout(self, now: float) -> None:
        """Forget that a site was offline when enough time has passed."""
        self._offline_until = {site: until for site, until in self._offline_until.items() if until > now}

    def poll_timeout(self) -> float | None:
        """When a site's state next ends by itself."""
        return min(self._offline_until.values(), default=None)

    def status_of(self, site_ids: Iterable[str]) -> ResourceStatus:
        """Online if any site is, offline if all are."""
        wanted = set(site_ids)
        if wanted & {self._gateways[g] for g in self._online}:
            return ResourceStatus.ONLINE
        if wanted and wanted <= set(self._offline_until):
            return ResourceStatus.OFFLINE
        return ResourceStatus.UNKNOWN


def resource_views(resources: Iterable[Any], sites: Sites) -> tuple[ResourceView, ...]:
    """Internet first, then by the bytes of the name, then by id. Pools are no resources to people."""
    views = [
        ResourceView(
            r.id,
            KINDS[type(r)],
            r.name,
            str(getattr(r, "address", "")),
            getattr(r, "address_description", None),
            tuple(site.name for site in r.sites),
            sites.status_of(site.id for site in r.sites),
        )
        for r in resources
        if type(r) in KINDS
    ]
    return tuple(sorted(views, key=lambda v: (v.type != "internet", v.name.encode(), v.id)))
