"""Values that several portal messages share, read strictly and built exactly (`spec/portal-protocol.md` §4).

`read_*` functions take decoded JSON and raise ValueError, KeyError or TypeError on anything unexpected;
the message parsers turn that into one dropped message. `write_*` functions are their inverse.
"""

from __future__ import annotations

import base64
import binascii
import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Any

from fz_core.packet import Address

Ip = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Json = Any
KEY_SIZE = 32


@dataclass(frozen=True, slots=True)
class IceCredentials:
    """`username` is the ufrag."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Filter:
    """Traffic a resource allows: `protocol` is tcp, udp or icmp; ports are inclusive."""

    protocol: str
    port_range_start: int = 0
    port_range_end: int = 65535


@dataclass(frozen=True, slots=True)
class Site:
    """A group of gateways; equal ids mean the same site."""

    id: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class DnsResource:
    """A name or pattern. Gateways get neither sites nor IP stack."""

    id: str
    address: str
    name: str
    filters: tuple[Filter, ...] = ()
    sites: tuple[Site, ...] = ()
    address_description: str | None = None
    ip_stack: str = "dual"


@dataclass(frozen=True, slots=True)
class CidrResource:
    """A network."""

    id: str
    address: Network
    name: str
    filters: tuple[Filter, ...] = ()
    sites: tuple[Site, ...] = ()
    address_description: str | None = None


@dataclass(frozen=True, slots=True)
class InternetResource:
    """Everything else."""

    id: str
    name: str = "Internet Resource"
    sites: tuple[Site, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolDevice:
    """A member of a static pool."""

    client_id: str
    ipv4: Network
    ipv6: Network


@dataclass(frozen=True, slots=True)
class StaticDevicePool:
    """Devices listed one by one."""

    id: str
    name: str
    devices: tuple[PoolDevice, ...] = ()
    filters: tuple[Filter, ...] = ()


@dataclass(frozen=True, slots=True)
class DynamicDevicePool:
    """Devices found by name."""

    id: str
    name: str
    address: str


Resource = DnsResource | CidrResource | InternetResource | StaticDevicePool | DynamicDevicePool


@dataclass(frozen=True, slots=True)
class Relay:
    """One address of a TURN server. A dual-stack one is two neighbours with equal id."""

    id: str
    address: Address
    username: str
    password: str = field(repr=False)
    expires_at: int = 0


@dataclass(frozen=True, slots=True)
class RelayEntry:
    """A TURN server with its addresses of both families."""

    id: str
    v4: Address | None
    v6: Address | None
    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Authorization:
    """A grant that still holds; `expires_at` in unix seconds."""

    client_id: str
    resource_id: str
    expires_at: int | None


@dataclass(frozen=True, slots=True)
class ProxiedName:
    """A name of a DNS resource, and the addresses a client before 1.4 uses in its place."""

    name: str
    proxy_ips: tuple[Ip, ...]


@dataclass(frozen=True, slots=True)
class FlowLogs:
    """Where flow logs go; an interval of 0 means nowhere."""

    api_url: str = ""
    upload_interval_secs: int = 0
    upload_batch_size: int = 0


NO_FLOW_LOGS = FlowLogs()


@dataclass(frozen=True, slots=True)
class Interface:
    """A client's tunnel addresses and DNS."""

    ipv4: IPv4Address
    ipv6: IPv6Address
    upstream_do53: tuple[Ip, ...] = ()
    upstream_doh: tuple[str, ...] = ()
    search_domain: str | None = None


@dataclass(frozen=True, slots=True)
class GatewayInterface:
    """A gateway's tunnel addresses."""

    ipv4: IPv4Address
    ipv6: IPv6Address


def merge_relays(relays: Iterable[Relay]) -> tuple[RelayEntry, ...]:
    """Join neighbours with equal id; of two addresses of one family the first counts."""
    merged: list[RelayEntry] = []
    for relay in relays:
        v4, v6 = (relay.address, None) if relay.address.is_ipv4 else (None, relay.address)
        if merged and merged[-1].id == relay.id:
            last = merged.pop()
            v4, v6 = last.v4 or v4, last.v6 or v6
        merged.append(RelayEntry(relay.id, v4, v6, relay.username, relay.password))
    return tuple(merged)


# reading


def read_text(value: Json) -> str:
    """A JSON string of whole characters: half a surrogate pair is a ValueError."""
    if not isinstance(value, str):
        raise TypeError(f"expected a string, found {type(value).__name__}")
    if not value.isascii():
        value.encode()
    return value


