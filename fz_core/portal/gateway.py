"""What a gateway and a portal say to each other (`spec/portal-protocol.md` §6, legacy names §9).

`RequestConnection`, `AllowAccess` and `ConnectionReady` serve clients before 1.4, who choose their own ICE
credentials and preshared key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from fz_core.portal import types as t
from fz_core.portal.client import NoRelays, Obsolete, RejectAccess, RelaysPresence, SetSnownetCapabilities
from fz_core.portal.client_wire import read_lines, read_presence, write_presence
from fz_core.portal.codec import Codec

# gateway to portal


@dataclass(frozen=True, slots=True)
class AuthorizationCreated:
    """The grant named by `ref` is installed."""

    ref: str


@dataclass(frozen=True, slots=True)
class BroadcastIceCandidates:
    """Candidates of ours for these clients."""

    client_ids: tuple[str, ...]
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BroadcastInvalidatedIceCandidates:
    """Candidates of ours that these clients must forget."""

    client_ids: tuple[str, ...]
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ConnectionReady:
    """Answer to a `RequestConnection`: our ICE credentials, of our own choice."""

    ref: str
    ice_credentials: t.IceCredentials


Outbound = (
    SetSnownetCapabilities
    | AuthorizationCreated
    | ConnectionReady
    | BroadcastIceCandidates
    | BroadcastInvalidatedIceCandidates
    | NoRelays
)

# portal to gateway

GatewayResource = t.DnsResource | t.CidrResource | t.InternetResource


@dataclass(frozen=True, slots=True)
class Init:
    """The whole state. Every grant not listed in `authorizations` is revoked."""

    interface: t.GatewayInterface
    relays: tuple[t.Relay, ...] = ()
    authorizations: tuple[t.Authorization, ...] = ()
    account_slug: str | None = None
    flow_logs: t.FlowLogs = t.NO_FLOW_LOGS


@dataclass(frozen=True, slots=True)
class Client:
    """The client of an authorization; `details` are for flow logs."""

    id: str
    public_key: bytes
    preshared_key: bytes = field(repr=False)
    ipv4: IPv4Address
    ipv6: IPv6Address
    details: tuple[tuple[str, Any], ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class CreateAuthorization:
    """Let a client use a resource, and connect to it."""

    ref: str
    client: Client
    resource: GatewayResource
    client_ice_credentials: t.IceCredentials
    gateway_ice_credentials: t.IceCredentials
    expires_at: int | None
    use_iceless: bool = False
    ingest_token: str = field(default="", repr=False)
    subject: tuple[tuple[str, Any], ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class ResourceUpdated:
    """New filters of a resource."""

    resource: GatewayResource


@dataclass(frozen=True, slots=True)
class IceCandidates:
    """A client's candidates."""

    client_id: str
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InvalidateIceCandidates:
    """A client's candidates to forget."""

    client_id: str
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RequestConnection:
    """A client before 1.4 wants a connection, and one resource through it; `ConnectionReady` answers.

    `domain` is set for a DNS resource: the name the client just resolved.
    """

    ref: str
    client: Client
    resource: GatewayResource
    client_ice_credentials: t.IceCredentials
    expires_at: int | None
    domain: t.ProxiedName | None = None
    persistent_keepalive: int | None = None


@dataclass(frozen=True, slots=True)
class AllowAccess:
    """A connected client before 1.4 wants one more resource, or one more name of it. Nobody waits for an answer."""

    ref: str
    client_id: str
    client_ipv4: IPv4Address
    client_ipv6: IPv6Address
    resource: GatewayResource
    expires_at: int | None
    domain: t.ProxiedName | None = None


Inbound = (
    Init
    | CreateAuthorization
    | RequestConnection
    | AllowAccess
    | RejectAccess
    | ResourceUpdated
    | IceCandidates
    | InvalidateIceCandidates
    | RelaysPresence
    | Obsolete
)


def _read_init(p: Any) -> Init:
    p["config"]  # required, though its values are not used
    interface = p["interface"]
    return Init(
        t.GatewayInterface(t.read_ipv4(interface["ipv4"]), t.read_ipv6(interface["ipv6"])),
        t.read_relays(p.get("relays") or []),
        t.read_authorizations(p.get("authorizations") or []),
        t.read_optional_text(p.get("account_slug")),
        t.read_flow_logs(p["flow_logs"]),
    )


