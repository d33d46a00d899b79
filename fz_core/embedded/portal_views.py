"""The policy as one peer sees it: values for messages (`spec/portal-protocol.md` §4 to §6)."""

from __future__ import annotations

import datetime
import re
from ipaddress import ip_network
from typing import Any

from fz_core.embedded.policy import AccessRule, ClientAccount, Policy, ResourceRule
from fz_core.embedded.portal_derivation import ingest_token
from fz_core.embedded.portal_session import Session
from fz_core.embedded.portal_versions import POOL_LIST, understands
from fz_core.embedded.store import Device, Store
from fz_core.portal import gateway
from fz_core.portal import types as t

FLOW_LOGS = t.FlowLogs("https://flow-logs.invalid/", 0, 0)


def interface(policy: Policy, device: Device) -> t.Interface:
    """A client's tunnel addresses and DNS."""
    return t.Interface(device.ipv4, device.ipv6, policy.dns_servers, policy.doh_servers, policy.search_domain)


def resources(policy: Policy, store: Store, session: Session) -> dict[str, t.Resource]:
    """What a client sees, by id. Clients that do not know device pools are not told of them."""
    assert isinstance(session.account, ClientAccount)
    knows_pools = session.agent is not None and understands(session.agent, POOL_LIST)
    return {
        rule.id: client_resource(policy, store, rule)
        for rule in policy.visible_to(session.account).values()
        if knows_pools or not rule.kind.endswith("_pool")
    }


def client_resource(policy: Policy, store: Store, rule: ResourceRule) -> t.Resource:
    """A resource as clients see it."""
    if rule.kind == "static_device_pool":
        return t.StaticDevicePool(rule.id, rule.name, pool_devices(policy, store, rule), rule.filters)
    if rule.kind == "dynamic_device_pool":
        return t.DynamicDevicePool(rule.id, rule.name, str(rule.address))
    site = policy.sites[rule.site or ""]
    sites = (t.Site(site.id, site.name),)
    if rule.kind == "internet":
        return t.InternetResource(rule.id, rule.name, sites)
    if rule.kind == "cidr":
        network = ip_network(str(rule.address))
        return t.CidrResource(rule.id, network, rule.name, rule.filters, sites, rule.description)
    return t.DnsResource(
        rule.id, str(rule.address), rule.name, rule.filters, sites, rule.description, rule.ip_stack
    )  # fmt: skip


def pool_devices(policy: Policy, store: Store, rule: ResourceRule) -> tuple[t.PoolDevice, ...]:
    """The devices of the clients a static pool names."""
    return tuple(
        t.PoolDevice(d.id, ip_network(f"{d.ipv4}/32"), ip_network(f"{d.ipv6}/128"))
        for owner in policy.pool_owners(rule)
        for d in store.devices_of(owner)
    )


def device_label(name: str) -> str:
    """What a device of this name is called in a dynamic pool: one label."""
    return re.sub("[^a-z0-9_-]", "-", name.lower())


def gateway_resource(rule: ResourceRule) -> gateway.GatewayResource:
    """A resource as gateways see it."""
    if rule.kind == "internet":
        return t.InternetResource(rule.id)
    if rule.kind == "cidr":
        return t.CidrResource(rule.id, ip_network(str(rule.address)), rule.name, rule.filters)
    return t.DnsResource(rule.id, str(rule.address), rule.name, rule.filters)


def client_details(session: Session) -> tuple[tuple[str, Any], ...]:
    """Members of `client` that only flow logs of old gateways use."""
    agent = session.agent
    return (
        ("version", agent.version_text if agent else None),
        ("device_os_name", agent.os_name if agent else None),
        ("device_os_version", agent.os_version if agent else None),
        ("device_serial", None),
        ("device_uuid", None),
        ("identifier_for_vendor", None),
        ("firebase_installation_id", None),
    )


def subject(session: Session) -> tuple[tuple[str, Any], ...]:
    """On whose behalf a client asks; for old gateways' flow logs."""
    assert isinstance(session.account, ClientAccount)
    return (
        ("actor_id", session.account.id),
        ("actor_name", session.account.name),
        ("actor_email", session.account.email),
        ("actor_type", "service_account"),
        ("auth_provider_id", None),
        ("ip", session.remote),
        ("ip_region", None),
        ("ip_city", None),
        ("ip_lat", None),
        ("ip_lon", None),
        ("user_agent", session.user_agent),
    )


def ingest_tokens(
    policy: Policy, client: Session, receiver: Device, rule: ResourceRule, access: AccessRule, ref: str,
    expires_at: int, unix_now: int, key: bytes,
) -> tuple[str, str]:  # fmt: skip
    """The flow-log tokens of the initiator and the responder; uploads are off, but peers insist on reading one."""
    assert isinstance(client.account, ClientAccount)
    claims: dict[str, Any] = {
        "account_id": policy.account_id,
        "iat": unix_now,
        "exp": expires_at,
        "uploads_enabled": False,
        "initiator_device_id": client.peer_id,
        "responder_device_id": receiver.id,
        "policy_authorization_id": ref,
        "policy_id": access.id,
        "resource_id": rule.id,
        "resource_name": rule.name,
        "initiator_actor_id": client.account.id,
        "initiator_actor_name": client.account.name,
        "authorized_at": iso_time(unix_now),
        "authorization_expires_at": iso_time(expires_at),
    }
    return ingest_token({**claims, "role": "initiator"}, key), ingest_token({**claims, "role": "responder"}, key)


def iso_time(unix: int) -> str:
    """ISO 8601 in UTC."""
    return datetime.datetime.fromtimestamp(unix, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
