"""What a client before 1.4 says to a portal, and the replies it waits for (`spec/portal-protocol.md` §9).

It asks which gateway to use (`PrepareConnection`), then that gateway for a connection (`RequestConnection`) or,
if it has one, for another resource (`ReuseConnection`). Each is answered by a reply to its frame, not by an event.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fz_core.portal import types as t
from fz_core.portal.codec import Reader, Writer

KEEPALIVE = 25


@dataclass(frozen=True, slots=True)
class PrepareConnection:
    """Which gateway should serve a resource? `ConnectionPrepared` answers."""

    resource_id: str
    connected_gateway_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestConnection:
    """Connect to a gateway, for a resource, with secrets of our own choice. `ConnectionAccepted` answers."""

    gateway_id: str
    resource_id: str
    ice_credentials: t.IceCredentials
    preshared_key: bytes = field(repr=False)
    domain: t.ProxiedName | None = None


@dataclass(frozen=True, slots=True)
class ReuseConnection:
    """Use a resource, or one more name of it, through a gateway we are connected to."""

    gateway_id: str
    resource_id: str
    domain: t.ProxiedName | None = None


@dataclass(frozen=True, slots=True)
class ConnectionPrepared:
    """The gateway to use, and the address it has on the internet."""

    resource_id: str
    site_id: str
    gateway_id: str
    gateway_remote_ip: str


@dataclass(frozen=True, slots=True)
class ConnectionAccepted:
    """The gateway agreed, and these are its secrets."""

    resource_id: str
    gateway_public_key: bytes
    gateway_ice_credentials: t.IceCredentials
    persistent_keepalive: int = KEEPALIVE


Outbound = PrepareConnection | RequestConnection | ReuseConnection
Reply = ConnectionPrepared | ConnectionAccepted


def read_reply(response: Any) -> Reply:
    """The `response` of an ok reply."""
    if "gateway_payload" not in response:
        return ConnectionPrepared(
            t.read_id(response["resource_id"]),
            t.read_id(response["site_id"]),
            t.read_id(response["gateway_id"]),
            t.read_text(response["gateway_remote_ip"]),
        )
    return ConnectionAccepted(
        t.read_id(response["resource_id"]),
        t.read_key(response["gateway_public_key"]),
        t.read_gateway_payload(response["gateway_payload"]),
        t.read_int(response["persistent_keepalive"]),
    )


def write_reply(reply: Reply) -> dict[str, Any]:
    """The `response` of an ok reply."""
    if isinstance(reply, ConnectionPrepared):
        return {
            "resource_id": reply.resource_id,
            "site_id": reply.site_id,
            "gateway_group_id": reply.site_id,  # the only name that clients before 1.4 know; those after never ask
            "gateway_id": reply.gateway_id,
            "gateway_remote_ip": reply.gateway_remote_ip,
        }
    return {
        "resource_id": reply.resource_id,
        "persistent_keepalive": reply.persistent_keepalive,
        "gateway_public_key": t.write_key(reply.gateway_public_key),
        "gateway_payload": t.write_gateway_payload(reply.gateway_ice_credentials),
    }


def _read_prepare(p: Any) -> PrepareConnection:
    connected = t.read_list(p.get("connected_gateway_ids") or [])
    return PrepareConnection(t.read_id(p["resource_id"]), tuple(t.read_id(i) for i in connected))


def _read_request(p: Any) -> RequestConnection:
    payload = p["client_payload"]
    return RequestConnection(
        t.read_id(p["gateway_id"]),
        t.read_id(p["resource_id"]),
        t.read_credentials(payload["ice_parameters"]),
        t.read_key(p["client_preshared_key"]),
        t.read_proxied_name(payload.get("domain")),
    )


def _read_reuse(p: Any) -> ReuseConnection:
    return ReuseConnection(
        t.read_id(p["gateway_id"]), t.read_id(p["resource_id"]), t.read_proxied_name(p.get("payload"))
    )


def _write_prepare(m: PrepareConnection) -> Any:
    return {"resource_id": m.resource_id, "connected_gateway_ids": list(m.connected_gateway_ids)}


def _write_request(m: RequestConnection) -> Any:
    return {
        "gateway_id": m.gateway_id,
        "resource_id": m.resource_id,
        "client_payload": {
            "ice_parameters": t.write_credentials(m.ice_credentials),
            "domain": t.write_proxied_name(m.domain),
        },
        "client_preshared_key": t.write_key(m.preshared_key),
    }


def _write_reuse(m: ReuseConnection) -> Any:
    return {"gateway_id": m.gateway_id, "resource_id": m.resource_id, "payload": t.write_proxied_name(m.domain)}


READERS: dict[str, Reader] = {
    "prepare_connection": _read_prepare,
    "request_connection": _read_request,
    "reuse_connection": _read_reuse,
}
WRITERS: dict[type, tuple[str, Writer]] = {
    PrepareConnection: ("prepare_connection", _write_prepare),
    RequestConnection: ("request_connection", _write_request),
    ReuseConnection: ("reuse_connection", _write_reuse),
}
