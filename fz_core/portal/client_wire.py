"""A client's messages as events and payloads (`spec/portal-protocol.md` §5, legacy names §9)."""

from __future__ import annotations

from typing import Any

from fz_core.portal import client_legacy
from fz_core.portal import types as t
from fz_core.portal.client import (
    AuthorizationCreated,
    AuthorizationCreationFailed,
    BroadcastIceCandidates,
    BroadcastInvalidatedIceCandidates,
    ClientDeviceAccessAuthorized,
    ClientDeviceAccessDenied,
    ClientIceCandidateError,
    ClientIceCandidates,
    ConfigChanged,
    DevicePoolDomainResolutionFailed,
    DevicePoolDomainResolved,
    FailReason,
    GatewayIceCandidates,
    Init,
    InvalidateClientIceCandidates,
    InvalidateGatewayIceCandidates,
    NewClientIceCandidates,
    NewGatewayIceCandidates,
    NoRelays,
    Obsolete,
    PoolGrant,
    RejectAccess,
    RelaysPresence,
    RequestAuthorization,
    ResolveDevicePoolDomain,
    ResourceCreatedOrUpdated,
    ResourceDeleted,
    ResourceFiltersUpdated,
    SetSnownetCapabilities,
    WithdrawClientIceCandidates,
    WithdrawGatewayIceCandidates,
)
from fz_core.portal.codec import Codec


def read_lines(value: Any) -> tuple[str, ...]:
    """A list of strings."""
    return tuple(t.read_text(line) for line in t.read_list(value))


def read_reason(value: Any) -> FailReason:
    """A reason, known or not."""
    text = t.read_text(value)
    return FailReason(text) if text in FailReason.__members__.values() else FailReason.UNKNOWN