def read_optional_text(value: Json) -> str | None:
    """A JSON string or null."""
    return None if value is None else read_text(value)


def read_int(value: Json) -> int:
    """A non-negative JSON integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError("expected a non-negative integer")
    return value


def read_optional_int(value: Json) -> int | None:
    """A JSON integer or null."""
    return None if value is None else read_int(value)


def read_bool(value: Json) -> bool:
    """A JSON boolean."""
    if not isinstance(value, bool):
        raise TypeError("expected a boolean")
    return value


def read_list(value: Json) -> list[Json]:
    """A JSON array."""
    if not isinstance(value, list):
        raise TypeError("expected an array")
    return value


def read_id(value: Json) -> str:
    """A UUID, as lower-case text."""
    return str(uuid.UUID(read_text(value)))


def read_key(value: Json) -> bytes:
    """32 bytes of standard Base64 with padding."""
    try:
        key = base64.b64decode(read_text(value), validate=True)
    except binascii.Error as error:
        raise ValueError("not Base64") from error
    if len(key) != KEY_SIZE:
        raise ValueError(f"a key has 32 bytes, this has {len(key)}")
    return key


def read_ipv4(value: Json) -> IPv4Address:
    """An IPv4 address; a /32 is accepted and dropped."""
    return IPv4Address(read_text(value).removesuffix("/32"))


def read_ipv6(value: Json) -> IPv6Address:
    """An IPv6 address; a /128 is accepted and dropped."""
    return IPv6Address(read_text(value).removesuffix("/128"))


def read_network(value: Json) -> Network:
    """A network with a prefix length and no host bits."""
    text = read_text(value)
    if "/" not in text:
        raise ValueError(f"network {text} has no prefix length")
    return ip_network(text, strict=True)


def read_credentials(value: Json) -> IceCredentials:
    """An object with username and password."""
    return IceCredentials(read_text(value["username"]), read_text(value["password"]))


def read_filter(value: Json) -> Filter:
    """A filter object."""
    protocol = read_text(value["protocol"])
    if protocol == "icmp":
        return Filter("icmp")
    if protocol not in ("tcp", "udp"):
        raise ValueError(f"unknown protocol {protocol}")
    start, end = read_int(value.get("port_range_start", 0)), read_int(value.get("port_range_end", 65535))
    if start > 65535 or end > 65535:
        raise ValueError("a port is above 65535")
    return Filter(protocol, start, end)


def read_filters(value: Json) -> tuple[Filter, ...]:
    """A list of filters."""
    return tuple(read_filter(f) for f in read_list(value))


def read_sites(value: Json) -> tuple[Site, ...]:
    """The sites of a resource, under either of their names; both at once are an error."""
    if "gateway_groups" in value and "sites" in value:
        raise ValueError("both gateway_groups and sites")
    sites = read_list(value["gateway_groups"] if "gateway_groups" in value else value["sites"])
    return tuple(Site(read_id(s["id"]), read_text(s["name"])) for s in sites)


def read_resource(value: Json) -> Resource | None:
    """A client's resource; None for a type of the future."""
    kind = read_text(value["type"])
    if kind == "internet":
        name = read_optional_text(value.get("name")) or "Internet Resource"
        return InternetResource(read_id(value["id"]), name, read_sites(value))
    if kind not in ("dns", "cidr", "static_device_pool", "dynamic_device_pool"):
        return None
    identity, name = read_id(value["id"]), read_text(value["name"])
    if kind == "dynamic_device_pool":
        return DynamicDevicePool(identity, name, read_text(value["address"]))
    filters = read_filters(value.get("filters") or [])
    if kind == "static_device_pool":
        return StaticDevicePool(identity, name, tuple(map(_read_device, read_list(value["devices"]))), filters)
    note = read_optional_text(value.get("address_description"))
    if kind == "cidr":
        return CidrResource(identity, read_network(value["address"]), name, filters, read_sites(value), note)
    stack = read_optional_text(value.get("ip_stack")) or "dual"
    if stack not in ("dual", "ipv4_only", "ipv6_only"):
        raise ValueError(f"unknown IP stack {stack}")
    return DnsResource(identity, read_text(value["address"]), name, filters, read_sites(value), note, stack)


