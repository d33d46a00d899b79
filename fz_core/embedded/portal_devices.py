"""Device pools: clients that may reach other clients (`spec/portal-protocol.md` §5.2, §10.2 "client to client").

The target hears first; its answer is not waited for. In a dynamic pool `*.suffix` the star is the device's name.
Only static pools make devices reachable: clients route to those listed in them.
"""

from __future__ import annotations

import uuid
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from fz_core.embedded import portal_views as views
from fz_core.embedded.policy import ClientAccount, ResourceRule
from fz_core.embedded.portal_access import Access
from fz_core.embedded.portal_derivation import client_preshared_key, ice_credentials
from fz_core.embedded.portal_hub import Hub, log
from fz_core.embedded.portal_session import Session
from fz_core.embedded.portal_versions import POOL_TARGET, understands
from fz_core.embedded.store import Device, Grant, StoreFull
from fz_core.portal import client as to_client
from fz_core.portal.client import FailReason
from fz_core.portal.types import read_key


class DevicePools:
    """Requests for devices, and candidates between clients."""

    def __init__(self, hub: Hub, access: Access) -> None:
        self._hub, self._access = hub, access
        self._ingest_key = hub.random_bytes(32)

    def is_for_device(self, message: to_client.RequestAuthorization) -> bool:
        """Whether a request names a device rather than a resource behind gateways."""
        rule = self._hub.policy.resource(message.resource_id)
        if rule is None:  # perhaps a pool that just went away
            return message.ipv4 is not None or message.ipv6 is not None
        return rule.site is None

    def request(self, client: Session, message: to_client.RequestAuthorization, now: float) -> None:
        """A client wants to reach a device of a pool."""
        rule = self._hub.policy.resource(message.resource_id)
        target = self._target(client, rule, message.ipv4, message.ipv6)
        if isinstance(target, FailReason):
            log.info("Refused client=%s resource=%s reason=%s", client.name, message.resource_id, target.value)
            self._hub.send(client, to_client.ClientDeviceAccessDenied(message.ipv4, message.ipv6, target))
        elif rule is not None:
            self._connect(client, target, rule, now)

    def handle(self, session: Session, message: Any) -> None:
        """Candidates for another client, or a name to look up."""
        match message:
            case to_client.NewClientIceCandidates(client_id, candidates):
                self._forward(session, client_id, to_client.ClientIceCandidates(session.peer_id, candidates))
            case to_client.WithdrawClientIceCandidates(client_id, candidates):
                gone = to_client.InvalidateClientIceCandidates(session.peer_id, candidates)
                if not self._forward(session, client_id, gone):
                    error = to_client.ClientIceCandidateError(client_id, FailReason.OFFLINE)
                    self._hub.send(session, error)
            case to_client.ResolveDevicePoolDomain(resource_id, domain):
                self._resolve(session, resource_id, domain)

    def _target(
        self, client: Session, rule: ResourceRule | None, v4: IPv4Address | None, v6: IPv6Address | None
    ) -> Session | FailReason:
        hub = self._hub
        assert isinstance(client.account, ClientAccount)
        if rule is None:
            return FailReason.NOT_FOUND
        if hub.policy.best_rule(client.account, rule) is None:
            return FailReason.FORBIDDEN
        if (v4 is None) == (v6 is None):
            return FailReason.MISSING_ADDRESS if v4 is None else FailReason.AMBIGUOUS_ADDRESS
        device = next((d for d in self._members(rule) if v4 == d.ipv4 or v6 == d.ipv6), None)
        if device is None or device.id == client.peer_id:
            return FailReason.NOT_FOUND if device is None else FailReason.INVALID_ADDRESS
        target = hub.peer(device.id, "client")
        if target is None:
            return FailReason.OFFLINE
        return target if _fit(client, target) else FailReason.VERSION_MISMATCH

    def _members(self, rule: ResourceRule) -> list[Device]:
        store = self._hub.store
        return [device for owner in self._hub.policy.pool_owners(rule) for device in store.devices_of(owner)]

    def _connect(self, client: Session, target: Session, rule: ResourceRule, now: float) -> None:
        hub = self._hub
        assert isinstance(client.account, ClientAccount)
        assert client.device is not None
        assert target.device is not None
        access = hub.policy.best_rule(client.account, rule)
        assert access is not None
        expires_at = self._access.expires_at(client.account, access, hub.unix(now))
        grant = Grant(client.peer_id, rule.id, target.peer_id, rule.fingerprint, expires_at)
        try:
            hub.store.put_grant(grant)
        except StoreFull as error:
            log.error("Cannot authorize client=%s: %s", client.name, error)
            return
        self._access.watch(grant)
        keys = client.public_key, client.device.psk_base, target.peer_id, target.public_key, target.device.psk_base
        psk = client_preshared_key(client.peer_id, *keys)
        mine, theirs = ice_credentials(client.peer_id, client.public_key, target.peer_id, target.public_key)
        iceless = hub.is_iceless(client, target)
        ref = str(uuid.UUID(bytes=hub.random_bytes(16), version=4))
        tokens = views.ingest_tokens(
            hub.policy, client, target.device, rule, access, ref, expires_at, hub.unix(now), self._ingest_key
        )
        inbound = to_client.PoolGrant(rule.id, rule.filters)
        hub.send(target, _introduce(client, psk, theirs, mine, False, iceless, inbound, expires_at, tokens[1]))
        hub.send(client, _introduce(target, psk, mine, theirs, True, iceless, None, None, tokens[0]))
        log.info("Authorized client=%s resource=%s device=%s iceless=%s", client.name, rule.id, target.name, iceless)

    def _forward(self, session: Session, client_id: str, message: Any) -> bool:
        """Candidates pass between clients that were introduced; others are dropped."""
        store, target = self._hub.store, self._hub.peer(client_id, "client")
        known = any(g.client_id == session.peer_id for g in store.grants_at(client_id)) or any(
            g.client_id == client_id for g in store.grants_at(session.peer_id)
        )
        if target is None or not known:
            return False
        self._hub.send(target, message)
        return True

    def _resolve(self, session: Session, resource_id: str, domain: str) -> None:
        hub, rule = self._hub, self._hub.policy.resource(resource_id)
        assert isinstance(session.account, ClientAccount)
        reason, found = FailReason.NOT_FOUND, []
        if rule is not None and hub.policy.best_rule(session.account, rule) is None:
            reason = FailReason.FORBIDDEN
        elif rule is not None and rule.kind == "dynamic_device_pool":
            suffix = str(rule.address).removeprefix("*").lower()
            wanted = domain.lower().removesuffix(".")
            found = [d for d in self._members(rule) if views.device_label(d.name) + suffix == wanted]
        if len(found) == 1:
            answer = to_client.DevicePoolDomainResolved(resource_id, domain, found[0].ipv4, found[0].ipv6)
            hub.send(session, answer)
            return
        reason = FailReason.AMBIGUOUS_ADDRESS if found else reason
        hub.send(session, to_client.DevicePoolDomainResolutionFailed(resource_id, domain, reason))


def _introduce(
    peer: Session, psk: bytes, local: Any, remote: Any, is_controlling: bool, iceless: bool,
    resource: to_client.PoolGrant | None, expires_at: int | None, token: str,
) -> to_client.ClientDeviceAccessAuthorized:  # fmt: skip
    assert peer.device is not None
    return to_client.ClientDeviceAccessAuthorized(
        peer.peer_id, peer.device.name, read_key(peer.public_key), peer.device.ipv4, peer.device.ipv6, psk,
        local, remote, is_controlling, iceless, resource, expires_at, token,
    )  # fmt: skip


def _fit(client: Session, target: Session) -> bool:
    if client.agent is None or target.agent is None or client.agent.version is None or target.agent.version is None:
        return False
    return understands(target.agent, POOL_TARGET) and client.agent.version[:2] == target.agent.version[:2]
