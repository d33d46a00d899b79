"""Authorizations: a client asks, a gateway agrees, the client is told (`spec/portal-protocol.md` §8.2, §8.8, §8.10).

The receiver always hears first. What was granted is remembered, so that a returning gateway keeps it.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from fz_core.embedded import portal_views as views
from fz_core.embedded.policy import AccessRule, ClientAccount, GatewayAccount, ResourceRule
from fz_core.embedded.portal_derivation import FAR_FUTURE, ice_credentials, preshared_key
from fz_core.embedded.portal_held import HeldRequests
from fz_core.embedded.portal_hub import Hub, log
from fz_core.embedded.portal_session import Session, owner_of
from fz_core.embedded.portal_versions import may_serve
from fz_core.embedded.store import Grant, StoreFull
from fz_core.portal import client as to_client
from fz_core.portal import gateway as to_gateway
from fz_core.portal.client import FailReason
from fz_core.portal.types import read_key

ANSWER_TIMEOUT = 15.0
MAX_PENDING_PER_CLIENT = 256
REFRESH_AFTER = 1.0
REPEAT_AFTER = 0.1
MAX_KNOWN_KEYS = 4096
ABILITIES_TIMEOUT = 0.5
RETURN_GRACE = 5.0


@dataclass(frozen=True, slots=True)
class Pending:
    """A request the receiver has not answered yet: its `order`, and the `answer` the client will hear."""

    ref: str
    client: Session
    gateway: Session
    resource_id: str
    connected: tuple[str, ...]
    order: to_gateway.CreateAuthorization = field(repr=False)
    answer: Any = field(repr=False)


class Access:
    """All pending requests and all grants."""

    def __init__(self, hub: Hub, now: float) -> None:
        self._hub = hub
        self._pending: dict[str, Pending] = {}
        self._repeat_in: dict[str, float] = {}
        self._ingest_key = hub.random_bytes(32)
        self._receiver_keys: dict[str, str] = {}
        self.held = HeldRequests(hub, self.request)
        known = [site for site in hub.policy.sites.values() if hub.store.devices_of(site.id)]
        self._expected_until = {site.name: now + RETURN_GRACE for site in known}

    # requests

    def request(self, client: Session, message: to_client.RequestAuthorization, now: float) -> None:
        """A client wants to reach a resource."""
        rule = self.rule_for(client, message.resource_id)
        if isinstance(rule, FailReason):
            self._refuse(client, message.resource_id, rule)
            return
        gateway = self.select(client, rule[0], message.connected_gateway_ids)
        until = self._patience(client, gateway, rule[0].site)
        if now < until and self.held.hold(client, message, until):
            return
        if isinstance(gateway, FailReason):
            self._refuse(client, message.resource_id, gateway)
        else:
            self._ask(client, gateway, *rule, message.connected_gateway_ids, now)

    def _patience(self, client: Session, gateway: Session | FailReason, site: str | None) -> float:
        """Until when a request may wait: for a gateway to return, or to say what it can do, for a pair's mode."""
        if gateway is FailReason.OFFLINE:
            return self._expected_until.get(site or "", 0.0)
        if isinstance(gateway, FailReason) or gateway.is_iceless is not None:
            return 0.0
        may_be_iceless = self._hub.policy.allow_iceless and client.is_iceless
        is_undecided = may_be_iceless and self._hub.modes.is_open(client, gateway)
        return gateway.joined_at + ABILITIES_TIMEOUT if is_undecided else 0.0

    def rule_for(self, client: Session, resource_id: str) -> tuple[ResourceRule, AccessRule] | FailReason:
        """What lets a client use a resource behind gateways, or why nothing does."""
        resource = self._hub.policy.resource(resource_id)
        if resource is None or resource.site is None:
            return FailReason.NOT_FOUND
        assert isinstance(client.account, ClientAccount)
        rule = self._hub.policy.best_rule(client.account, resource)
        return FailReason.FORBIDDEN if rule is None else (resource, rule)

    def select(self, client: Session, resource: ResourceRule, connected: tuple[str, ...]) -> Session | FailReason:
        """One of the gateways that may serve a client, if possible one it is connected to."""
        fitting = self.gateways_for(client, resource)
        if isinstance(fitting, FailReason):
            return fitting
        fitting = [g for g in fitting if g.peer_id in connected] or fitting
        return fitting[self._hub.choose(len(fitting))]

    def gateways_for(self, client: Session, resource: ResourceRule) -> list[Session] | FailReason:
        """The gateways that may serve a client."""
        at_site = [
            g
            for g in self._hub.joined("gateway")
            if isinstance(g.account, GatewayAccount) and g.account.site == resource.site
        ]
        if not at_site:
            return FailReason.OFFLINE
        agent, serve_old = client.agent, self._hub.policy.old_clients
        fitting = [g for g in at_site if agent is not None and may_serve(g.agent, agent, serve_old=serve_old)]
        return fitting or FailReason.VERSION_MISMATCH

    def _ask(
        self, client: Session, gateway: Session, resource: ResourceRule, rule: AccessRule,
        connected: tuple[str, ...], now: float,
    ) -> None:  # fmt: skip
        hub = self._hub
        assert client.device is not None
        assert gateway.device is not None
        self._supersede(client, resource.id)
        if sum(p.client is client for p in self._pending.values()) >= MAX_PENDING_PER_CLIENT:
            return
        ref = str(uuid.UUID(bytes=hub.random_bytes(16), version=4))
        expires_at = self.expires_at(client.account, rule, hub.unix(now))
        try:
            grant = Grant(client.peer_id, resource.id, gateway.peer_id, resource.fingerprint, expires_at)
            hub.store.put_grant(grant)
        except StoreFull as error:
            log.error("Cannot authorize client=%s: %s", client.name, error)
            return
        psk = preshared_key(
            client.peer_id, client.public_key, client.device.psk_base,
            gateway.peer_id, gateway.public_key, gateway.device.psk_base,
        )  # fmt: skip
        ice = ice_credentials(client.peer_id, client.public_key, gateway.peer_id, gateway.public_key)
        iceless = hub.is_iceless(client, gateway)
        tokens = views.ingest_tokens(
            hub.policy, client, gateway.device, resource, rule, ref, expires_at, hub.unix(now), self._ingest_key
        )
        answer = to_client.AuthorizationCreated(
            resource.id, gateway.peer_id, hub.policy.sites[resource.site or ""].id, read_key(gateway.public_key),
            gateway.device.ipv4, gateway.device.ipv6, psk, *ice, iceless, tokens[0],
        )  # fmt: skip
        peer = to_gateway.Client(
            client.peer_id, read_key(client.public_key), psk, client.device.ipv4, client.device.ipv6,
            views.client_details(client),
        )  # fmt: skip
        order = to_gateway.CreateAuthorization(
            ref, peer, views.gateway_resource(resource), *ice, expires_at, iceless, tokens[1], views.subject(client)
        )
        self._pending[ref] = Pending(ref, client, gateway, resource.id, connected, order, answer)
        hub.timers.set(("pending", ref), now + ANSWER_TIMEOUT)
        hub.send(gateway, order)

    def expires_at(self, account: Any, rule: AccessRule, unix_now: int) -> int:
        """When an authorization made now ends."""
        token_end = account.expires_at if isinstance(account, ClientAccount) else None
        rule_end = None if rule.expires_in is None else unix_now + rule.expires_in
        return min(end for end in (token_end, rule_end, FAR_FUTURE) if end is not None)

    def _supersede(self, client: Session, resource_id: str) -> None:
        for pending in [p for p in self._pending.values() if p.client is client and p.resource_id == resource_id]:
            self._drop(pending)
        self.held.drop(client, resource_id)

    def _drop(self, pending: Pending) -> None:
        self._pending.pop(pending.ref, None)
        self._repeat_in.pop(pending.ref, None)
        for timer in ("pending", "repeat"):
            self._hub.timers.cancel((timer, pending.ref))

    def _refuse(self, client: Session, resource_id: str, reason: FailReason) -> None:
        log.info("Refused client=%s resource=%s reason=%s", client.name, resource_id, reason.value)
        self._hub.send(client, to_client.AuthorizationCreationFailed(resource_id, reason))

    # answers

    def confirm(self, gateway: Session, ref: str, now: float) -> bool:
        """The gateway has installed the grant: release the client. False for an unknown or late `ref`."""
        pending = self._pending.get(ref)
        if pending is None or pending.gateway is not gateway:
            return False
        self._drop(pending)
        self._hub.send(pending.client, pending.answer)
        for grant in self._hub.store.grants_at(gateway.peer_id):
            if (grant.client_id, grant.resource_id) == (pending.client.peer_id, pending.resource_id):
                self.watch(grant)
        log.info(
            "Authorized client=%s resource=%s gateway=%s iceless=%s",
            pending.client.name, pending.resource_id, gateway.name, pending.order.use_iceless,
        )  # fmt: skip
        return True

    def handle_unanswered(self, ref: str) -> None:
        """The gateway kept silent."""
        pending = self._pending.get(ref)
        if pending is not None:
            self._drop(pending)
            self._refuse(pending.client, pending.resource_id, FailReason.OFFLINE)

    def handle_no_relays(self, gateway: Session, now: float) -> None:
        """Orders that came before the gateway could reach a relay are lost; official gateways need a moment."""
        for pending in self._pending.values():
            if pending.gateway is gateway:
                delay = self._repeat_in.get(pending.ref, REPEAT_AFTER)
                self._repeat_in[pending.ref] = 2 * delay
                self._hub.timers.set(("repeat", pending.ref), now + delay)

    def repeat(self, ref: str) -> None:
        """Send an order again."""
        pending = self._pending.get(ref)
        if pending is not None:
            self._hub.send(pending.gateway, pending.order)

    def handle_gone(self, session: Session, now: float) -> None:
        """A peer left: its requests are void, those waiting for it go to another gateway, or wait for its return."""
        self.held.drop_all_of(session)
        account = owner_of(self._hub.policy, session.role, session.token)
        if isinstance(account, GatewayAccount) and session.was_joined:
            self._expected_until[account.site] = now + RETURN_GRACE
        for pending in [p for p in self._pending.values() if session in (p.client, p.gateway)]:
            self._drop(pending)
            if pending.client is not session and pending.client.is_joined:
                again = to_client.RequestAuthorization(pending.resource_id, pending.connected)
                self.request(pending.client, again, now)
        if session.role == "gateway":
            self.held.retry(now)

    # grants

    def watch(self, grant: Grant) -> None:
        """Look at a grant again shortly after its end."""
        if grant.expires_at < FAR_FUTURE:
            at = self._hub.monotonic(grant.expires_at) + REFRESH_AFTER
            self._hub.timers.set(("grant", grant.client_id, grant.resource_id, grant.receiver_id), at)

    def handle_expired(self, client_id: str, resource_id: str, receiver_id: str, now: float) -> None:
        """Have the client ask again: it does not notice by itself that the receiver dropped the grant.

        Not for the internet resource, which a client does not switch on again after a removal.
        """
        hub = self._hub
        for grant in hub.store.grants_at(receiver_id):
            if (grant.client_id, grant.resource_id) != (client_id, resource_id):
                continue
            if grant.expires_at > hub.unix(now):
                self.watch(grant)
                return
            hub.store.remove_grant(grant)
            self._have_ask_again(client_id, resource_id)

    def handle_receiver_joined(self, receiver: Session) -> None:
        """A receiver with a new key knows no connection: those who use it need not find out by time-out."""
        hub, known = self._hub, self._receiver_keys.pop(receiver.peer_id, receiver.public_key)
        self._receiver_keys[receiver.peer_id] = receiver.public_key
        if len(self._receiver_keys) > MAX_KNOWN_KEYS:
            del self._receiver_keys[next(iter(self._receiver_keys))]
        if known == receiver.public_key:
            return
        for grant in hub.store.grants_at(receiver.peer_id):
            client = hub.peer(grant.client_id, "client")
            if client is not None and self.held.is_held(client, grant.resource_id):
                continue  # it knows, and waits
            if receiver.role == "client":
                hub.store.remove_grant(grant)
                self._deny(grant, FailReason.OFFLINE)
            elif self._have_ask_again(grant.client_id, grant.resource_id):
                hub.store.remove_grant(grant)

    def _have_ask_again(self, client_id: str, resource_id: str) -> bool:
        """Remove and add a resource at a client; False if that cannot be done."""
        hub = self._hub
        client, rule = hub.peer(client_id, "client"), hub.policy.resource(resource_id)
        if client is None or rule is None or rule.kind == "internet":
            return False
        view = views.resources(hub.policy, hub.store, client).get(resource_id)
        if view is None:
            return False
        hub.send(client, to_client.ResourceDeleted(resource_id))
        hub.send(client, to_client.ResourceCreatedOrUpdated(view))
        return True

    def _deny(self, grant: Grant, reason: FailReason) -> None:
        """Have a client close its connection to a device; with the next packet it asks again."""
        device, client = self._hub.store.device(grant.receiver_id), self._hub.peer(grant.client_id, "client")
        if client is not None and device is not None:
            self._hub.send(client, to_client.ClientDeviceAccessDenied(device.ipv4, device.ipv6, reason))

    def revoke(self, grant: Grant) -> None:
        """Take a grant back from its receiver."""
        hub = self._hub
        hub.store.remove_grant(grant)
        hub.timers.cancel(("grant", grant.client_id, grant.resource_id, grant.receiver_id))
        receiver = hub.peer(grant.receiver_id, "gateway") or hub.peer(grant.receiver_id, "client")
        if receiver is not None:
            hub.send(receiver, to_client.RejectAccess(grant.client_id, grant.resource_id))
        device = hub.store.device(grant.receiver_id)
        if device is not None and device.role == "client":
            self._deny(grant, FailReason.FORBIDDEN)

    def void(self, resource_id: str, client: Session) -> None:
        """Forget what a client asked for and may not have any more."""
        self._supersede(client, resource_id)

    def is_allowed(self, grant: Grant, now: float) -> bool:
        """Whether the policy of today would give this grant."""
        hub = self._hub
        device, resource = hub.store.device(grant.client_id), hub.policy.resource(grant.resource_id)
        account = next((c for c in hub.policy.clients.values() if device and c.id == device.owner), None)
        if resource is None or account is None or resource.fingerprint != grant.fingerprint:
            return False
        if resource.site is None:
            receiver = hub.store.device(grant.receiver_id)
            if receiver is None or receiver.owner not in hub.policy.pool_owners(resource):
                return False
        rule = hub.policy.best_rule(account, resource)
        return rule is not None and grant.expires_at <= self.expires_at(account, rule, hub.unix(now))