def _read_authorization(p: Any) -> CreateAuthorization:
    c = p["client"]
    known = ("id", "public_key", "preshared_key", "ipv4", "ipv6")
    return CreateAuthorization(
        t.read_text(p["ref"]),
        Client(
            t.read_id(c["id"]),
            t.read_key(c["public_key"]),
            t.read_key(c["preshared_key"]),
            t.read_ipv4(c["ipv4"]),
            t.read_ipv6(c["ipv6"]),
            tuple((k, v) for k, v in c.items() if k not in known),
        ),
        t.read_gateway_resource(p["resource"]),
        t.read_credentials(p["client_ice_credentials"]),
        t.read_credentials(p["gateway_ice_credentials"]),
        t.read_optional_int(p.get("expires_at")),
        t.read_bool(p.get("use_iceless", False)),
        t.read_ingest_token(p["flow_logs_ingest_token"]),
        tuple((p.get("subject") or {}).items()),
    )


def _read_connection(p: Any) -> RequestConnection:
    client, payload = p["client"], p["client"]["payload"]
    peer = client["peer"]
    return RequestConnection(
        t.read_text(p["ref"]),
        Client(
            t.read_id(client["id"]),
            t.read_key(peer["public_key"]),
            t.read_key(peer["preshared_key"]),
            t.read_ipv4(peer["ipv4"]),
            t.read_ipv6(peer["ipv6"]),
        ),
        t.read_gateway_resource(p["resource"]),
        t.read_credentials(payload["ice_parameters"]),
        t.read_optional_int(p.get("expires_at")),
        t.read_proxied_name(payload.get("domain")),
        t.read_optional_int(peer.get("persistent_keepalive")),
    )


def _read_access(p: Any) -> AllowAccess:
    return AllowAccess(
        t.read_text(p["ref"]),
        t.read_id(p["client_id"]),
        t.read_ipv4(p["client_ipv4"]),
        t.read_ipv6(p["client_ipv6"]),
        t.read_gateway_resource(p["resource"]),
        t.read_optional_int(p.get("expires_at")),
        t.read_proxied_name(p.get("payload")),
    )


def _read_ready(p: Any) -> ConnectionReady:
    return ConnectionReady(t.read_text(p["ref"]), t.read_gateway_payload(p["gateway_payload"]))


def _write_init(m: Init) -> Any:
    return {
        "interface": {"ipv4": str(m.interface.ipv4), "ipv6": str(m.interface.ipv6)},
        "config": {"ipv4_masquerade_enabled": True, "ipv6_masquerade_enabled": True},
        "relays": [t.write_relay(r) for r in m.relays],
        "authorizations": [t.write_authorization(a) for a in m.authorizations],
        "account_slug": m.account_slug,
        "flow_logs": t.write_flow_logs(m.flow_logs),
    }


def _write_authorization(m: CreateAuthorization) -> Any:
    return {
        "ref": m.ref,
        "client": {
            "id": m.client.id,
            "public_key": t.write_key(m.client.public_key),
            "preshared_key": t.write_key(m.client.preshared_key),
            "ipv4": str(m.client.ipv4),
            "ipv6": str(m.client.ipv6),
            **dict(m.client.details),
        },
        "resource": t.write_gateway_resource(m.resource),
        "client_ice_credentials": t.write_credentials(m.client_ice_credentials),
        "gateway_ice_credentials": t.write_credentials(m.gateway_ice_credentials),
        "expires_at": m.expires_at,
        "use_iceless": m.use_iceless,
        "flow_logs_ingest_token": m.ingest_token,
        "subject": dict(m.subject),
    }