def read_gateway_resource(value: Json) -> DnsResource | CidrResource | InternetResource:
    """A gateway's resource; an unknown type is an error."""
    kind, identity = read_text(value["type"]), read_id(value["id"])
    if kind == "internet":
        return InternetResource(identity)
    name, filters = read_text(value["name"]), read_filters(value["filters"])
    if kind == "cidr":
        return CidrResource(identity, read_network(value["address"]), name, filters)
    if kind == "dns":
        return DnsResource(identity, read_text(value["address"]), name, filters)
    raise ValueError(f"unknown resource type {kind}")


def _read_device(value: Json) -> PoolDevice:
    identity = value["client_id"] if "client_id" in value else value["id"]
    return PoolDevice(read_id(identity), read_network(value["ipv4"]), read_network(value["ipv6"]))


def read_relays(value: Json) -> tuple[Relay, ...]:
    """A list of relays; `stun` entries are left out, unknown types are an error."""
    relays = []
    for entry in read_list(value):
        kind = read_text(entry["type"])
        if kind not in ("turn", "stun"):
            raise ValueError(f"unknown relay type {kind}")
        address = Address.parse(read_text(entry["addr"]))
        if kind == "turn":
            identity, expires_at = read_id(entry["id"]), read_optional_int(entry.get("expires_at")) or 0
            credentials = read_text(entry["username"]), read_text(entry["password"])
            relays.append(Relay(identity, address, *credentials, expires_at))
    return tuple(relays)


def read_authorizations(value: Json) -> tuple[Authorization, ...]:
    """A list of grants."""
    return tuple(
        Authorization(read_id(a["client_id"]), read_id(a["resource_id"]), read_optional_int(a.get("expires_at")))
        for a in read_list(value)
    )


def read_proxied_name(value: Json) -> ProxiedName | None:
    """A name with its proxy addresses, or null."""
    if value is None:
        return None
    ips = tuple(ip_address(read_text(ip)) for ip in read_list(value["proxy_ips"]))
    return ProxiedName(read_text(value["name"]), ips)


def read_flow_logs(value: Json) -> FlowLogs:
    """The flow log configuration; all three members are required."""
    interval, batch = read_int(value["upload_interval_secs"]), read_int(value["upload_batch_size"])
    return FlowLogs(read_text(value["api_url"]), interval, batch)


def read_interface(value: Json) -> Interface:
    """A client's interface; the legacy DNS form counts only if the new one is empty."""
    do53 = [ip_address(read_text(e["ip"])) for e in read_list(value.get("upstream_do53") or [])]
    if not do53:
        legacy = [Address.parse(read_text(e["address"])) for e in read_list(value.get("upstream_dns") or [])]
        do53 = [ip_address(address.ip) for address in legacy]
    doh = tuple(read_doh_url(e["url"]) for e in read_list(value.get("upstream_doh") or []))
    return Interface(
        read_ipv4(value["ipv4"]),
        read_ipv6(value["ipv6"]),
        tuple(dict.fromkeys(do53)),
        tuple(dict.fromkeys(doh)),
        read_optional_text(value.get("search_domain")),
    )


def read_doh_url(value: Json) -> str:
    """An https URL with a host and without a query."""
    url = read_text(value)
    if not url.startswith("https://") or len(url) == len("https://") or "?" in url:
        raise ValueError(f"{url} cannot be a DoH URL")
    return url


INGEST_CLAIMS = (
    "account_id", "role", "initiator_device_id", "responder_device_id", "policy_authorization_id", "policy_id",
    "resource_id", "resource_name", "initiator_actor_id", "initiator_actor_name", "authorized_at",
    "authorization_expires_at",
)  # fmt: skip


def read_ingest_token(value: Json) -> str:
    """A flow-log token: three segments, HS256, all required claims. The signature is not ours to check."""
    token = read_text(value)
    header, payload, signature = token.split(".")
    if _segment(header).get("alg") != "HS256" or not signature:
        raise ValueError("not an HS256 token")
    claims = _segment(payload)
    for name in INGEST_CLAIMS:
        read_text(claims[name])
    read_int(claims["iat"]), read_int(claims["exp"]), read_bool(claims["uploads_enabled"])
    return token


def _segment(text: str) -> dict[str, Any]:
    decoded = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    if not isinstance(decoded, dict):
        raise TypeError("expected an object")
    return decoded


# writing


def write_key(key: bytes) -> str:
    """Standard Base64 with padding."""
    return base64.b64encode(key).decode()


