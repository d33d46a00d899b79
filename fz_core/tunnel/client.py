"""The client's side of a tunnel: which packet may go to which peer, and who must be asked first.

Source: `spec/tunnel.md` §4, §6, §7, §11, §12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from ipaddress import ip_address

from fz_core.crypto import PrivateKey
from fz_core.dns import DnsRecord, NameEntry
from fz_core.node import CLIENT_PROFILES, NoRelays
from fz_core.packet import DropReason, Packet, build_icmp_prohibited
from fz_core.portal import client as messages
from fz_core.portal.types import DynamicDevicePool, Interface, merge_relays
from fz_core.tunnel import control
from fz_core.tunnel.authorizations import AccessKey
from fz_core.tunnel.client_dns import DNS_PORT, ClientDns, SiteAsker
from fz_core.tunnel.client_peers import MAX_RESUMED, PeerTunnel
from fz_core.tunnel.events import (
    AccessEnded,
    ConnectionDown,
    DnsRecordsChanged,
    ResourceActivated,
    ResourceDeactivated,
    ResourceOffline,
    ResourcesChanged,
    SendToPortal,
    TunConfigChanged,
    TunnelEvent,
)
from fz_core.tunnel.flow_tracking import FlowTracking
from fz_core.tunnel.latest import Latest
from fz_core.tunnel.name_setups import NameSetups, SetupKey
from fz_core.tunnel.peer_access import PeerDecision
from fz_core.tunnel.ranges import PROXY_RANGE, SENTINEL_RANGE, is_multicast
from fz_core.tunnel.resources import Target, Via
from fz_core.tunnel.role import connection_parameters
from fz_core.tunnel.status import resource_views
from fz_core.tunnel.traffic import is_classifiable, outbound

EAGER_NAMES = 100
ABOUT_PATHS = (
    messages.RelaysPresence,
    messages.GatewayIceCandidates,
    messages.ClientIceCandidates,
    messages.InvalidateGatewayIceCandidates,
    messages.InvalidateClientIceCandidates,
)


class ClientTunnel(PeerTunnel):
    """Sans-IO state of a client. One mutation, then drain every `poll_*`, then wait for `poll_timeout`."""

    def __init__(
        self,
        private_key: PrivateKey,
        now: float,
        unix_epoch: float,
        random_bytes: Callable[[int], bytes],
        *,
        flows: FlowTracking | None = None,
    ) -> None:
        super().__init__(private_key, now, unix_epoch, random_bytes, flows=flows)
        self._dns = ClientDns(self._names, self, self.drops, random_bytes)
        self._setups = NameSetups(self._void_peer)
        self._config: Latest[TunConfigChanged] = Latest()

    # commands

    def _handle_message(self, message: messages.Inbound, now: float) -> None:
        if not isinstance(message, ABOUT_PATHS):
            self._void()
        match message:
            case messages.Init():
                self._init(message, now)
            case messages.ConfigChanged(interface):
                self._configure(interface)
            case messages.ResourceCreatedOrUpdated(resource):
                self._add_resource(resource, now)
            case messages.ResourceDeleted(resource_id):
                self._remove_resource(resource_id, now)
            case messages.RelaysPresence():
                self.node.update_relays(message.disconnected_ids, merge_relays(message.connected), now)
            case messages.AuthorizationCreated():
                self._authorize(message, now)
            case messages.AuthorizationCreationFailed(resource_id, reason):
                self._authorization_failed(resource_id, str(reason), now)
            case messages.ClientDeviceAccessAuthorized():
                self._authorize_device(message, now)
            case messages.ClientDeviceAccessDenied():
                self._device_denied(message, now)
            case messages.ResourceFiltersUpdated(resource_id, filters):
                for peer in self._peers:
                    peer.access.update_filters(resource_id, filters)
            case messages.RejectAccess(client_id, resource_id):
                self._end_grant(client_id, resource_id, "revoked")
            case messages.DevicePoolDomainResolved():
                ips = message.ipv4.packed, message.ipv6.packed
                self._dns.devices.resolved(message.resource_id, message.domain, *ips, now)
            case messages.DevicePoolDomainResolutionFailed():
                is_missing = message.reason is messages.FailReason.NOT_FOUND
                self._dns.devices.failed(message.resource_id, message.domain, is_missing, now)
            case messages.ClientIceCandidateError(client_id, reason):
                unreachable = self._peers.get(client_id) if reason is messages.FailReason.OFFLINE else None
                if unreachable is not None:
                    self._give_up_device(unreachable, "offline", now)
            case _:
                self._handle_candidates(message, now)
        self._dns.settle(now)

    def _handle_candidates(self, message: messages.Inbound, now: float) -> None:
        match message:
            case messages.GatewayIceCandidates(peer_id, lines) | messages.ClientIceCandidates(peer_id, lines):
                if not self.node.is_known(peer_id):
                    self._early.add(peer_id, lines, now)
                for line in lines:
                    self.node.add_remote_candidate(peer_id, line, now)
            case messages.InvalidateGatewayIceCandidates(peer_id, lines) | messages.InvalidateClientIceCandidates(
                peer_id, lines
            ):
                self._early.withdraw(peer_id, lines)
                for line in lines:
                    self.node.remove_remote_candidate(peer_id, line, now)

    def set_internet_resource(self, active: bool, now: float) -> None:
        """Switch the internet resource on or off; remembered even before it exists."""
        self._void()
        switched_off = self.resources.set_internet_active(active)
        if switched_off is not None:
            self._release_resource(switched_off, now)
        self._config.is_due = True
        self._collect(now)

    def set_system_resolvers(self, ips: Iterable[bytes], now: float) -> None:
        """The host's own name servers; used for names that are no resource's if the portal names no servers."""
        if self._dns.set_system_resolvers(ips):
            self._void()
            self._config.is_due = True

    def handle_portal_disconnected(self, now: float) -> None:
        """The portal is away; tunnels go on, candidates are held back, questions will be asked again."""
        super().handle_portal_disconnected(now)
        self._resume += self._pending.unanswered()

    def handle_dns_result(self, token: int, reply: bytes | None, now: float, *, timed_out: bool = False) -> None:
        """The end of a `ForwardQuery`: the server's reply, or None."""
        self._dns.handle_result(token, reply, now, timed_out=timed_out)

    @property
    def dns_records(self) -> tuple[DnsRecord, ...]:
        """Every name with its proxy addresses, for the next session of this process."""
        return self._names.records()

    def restore_dns_records(self, records: Iterable[DnsRecord]) -> None:
        """Take over the names of an earlier session, before anything else."""
        self._names.restore(records)

    def reset(self, now: float) -> None:
        """The network under us changed: begin anew with relays and peers, under a new key.

        The owner gives us new sockets before this and a new link to the portal after it, with `public_key`; what was in
        use is asked for again as soon as that stands. Source: `spec/connectivity.md` §8.9, `spec/io.md` §3.9.
        """
        self._void()
        busy = [peer_id for peer_id in self.node.peers if self.node.is_busy(peer_id)]
        self._resume += self._pending.unanswered()
        self._resume += [key for peer_id in busy for key in self._keys_of(peer_id)]
        self._dns.reset()
        self._transmits.clear()
        self.path_mtus.clear()
        for peer_id in self.node.reset(PrivateKey(self._random_bytes(32)), now):
            self._handle_connection_lost(peer_id, "the network changed", now)
        self._collect(now)

    def shutdown(self, now: float) -> None:
        """Say goodbye to every peer."""
        self._void()
        self.flows.shutdown(now)
        for peer_id in self.node.peers:
            self.node.close(peer_id, control.Goodbye().build().data, now)
            self._forget_peer(peer_id, "shutdown", now)
        self._collect(now)

    # time and output

    def handle_timeout(self, now: float) -> None:
        """Run every timer that is due."""
        self.node.handle_timeout(now)
        self.flows.handle_timeout(now)
        self._dns.handle_timeout(now)
        self._dns.settle(now)
        due = self._sites.poll_timeout()
        if due is not None and due <= now:
            self._sites.handle_timeout(now)
            self._views.is_due = True
        for client_id, resource_id in self._peers.expire(now):
            self._void_peer(client_id)
            self._events.append(AccessEnded(client_id, resource_id, "expired"))
            self._dismiss_if_unused(client_id)
        self._collect(now)

    def poll_timeout(self) -> tuple[float, str] | None:
        """The next deadline and what it is for."""
        due = (
            (self.node.poll_timeout(), "connections"),
            (self._dns.poll_timeout(), "DNS"),
            (self._sites.poll_timeout(), "site status"),
            (self._peers.next_expiry(), "access expiry"),
            (self.flows.poll_timeout(), "flow logs"),
        )
        return min(((at, why) for at, why in due if at is not None), default=None)

    def poll_event(self) -> TunnelEvent | None:
        """Something the owner should act on or show.

        A changed configuration comes first, then a changed list of resources; only the last state of each.
        """
        if self._config.is_due and (config := self._config.take(self._current_config())) is not None:
            return config
        if self._views.is_due and (views := self._views.take(self._current_views())) is not None:
            return views
        if self._dns.events:
            return self._dns.events.popleft()
        while (request := self._dns.devices.poll_request()) is not None:
            return SendToPortal(messages.ResolveDevicePoolDomain(*request))
        return super().poll_event()

    def poll_packet(self) -> Packet | None:
        """An IP packet for the TUN device."""
        return self._packets.popleft() if self._packets else self._dns.poll_packet()

    # TUN to network, in the order of §6.1

    def _route(self, packet: Packet, now: float) -> DropReason | None:
        dst = packet.dst
        settled = self.resources.settled(dst, packet.protocol, packet.dst_port)
        if settled is not None and packet.src in self._own_ips:
            return self._route_to_gateway(settled, packet, now)
        if is_multicast(dst):
            return DropReason.MULTICAST
        if self._interface is None:
            return DropReason.NOT_CONFIGURED
        if packet.src not in self._own_ips:
            return DropReason.NOT_TUNNEL_SOURCE_IP
        if dst in self._own_ips:
            return DropReason.PACKET_TO_SELF
        if dst in SENTINEL_RANGE:
            known = self._dns.is_sentinel(dst)
            return self._dns.handle_packet(packet, now) if known else DropReason.UNMAPPED_SENTINEL
        peer = self._peers.by_ip(dst)
        if peer is not None:
            decision = peer.access.decide_outbound(packet, peer.flows, now)
            if decision is PeerDecision.ACCEPT:
                return self._send_in_flow_of(peer, packet, now)
            if isinstance(decision, DropReason):
                return decision
        elif not is_classifiable(packet):
            return DropReason.UNSUPPORTED_PROTOCOL
        gateway_id = self._gateways.by_tunnel_ip(dst)
        if gateway_id is not None:
            reason = self._send(gateway_id, packet, now, routed=False)
            if self._may_offer and reason is None and peer is None:
                self._verdict = self._draft(gateway_id, packet, now, is_inbound=False)
            return reason
        target = self.resources.route(dst, *outbound(packet))
        if target is None:
            return DropReason.UNKNOWN_RESOURCE
        if not target.allowed:
            self._packets.append(build_icmp_prohibited(packet))
            return None
        if target.via is Via.DEVICE:
            return self._route_to_device(target, peer, packet, now)
        if peer is not None:
            self._may_offer = False  # should the peer open a flow like this, the next packet belongs to that
        return self._route_to_gateway(target, packet, now)

    def _route_to_gateway(self, target: Target, packet: Packet, now: float) -> DropReason | None:
        gateway_id = self._gateways.serving(target.resource_id)
        if gateway_id is None:
            self._request(AccessKey(target.resource_id), now, packet=packet)
            return None
        key = None
        if target.name is not None:
            key = SetupKey(gateway_id, target.name.name, target.resource_id)
            may_go, announcement = self._setups.handle_packet(key, target.name, packet, now)
            self._announce(gateway_id, announcement, now)
            if not may_go:
                return None
        is_own = packet.dst_port == DNS_PORT and self._dns.is_upstream(packet.dst)
        if is_own:
            reason = self._send(gateway_id, packet, now, routed=True)  # our own questions are nobody's flow
        else:
            name = None if target.name is None else target.name.name
            reason = self._send_flow(gateway_id, target.resource_id, packet, now, name)
        if self._may_offer and reason is None:
            self._offer_outbound(gateway_id, key, packet, now, is_tracked=not is_own)
        return reason

    def _offer_outbound(
        self, gateway_id: str, setup: SetupKey | None, packet: Packet, now: float, *, is_tracked: bool
    ) -> None:
        verdict = self._draft(gateway_id, packet, now, is_inbound=False)
        if verdict is None or (setup is not None and not self._setups.support(verdict, setup)):
            return
        if not is_tracked or self.flows.support(verdict, is_tx=True):
            self._verdict = verdict

    def _announce(self, gateway_id: str, announcement: control.AssignedIps | None, now: float) -> None:
        if announcement is not None:
            self._note_drop(self._send(gateway_id, announcement.build(), now, routed=False))

    # what the name server asks

    def is_name_in_use(self, name: str, now: float) -> bool:
        """Whether a name's addresses must not be given to another one."""
        return self._setups.is_in_use(name, now)

    def handle_name_answered(self, entry: NameEntry, now: float) -> None:
        """Somebody was told the proxy addresses of a name: its gateways must know them."""
        if self._names.take_changed():
            self._void()  # addresses that meant nothing, or another name
            record = DnsRecord(entry.name, entry.recorded, (*entry.v4, *entry.v6))
            self._events.append(DnsRecordsChanged((record,)))
        self._renew_name(entry, now)

    def _renew_name(self, entry: NameEntry, now: float) -> None:
        """Tell the gateways of a name its proxy addresses again: it may have moved, or they may have lost them."""
        self._setups.handle_queried(entry.name, now)
        for match in entry.matches:
            gateway_id = self._gateways.serving(match.resource_id)
            if gateway_id is not None:
                key = SetupKey(gateway_id, entry.name, match.resource_id)
                self._announce(gateway_id, self._setups.update(key, entry, now), now)

    def _names_of(self, resource_id: str) -> list[NameEntry]:
        """Names that lead to a resource, the one asked for last at the end."""
        return [e for e in self._names.names() if any(m.resource_id == resource_id for m in e.matches)]

    def is_tunnelled(self, server: bytes) -> bool:
        """Whether a name server is reached through the tunnel."""
        return self.resources.covers(server)

    def resolve_in_site(self, resource_id: str, waiting: SiteAsker, now: float) -> None:
        """A query must go to the gateway of this resource."""
        gateway_id = self._gateways.serving(resource_id)
        if gateway_id is None:
            self._request(AccessKey(resource_id), now, query=waiting)
        else:
            self._dns.forward_to_site(waiting, self._gateways.tunnel_ips(gateway_id))

    # network to TUN, in the order of §6.2

    def _accept(self, peer_id: str, packet: Packet, ecn: int, now: float) -> DropReason | None:
        if packet.is_fz_control:
            return self._handle_control(peer_id, packet, now)
        peer = self._peers.get(peer_id)
        if peer is not None:
            return self._accept_from_peer(peer, packet, ecn, now)
        if packet.dst not in self._own_ips or not self._may_send(peer_id, packet.src):
            return DropReason.NOT_ALLOWED
        if packet.is_icmp_error:
            self._note_prohibition(peer_id, packet, now)
        if self.flows.tracker is not None:
            self.flows.tracker.handle_rx(peer_id, packet, now)
        self._deliver(packet, ecn)
        if self._may_offer:
            verdict = self._draft(peer_id, packet, now, is_inbound=True)
            if verdict is not None and self.flows.support(verdict, is_tx=False):
                self._verdict = verdict
        return None

    def _may_send(self, gateway_id: str, source: bytes) -> bool:
        """A gateway speaks for itself, for the networks it was authorized for, and for names it was told."""
        if self._gateways.may_send(gateway_id, source):
            return True
        entry = self._names.entry_of(source) if source in PROXY_RANGE else None
        return entry is not None and self._setups.is_set_up(gateway_id, entry.name)

    def _handle_control(self, peer_id: str, packet: Packet, now: float) -> DropReason | None:
        match control.parse_untrusted(packet.control_event_type, packet.control_body):
            case control.Goodbye():
                self.node.remove(peer_id)
                self._forget_peer(peer_id, "the peer said goodbye", now)
                self._collect(now)
            case control.DomainStatus(resource_id, domain, active) if self._peers.get(peer_id) is None:
                key = SetupKey(peer_id, domain.lower(), resource_id)
                self._replay(self._setups.handle_status(key, active), now)
            case _:
                return DropReason.BAD_CONTROL
        return None

    # portal messages: configuration and resources

    def _init(self, message: messages.Init, now: float) -> None:
        wanted = {resource.id for resource in message.resources}
        for resource_id in sorted(self.resources.ids - wanted):
            self._remove_resource(resource_id, now)
        self.node.update_relays((), merge_relays(message.relays), now)
        for resource in message.resources:
            self._add_resource(resource, now)
        self._configure(message.interface)
        self._configure_flow_logs(message.flow_logs, now)
        self._resync_grants(message.authorizations, now)
        self._resume += self._pending.unanswered()
        self._resume_access(now)

    def _configure(self, interface: Interface) -> None:
        self._interface = interface
        self._own_ips = (interface.ipv4.packed, interface.ipv6.packed)
        self._dns.configure(interface)
        self._config.is_due = True

    def _current_config(self) -> TunConfigChanged | None:
        if self._interface is None:
            return None
        servers = self._dns.mapping
        return TunConfigChanged(
            self._interface.ipv4,
            self._interface.ipv6,
            self.resources.routes(),
            self._interface.search_domain,
            tuple((str(ip_address(ip)), str(server.url or ip_address(server.ip or b""))) for ip, server in servers),
        )

    def _current_views(self) -> ResourcesChanged:
        devices = [
            peer.view(pools)
            for peer in sorted(self._peers, key=lambda p: p.id)
            if self.node.is_ready(peer.id) and (pools := self.resources.pools_of(peer.id))
        ]
        return ResourcesChanged(resource_views(self.resources, self._sites), tuple(devices))

    def _add_resource(self, resource: object, now: float) -> None:
        change = self.resources.upsert(resource)
        if change.replaced is not None:
            self._release_resource(change.replaced, now)
        if isinstance(resource, DynamicDevicePool):
            self._dns.devices.add_pool(resource.id, resource.address)
        for client_id, ip in change.departed:
            self._pending.drop(AccessKey(resource.id, ip))  # type: ignore[attr-defined]
            self._peers.leave_pool(resource.id, client_id)  # type: ignore[attr-defined]
        if change.filters is not None:
            for peer in self._peers:
                peer.access.update_filters(resource.id, resource.filters)  # type: ignore[attr-defined]
        if change.added is not None:
            self._events.append(ResourceActivated(change.added.id, change.added.name, change.added.address))
        self._note_resource_change()

    def _remove_resource(self, resource_id: str, now: float) -> None:
        removed = self.resources.remove(resource_id)
        if removed is not None:
            self._dns.devices.remove_pool(resource_id)
            self._release_resource(resource_id, now)
            self._events.append(ResourceDeactivated(resource_id, removed.name))
            self._note_resource_change()

    def _note_resource_change(self) -> None:
        self._dns.handle_resources_changed()
        self._config.is_due = self._views.is_due = True

    def _release_resource(self, resource_id: str, now: float) -> None:
        self._pending.drop_resource(resource_id)
        self._refused_at = {key: at for key, at in self._refused_at.items() if key.resource_id != resource_id}
        self._setups.forget_resource(resource_id)
        self._peers.leave_pool(resource_id)
        idle_gateway = self._gateways.revoke(resource_id)
        if idle_gateway is not None:
            self.node.close(idle_gateway, control.Goodbye().build().data, now)
            self._forget_peer(idle_gateway, "its last resource is gone", now)

    # portal messages: access

    def _authorize(self, message: messages.AuthorizationCreated, now: float) -> None:
        resource = self.resources.get(message.resource_id)
        if resource is None or AccessKey(message.resource_id) not in self._pending:
            return
        parameters = connection_parameters(
            message.gateway_public_key,
            message.preshared_key,
            message.client_ice_credentials,
            message.gateway_ice_credentials,
            controlling=True,
            iceless=message.use_iceless,
        )
        try:
            is_new = self._connect(message.gateway_id, parameters, CLIENT_PROFILES, now)
        except NoRelays:
            # The request stays open with its packets.
            self._postpone(message, now)
            return
        if is_new and self._gateways.resources_of(message.gateway_id):
            # It started anew, and what it granted before is gone: ask for that again.
            lost = self._keys_of(message.gateway_id)
            self._forget_peer(message.gateway_id, "the gateway started anew", now)
            for gone in lost[-MAX_RESUMED:]:
                self._request(gone, now)
        tunnel_ips = (message.gateway_ipv4.packed, message.gateway_ipv6.packed)
        self._gateways.authorize(message.gateway_id, tunnel_ips, resource.id, self.resources.networks_of(resource.id))
        self.flows.learn(message.gateway_id, resource.id, message.ingest_token)
        self._sites.assign(message.gateway_id, message.site_id)
        self._await_connection(message.gateway_id)
        for entry in self._names_of(resource.id)[-EAGER_NAMES:]:
            key = SetupKey(message.gateway_id, entry.name, resource.id)
            self._announce(message.gateway_id, self._setups.update(key, entry, now), now)
        waiting = self._pending.resolve(AccessKey(resource.id))
        if waiting is not None:
            self._replay(waiting.packets, now)
            for query in waiting.queries:
                self._dns.forward_to_site(query, tunnel_ips)

    def _authorization_failed(self, resource_id: str, reason: str, now: float) -> None:
        self._events.append(ResourceOffline(resource_id, reason))
        if reason != "offline":
            return
        self._pending.refuse(AccessKey(resource_id), now)
        resource = self.resources.get(resource_id)
        if resource is not None and hasattr(resource, "sites"):
            self._sites.handle_offline((site.id for site in resource.sites), now)
            self._views.is_due = True
        gateway_id = self._gateways.serving(resource_id)
        if gateway_id is not None:
            self.node.remove(gateway_id)
            self._forget_peer(gateway_id, "the portal calls its site offline", now)

    # what the node reports

    def _handle_connection_lost(self, peer_id: str, reason: str, now: float) -> None:
        peer = self._peers.get(peer_id)
        if peer is None:
            self._forget_peer(peer_id, reason, now)
            return
        self._void_peer(peer_id)
        peer.pools.clear()
        self._waiting.close(peer_id)
        self._views.is_due = True
        self._events.append(ConnectionDown(peer_id, reason))
        self._dismiss_if_unused(peer_id)

    def _handle_connected(self, peer_id: str, now: float) -> None:
        self._sites.handle_connected(peer_id)
        self._views.is_due = True
        routed, fixed = self._waiting.close(peer_id)
        for packet in fixed:
            self._note_drop(self._send(peer_id, packet, now, routed=False))
        self._replay(routed, now)

    def _forget_peer(self, peer_id: str, reason: str, now: float) -> None:
        self._void_peer(peer_id)
        self.flows.end_peer(peer_id, now)
        self._forget_paths(peer_id)
        self._waiting.close(peer_id)
        self._sites.handle_gone(peer_id)
        self._setups.forget_gateway(peer_id)
        self._views.is_due = True
        was_gateway, was_client = self._gateways.forget(peer_id), self._peers.forget(peer_id)
        if was_gateway or was_client:
            self._events.append(ConnectionDown(peer_id, reason))