def _write_connection(m: RequestConnection) -> Any:
    peer = {
        "persistent_keepalive": m.persistent_keepalive,
        "public_key": t.write_key(m.client.public_key),
        "preshared_key": t.write_key(m.client.preshared_key),
        "ipv4": str(m.client.ipv4),
        "ipv6": str(m.client.ipv6),
    }
    payload = {
        "ice_parameters": t.write_credentials(m.client_ice_credentials),
        "domain": t.write_proxied_name(m.domain),
    }
    return {
        "ref": m.ref,
        "client": {"id": m.client.id, "payload": payload, "peer": peer},
        "resource": t.write_gateway_resource(m.resource),
        "expires_at": m.expires_at,
    }


def _write_access(m: AllowAccess) -> Any:
    return {
        "ref": m.ref,
        "client_id": m.client_id,
        "client_ipv4": str(m.client_ipv4),
        "client_ipv6": str(m.client_ipv6),
        "resource": t.write_gateway_resource(m.resource),
        "expires_at": m.expires_at,
        "payload": t.write_proxied_name(m.domain),
    }


def _write_ready(m: ConnectionReady) -> Any:
    return {"ref": m.ref, "gateway_payload": t.write_gateway_payload(m.ice_credentials)}


def _broadcast(kind: Any) -> Any:
    def read(p: Any) -> Any:
        return kind(tuple(t.read_id(i) for i in t.read_list(p["client_ids"])), read_lines(p["candidates"]))

    return read


def _write_broadcast(m: Any) -> Any:
    return {"client_ids": list(m.client_ids), "candidates": list(m.candidates)}


def _write_candidates(m: Any) -> Any:
    return {"client_id": m.client_id, "candidates": list(m.candidates)}


TO_PORTAL = Codec(
    readers={
        "set_snownet_capabilities": lambda p: SetSnownetCapabilities(p.get("iceless", False) is True),
        "authorization_created": lambda p: AuthorizationCreated(t.read_text(p["ref"])),
        "connection_ready": _read_ready,
        "broadcast_ice_candidates": _broadcast(BroadcastIceCandidates),
        "broadcast_invalidated_ice_candidates": _broadcast(BroadcastInvalidatedIceCandidates),
        "no_relays": lambda p: NoRelays(),
    },
    writers={
        SetSnownetCapabilities: ("set_snownet_capabilities", lambda m: {"iceless": m.iceless}),
        AuthorizationCreated: ("authorization_created", lambda m: {"ref": m.ref}),
        ConnectionReady: ("connection_ready", _write_ready),
        BroadcastIceCandidates: ("broadcast_ice_candidates", _write_broadcast),
        BroadcastInvalidatedIceCandidates: ("broadcast_invalidated_ice_candidates", _write_broadcast),
        NoRelays: ("no_relays", lambda m: {}),
    },
    legacy={"authorization_created": "flow_authorized"},
)

TO_GATEWAY = Codec(
    readers={
        "init": _read_init,
        "create_authorization": _read_authorization,
        "request_connection": _read_connection,
        "allow_access": _read_access,
        "reject_access": lambda p: RejectAccess(t.read_id(p["client_id"]), t.read_id(p["resource_id"])),
        "resource_updated": lambda p: ResourceUpdated(t.read_gateway_resource(p)),
        "ice_candidates": lambda p: IceCandidates(t.read_id(p["client_id"]), read_lines(p["candidates"])),
        "invalidate_ice_candidates": lambda p: InvalidateIceCandidates(
            t.read_id(p["client_id"]), read_lines(p["candidates"])
        ),
        "relays_presence": read_presence,
        "access_authorization_expiry_updated": lambda p: Obsolete("access_authorization_expiry_updated"),
    },
    writers={
        Init: ("init", _write_init),
        CreateAuthorization: ("create_authorization", _write_authorization),
        RequestConnection: ("request_connection", _write_connection),
        AllowAccess: ("allow_access", _write_access),
        RejectAccess: ("reject_access", lambda m: {"client_id": m.client_id, "resource_id": m.resource_id}),
        ResourceUpdated: ("resource_updated", lambda m: t.write_gateway_resource(m.resource)),
        IceCandidates: ("ice_candidates", _write_candidates),
        InvalidateIceCandidates: ("invalidate_ice_candidates", _write_candidates),
        RelaysPresence: ("relays_presence", write_presence),
    },
    legacy={"create_authorization": "authorize_flow"},
)
