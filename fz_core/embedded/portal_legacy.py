"""Clients before 1.4: they ask for a gateway first and choose secrets themselves (`spec/portal-protocol.md` §9).

The portal answers their frames by replies. A gateway answers `request_connection`; to `allow_access` it need not say
anything, and a client that sent `reuse_connection` does not wait.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace

from fz_core.embedded import portal_views as views
from fz_core.embedded.policy import AccessRule, ResourceRule
from fz_core.embedded.portal_access import ANSWER_TIMEOUT, MAX_PENDING_PER_CLIENT, Access
from fz_core.embedded.portal_hub import Hub, log
from fz_core.embedded.portal_session import Session
from fz_core.embedded.store import Grant, StoreFull
from fz_core.portal import client_legacy as messages
from fz_core.portal import gateway as to_gateway
from fz_core.portal.client import FailReason
from fz_core.portal.framing import Frame
from fz_core.portal.types import IceCredentials, read_key


@dataclass(frozen=True, slots=True)
class Waiting:
    """A gateway was asked; its answer becomes the reply to `frame`."""

    client: Session
    gateway: Session
    resource_id: str
    frame: Frame
    is_new: bool


class OldClients:
    """Their requests, from the frame to its reply."""

    def __init__(self, hub: Hub, access: Access) -> None:
        self._hub, self._access = hub, access
        self._waiting: dict[str, Waiting] = {}

    def handle(self, client: Session, message: messages.Outbound, frame: Frame, now: float) -> None:
        """One of the three messages."""
        rule = self._access.rule_for(client, message.resource_id)
        if isinstance(rule, FailReason):
            self._refuse(client, message.resource_id, frame, rule)
        elif isinstance(message, messages.PrepareConnection):
            self._prepare(client, rule[0], message, frame)
        else:
            self._ask(client, rule, message, replace(frame, payload=None), now)

    def _prepare(
        self, client: Session, resource: ResourceRule, message: messages.PrepareConnection, frame: Frame
    ) -> None:
        gateway = self._access.select(client, resource, message.connected_gateway_ids)
        if isinstance(gateway, FailReason):
            self._refuse(client, resource.id, frame, gateway)
            return
        site = self._hub.policy.sites[resource.site or ""]
        reply = messages.ConnectionPrepared(resource.id, site.id, gateway.peer_id, gateway.remote)
        self._hub.reply(client, frame, "ok", messages.write_reply(reply))

    def _ask(
        self, client: Session, rule: tuple[ResourceRule, AccessRule],
        message: messages.RequestConnection | messages.ReuseConnection, frame: Frame, now: float,
    ) -> None:  # fmt: skip
        resource, access = rule
        gateways = self._access.gateways_for(client, resource)
        if isinstance(gateways, FailReason):
            self._refuse(client, resource.id, frame, gateways)
            return
        gateway = next((g for g in gateways if g.peer_id == message.gateway_id), None)
        if gateway is None:
            self._refuse(client, resource.id, frame, FailReason.OFFLINE)
            return
        if sum(w.client is client for w in self._waiting.values()) >= MAX_PENDING_PER_CLIENT:
            return
        expires_at = self._access.expires_at(client.account, access, self._hub.unix(now))
        grant = Grant(client.peer_id, resource.id, gateway.peer_id, resource.fingerprint, expires_at)
        try:
            self._hub.store.put_grant(grant)
        except StoreFull as error:
            log.error("Cannot authorize client=%s: %s", client.name, error)
            return
        self._access.watch(grant)
        ref = str(uuid.UUID(bytes=self._hub.random_bytes(16), version=4))
        is_new = isinstance(message, messages.RequestConnection)
        self._waiting[ref] = Waiting(client, gateway, resource.id, frame, is_new)
        self._hub.timers.set(("waiting", ref), now + ANSWER_TIMEOUT)
        self._hub.send(gateway, _order(ref, client, resource, message, expires_at))

    def confirm(self, gateway: Session, ref: str, credentials: IceCredentials) -> bool:
        """The gateway is ready: release the client. False for an unknown or late `ref`."""
        waiting = self._waiting.get(ref)
        if waiting is None or waiting.gateway is not gateway:
            return False
        self._forget(ref)
        grants = self._hub.store.grants_at(gateway.peer_id)
        if not any((g.client_id, g.resource_id) == (waiting.client.peer_id, waiting.resource_id) for g in grants):
            self._refuse(waiting.client, waiting.resource_id, waiting.frame, FailReason.FORBIDDEN)  # just revoked
            return True
        reply = messages.ConnectionAccepted(waiting.resource_id, read_key(gateway.public_key), credentials)
        self._hub.reply(waiting.client, waiting.frame, "ok", messages.write_reply(reply))
        log.info(
            "Authorized client=%s resource=%s gateway=%s", waiting.client.name, waiting.resource_id, gateway.name
        )  # fmt: skip
        return True

    def handle_unanswered(self, ref: str) -> None:
        """The gateway kept silent, which for an existing connection is all it does."""
        waiting = self._waiting.pop(ref, None)
        if waiting is not None and waiting.is_new:
            self._refuse(waiting.client, waiting.resource_id, waiting.frame, FailReason.OFFLINE)

    def handle_gone(self, session: Session) -> None:
        """A peer left: the client has to choose another gateway."""
        gone = [ref for ref, w in self._waiting.items() if session in (w.client, w.gateway)]
        for ref in gone:
            waiting = self._forget(ref)
            if waiting.client is not session and waiting.client.is_joined:
                self._refuse(waiting.client, waiting.resource_id, waiting.frame, FailReason.OFFLINE)

    def _forget(self, ref: str) -> Waiting:
        self._hub.timers.cancel(("waiting", ref))
        return self._waiting.pop(ref)

    def _refuse(self, client: Session, resource_id: str, frame: Frame, reason: FailReason) -> None:
        log.info("Refused client=%s resource=%s reason=%s", client.name, resource_id, reason.value)
        self._hub.reply(client, frame, "error", {"reason": reason.value})


def _order(
    ref: str, client: Session, resource: ResourceRule,
    message: messages.RequestConnection | messages.ReuseConnection, expires_at: int,
) -> to_gateway.RequestConnection | to_gateway.AllowAccess:  # fmt: skip
    assert client.device is not None
    view, v4, v6 = views.gateway_resource(resource), client.device.ipv4, client.device.ipv6
    if isinstance(message, messages.ReuseConnection):
        return to_gateway.AllowAccess(ref, client.peer_id, v4, v6, view, expires_at, message.domain)
    peer = to_gateway.Client(client.peer_id, read_key(client.public_key), message.preshared_key, v4, v6)
    return to_gateway.RequestConnection(
        ref, peer, view, message.ice_credentials, expires_at, message.domain, messages.KEEPALIVE
    )  # fmt: skip
