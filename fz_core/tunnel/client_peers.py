"""What a client does with any peer, and with other clients in particular (`spec/tunnel.md` §7, §12).

Requests for access, packets that wait for a connection, and direct traffic between clients. What
concerns gateways is `client.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Address, ip_address

from fz_core.crypto import PrivateKey
from fz_core.dns import NameEntry, ProxyNames
from fz_core.node import PEER_CLIENT_PROFILES, NoRelays, Parameters, Profiles
from fz_core.packet import DropReason, IcmpErrorKind, Packet, build_icmp_prohibited
from fz_core.portal import client as messages
from fz_core.portal.types import Authorization, Interface
from fz_core.tunnel import control
from fz_core.tunnel.authorizations import RETRY_INTERVAL, AccessKey, PendingAuthorizations
from fz_core.tunnel.candidates import CandidateBatch, EarlyCandidates
from fz_core.tunnel.client_dns import SiteAsker
from fz_core.tunnel.events import (
    AccessEnded,
    AccessGranted,
    ResetWanted,
    ResourceOffline,
    ResourcesChanged,
    SendToPortal,
)
from fz_core.tunnel.flow_tracking import FlowTracking
from fz_core.tunnel.gateways import Gateways
from fz_core.tunnel.latest import Latest
from fz_core.tunnel.peer_access import PeerDecision
from fz_core.tunnel.peer_clients import PeerClient, PeerClients
from fz_core.tunnel.portal_clock import PortalClock
from fz_core.tunnel.resources import Resources, Target, Via
from fz_core.tunnel.role import TunnelRole, connection_parameters
from fz_core.tunnel.status import Sites
from fz_core.tunnel.traffic import outbound
from fz_core.tunnel.verdict import FOREVER, FlowKey, Verdict, is_plain
from fz_core.tunnel.waiting import WaitingPackets

MAX_RESUMED = 32
RESET_INTERVAL = 60.0


class PeerTunnel(TunnelRole):
    """The part of `ClientTunnel` that knows peers, whatever they are."""

    def __init__(
        self,
        private_key: PrivateKey,
        now: float,
        unix_epoch: float,
        random_bytes: Callable[[int], bytes],
        *,
        flows: FlowTracking | None = None,
    ) -> None:
        super().__init__(private_key, now, unix_epoch, random_bytes, flows or FlowTracking("client", unix_epoch))
        self._clock = PortalClock(unix_epoch, now)
        self._names = ProxyNames()
        self.resources = Resources(self._names)
        self._sites = Sites()
        self._gateways = Gateways()
        self._peers = PeerClients(self._revoked)
        self._pending = PendingAuthorizations()
        self._refused_at: dict[AccessKey, float] = {}
        self._waiting = WaitingPackets()
        self._early = EarlyCandidates()
        self._resume: list[AccessKey] = []
        self._reset_wanted_at = now - RESET_INTERVAL
        self._views: Latest[ResourcesChanged] = Latest()
        self._interface: Interface | None = None

    @abstractmethod
    def _forget_peer(self, peer_id: str, reason: str, now: float) -> None: ...

    @abstractmethod
    def _renew_name(self, entry: NameEntry, now: float) -> None: ...

    # any peer

    def _send(self, peer_id: str, packet: Packet, now: float, *, routed: bool) -> DropReason | None:
        if self._waiting.push(peer_id, packet, routed=routed):
            self._may_offer = False
            return None
        return self._transmit(peer_id, packet, now)

    def _send_flow(
        self, peer_id: str, resource_id: str, packet: Packet, now: float, domain: str | None = None
    ) -> DropReason | None:
        """Send what was routed to a resource; a packet that waits becomes part of a flow when it is sent."""
        if self._waiting.push(peer_id, packet, routed=True):
            self._may_offer = False
            return None
        reason = self._transmit(peer_id, packet, now)
        if reason is None and self.flows.tracker is not None:
            self.flows.note_tx(peer_id, resource_id, packet, self.node.path(peer_id), now, domain=domain)
        return reason

    def _draft(
        self, peer_id: str, packet: Packet, now: float, *, is_inbound: bool, until: float = FOREVER
    ) -> Verdict | None:
        """A verdict about a packet that passed as it is, if packets like it can be carried by others."""
        if not is_plain(packet) or until <= now:
            return None
        key = FlowKey.of(packet)
        return Verdict(is_inbound, peer_id, key, key, until)

    def _request(
        self, key: AccessKey, now: float, *, packet: Packet | None = None, query: SiteAsker | None = None
    ) -> None:
        if not self._pending.trigger(key, now, packet=packet, query=query):
            return
        if key.device is None:
            request = messages.RequestAuthorization(key.resource_id, self._gateways.preferred(key.resource_id))
        else:
            ip = ip_address(key.device)
            request = (
                messages.RequestAuthorization(key.resource_id, (), ipv4=ip)
                if isinstance(ip, IPv4Address)
                else messages.RequestAuthorization(key.resource_id, (), ipv6=ip)
            )
        self._events.append(SendToPortal(request))

    def _connect(self, peer_id: str, parameters: Parameters, profiles: Profiles, now: float) -> bool:
        """Make or wake a connection, with what the peer told of itself before; whether it is a new one."""
        is_new = self.node.upsert_connection(peer_id, parameters, now, profiles)
        for line in self._early.take(peer_id, now):
            self.node.add_remote_candidate(peer_id, line, now)
        return is_new

    def _await_connection(self, peer_id: str) -> None:
        if self.node.is_ready(peer_id):
            self._sites.handle_connected(peer_id)
            self._views.is_due = True
        else:
            self._waiting.open(peer_id)

    def _replay(self, packets: list[Packet], now: float) -> None:
        self._may_offer = False  # these are not the packet in hand
        for packet in packets:
            self._note_drop(self._route(packet, now))

    def _note_drop(self, reason: DropReason | None) -> None:
        if reason is not None:
            self._drop(reason)

    def _note_prohibition(self, peer_id: str, packet: Packet, now: float) -> None:
        """A peer refuses what we thought allowed: ask the portal again, at most every 2 s per resource.

        The access stays until the portal has answered: the refusal may be that of a firewall behind the gateway.
        """
        error = packet.icmp_error()
        if error is None or isinstance(error, DropReason) or error.kind is not IcmpErrorKind.PROHIBITED:
            return
        if packet.src != error.dst:
            return  # a router's; an access list answers in the name of the destination (§2.6)
        target = self.resources.route(error.dst, error.protocol, error.dst_port)
        if target is None or not target.allowed:
            return
        key = AccessKey(target.resource_id, error.dst if target.via is Via.DEVICE else None)
        if key.device is None and self._gateways.serving(key.resource_id) != peer_id:
            return
        asked_at = self._refused_at.get(key)
        if asked_at is None or now - asked_at >= RETRY_INTERVAL:
            self._refused_at[key] = now
            self._request(key, now)
            if target.name is not None:
                self._renew_name(target.name, now)

    def _candidate_messages(self, batch: CandidateBatch) -> Iterator[messages.Outbound]:
        is_client = self._peers.get(batch.peer_id) is not None
        if batch.removed:
            withdraw = messages.WithdrawClientIceCandidates if is_client else messages.WithdrawGatewayIceCandidates
            yield withdraw(batch.peer_id, batch.removed)
        if batch.added:
            new = messages.NewClientIceCandidates if is_client else messages.NewGatewayIceCandidates
            yield new(batch.peer_id, batch.added)

    # silent and lost peers

    def _handle_peer_lost(self, peer_id: str, now: float) -> None:
        """No path answers: if the peer has started anew, the portal knows its new key."""
        for key in self._keys_of(peer_id)[:1]:
            self._request(key, now)

    def _handle_peer_stuck(self, peer_id: str, now: float) -> None:
        if now - self._reset_wanted_at >= RESET_INTERVAL:
            self._reset_wanted_at = now
            self._events.append(ResetWanted("a peer does not leave a dead path"))

    def _keys_of(self, peer_id: str) -> list[AccessKey]:
        """What we have access to through a peer."""
        peer = self._peers.get(peer_id)
        if peer is None:
            return [AccessKey(resource_id) for resource_id in self._gateways.resources_of(peer_id)]
        return [AccessKey(resource_id, peer.ips[0]) for resource_id in sorted(peer.pools)]

    def _resume_access(self, now: float) -> None:
        """Ask again for what was in use before a reset: the far end may be the one that has something to say."""
        keys, self._resume = dict.fromkeys(self._resume), []
        for key in list(keys)[-MAX_RESUMED:]:
            if self.resources.get(key.resource_id) is not None:
                self._request(key, now)

    # other clients

    def _route_to_device(
        self, target: Target, peer: PeerClient | None, packet: Packet, now: float
    ) -> DropReason | None:
        if peer is None or target.resource_id not in peer.pools:
            self._request(AccessKey(target.resource_id, packet.dst), now, packet=packet)
            return None
        peer.flows.handle_outbound(packet, now)
        reason = self._send_flow(peer.id, target.resource_id, packet, now)
        if self._may_offer and reason is None:
            self._offer_peer(peer, packet, now, is_inbound=False, is_tx=True)
        return reason

    def _send_in_flow_of(self, peer: PeerClient, packet: Packet, now: float) -> DropReason | None:
        """An answer in a flow that the peer opened."""
        reason = self._send(peer.id, packet, now, routed=False)
        if reason is None and self.flows.tracker is not None:
            self.flows.tracker.handle_rx(peer.id, packet, now)
        if self._may_offer and reason is None:
            self._offer_peer(peer, packet, now, is_inbound=False, is_tx=False)
        return reason

    def _offer_peer(self, peer: PeerClient, packet: Packet, now: float, *, is_inbound: bool, is_tx: bool) -> None:
        """A packet passed from or to a peer client; `is_tx` if from the one that opened the flow."""
        until = peer.access.next_expiry()
        verdict = self._draft(peer.id, packet, now, is_inbound=is_inbound, until=FOREVER if until is None else until)
        if verdict is not None and peer.flows.support(verdict, now) and self.flows.support(verdict, is_tx=is_tx):
            self._verdict = verdict

    def _accept_from_peer(self, peer: PeerClient, packet: Packet, ecn: int, now: float) -> DropReason | None:
        decision = peer.access.decide_inbound(packet, self._own_ips, peer.ips, peer.flows, now)
        if isinstance(decision, DropReason):
            return decision
        if decision is PeerDecision.PROHIBITED:
            self.drops.add(DropReason.FILTERED)
            return self._send(peer.id, build_icmp_prohibited(packet), now, routed=False)
        if packet.is_icmp_error:
            self._note_prohibition(peer.id, packet, now)
        if self.flows.tracker is not None:
            self._note_from_peer(peer, packet, now)
        self._deliver(packet, ecn)
        if self._may_offer:
            self._offer_peer(peer, packet, now, is_inbound=True, is_tx=not peer.flows.is_reply(packet, now))
        return None

    def _note_from_peer(self, peer: PeerClient, packet: Packet, now: float) -> None:
        """An accepted packet of a peer client: an answer in our flow, or part of one the peer opened."""
        assert self.flows.tracker is not None
        if peer.flows.is_reply(packet, now):
            self.flows.tracker.handle_rx(peer.id, packet, now)
            return
        resource_id = peer.access.attribute(*outbound(packet), now)
        if resource_id is not None:
            path = self.node.path(peer.id)
            self.flows.note_tx(peer.id, resource_id, packet, path, now, opened_by_peer=True)

    def _authorize_device(self, message: messages.ClientDeviceAccessAuthorized, now: float) -> None:
        if self._interface is None:
            return
        ips = (message.client_ipv4.packed, message.client_ipv6.packed)
        wanted = list(self._pending.devices(*ips))
        if message.resource is None and not wanted and self._peers.get(message.client_id) is None:
            return  # a late answer
        parameters = connection_parameters(
            message.client_public_key,
            message.preshared_key,
            message.local_ice_credentials,
            message.remote_ice_credentials,
            controlling=message.is_controlling,
            iceless=message.use_iceless,
        )
        try:
            self._connect(message.client_id, parameters, PEER_CLIENT_PROFILES, now)
        except NoRelays:
            self._postpone(message, now)
            return
        peer = self._peers.upsert(message.client_id, message.client_name, (message.client_ipv4, message.client_ipv6))
        if message.resource is not None:
            expires_at = self._clock.monotonic(message.expires_at, now)
            peer.access.grant(message.resource.resource_id, message.resource.filters, expires_at)
            self._peers.note_grants(peer)
            self._events.append(AccessGranted(peer.id, message.resource.resource_id, message.expires_at))
            self.flows.learn(peer.id, message.resource.resource_id, message.ingest_token, opened_by_peer=True)
        self._await_connection(peer.id)
        for key in wanted:
            peer.pools.add(key.resource_id)
            if message.resource is None:
                self.flows.learn(peer.id, key.resource_id, message.ingest_token)
            waiting = self._pending.resolve(key)
            self._replay(waiting.packets if waiting else [], now)
        self._views.is_due = True

    def _device_denied(self, message: messages.ClientDeviceAccessDenied, now: float) -> None:
        ips = [ip.packed for ip in (message.ipv4, message.ipv6) if ip is not None]
        for key in self._pending.devices(*ips):
            self._pending.drop(key)
            self._events.append(ResourceOffline(key.resource_id, str(message.reason)))
        for ip in ips:
            peer = self._peers.by_ip(ip)
            if peer is not None and self.resources.member_of(ip):
                self._give_up_device(peer, f"access denied: {message.reason}", now)

    def _give_up_device(self, peer: PeerClient, reason: str, now: float) -> None:
        for key in self._pending.devices(*peer.ips):
            self._pending.drop(key)
        self.node.close(peer.id, control.Goodbye().build().data, now)
        self._forget_peer(peer.id, reason, now)

    def _resync_grants(self, listed: Iterable[Authorization], now: float) -> None:
        """The portal says which clients may reach us, and until when; nobody else may."""
        expiries: dict[str, dict[str, float | None]] = {}
        for entry in listed:
            expiries.setdefault(entry.client_id, {})[entry.resource_id] = self._clock.monotonic(entry.expires_at, now)
        for peer in self._peers:
            self._peers.note_grants(peer)
            for resource_id in peer.access.resync(expiries.get(peer.id, {})):
                self._events.append(AccessEnded(peer.id, resource_id, "not listed by the portal"))
            self._dismiss_if_unused(peer.id)

    def _end_grant(self, client_id: str, resource_id: str, reason: str) -> None:
        peer = self._peers.get(client_id)
        if peer is not None and peer.access.revoke(resource_id):
            self._peers.note_grants(peer)
            self._void_peer(client_id)
            self._events.append(AccessEnded(client_id, resource_id, reason))
            self._dismiss_if_unused(client_id)

    def _dismiss_if_unused(self, client_id: str) -> None:
        """A peer without connection, grants and authorizations is not worth remembering."""
        peer = self._peers.get(client_id)
        if peer is not None and peer.access.is_empty and not peer.pools and not self.node.is_known(client_id):
            self._peers.forget(client_id)
