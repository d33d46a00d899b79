"""What a tunnel tells its owner. All frozen; ids are the portal's UUIDs as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from fz_core.dns import DnsRecord
from fz_core.portal.types import FlowLogs
from fz_core.tunnel.ranges import Network
from fz_core.tunnel.status import DeviceView, ResourceView


@dataclass(frozen=True, slots=True)
class SendToPortal:
    """A typed portal message (`fz_core.portal.client` or `.gateway`) to send."""

    message: Any


@dataclass(frozen=True, slots=True)
class TunConfigChanged:
    """The TUN device must get these addresses and routes, and the host's DNS these servers.

    `sentinels` are the addresses we answer DNS at, each with the upstream server or DoH URL behind it.
    """

    ipv4: IPv4Address
    ipv6: IPv6Address
    routes: frozenset[Network]
    search_domain: str | None = None
    sentinels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class FlowLogsConfigured:
    """Where the portal wants flow logs, and how often."""

    settings: FlowLogs


@dataclass(frozen=True, slots=True)
class ResourcesChanged:
    """Client: every resource with its status, and the devices of pools that are connected."""

    resources: tuple[ResourceView, ...]
    devices: tuple[DeviceView, ...]


@dataclass(frozen=True, slots=True)
class ForwardQuery:
    """Client: a DNS message for a server, or a DoH `url`; the reply goes to `handle_dns_result(token, …)`.

    Through the tunnel if `via_tunnel`, else past it. `payload` is the message.
    """

    token: int
    server: bytes | None
    port: int
    url: str | None
    tcp: bool
    via_tunnel: bool
    payload: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class DnsDecision:
    """Client: how a question is answered: `resource`, `device`, `site`, `tunnel` or `local`.

    Told once per name and type until the resources change. `rdtype` is the number of the record type.
    """

    name: str
    rdtype: int
    decision: str
    resource_id: str | None = None


@dataclass(frozen=True, slots=True)
class DnsRecordsChanged:
    """Client: names that got proxy addresses; the whole table is `ClientTunnel.dns_records`."""

    records: tuple[DnsRecord, ...]


@dataclass(frozen=True, slots=True)
class ResolveName:
    """Gateway: look up the addresses of a name; they go to `handle_name_resolved(token, …)`."""

    token: int
    name: str


@dataclass(frozen=True, slots=True)
class PacketsDropped:
    """Drops since the start by reason, told at most once a second while there are new ones."""

    totals: tuple[tuple[str, int], ...]


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


@dataclass(frozen=True, slots=True)
class CheckPortal:
    """A peer fell silent, so the network under us may have changed: does the portal still answer?"""


@dataclass(frozen=True, slots=True)
class PathMtuChanged:
    """The path to a peer lets inner packets of at most `inner_mtu` bytes pass; 1280 is everything."""

    peer_id: str
    inner_mtu: int


@dataclass(frozen=True, slots=True)
class ResetWanted:
    """Client: only beginning anew under another key can help; at most once a minute."""

    reason: str


TunnelEvent = (
    SendToPortal
    | CheckPortal
    | ResetWanted
    | FlowLogsConfigured
    | TunConfigChanged
    | ResourcesChanged
    | ForwardQuery
    | DnsDecision
    | DnsRecordsChanged
    | ResolveName
    | PacketsDropped
    | ConnectionUp
    | ConnectionDown
    | PathInUse
    | PathMtuChanged
    | ResourceActivated
    | ResourceDeactivated
    | ResourceOffline
    | AccessGranted
    | AccessEnded
)
