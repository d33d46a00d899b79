"""What a client and a portal say to each other (`spec/portal-protocol.md` §5, legacy names §9)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address

from fz_core.portal import types as t

# client to portal


@dataclass(frozen=True, slots=True)
class SetSnownetCapabilities:
    """What this peer's connections can do; sent after every join."""

    iceless: bool


@dataclass(frozen=True, slots=True)
class RequestAuthorization:
    """Ask for access to a resource; for a device of a pool with its address."""

    resource_id: str
    connected_gateway_ids: tuple[str, ...] = ()
    ipv4: IPv4Address | None = None
    ipv6: IPv6Address | None = None


@dataclass(frozen=True, slots=True)
class ResolveDevicePoolDomain:
    """Ask which device a name of a dynamic pool means."""

    resource_id: str
    domain: str


@dataclass(frozen=True, slots=True)
class NewGatewayIceCandidates:
    """Candidates of ours for a gateway."""

    gateway_id: str
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WithdrawGatewayIceCandidates:
    """Candidates of ours that a gateway must forget."""

    gateway_id: str
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NewClientIceCandidates:
    """Candidates of ours for another client."""

    client_id: str
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WithdrawClientIceCandidates:
    """Candidates of ours that another client must forget."""

    client_id: str
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BroadcastIceCandidates:
    """What clients before 1.5.7 say instead of `NewGatewayIceCandidates`."""

    gateway_ids: tuple[str, ...]
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BroadcastInvalidatedIceCandidates:
    """What clients before 1.5.7 say instead of `WithdrawGatewayIceCandidates`."""

    gateway_ids: tuple[str, ...]
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NoRelays:
    """The last relay is lost, or there is none to connect with."""


Outbound = (
    SetSnownetCapabilities
    | RequestAuthorization
    | ResolveDevicePoolDomain
    | NewGatewayIceCandidates
    | WithdrawGatewayIceCandidates
    | NewClientIceCandidates
    | WithdrawClientIceCandidates
    | BroadcastIceCandidates
    | BroadcastInvalidatedIceCandidates
    | NoRelays
)

# portal to client


class FailReason(StrEnum):
    """Why access was not given; anything the portal may invent is UNKNOWN."""

    NOT_FOUND = "not_found"
    OFFLINE = "offline"
    VERSION_MISMATCH = "version_mismatch"
    FORBIDDEN = "forbidden"
    DISABLED = "disabled"
    AMBIGUOUS_ADDRESS = "ambiguous_address"
    MISSING_ADDRESS = "missing_address"
    INVALID_ADDRESS = "invalid_address"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Init:
    """The whole state; sent after a join and whenever the client must resynchronise.

    `skipped` says which resources could not be read; the rest of the list stands.
    """

    interface: t.Interface
    resources: tuple[t.Resource, ...] = ()
    relays: tuple[t.Relay, ...] = ()
    authorizations: tuple[t.Authorization, ...] = ()
    flow_logs: t.FlowLogs = t.NO_FLOW_LOGS
    skipped: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class ConfigChanged:
    """Addresses or DNS changed."""

    interface: t.Interface


@dataclass(frozen=True, slots=True)
class ResourceCreatedOrUpdated:
    """Upsert of one resource."""

    resource: t.Resource


@dataclass(frozen=True, slots=True)
class ResourceDeleted:
    """A resource is gone."""

    resource_id: str


@dataclass(frozen=True, slots=True)
class RelaysPresence:
    """Relays to forget, and relays to add or update."""

    disconnected_ids: tuple[str, ...]
    connected: tuple[t.Relay, ...]


@dataclass(frozen=True, slots=True)
class AuthorizationCreated:
    """Access was given through this gateway."""

    resource_id: str
    gateway_id: str
    site_id: str
    gateway_public_key: bytes
    gateway_ipv4: IPv4Address
    gateway_ipv6: IPv6Address
    preshared_key: bytes = field(repr=False)
    client_ice_credentials: t.IceCredentials
    gateway_ice_credentials: t.IceCredentials
    use_iceless: bool = False
    ingest_token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class AuthorizationCreationFailed:
    """Access was not given."""

    resource_id: str
    reason: FailReason
    violated_properties: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GatewayIceCandidates:
    """A gateway's candidates."""

    gateway_id: str
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InvalidateGatewayIceCandidates:
    """A gateway's candidates to forget."""

    gateway_id: str
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClientIceCandidates:
    """Another client's candidates."""

    client_id: str
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InvalidateClientIceCandidates:
    """Another client's candidates to forget."""

    client_id: str
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClientIceCandidateError:
    """Candidates could not be delivered to another client."""

    client_id: str
    reason: FailReason


@dataclass(frozen=True, slots=True)
class PoolGrant:
    """Target side of a device access: what the other client may reach here."""

    resource_id: str
    filters: tuple[t.Filter, ...]


@dataclass(frozen=True, slots=True)
class ClientDeviceAccessAuthorized:
    """Two clients may talk; both get this, the target with `resource`."""

    client_id: str
    client_name: str
    client_public_key: bytes
    client_ipv4: IPv4Address
    client_ipv6: IPv6Address
    preshared_key: bytes = field(repr=False)
    local_ice_credentials: t.IceCredentials
    remote_ice_credentials: t.IceCredentials
    is_controlling: bool
    use_iceless: bool = False
    resource: PoolGrant | None = None
    expires_at: int | None = None
    ingest_token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class ClientDeviceAccessDenied:
    """Two clients may not, or no longer, talk."""

    ipv4: IPv4Address | None
    ipv6: IPv6Address | None
    reason: FailReason


@dataclass(frozen=True, slots=True)
class DevicePoolDomainResolved:
    """The device a name of a dynamic pool means."""

    resource_id: str
    domain: str
    ipv4: IPv4Address
    ipv6: IPv6Address


@dataclass(frozen=True, slots=True)
class DevicePoolDomainResolutionFailed:
    """A name of a dynamic pool means no device."""

    resource_id: str
    domain: str
    reason: FailReason


@dataclass(frozen=True, slots=True)
class ResourceFiltersUpdated:
    """What other clients may reach here through a pool."""

    resource_id: str
    filters: tuple[t.Filter, ...]


@dataclass(frozen=True, slots=True)
class RejectAccess:
    """Another client may no longer reach us through a pool."""

    client_id: str
    resource_id: str


@dataclass(frozen=True, slots=True)
class Obsolete:
    """Read and ignored."""

    event: str


Inbound = (
    Init
    | ConfigChanged
    | ResourceCreatedOrUpdated
    | ResourceDeleted
    | RelaysPresence
    | AuthorizationCreated
    | AuthorizationCreationFailed
    | GatewayIceCandidates
    | InvalidateGatewayIceCandidates
    | ClientIceCandidates
    | InvalidateClientIceCandidates
    | ClientIceCandidateError
    | ClientDeviceAccessAuthorized
    | ClientDeviceAccessDenied
    | DevicePoolDomainResolved
    | DevicePoolDomainResolutionFailed
    | ResourceFiltersUpdated
    | RejectAccess
    | Obsolete
)
