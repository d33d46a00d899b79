"""What a tunnel tells its owner. All frozen; ids are the portal's UUIDs as text."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from fz_core.tunnel.ranges import Network


@dataclass(frozen=True, slots=True)
class SendToPortal:
    """A typed portal message (`fz_core.portal.client` or `.gateway`) to send."""

    message: Any


@dataclass(frozen=True, slots=True)
class TunConfigChanged:
    """The TUN device must get these addresses and routes."""

    ipv4: IPv4Address
    ipv6: IPv6Address
    routes: frozenset[Network]
    search_domain: str | None = None


@dataclass(frozen=True, slots=True)
class ConnectionUp:
    """Packets can travel to and from this peer."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class ConnectionDown:
    """The peer's connection is gone."""

    peer_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class PathInUse:
    """Data to this peer now travels between these sockets."""

    peer_id: str
    local: str
    remote: str
    relayed: bool


@dataclass(frozen=True, slots=True)
class ResourceActivated:
    """A resource can now be used."""

    resource_id: str
    name: str
    address: str


@dataclass(frozen=True, slots=True)
class ResourceDeactivated:
    """A resource is gone."""

    resource_id: str
    name: str


@dataclass(frozen=True, slots=True)
class ResourceOffline:
    """The portal found no gateway for a resource."""

    resource_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class AccessGranted:
    """Gateway: a client may use a resource until `expires_at` (unix seconds; None means for ever)."""

    client_id: str
    resource_id: str
    expires_at: float | None


@dataclass(frozen=True, slots=True)
class AccessEnded:
    """Gateway: a grant was revoked or has expired."""

    client_id: str
    resource_id: str
    reason: str


TunnelEvent = (
    SendToPortal
    | TunConfigChanged
    | ConnectionUp
    | ConnectionDown
    | PathInUse
    | ResourceActivated
    | ResourceDeactivated
    | ResourceOffline
    | AccessGranted
    | AccessEnded
)