def write_credentials(credentials: IceCredentials) -> Json:
    """An object with username and password."""
    return {"username": credentials.username, "password": credentials.password}


def read_gateway_payload(value: Json) -> IceCredentials:
    """What a gateway tells a client before 1.4 about a connection it accepted."""
    return read_credentials(value["ConnectionAccepted"]["ice_parameters"])


def write_gateway_payload(credentials: IceCredentials) -> Json:
    """The inverse of `read_gateway_payload`."""
    return {"ConnectionAccepted": {"ice_parameters": write_credentials(credentials)}}


def write_filter(item: Filter) -> Json:
    """A filter object; ICMP has no ports."""
    if item.protocol == "icmp":
        return {"protocol": "icmp"}
    return {
        "protocol": item.protocol,
        "port_range_start": item.port_range_start,
        "port_range_end": item.port_range_end,
    }


def write_resource(resource: Resource, *, modern: bool = True) -> Json:
    """A client's resource; clients that are not `modern` know sites as gateway groups."""
    fields: dict[str, Any] = {
        "id": resource.id,
        "name": resource.name,
        "type": RESOURCE_TYPES[type(resource)],
    }
    if isinstance(resource, DnsResource | CidrResource | StaticDevicePool):
        fields["filters"] = [write_filter(f) for f in resource.filters]
    if isinstance(resource, DnsResource | CidrResource):
        fields |= {"address": str(resource.address), "address_description": resource.address_description}
    if isinstance(resource, DnsResource):
        fields["ip_stack"] = resource.ip_stack
    if isinstance(resource, DynamicDevicePool):
        fields |= {"address": resource.address, "filters": []}
    if isinstance(resource, InternetResource):
        fields["can_be_disabled"] = True
    if isinstance(resource, StaticDevicePool):
        fields["devices"] = [
            {"client_id": d.client_id, "ipv4": str(d.ipv4), "ipv6": str(d.ipv6)} for d in resource.devices
        ]
    if isinstance(resource, DnsResource | CidrResource | InternetResource):
        sites = [{"id": s.id, "name": s.name} for s in resource.sites]
        fields["sites" if modern else "gateway_groups"] = sites
    return fields


def write_gateway_resource(resource: DnsResource | CidrResource | InternetResource) -> Json:
    """A gateway's resource."""
    fields: dict[str, Any] = {"id": resource.id, "type": RESOURCE_TYPES[type(resource)]}
    if not isinstance(resource, InternetResource):
        filters = [write_filter(f) for f in resource.filters]
        fields |= {"name": resource.name, "address": str(resource.address), "filters": filters}
    return fields


RESOURCE_TYPES: dict[type, str] = {
    DnsResource: "dns",
    CidrResource: "cidr",
    InternetResource: "internet",
    StaticDevicePool: "static_device_pool",
    DynamicDevicePool: "dynamic_device_pool",
}


def write_relay(relay: Relay) -> Json:
    """One address of a TURN server."""
    return {
        "type": "turn",
        "id": relay.id,
        "addr": str(relay.address),
        "username": relay.username,
        "password": relay.password,
        "expires_at": relay.expires_at,
    }


def write_interface(interface: Interface) -> Json:
    """A client's interface, with the legacy DNS form for old clients."""
    return {
        "ipv4": str(interface.ipv4),
        "ipv6": str(interface.ipv6),
        "upstream_do53": [{"ip": str(ip)} for ip in interface.upstream_do53],
        "upstream_doh": [{"url": url} for url in interface.upstream_doh],
        "upstream_dns": [
            {"protocol": "ip_port", "address": str(Address(ip.packed, 53))} for ip in interface.upstream_do53
        ],
        "search_domain": interface.search_domain,
    }


def write_authorization(grant: Authorization) -> Json:
    """A grant."""
    return {"client_id": grant.client_id, "resource_id": grant.resource_id, "expires_at": grant.expires_at}


def write_proxied_name(domain: ProxiedName | None) -> Json:
    """A name with its proxy addresses, or null."""
    return None if domain is None else {"name": domain.name, "proxy_ips": [str(ip) for ip in domain.proxy_ips]}


def write_flow_logs(config: FlowLogs) -> Json:
    """The flow log configuration."""
    return {
        "api_url": config.api_url,
        "upload_interval_secs": config.upload_interval_secs,
        "upload_batch_size": config.upload_batch_size,
    }
