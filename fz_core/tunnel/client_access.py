"""One client on a gateway: what it was granted, and whether a packet of it may pass (`spec/tunnel.md` §14, §16).

DNS resources are granted but not translated yet: no packet reaches them (`docs/deviations.md`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from fz_core.packet import DropReason, Packet
from fz_core.portal.types import CidrResource, InternetResource
from fz_core.tunnel.filters import FilterSet
from fz_core.tunnel.ranges import INTERNET_REJECTED_RANGE, PEER_RANGE, PROXY_RANGE, is_multicast
from fz_core.tunnel.routing import Route, RoutingTable
from fz_core.tunnel.traffic import inbound, is_classifiable, outbound


class Decision(Enum):
    """What happens to a packet of a client."""

    PASS = auto()
    CONTROL = auto()
    PROHIBITED = auto()
    UNREACHABLE = auto()
    IGNORE = auto()


@dataclass(slots=True)
class Grant:
    """One resource; `expires_at` is monotonic seconds, None for ever."""

    resource: Any
    filters: FilterSet
    expires_at: float | None


class ClientAccess:
    """The access list of one client. It outlives connections; only revocation, expiry or goodbye end it."""

    def __init__(self, client_ips: tuple[bytes, bytes], own_ips: tuple[bytes, bytes]) -> None:
        self.client_ips = client_ips
        self.own_ips = own_ips
        self._grants: dict[str, Grant] = {}
        self._routes = RoutingTable()
        self._has_internet = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is granted."""
        return not self._grants

    @property
    def resource_ids(self) -> set[str]:
        """Ids of all granted resources."""
        return set(self._grants)

    def grant(self, resource: Any, expires_at: float | None) -> bool:
        """Upsert a grant; of a known resource only filters and expiry change. False: refused, type differs."""
        known = self._grants.get(resource.id)
        if known is not None and type(known.resource) is not type(resource):
            return False
        if known is None:
            known = self._grants[resource.id] = Grant(resource, FilterSet(_filters(resource)), expires_at)
        known.expires_at = expires_at
        self._set_filters(known, resource)
        return True

    def update_filters(self, resource: Any) -> None:
        """The resource's filters changed at the portal."""
        known = self._grants.get(resource.id)
        if known is not None and type(known.resource) is type(resource):
            self._set_filters(known, resource)

    def set_expiry(self, resource_id: str, expires_at: float | None) -> None:
        """Move the deadline of a grant either way."""
        if resource_id in self._grants:
            self._grants[resource_id].expires_at = expires_at

    def revoke(self, resource_id: str) -> bool:
        """End a grant; whether it existed."""
        if self._grants.pop(resource_id, None) is None:
            return False
        self._routes.remove_resource(resource_id)
        self._has_internet = any(isinstance(g.resource, InternetResource) for g in self._grants.values())
        return True

    def expire(self, now: float) -> list[str]:
        """End every grant whose time has come; their ids."""
        due = [i for i, g in self._grants.items() if g.expires_at is not None and g.expires_at <= now]
        for resource_id in due:
            self.revoke(resource_id)
        return due

    def next_expiry(self) -> float | None:
        """The earliest deadline."""
        return min((g.expires_at for g in self._grants.values() if g.expires_at is not None), default=None)

    def decide(self, packet: Packet) -> Decision | DropReason:
        """A packet from the client, in the order of §14."""
        dst = packet.dst
        if is_multicast(dst):
            return Decision.IGNORE
        if packet.is_fz_control:
            return Decision.CONTROL
        if packet.is_icmp_error:
            return DropReason.OUTBOUND_ICMP_ERROR
        if packet.src not in self.client_ips:
            return Decision.PROHIBITED
        if dst in self.own_ips:
            return Decision.PASS
        if dst in PEER_RANGE:
            return Decision.PROHIBITED
        if self._has_internet and dst not in PROXY_RANGE:
            return Decision.UNREACHABLE if dst in INTERNET_REJECTED_RANGE else Decision.PASS
        verdict = self._routes.lookup(dst, *outbound(packet))
        return Decision.PASS if verdict is not None and verdict.allowed else Decision.PROHIBITED

    def admits(self, packet: Packet) -> bool:
        """Whether a packet of this host or its network may go to the client (§14, from TUN)."""
        src = packet.src
        if src in self.own_ips:
            return True
        if packet.dst not in self.client_ips or src in PEER_RANGE:
            return False
        if packet.is_icmp_error:
            return True
        if not is_classifiable(packet):
            return False
        if self._has_internet and src not in PROXY_RANGE:
            return src not in INTERNET_REJECTED_RANGE
        verdict = self._routes.lookup(src, *inbound(packet))
        return verdict is not None and verdict.allowed

    def _set_filters(self, grant: Grant, resource: Any) -> None:
        grant.filters = FilterSet(_filters(resource))
        if isinstance(grant.resource, CidrResource):
            self._routes.add(Route(grant.resource.address, grant.resource.id, grant.filters))
        elif isinstance(grant.resource, InternetResource):
            self._has_internet = True


def _filters(resource: Any) -> Any:
    return getattr(resource, "filters", ())