def _read_resources(value: Any) -> tuple[tuple[t.Resource, ...], tuple[str, ...]]:
    resources, skipped = [], []
    for entry in t.read_list(value):
        try:
            resource = t.read_resource(entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            skipped.append(f"{type(error).__name__}: {error}")
            continue
        if resource is not None:
            resources.append(resource)
    return tuple(resources), tuple(skipped)


def _read_init(p: Any) -> Init:
    resources, skipped = _read_resources(p.get("resources") or [])
    return Init(
        t.read_interface(p["interface"]),
        resources,
        t.read_relays(p.get("relays") or []),
        t.read_authorizations(p.get("authorizations") or []),
        t.read_flow_logs(p["flow_logs"]),
        skipped,
    )


def _read_resource(p: Any) -> ResourceCreatedOrUpdated | Obsolete:
    resource = t.read_resource(p)
    return Obsolete("resource of an unknown type") if resource is None else ResourceCreatedOrUpdated(resource)


def read_presence(p: Any) -> RelaysPresence:
    """`relays_presence`, the same for clients and gateways."""
    gone = tuple(t.read_id(i) for i in t.read_list(p["disconnected_ids"]))
    return RelaysPresence(gone, t.read_relays(p["connected"]))


def _read_created(p: Any) -> AuthorizationCreated:
    if "gateway_group_id" in p and "site_id" in p:
        raise ValueError("both gateway_group_id and site_id")
    return AuthorizationCreated(
        t.read_id(p["resource_id"]),
        t.read_id(p["gateway_id"]),
        t.read_id(p["gateway_group_id"] if "gateway_group_id" in p else p["site_id"]),
        t.read_key(p["gateway_public_key"]),
        t.read_ipv4(p["gateway_ipv4"]),
        t.read_ipv6(p["gateway_ipv6"]),
        t.read_key(p["preshared_key"]),
        t.read_credentials(p["client_ice_credentials"]),
        t.read_credentials(p["gateway_ice_credentials"]),
        t.read_bool(p.get("use_iceless", False)),
        t.read_ingest_token(p["flow_logs_ingest_token"]),
    )


def _read_device_access(p: Any) -> ClientDeviceAccessAuthorized:
    role = t.read_text(p["ice_role"])
    if role not in ("controlling", "controlled"):
        raise ValueError(f"unknown ICE role {role}")
    resource = p.get("resource")
    grant = PoolGrant(t.read_id(resource["id"]), t.read_filters(resource["filters"])) if resource else None
    return ClientDeviceAccessAuthorized(
        t.read_id(p["client_id"]),
        t.read_text(p["client_name"]),
        t.read_key(p["client_public_key"]),
        t.read_ipv4(p["client_ipv4"]),
        t.read_ipv6(p["client_ipv6"]),
        t.read_key(p["preshared_key"]),
        t.read_credentials(p["local_ice_credentials"]),
        t.read_credentials(p["remote_ice_credentials"]),
        role == "controlling",
        t.read_bool(p.get("use_iceless", False)),
        grant,
        t.read_optional_int(p.get("expires_at")),
        t.read_ingest_token(p["flow_logs_ingest_token"]),
    )


def _read_denied(p: Any) -> ClientDeviceAccessDenied:
    v4, v6 = p.get("ipv4"), p.get("ipv6")
    return ClientDeviceAccessDenied(
        None if v4 is None else t.read_ipv4(v4),
        None if v6 is None else t.read_ipv6(v6),
        read_reason(p["reason"]),
    )


def _broadcast(kind: Any) -> Any:
    return lambda p: kind(tuple(t.read_id(i) for i in t.read_list(p["gateway_ids"])), read_lines(p["candidates"]))


def _write_broadcast(m: Any) -> Any:
    return {"gateway_ids": list(m.gateway_ids), "candidates": list(m.candidates)}


def _candidates(kind: Any, peer: str) -> Any:
    return lambda p: kind(t.read_id(p[peer]), read_lines(p["candidates"]))


def _write_candidates(peer: str) -> Any:
    return lambda m: {peer: getattr(m, peer), "candidates": list(m.candidates)}


def _write_request(m: RequestAuthorization) -> Any:
    device = {"ipv4": m.ipv4, "ipv6": m.ipv6}
    return {
        "resource_id": m.resource_id,
        "connected_gateway_ids": list(m.connected_gateway_ids),
        **{family: str(ip) for family, ip in device.items() if ip is not None},
    }


def _read_request(p: Any) -> RequestAuthorization:
    v4, v6 = p.get("ipv4"), p.get("ipv6")
    return RequestAuthorization(
        t.read_id(p["resource_id"]),
        tuple(t.read_id(i) for i in t.read_list(p.get("connected_gateway_ids") or [])),
        None if v4 is None else t.read_ipv4(v4),
        None if v6 is None else t.read_ipv6(v6),
    )


LEGACY_TO_PORTAL = {"request_authorization": "create_flow"}
LEGACY_TO_CLIENT = {
    "authorization_created": "flow_created",
    "authorization_creation_failed": "flow_creation_failed",
}

TO_PORTAL = Codec(
    readers={
        "set_snownet_capabilities": lambda p: SetSnownetCapabilities(p.get("iceless", False) is True),
        "request_authorization": _read_request,
        "resolve_device_pool_domain": lambda p: ResolveDevicePoolDomain(
            t.read_id(p["resource_id"]), t.read_text(p["domain"])
        ),
        "new_gateway_ice_candidates": _candidates(NewGatewayIceCandidates, "gateway_id"),
        "invalidate_gateway_ice_candidates": _candidates(WithdrawGatewayIceCandidates, "gateway_id"),
        "new_client_ice_candidates": _candidates(NewClientIceCandidates, "client_id"),
        "invalidate_client_ice_candidates": _candidates(WithdrawClientIceCandidates, "client_id"),
        "broadcast_ice_candidates": _broadcast(BroadcastIceCandidates),
        "broadcast_invalidated_ice_candidates": _broadcast(BroadcastInvalidatedIceCandidates),
        "no_relays": lambda p: NoRelays(),
        **client_legacy.READERS,
    },
    writers={
        SetSnownetCapabilities: ("set_snownet_capabilities", lambda m: {"iceless": m.iceless}),
        RequestAuthorization: ("request_authorization", _write_request),
        ResolveDevicePoolDomain: (
            "resolve_device_pool_domain",
            lambda m: {"resource_id": m.resource_id, "domain": m.domain},
        ),
        NewGatewayIceCandidates: ("new_gateway_ice_candidates", _write_candidates("gateway_id")),
        WithdrawGatewayIceCandidates: ("invalidate_gateway_ice_candidates", _write_candidates("gateway_id")),
        NewClientIceCandidates: ("new_client_ice_candidates", _write_candidates("client_id")),
        WithdrawClientIceCandidates: ("invalidate_client_ice_candidates", _write_candidates("client_id")),
        BroadcastIceCandidates: ("broadcast_ice_candidates", _write_broadcast),
        BroadcastInvalidatedIceCandidates: ("broadcast_invalidated_ice_candidates", _write_broadcast),
        NoRelays: ("no_relays", lambda m: {}),
        **client_legacy.WRITERS,
    },
    legacy=LEGACY_TO_PORTAL,
)

_GATEWAY_ICE = _candidates(GatewayIceCandidates, "gateway_id")
_GATEWAY_ICE_GONE = _candidates(InvalidateGatewayIceCandidates, "gateway_id")


def _write_init(m: Init) -> Any:
    return {
        "interface": t.write_interface(m.interface),
        "resources": [t.write_resource(r) for r in m.resources],
        "relays": [t.write_relay(r) for r in m.relays],
        "authorizations": [t.write_authorization(a) for a in m.authorizations],
        "flow_logs": t.write_flow_logs(m.flow_logs),
    }


def write_presence(m: RelaysPresence) -> Any:
    """`relays_presence`, the same for clients and gateways."""
    return {
        "disconnected_ids": list(m.disconnected_ids),
        "connected": [t.write_relay(r) for r in m.connected],
    }


def _write_created(m: AuthorizationCreated) -> Any:
    return {
        "resource_id": m.resource_id,
        "gateway_id": m.gateway_id,
        "site_id": m.site_id,
        "gateway_public_key": t.write_key(m.gateway_public_key),
        "gateway_ipv4": str(m.gateway_ipv4),
        "gateway_ipv6": str(m.gateway_ipv6),
        "preshared_key": t.write_key(m.preshared_key),
        "client_ice_credentials": t.write_credentials(m.client_ice_credentials),
        "gateway_ice_credentials": t.write_credentials(m.gateway_ice_credentials),
        "use_iceless": m.use_iceless,
        "flow_logs_ingest_token": m.ingest_token,
    }


def _write_failed(m: AuthorizationCreationFailed) -> Any:
    fields: dict[str, Any] = {"resource_id": m.resource_id, "reason": m.reason.value}
    return fields | ({"violated_properties": list(m.violated_properties)} if m.violated_properties else {})


def _write_device_access(m: ClientDeviceAccessAuthorized) -> Any:
    fields: dict[str, Any] = {
        "client_id": m.client_id,
        "client_name": m.client_name,
        "client_public_key": t.write_key(m.client_public_key),
        "client_ipv4": str(m.client_ipv4),
        "client_ipv6": str(m.client_ipv6),
        "preshared_key": t.write_key(m.preshared_key),
        "local_ice_credentials": t.write_credentials(m.local_ice_credentials),
        "remote_ice_credentials": t.write_credentials(m.remote_ice_credentials),
        "ice_role": "controlling" if m.is_controlling else "controlled",
        "use_iceless": m.use_iceless,
        "flow_logs_ingest_token": m.ingest_token,
    }
    if m.resource is not None:
        filters = [t.write_filter(f) for f in m.resource.filters]
        fields["resource"] = {"id": m.resource.resource_id, "filters": filters}
        # Clients 1.5.9 and 1.5.10 read the second name.
        fields |= {"expires_at": m.expires_at, "authorization_expires_at": m.expires_at}
    return fields


def _write_ips(m: Any) -> dict[str, Any]:
    return {family: None if (ip := getattr(m, family)) is None else str(ip) for family in ("ipv4", "ipv6")}


TO_CLIENT = Codec(
    readers={
        "init": _read_init,
        "config_changed": lambda p: ConfigChanged(t.read_interface(p["interface"])),
        "resource_created_or_updated": _read_resource,
        "resource_deleted": lambda p: ResourceDeleted(t.read_id(p)),
        "relays_presence": read_presence,
        "authorization_created": _read_created,
        "authorization_creation_failed": lambda p: AuthorizationCreationFailed(
            t.read_id(p["resource_id"]),
            read_reason(p["reason"]),
            read_lines(p.get("violated_properties") or []),
        ),
        "ice_candidates": _GATEWAY_ICE,
        "gateway_ice_candidates": _GATEWAY_ICE,
        "invalidate_ice_candidates": _GATEWAY_ICE_GONE,
        "invalidate_gateway_ice_candidates": _GATEWAY_ICE_GONE,
        "client_ice_candidates": _candidates(ClientIceCandidates, "client_id"),
        "invalidate_client_ice_candidates": _candidates(InvalidateClientIceCandidates, "client_id"),
        "client_ice_candidate_error": lambda p: ClientIceCandidateError(
            t.read_id(p["client_id"]), read_reason(p["reason"])
        ),
        "client_device_access_authorized": _read_device_access,
        "client_device_access_denied": _read_denied,
        "device_pool_domain_resolved": lambda p: DevicePoolDomainResolved(
            t.read_id(p["resource_id"]),
            t.read_text(p["domain"]),
            t.read_ipv4(p["ipv4"]),
            t.read_ipv6(p["ipv6"]),
        ),
        "device_pool_domain_resolution_failed": lambda p: DevicePoolDomainResolutionFailed(
            t.read_id(p["resource_id"]), t.read_text(p["domain"]), read_reason(p["reason"])
        ),
        "resource_filters_updated": lambda p: ResourceFiltersUpdated(t.read_id(p["id"]), t.read_filters(p["filters"])),
        "reject_access": lambda p: RejectAccess(t.read_id(p["client_id"]), t.read_id(p["resource_id"])),
        "access_authorization_expiry_updated": lambda p: Obsolete("access_authorization_expiry_updated"),
    },
    writers={
        Init: ("init", _write_init),
        ConfigChanged: ("config_changed", lambda m: {"interface": t.write_interface(m.interface)}),
        ResourceCreatedOrUpdated: ("resource_created_or_updated", lambda m: t.write_resource(m.resource)),
        ResourceDeleted: ("resource_deleted", lambda m: m.resource_id),
        RelaysPresence: ("relays_presence", write_presence),
        AuthorizationCreated: ("authorization_created", _write_created),
        AuthorizationCreationFailed: ("authorization_creation_failed", _write_failed),
        GatewayIceCandidates: ("ice_candidates", _write_candidates("gateway_id")),
        InvalidateGatewayIceCandidates: ("invalidate_ice_candidates", _write_candidates("gateway_id")),
        ClientIceCandidates: ("client_ice_candidates", _write_candidates("client_id")),
        InvalidateClientIceCandidates: ("invalidate_client_ice_candidates", _write_candidates("client_id")),
        ClientIceCandidateError: (
            "client_ice_candidate_error",
            lambda m: {"client_id": m.client_id, "reason": m.reason.value},
        ),
        ClientDeviceAccessAuthorized: ("client_device_access_authorized", _write_device_access),
        ClientDeviceAccessDenied: (
            "client_device_access_denied",
            lambda m: {**_write_ips(m), "reason": m.reason.value},
        ),
        DevicePoolDomainResolved: (
            "device_pool_domain_resolved",
            lambda m: {"resource_id": m.resource_id, "domain": m.domain, **_write_ips(m)},
        ),
        DevicePoolDomainResolutionFailed: (
            "device_pool_domain_resolution_failed",
            lambda m: {"resource_id": m.resource_id, "domain": m.domain, "reason": m.reason.value},
        ),
        ResourceFiltersUpdated: (
            "resource_filters_updated",
            lambda m: {"id": m.resource_id, "filters": [t.write_filter(f) for f in m.filters]},
        ),
        RejectAccess: ("reject_access", lambda m: {"client_id": m.client_id, "resource_id": m.resource_id}),
    },
    legacy=LEGACY_TO_CLIENT,
)


def write_for_old_sites(event: str, payload: Any) -> Any:
    """The payload with sites under the names that older clients know (§8.9, first row)."""
    if event == "init":
        resources = [write_for_old_sites("resource_created_or_updated", r) for r in payload["resources"]]
        return {**payload, "resources": resources}
    old = {"resource_created_or_updated": ("sites", "gateway_groups")}.get(event)
    if event in ("authorization_created", "flow_created"):
        old = ("site_id", "gateway_group_id")
    if old is None or old[0] not in payload:
        return payload
    return {(old[1] if key == old[0] else key): value for key, value in payload.items()}
