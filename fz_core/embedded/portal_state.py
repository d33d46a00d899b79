"""An embedded portal without sockets: connections, texts and time in, texts and closings out.

    state = PortalState(policy, store, unix_epoch=..., random_bytes=..., now=now)
    session_id = state.open(Knock(...), now)             # or a Refusal
    state.handle_text(session_id, text, now)             # then drain poll_output(), wait for poll_timeout()

Source: `spec/portal-protocol.md` §2, §8, §10. Not here: HTTP, files, signals (`portal_server`, `commands.portal`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fz_core.embedded import portal_views as views
from fz_core.embedded.policy import ClientAccount, GatewayAccount, Policy, ResourceRule
from fz_core.embedded.portal_access import Access
from fz_core.embedded.portal_changes import apply_policy
from fz_core.embedded.portal_devices import DevicePools
from fz_core.embedded.portal_hub import FROM_PEER, Close, Evict, Hub, Look, Output, Send, log
from fz_core.embedded.portal_legacy import OldClients
from fz_core.embedded.portal_session import Knock, Refusal, Session, admit, external_id_of
from fz_core.embedded.store import Store, StoreFull
from fz_core.portal import client as to_client
from fz_core.portal import client_legacy
from fz_core.portal import gateway as to_gateway
from fz_core.portal import relay as to_relay
from fz_core.portal.codec import ParseFailure
from fz_core.portal.framing import Frame, Truncated, parse_frame_untrusted
from fz_core.portal.types import Authorization, GatewayInterface
from fz_core.turn import relay_id

IDLE_TIMEOUT = 60.0
SWEEP_INTERVAL = 5.0
PRESENCE_DELAY = 1.0
MAX_SESSIONS = 4096
MAX_SECRET = 256

__all__ = ["Close", "Evict", "Knock", "Look", "PortalState", "Refusal", "Send"]


class PortalState:
    """The whole portal. **After any call drain `poll_output`.**"""

    def __init__(
        self,
        policy: Policy,
        store: Store,
        *,
        unix_epoch: float,
        random_bytes: Callable[[int], bytes],
        now: float,
        max_sessions: int = MAX_SESSIONS,
    ) -> None:
        self._hub = Hub(policy, store, unix_epoch, random_bytes)
        self._access = Access(self._hub, now)
        self._pools = DevicePools(self._hub, self._access)
        self._old_clients = OldClients(self._hub, self._access)
        self._max_sessions, self._last_id = max_sessions, 0
        self._hub.timers.set(("sweep",), now + SWEEP_INTERVAL)
        for grant in store.grants():
            if self._access.is_allowed(grant, now) and grant.expires_at > self._hub.unix(now):
                self._access.watch(grant)
            else:
                store.remove_grant(grant)

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._hub.policy

    def counts(self) -> dict[str, int]:
        """Joined peers by role."""
        return {role: sum(1 for _ in self._hub.joined(role)) for role in ("client", "gateway", "relay")}

    # connections

    def open(self, knock: Knock, now: float) -> int | Refusal:
        """Someone asks for a WebSocket. The number of the session, or what to answer instead."""
        hub, unix_now = self._hub, self._hub.unix(now)
        session = admit(knock, hub.policy, self._last_id + 1, unix_now, now)
        if isinstance(session, Refusal):
            return session
        if len(hub.sessions) >= self._max_sessions:
            return Refusal(503, "overloaded", "Too many connections.", 5)
        if session.account is not None:
            owner = self._owner(session)
            external_id, name = external_id_of(knock.params), knock.params["name"]
            try:
                session.device = hub.store.find_or_create(
                    session.role, owner, external_id, name, unix_now, hub.online_devices()
                )
            except StoreFull as error:
                log.error("Cannot admit %s name=%s: %s", session.role, name, error)
                return Refusal(503, "overloaded", "Too many devices.", 60)
        self._last_id = session.id
        replaced = hub.peer(session.peer_id, session.role) if session.device else None
        hub.add(session)
        if replaced is not None:
            self._access.handle_gone(replaced, now)
            self._old_clients.handle_gone(replaced)
        if isinstance(session.account, ClientAccount) and session.account.expires_at is not None:
            hub.timers.set(("token", str(session.id)), hub.monotonic(session.account.expires_at))
        return session.id

    def rival_of(self, knock: Knock, now: float) -> int | None:
        """The connection a knock would replace, if that of another process: one with another key."""
        hub = self._hub
        session = admit(knock, hub.policy, 0, hub.unix(now), now)
        if isinstance(session, Refusal) or session.account is None:
            return None
        device = hub.store.find(session.role, self._owner(session), external_id_of(knock.params))
        old = hub.peer(device.id, session.role) if device else None
        return old.id if old is not None and old.public_key != session.public_key else None

    def _owner(self, session: Session) -> str:
        account = session.account
        if isinstance(account, GatewayAccount):
            return self._hub.policy.sites[account.site].id
        return account.id if account is not None else ""

    def handle_closed(self, session_id: int, now: float) -> None:
        """A connection is gone."""
        session = self._hub.sessions.get(session_id)
        if session is not None:
            self._leave(session, "closed by the peer", now, tell=False)

    def handle_text(self, session_id: int, text: str, now: float) -> None:
        """A text message of a peer."""
        session = self._hub.sessions.get(session_id)
        if session is None:
            return
        session.last_frame_at = now
        try:
            frame = parse_frame_untrusted(text)
        except Truncated:
            frame = None
        if frame is None:
            log.debug("Ignored what is no frame role=%s name=%s", session.role, session.name)
        elif frame.topic == "phoenix" and frame.event == "heartbeat":
            self._hub.reply(session, frame, "ok")
        elif frame.topic != session.role:
            self._hub.reply(session, frame, "error", {"reason": "unmatched topic"})
        elif frame.event == "phx_join":
            self._join(session, frame, now)
        elif frame.event == "phx_leave":
            self._leave(session, "left", now)
        elif not session.is_joined:
            self._hub.reply(session, frame, "error", {"reason": "unmatched topic"})
        else:
            self._dispatch(session, frame, now)

    def handle_timeout(self, now: float) -> None:
        """Do what is due."""
        while (key := self._hub.timers.pop(now)) is not None:
            match key:
                case ("sweep",):
                    self._sweep(now)
                case ("presence",):
                    self._announce_relays()
                case ("pending", ref):
                    self._access.handle_unanswered(ref)
                case ("held", session_id, resource_id):
                    self._access.held.handle_due(int(session_id), resource_id, now)
                case ("missing", identity):
                    self._hub.missing_relays.discard(identity)
                    self._announce_relays()
                case ("repeat", ref):
                    self._access.repeat(ref)
                case ("waiting", ref):
                    self._old_clients.handle_unanswered(ref)
                case ("token", session_id):
                    self._expire_token(int(session_id), now)
                case ("grant", client_id, resource_id, receiver_id):
                    self._access.handle_expired(client_id, resource_id, receiver_id, now)

    def poll_timeout(self) -> float | None:
        """When `handle_timeout` is next due."""
        return self._hub.timers.next_at()

    def poll_output(self) -> Output | None:
        """What to send or close."""
        return self._hub.outputs.popleft() if self._hub.outputs else None

    def set_policy(self, policy: Policy, now: float) -> None:
        """Put a new policy in force and tell everyone concerned."""
        before = {s.id: s for s in self._hub.sessions.values()}
        apply_policy(self._hub, self._access, policy, now)
        for session in before.values():
            if session.id not in self._hub.sessions:
                self._left(session, now)

    # joining

    def _join(self, session: Session, frame: Frame, now: float) -> None:
        if session.role == "relay" and not self._join_relay(session, frame, now):
            self._hub.reply(session, frame, "error", {"reason": "invalid stamp_secret"})
            return
        session.is_joined = session.was_joined = True
        session.joined_at = now
        self._hub.reply(session, frame, "ok")
        version = session.agent.version_text if session.agent else None
        log.info("Joined role=%s name=%s version=%s", session.role, session.name, version)
        if session.role == "client":
            self._access.handle_receiver_joined(session)
            self._send_client_init(session, now)
            self._announce_device(session)
        elif session.role == "gateway":
            self._access.handle_receiver_joined(session)
            self._send_gateway_init(session, now)
            self._access.held.retry(now)
        else:
            self._hub.send(session, to_relay.Init())

    def _join_relay(self, session: Session, frame: Frame, now: float) -> bool:
        secret = frame.payload.get("stamp_secret") if isinstance(frame.payload, dict) else None
        if not isinstance(secret, str) or not secret.isascii() or not 0 < len(secret) <= MAX_SECRET:
            return False
        identity = relay_id(secret)
        for old in [s for s in self._hub.joined("relay") if s.relay_id == identity and s is not session]:
            self._hub.close(old, "replaced by a newer connection of this relay")
        session.stamp_secret, session.relay_id = secret, identity
        self._hub.missing_relays.discard(identity)
        self._hub.timers.cancel(("missing", identity))
        self._hub.timers.set(("presence",), now + PRESENCE_DELAY)
        return True

    def _send_client_init(self, session: Session, now: float) -> None:
        assert session.device is not None
        hub, grants = self._hub, self._authorizations(session, now)
        hub.send(
            session,
            to_client.Init(
                views.interface(hub.policy, session.device),
                tuple(views.resources(hub.policy, hub.store, session).values()),
                hub.relays_for(session),
                grants,
                views.FLOW_LOGS,
            ),
        )
        for rule in self._granted(grants):
            hub.send(session, to_client.ResourceFiltersUpdated(rule.id, rule.filters))

    def _announce_device(self, session: Session) -> None:
        """A pool this device belongs to may have grown by it; to clients that know it already nothing changes."""
        hub = self._hub
        for rule in hub.policy.resources.values():
            if not isinstance(session.account, ClientAccount) or session.account.name not in rule.devices:
                continue
            for other in hub.joined("client"):
                view = views.resources(hub.policy, hub.store, other).get(rule.id)
                if other is not session and view is not None:
                    hub.send(other, to_client.ResourceCreatedOrUpdated(view))

    def _send_gateway_init(self, session: Session, now: float) -> None:
        assert session.device is not None
        hub = self._hub
        addresses = GatewayInterface(session.device.ipv4, session.device.ipv6)
        grants = self._authorizations(session, now)
        hub.send(
            session,
            to_gateway.Init(addresses, hub.relays_for(session), grants, hub.policy.account, views.FLOW_LOGS),
        )
        for rule in self._granted(grants):
            hub.send(session, to_gateway.ResourceUpdated(views.gateway_resource(rule)))

    def _granted(self, grants: tuple[Authorization, ...]) -> list[ResourceRule]:
        """What a receiver serves; filters may have changed while it was away, and `init` does not tell."""
        rules = (self._hub.policy.resource(i) for i in dict.fromkeys(g.resource_id for g in grants))
        return [rule for rule in rules if rule is not None]

    def _authorizations(self, session: Session, now: float) -> tuple[Authorization, ...]:
        return tuple(
            Authorization(g.client_id, g.resource_id, g.expires_at)
            for g in self._hub.store.grants_at(session.peer_id)
            if g.expires_at > self._hub.unix(now)
        )

    # messages

    def _dispatch(self, session: Session, frame: Frame, now: float) -> None:
        message = FROM_PEER[session.role].parse(frame.event, frame.payload, is_legacy=session.is_legacy)
        match message:
            case ParseFailure(event, reason):
                log.debug("Ignored event=%s name=%s: %s", event, session.name, reason)
                self._hub.reply(session, frame, "error", {"reason": "unknown_message"})
            case to_client.SetSnownetCapabilities(iceless):
                session.is_iceless = iceless
                self._access.held.retry(now)
            case to_client.NoRelays():
                session.relays = set()
                self._hub.send(session, to_client.RelaysPresence((), self._hub.relays_for(session)))
                self._access.handle_no_relays(session, now)
            case to_gateway.AuthorizationCreated(ref):
                self._acknowledge(session, frame, self._access.confirm(session, ref, now))
            case to_gateway.ConnectionReady(ref, credentials):
                self._acknowledge(session, frame, self._old_clients.confirm(session, ref, credentials))
            case to_gateway.BroadcastIceCandidates(client_ids, candidates):
                self._to_clients(session, client_ids, to_client.GatewayIceCandidates, candidates)
            case to_gateway.BroadcastInvalidatedIceCandidates(client_ids, candidates):
                self._to_clients(session, client_ids, to_client.InvalidateGatewayIceCandidates, candidates)
            case to_client.NewGatewayIceCandidates(gateway_id, candidates):
                self._to_gateway(gateway_id, to_gateway.IceCandidates(session.peer_id, candidates))
            case to_client.WithdrawGatewayIceCandidates(gateway_id, candidates):
                self._to_gateway(gateway_id, to_gateway.InvalidateIceCandidates(session.peer_id, candidates))
            case to_client.BroadcastIceCandidates(gateway_ids, candidates):
                for gateway_id in gateway_ids:
                    self._to_gateway(gateway_id, to_gateway.IceCandidates(session.peer_id, candidates))
            case to_client.BroadcastInvalidatedIceCandidates(gateway_ids, candidates):
                for gateway_id in gateway_ids:
                    self._to_gateway(gateway_id, to_gateway.InvalidateIceCandidates(session.peer_id, candidates))
            case (
                client_legacy.PrepareConnection() | client_legacy.RequestConnection() | client_legacy.ReuseConnection()
            ):
                self._old_clients.handle(session, message, frame, now)
            case to_client.RequestAuthorization() if self._pools.is_for_device(message):
                self._pools.request(session, message, now)
            case to_client.RequestAuthorization():
                self._access.request(session, message, now)
            case _:
                self._pools.handle(session, message)

    def _acknowledge(self, session: Session, frame: Frame, is_known: bool) -> None:
        if is_known:
            self._hub.reply(session, frame, "ok")
        else:
            self._hub.reply(session, frame, "error", {"reason": "invalid_ref"})

    def _to_clients(
        self, session: Session, client_ids: tuple[str, ...], kind: Any, candidates: tuple[str, ...]
    ) -> None:
        for client_id in client_ids:
            client = self._hub.peer(client_id, "client")
            if client is not None:
                self._hub.send(client, kind(session.peer_id, candidates))

    def _to_gateway(self, gateway_id: str, message: Any) -> None:
        gateway = self._hub.peer(gateway_id, "gateway")
        if gateway is not None:
            self._hub.send(gateway, message)

    # leaving

    def _leave(self, session: Session, reason: str, now: float, *, tell: bool = True) -> None:
        was_joined = session.is_joined
        if tell:
            self._hub.close(session, reason)
        else:
            self._hub.forget(session)
        if was_joined:
            log.info("Left role=%s name=%s reason=%s", session.role, session.name, reason)
        self._left(session, now)

    def _left(self, session: Session, now: float) -> None:
        self._hub.timers.cancel(("token", str(session.id)))
        if session.role == "relay":
            self._miss(session, now)
        else:
            self._access.handle_gone(session, now)
            self._old_clients.handle_gone(session)

    def _miss(self, session: Session, now: float) -> None:
        """A relay's connection ended; perhaps only that. Have it looked at, and wait for it a moment."""
        identity = session.relay_id
        if identity is None or any(s.relay_id == identity for s in self._hub.joined("relay")):
            return
        self._hub.missing_relays.add(identity)
        self._hub.timers.set(("missing", identity), now + PRESENCE_DELAY)
        self._hub.outputs.append(Look(identity, session.addresses))

    def handle_relay_dead(self, identity: str, now: float) -> None:
        """A relay to `Look` at does not answer its clients either: waiting for it is no use."""
        if identity in self._hub.missing_relays:
            self._hub.timers.set(("missing", identity), now)

    def _expire_token(self, session_id: int, now: float) -> None:
        session = self._hub.sessions.get(session_id)
        if session is not None:
            log.info("Token expired role=%s name=%s", session.role, session.name)
            self._hub.expel(session)
            self._left(session, now)

    def _sweep(self, now: float) -> None:
        self._hub.timers.set(("sweep",), now + SWEEP_INTERVAL)
        for session in list(self._hub.sessions.values()):
            if now - session.last_frame_at >= IDLE_TIMEOUT:
                self._leave(session, f"silent for {IDLE_TIMEOUT:.0f} s", now)

    def _announce_relays(self) -> None:
        """Replace relays that went away, and complete what has too few."""
        hub = self._hub
        present = hub.missing_relays | {s.relay_id for s in hub.joined("relay") if s.relay_id}
        for role in ("client", "gateway"):
            for session in hub.joined(role):
                given = set(session.relays)
                connected = hub.relays_for(session)
                gone = given - present
                if gone or session.relays - given:
                    hub.send(session, to_client.RelaysPresence(tuple(sorted(gone)), connected))
