"""The gateway's side of a tunnel: clients, what each was granted, and the packets of both directions.

Source: `spec/tunnel.md` §14 to §17; `spec/portal-protocol.md` §6, and §9 for clients before 1.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from fz_core.crypto import PrivateKey
from fz_core.node import GATEWAY_PROFILES, NoRelays, Parameters
from fz_core.node.deadlines import Deadlines
from fz_core.packet import (
    DropReason,
    Packet,
    TooBig,
    build_icmp_prohibited,
    build_icmp_too_big,
    build_icmp_unreachable,
)
from fz_core.portal import client as shared
from fz_core.portal import gateway as messages
from fz_core.portal.types import GatewayInterface, IceCredentials, merge_relays
from fz_core.tunnel import control
from fz_core.tunnel.candidates import CandidateBatch
from fz_core.tunnel.client_access import Attribution, ClientAccess, Decision
from fz_core.tunnel.events import (
    AccessEnded,
    AccessGranted,
    ConnectionDown,
    ResolveName,
    SendToPortal,
    TunConfigChanged,
)
from fz_core.tunnel.flow_tracking import FlowTracking
from fz_core.tunnel.portal_clock import PortalClock
from fz_core.tunnel.ranges import PEER_RANGE, PEERS, PROXY_RANGE, SENTINEL_RANGE
from fz_core.tunnel.resolutions import RENEWAL, Resolution, Resolutions
from fz_core.tunnel.role import TunnelRole, connection_parameters
from fz_core.tunnel.verdict import FlowKey, Verdict, is_plain

TICK = 1.0
MAX_PROXIES_PER_NAME = 16
LEGACY_RENEWAL = 5.0
FIN, RST = 1, 4


class GatewayTunnel(TunnelRole):
    """Sans-IO state of a gateway. One mutation, then drain every `poll_*`, then wait for `poll_timeout`.

    With `mix_families` a name that has addresses of one family only is reachable through proxy
    addresses of both (64 and 46 translation); without, the other family is answered "unreachable".
    """

    def __init__(
        self,
        private_key: PrivateKey,
        now: float,
        unix_epoch: float,
        random_bytes: Callable[[int], bytes],
        *,
        mix_families: bool = True,
        flows: FlowTracking | None = None,
    ) -> None:
        super().__init__(private_key, now, unix_epoch, random_bytes, flows or FlowTracking("gateway", unix_epoch))
        self._clock = PortalClock(unix_epoch, now)
        self._random_bytes = random_bytes
        self._mix_families = mix_families
        self._interface: GatewayInterface | None = None
        self._clients: dict[str, ClientAccess] = {}
        self._by_ip: dict[bytes, str] = {}
        self._endings: Deadlines[str] = Deadlines(lambda client_id: self._clients[client_id].next_expiry())
        self._resolutions = Resolutions()
        self._legacy: dict[str, Parameters] = {}
        self._tick_at: float | None = None

    # commands

    def _handle_message(self, message: messages.Inbound, now: float) -> None:
        match message:
            case messages.Init():
                self._init(message, now)
            case messages.CreateAuthorization():
                self._authorize(message, now)
            case messages.RequestConnection() | messages.AllowAccess():
                self._handle_legacy(message, now)
            case shared.RejectAccess(client_id, resource_id):
                self._revoke(client_id, resource_id, "revoked", now)
            case messages.ResourceUpdated(resource):
                self._void()
                for access in self._clients.values():
                    access.update_filters(resource)
            case shared.RelaysPresence():
                self.node.update_relays(message.disconnected_ids, merge_relays(message.connected), now)
            case messages.IceCandidates(client_id, candidates):
                for line in candidates:
                    self.node.add_remote_candidate(client_id, line, now)
            case messages.InvalidateIceCandidates(client_id, candidates):
                for line in candidates:
                    self.node.remove_remote_candidate(client_id, line, now)
            case _:
                pass

    def shutdown(self, now: float) -> None:
        """Say goodbye to every peer."""
        self._void()
        self.flows.shutdown(now)
        for client_id in self.node.peers:
            self.node.close(client_id, control.Goodbye().build().data, now)
        self._collect(now)

    # time and output

    def handle_timeout(self, now: float) -> None:
        """Run every timer that is due; grants and translations are checked at most once a second."""
        self.node.handle_timeout(now)
        self.flows.handle_timeout(now)
        if self._tick_at is not None and now >= self._tick_at:
            self._expire(now)
        self._collect(now)

    def poll_timeout(self) -> tuple[float, str] | None:
        """The next deadline and what it is for."""
        due = (
            (self.node.poll_timeout(), "connections"),
            (self._tick_at, "access expiry"),
            (self.flows.poll_timeout(), "flow logs"),
        )
        return min(((at, why) for at, why in due if at is not None), default=None)

    def _note_ending(self, client_id: str, now: float) -> None:
        """A grant or translation of this client may end earlier than known."""
        self._endings.note(client_id)
        self._schedule_look(now)

    def _schedule_look(self, now: float) -> None:
        """Look when the next thing ends, but not within a second from now."""
        due_at = self._endings.poll_timeout()
        if due_at is not None:
            at = max(due_at, now + TICK)
            self._tick_at = at if self._tick_at is None else min(self._tick_at, at)

    # data

    def _route(self, packet: Packet, now: float) -> DropReason | None:
        client_id = self._by_ip.get(packet.dst)
        if client_id is None:
            return DropReason.NO_PEER_STATE if packet.dst in PEER_RANGE else DropReason.NOT_A_PEER
        tracker = self.flows.tracker
        flow = None if tracker is None else tracker.match_rx(client_id, packet, now)
        before = FlowKey.of(packet) if self._may_offer and is_plain(packet) else None
        # Whoever sent what does not fit must be told in terms of what it sent, and `admit` translates in place.
        as_received = packet.copy() if self.path_mtus.limits and client_id in self.path_mtus.limits else None
        admitted = self._clients[client_id].admit(packet, now)
        if isinstance(admitted, DropReason):
            return admitted
        if isinstance(admitted, TooBig):
            self._packets.append(build_icmp_too_big(packet, admitted.mtu))
            return DropReason.TOO_BIG
        if packet.tcp_flags & (FIN | RST):
            self._note_ending(client_id, now)
        reason = self._transmit(client_id, admitted, now, as_received)
        if tracker is not None and flow is not None and reason is None:
            tracker.count_rx(flow, admitted, now)
        if before is not None and reason is None:
            self._offer(client_id, before, admitted, now, is_inbound=False, is_tracked=before.src not in self._own_ips)
        return reason

    def _accept(self, client_id: str, packet: Packet, ecn: int, now: float) -> DropReason | None:
        access = self._clients.get(client_id)
        if access is None:
            # A client whose last grant is gone may still say goodbye.
            return self._handle_control(client_id, packet, now) if packet.is_fz_control else DropReason.NO_PEER_STATE
        match access.decide(packet):
            case Decision.PASS:
                if self.flows.tracker is not None:
                    self._note_flow(client_id, access.attribute(packet), packet, now)
                self._deliver(packet, ecn)
                if self._may_offer and is_plain(packet):
                    before, is_tracked = FlowKey.of(packet), packet.dst not in self._own_ips
                    self._offer(client_id, before, packet, now, is_inbound=True, is_tracked=is_tracked)
            case Decision.TRANSLATE:
                return self._translate(client_id, access, packet, ecn, now)
            case Decision.CONTROL:
                return self._handle_control(client_id, packet, now)
            case Decision.PROHIBITED if client_id in self._legacy and self._is_early(access, packet):
                return DropReason.NOT_ALLOWED
            case Decision.PROHIBITED:
                self.drops.add(DropReason.FILTERED)
                return self._transmit(client_id, build_icmp_prohibited(packet), now)
            case Decision.UNREACHABLE:
                self._renew_legacy_name(client_id, access, packet.dst, now)
                self.drops.add(DropReason.FILTERED)
                return self._transmit(client_id, build_icmp_unreachable(packet), now)
            case Decision.IGNORE:
                self.drops.add(DropReason.MULTICAST)
            case reason:
                return reason
        return None

    def _translate(
        self, client_id: str, access: ClientAccess, packet: Packet, ecn: int, now: float
    ) -> DropReason | None:
        attribution = None if self.flows.tracker is None else access.attribute(packet)
        opened, is_end, proxy_ip = access.opened_sessions, packet.tcp_flags & (FIN | RST), packet.dst
        before = FlowKey.of(packet) if self._may_offer and is_plain(packet) else None
        translated = access.translate(packet, now)
        if isinstance(translated, DropReason):
            return translated
        if isinstance(translated, TooBig):
            return self._transmit(client_id, build_icmp_too_big(packet, translated.mtu), now) or DropReason.TOO_BIG
        if is_end or access.opened_sessions != opened:  # packets of known flows only move deadlines away
            self._note_ending(client_id, now)
            self._renew_legacy_name(client_id, access, proxy_ip, now)
        if attribution is not None:
            self._note_flow(client_id, attribution, translated, now)
        self._deliver(translated, ecn)
        if before is not None:
            self._offer(client_id, before, translated, now, is_inbound=True, is_tracked=True)
        return None

    def _offer(
        self, client_id: str, before: FlowKey, after: Packet, now: float, *, is_inbound: bool, is_tracked: bool
    ) -> None:
        """A packet passed; what a client and this gateway say to each other is nobody's flow."""
        access = self._clients[client_id]
        until = access.lasts_until
        if not self._may_offer or until <= now:
            return
        verdict = Verdict(is_inbound, client_id, before, FlowKey.of(after), until)
        if access.support(verdict) and (not is_tracked or self.flows.support(verdict, is_tx=is_inbound)):
            self._verdict = verdict

    def _note_flow(self, client_id: str, attribution: Attribution | None, packet: Packet, now: float) -> None:
        """A packet of a client passes to a resource; as the resource sees it."""
        if attribution is not None:
            resource_id, name = attribution
            self.flows.note_tx(client_id, resource_id, packet, self.node.path(client_id), now, domain=name)

    def _handle_control(self, client_id: str, packet: Packet, now: float) -> DropReason | None:
        match control.parse_untrusted(packet.control_event_type, packet.control_body):
            case control.Goodbye():
                self.node.remove(client_id)
                self._forget(client_id, "the client said goodbye", now)
            case control.AssignedIps() as assigned:
                return self._resolve_for(client_id, assigned, now)
            case _:
                return DropReason.BAD_CONTROL
        return None

    # names

    def _resolve_for(self, client_id: str, assigned: control.AssignedIps, now: float) -> DropReason | None:
        access = self._clients.get(client_id)
        domain, proxy_ips = assigned.domain.lower(), tuple(ip.packed for ip in assigned.proxy_ips)
        if not are_proxies(proxy_ips):
            return DropReason.BAD_CONTROL
        if access is None or not access.may_resolve(assigned.resource_id, domain):
            return self._tell_status(client_id, assigned.resource_id, assigned.domain, False, now)
        token = self._resolutions.begin(Resolution(client_id, assigned.resource_id, assigned.domain, proxy_ips))
        if token is None:
            return DropReason.DNS_BUSY  # the client asks again
        if token:
            self._events.append(ResolveName(token, domain))
        return None

    def handle_name_resolved(self, token: int, addresses: Iterable[bytes] | None, now: float) -> None:
        """The end of a `ResolveName`: all addresses found, possibly none; None if it took too long."""
        resolution = self._resolutions.end(token)
        if resolution is None:
            return
        known = None if addresses is None else tuple(addresses)
        if resolution.legacy is RENEWAL:
            self._set_up_name(resolution, known or None)
        elif resolution.legacy is not None:
            self._finish_legacy(resolution.legacy, known or (), now)
        else:
            is_active = self._set_up_name(resolution, known)
            reason = self._tell_status(resolution.client_id, resolution.resource_id, resolution.domain, is_active, now)
            if reason is not None:
                self._drop(reason)
        self._collect(now)

    def _set_up_name(
        self, resolution: Resolution, addresses: tuple[bytes, ...] | None, renew_at: float | None = None
    ) -> bool:
        access, name = self._clients.get(resolution.client_id), resolution.domain.lower()
        if addresses is None or access is None or not access.may_resolve(resolution.resource_id, name):
            return False
        proxy_ips, mix = resolution.proxy_ips, self._mix_families
        self._void_peer(resolution.client_id)
        access.set_up_name(resolution.resource_id, name, proxy_ips, addresses, mix=mix, renew_at=renew_at)
        return True

    def _tell_status(
        self, client_id: str, resource_id: str, domain: str, active: bool, now: float
    ) -> DropReason | None:
        return self._transmit(client_id, control.DomainStatus(resource_id, domain, active).build(), now)

    # portal messages

    def _init(self, message: messages.Init, now: float) -> None:
        self._void()
        self._interface = message.interface
        self._own_ips = (message.interface.ipv4.packed, message.interface.ipv6.packed)
        self.node.update_relays((), merge_relays(message.relays), now)
        self._configure_flow_logs(message.flow_logs, now)
        self._events.append(TunConfigChanged(message.interface.ipv4, message.interface.ipv6, frozenset(PEERS)))
        for access in self._clients.values():
            access.own_ips = self._own_ips
        listed = {(a.client_id, a.resource_id): a.expires_at for a in message.authorizations}
        for client_id, access in list(self._clients.items()):
            for resource_id in sorted(access.resource_ids):
                if (client_id, resource_id) in listed:
                    access.set_expiry(resource_id, self._clock.monotonic(listed[client_id, resource_id], now))
                    self._note_ending(client_id, now)
                else:
                    self._revoke(client_id, resource_id, "not listed by the portal", now)

    def _authorize(self, message: messages.CreateAuthorization, now: float) -> None:
        parameters = connection_parameters(
            message.client.public_key,
            message.client.preshared_key,
            message.gateway_ice_credentials,
            message.client_ice_credentials,
            controlling=False,
            iceless=message.use_iceless,
        )
        try:
            self.node.upsert_connection(message.client.id, parameters, now, GATEWAY_PROFILES)
        except NoRelays:
            self._postpone(message, now)
            return
        ips = (message.client.ipv4.packed, message.client.ipv6.packed)
        self._grant(message.client.id, ips, message.resource, message.expires_at, now)
        self.flows.learn(message.client.id, message.resource.id, message.ingest_token)
        self._events.append(SendToPortal(messages.AuthorizationCreated(message.ref)))

    def _connect(self, client_id: str, parameters: Parameters, now: float) -> bool:
        try:
            self.node.upsert_connection(client_id, parameters, now, GATEWAY_PROFILES)
        except NoRelays:
            self._events.append(SendToPortal(shared.NoRelays()))
            return False
        return True

    def _grant(
        self,
        client_id: str,
        ips: tuple[bytes, bytes],
        resource: messages.GatewayResource,
        expires_at: float | None,
        now: float,
    ) -> None:
        if self._interface is None:
            return
        self._void_peer(client_id)
        access = self._clients.get(client_id)
        if access is None or access.client_ips != ips:
            self._unindex(client_id)
            if access is None:
                self._endings.add(client_id)
            access = self._clients[client_id] = ClientAccess(ips, self._own_ips, self._revoked)
            for ip in ips:
                if ip in self._by_ip:
                    self._void_peer(self._by_ip[ip])
                self._by_ip[ip] = client_id
        if access.grant(resource, self._clock.monotonic(expires_at, now)):
            self._events.append(AccessGranted(client_id, resource.id, expires_at))
            self._note_ending(client_id, now)

    def _revoke(self, client_id: str, resource_id: str, reason: str, now: float) -> None:
        access = self._clients.get(client_id)
        if access is not None and access.revoke(resource_id):
            self._void_peer(client_id)
            self.flows.end_access(client_id, resource_id, now)
            self._events.append(AccessEnded(client_id, resource_id, reason))
            self._dismiss_if_empty(client_id, now)

    def _expire(self, now: float) -> None:
        self._tick_at = None
        for client_id in self._endings.take(now):
            for resource_id in self._clients[client_id].expire(now):
                self._void_peer(client_id)
                self.flows.end_access(client_id, resource_id, now)
                self._events.append(AccessEnded(client_id, resource_id, "expired"))
            self._dismiss_if_empty(client_id, now)
        self._schedule_look(now)

    def _dismiss_if_empty(self, client_id: str, now: float) -> None:
        if self._clients[client_id].is_empty:
            self.node.close(client_id, control.Goodbye().build().data, now)
            self._forget(client_id, "nothing is granted any more", now)

    def _forget(self, client_id: str, reason: str, now: float) -> None:
        self._void_peer(client_id)
        self.flows.end_peer(client_id, now)
        self._unindex(client_id)
        self._forget_paths(client_id)
        self._legacy.pop(client_id, None)
        self._endings.remove(client_id)
        if self._clients.pop(client_id, None) is not None:
            self._events.append(ConnectionDown(client_id, reason))

    def _unindex(self, client_id: str) -> None:
        access = self._clients.get(client_id)
        if access is not None:
            for ip in access.client_ips:
                if self._by_ip.get(ip) == client_id:
                    del self._by_ip[ip]

    # clients before 1.4: the name is resolved before the answer, and we choose our own ICE credentials

    def _handle_legacy(self, message: messages.RequestConnection | messages.AllowAccess, now: float) -> None:
        if message.domain is None:
            self._finish_legacy(message, (), now)
            return
        client_id = message.client.id if isinstance(message, messages.RequestConnection) else message.client_id
        proxy_ips = tuple(ip.packed for ip in message.domain.proxy_ips)
        resolution = Resolution(client_id, message.resource.id, message.domain.name, proxy_ips, message)
        token = self._resolutions.begin(resolution) if are_proxies(proxy_ips) else None
        if token is None:
            self._drop(DropReason.BAD_CONTROL)
        else:
            self._events.append(ResolveName(token, message.domain.name.lower()))

    def _finish_legacy(
        self,
        message: messages.RequestConnection | messages.AllowAccess,
        addresses: Sequence[bytes],
        now: float,
    ) -> None:
        """Connect if that was asked for, grant, translate, answer.

        A name without addresses is no reason for silence: such a client holds everything else until it is answered.
        """
        if isinstance(message, messages.AllowAccess):
            client_id, ips = message.client_id, (message.client_ipv4.packed, message.client_ipv6.packed)
        else:
            client_id, ips = message.client.id, (message.client.ipv4.packed, message.client.ipv6.packed)
            parameters = self._legacy_parameters(message)
            if not self._connect(client_id, parameters, now):
                return
            self._legacy[client_id] = parameters
        self._grant(client_id, ips, message.resource, message.expires_at, now)
        if message.domain is not None:
            proxy_ips = tuple(ip.packed for ip in message.domain.proxy_ips)
            resolution = Resolution(client_id, message.resource.id, message.domain.name, proxy_ips)
            self._set_up_name(resolution, tuple(addresses), now + LEGACY_RENEWAL)
        if isinstance(message, messages.RequestConnection):
            local = self._legacy[client_id].local
            answer = messages.ConnectionReady(message.ref, IceCredentials(local.ufrag, local.password))
            self._events.append(SendToPortal(answer))

    def _renew_legacy_name(self, client_id: str, access: ClientAccess, proxy_ip: bytes, now: float) -> None:
        """Clients before 1.4 announce a name once per connection; look it up again for new flows."""
        due = access.take_due_name(proxy_ip, now, LEGACY_RENEWAL) if client_id in self._legacy else None
        if due is not None and due.resource_ids:
            resolution = Resolution(client_id, due.resource_ids[0], due.name, due.ips, RENEWAL)
            token = self._resolutions.begin(resolution)
            if token:
                self._events.append(ResolveName(token, due.name))

    def _is_early(self, access: ClientAccess, packet: Packet) -> bool:
        """Whether a name's packet came before its announcement, which takes the slower way through the portal."""
        return packet.dst in PROXY_RANGE and not access.is_announced(packet.dst)

    def _legacy_parameters(self, message: messages.RequestConnection) -> Parameters:
        """The same request again means the same connection, so our credentials must be the same too."""
        client = message.client
        wanted = connection_parameters(
            client.public_key,
            client.preshared_key,
            IceCredentials(self._random_bytes(4).hex(), self._random_bytes(16).hex()),
            message.client_ice_credentials,
            controlling=False,
            iceless=False,
        )
        known = self._legacy.get(client.id)
        return known if known is not None and known == replace(wanted, local=known.local) else wanted

    # what the node reports

    def _candidate_messages(self, batch: CandidateBatch) -> Iterator[messages.Outbound]:
        if batch.removed:
            yield messages.BroadcastInvalidatedIceCandidates((batch.peer_id,), batch.removed)
        if batch.added:
            yield messages.BroadcastIceCandidates((batch.peer_id,), batch.added)

    def _handle_connected(self, peer_id: str, now: float) -> None:
        """A gateway keeps no packets back."""

    def _handle_connection_lost(self, peer_id: str, reason: str, now: float) -> None:
        # The grants stay: the client may still count on them when it returns.
        self._events.append(ConnectionDown(peer_id, reason))


def are_proxies(ips: Sequence[bytes]) -> bool:
    """Whether addresses may be translated: few, and all from the proxy ranges (§24)."""
    return 0 < len(ips) <= MAX_PROXIES_PER_NAME and all(ip in PROXY_RANGE and ip not in SENTINEL_RANGE for ip in ips)
