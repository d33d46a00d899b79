"""The client's side of a tunnel: which packet may go to which gateway, and who must be asked first.

Source: `spec/tunnel.md` §4, §6, §7. CIDR and internet resources; names and devices are not routed yet
(`docs/deviations.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fz_core.crypto import PrivateKey
from fz_core.ice import Credentials
from fz_core.node import CLIENT_PROFILES, NoRelays, Parameters
from fz_core.packet import (
    DropReason,
    IcmpErrorKind,
    Packet,
    build_icmp_prohibited,
)
from fz_core.portal import client as messages
from fz_core.portal.types import Interface, merge_relays
from fz_core.tunnel import control
from fz_core.tunnel.authorizations import RETRY_INTERVAL, PendingAuthorizations
from fz_core.tunnel.buffers import PacketBuffer
from fz_core.tunnel.candidates import CandidateBatch
from fz_core.tunnel.events import (
    ConnectionDown,
    ResourceActivated,
    ResourceDeactivated,
    ResourceOffline,
    SendToPortal,
    TunConfigChanged,
    TunnelEvent,
)
from fz_core.tunnel.gateways import Gateways
from fz_core.tunnel.ranges import SENTINEL_RANGE, is_multicast
from fz_core.tunnel.resources import Resources
from fz_core.tunnel.role import TunnelRole
from fz_core.tunnel.traffic import is_classifiable, outbound

CONNECTION_BUFFER = 128


class ClientTunnel(TunnelRole):
    """Sans-IO state of a client. One mutation, then drain every `poll_*`, then wait for `poll_timeout`."""

    def __init__(
        self, private_key: PrivateKey, now: float, unix_epoch: float, random_bytes: Callable[[int], bytes]
    ) -> None:
        super().__init__(private_key, now, unix_epoch, random_bytes)
        self.resources = Resources()
        self._interface: Interface | None = None
        self._pending = PendingAuthorizations()
        self._refused_at: dict[str, float] = {}
        self._gateways = Gateways()
        self._waiting: dict[str, tuple[PacketBuffer, PacketBuffer]] = {}
        self._last_config: TunConfigChanged | None = None
        self._config_is_due = False

    # commands

    def _handle_message(self, message: messages.Inbound, now: float) -> None:
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
            case messages.GatewayIceCandidates(gateway_id, candidates):
                for line in candidates:
                    self.node.add_remote_candidate(gateway_id, line, now)
            case messages.InvalidateGatewayIceCandidates(gateway_id, candidates):
                for line in candidates:
                    self.node.remove_remote_candidate(gateway_id, line, now)
            case _:
                pass

    def set_internet_resource(self, active: bool, now: float) -> None:
        """Switch the internet resource on or off; remembered even before it exists."""
        switched_off = self.resources.set_internet_active(active)
        if switched_off is not None:
            self._release_resource(switched_off, now)
        self._config_is_due = True
        self._collect(now)

    def shutdown(self, now: float) -> None:
        """Say goodbye to every peer."""
        for gateway_id in self.node.peers:
            self.node.close(gateway_id, control.Goodbye().build().data, now)
            self._forget_gateway(gateway_id, "shutdown")
        self._collect(now)

    # time and output

    def handle_timeout(self, now: float) -> None:
        """Run every timer that is due."""
        self.node.handle_timeout(now)
        self._collect(now)

    def poll_timeout(self) -> tuple[float, str] | None:
        """The next deadline and what it is for."""
        due = self.node.poll_timeout()
        return None if due is None else (due, "connections")

    def poll_event(self) -> TunnelEvent | None:
        """Something the owner should act on or show. A changed configuration comes first, and only its last state."""
        if self._config_is_due and (changed := self._changed_config()) is not None:
            return changed
        return super().poll_event()

    # TUN to network, in the order of §6.1

    def _route(self, packet: Packet, now: float) -> DropReason | None:
        dst = packet.dst
        if is_multicast(dst):
            return DropReason.MULTICAST
        if self._interface is None:
            return DropReason.NOT_CONFIGURED
        if packet.src not in self._own_ips:
            return DropReason.NOT_TUNNEL_SOURCE_IP
        if dst in self._own_ips:
            return DropReason.PACKET_TO_SELF
        if dst in SENTINEL_RANGE:
            return DropReason.UNMAPPED_SENTINEL
        if not is_classifiable(packet):
            return DropReason.UNSUPPORTED_PROTOCOL
        gateway_id = self._gateways.by_tunnel_ip(dst)
        if gateway_id is not None:
            return self._send(gateway_id, packet, now, routed=False)
        verdict = self.resources.route(dst, *outbound(packet))
        if verdict is None:
            return DropReason.UNKNOWN_RESOURCE
        resource_id, allowed = verdict
        if not allowed:
            self._packets.append(build_icmp_prohibited(packet))
            return None
        gateway_id = self._gateways.serving(resource_id)
        if gateway_id is None:
            self._request(resource_id, packet, now)
            return None
        return self._send(gateway_id, packet, now, routed=True)

    def _send(self, gateway_id: str, packet: Packet, now: float, *, routed: bool) -> DropReason | None:
        waiting = self._waiting.get(gateway_id)
        if waiting is not None:
            waiting[0 if routed else 1].push(packet)
            return None
        return self._transmit(gateway_id, packet, now)

    def _request(self, resource_id: str, packet: Packet | None, now: float) -> None:
        if self._pending.trigger(resource_id, packet, now):
            preferred = self._gateways.preferred(resource_id)
            self._events.append(SendToPortal(messages.RequestAuthorization(resource_id, preferred)))

    # network to TUN, in the order of §6.2

    def _accept(self, gateway_id: str, packet: Packet, ecn: int, now: float) -> DropReason | None:
        if packet.is_fz_control:
            return self._handle_control(gateway_id, packet, now)
        if packet.dst not in self._own_ips or not self._gateways.may_send(gateway_id, packet.src):
            return DropReason.NOT_ALLOWED
        if packet.is_icmp_error:
            self._note_prohibition(gateway_id, packet, now)
        self._deliver(packet, ecn)
        return None

    def _handle_control(self, gateway_id: str, packet: Packet, now: float) -> DropReason | None:
        event = control.parse_untrusted(packet.control_event_type, packet.control_body)
        if not isinstance(event, control.Goodbye):
            return DropReason.BAD_CONTROL
        self.node.remove(gateway_id)
        self._forget_gateway(gateway_id, "the gateway said goodbye")
        self._collect(now)
        return None

    def _note_prohibition(self, gateway_id: str, packet: Packet, now: float) -> None:
        """A gateway refuses what we thought allowed: ask the portal again, at most every 2 s per resource.

        The access stays until the portal has answered: the refusal may be that of a firewall behind the gateway.
        """
        error = packet.icmp_error()
        if error is None or isinstance(error, DropReason) or error.kind is not IcmpErrorKind.PROHIBITED:
            return
        if packet.src != error.dst:
            return  # a router's; an access list answers in the name of the destination (§2.6)
        verdict = self.resources.route(error.dst, error.protocol, error.dst_port)
        if verdict is None or not verdict[1] or self._gateways.serving(verdict[0]) != gateway_id:
            return
        asked_at = self._refused_at.get(verdict[0])
        if asked_at is None or now - asked_at >= RETRY_INTERVAL:
            self._refused_at[verdict[0]] = now
            self._request(verdict[0], None, now)

    # portal messages

    def _init(self, message: messages.Init, now: float) -> None:
        wanted = {resource.id for resource in message.resources}
        for resource_id in sorted(self.resources.ids - wanted):
            self._remove_resource(resource_id, now)
        self.node.update_relays((), merge_relays(message.relays), now)
        for resource in message.resources:
            self._add_resource(resource, now)
        self._configure(message.interface)

    def _configure(self, interface: Interface) -> None:
        self._interface = interface
        self._own_ips = (interface.ipv4.packed, interface.ipv6.packed)
        self._config_is_due = True

    def _changed_config(self) -> TunConfigChanged | None:
        self._config_is_due = False
        if self._interface is None:
            return None
        config = TunConfigChanged(
            self._interface.ipv4, self._interface.ipv6, self.resources.routes(), self._interface.search_domain
        )
        if config == self._last_config:
            return None
        self._last_config = config
        return config

    def _add_resource(self, resource: object, now: float) -> None:
        change = self.resources.upsert(resource)
        if change.replaced is not None:
            self._release_resource(change.replaced, now)
        if change.added is not None:
            self._events.append(ResourceActivated(change.added.id, change.added.name, change.added.address))
        self._config_is_due = True

    def _remove_resource(self, resource_id: str, now: float) -> None:
        removed = self.resources.remove(resource_id)
        if removed is not None:
            self._release_resource(resource_id, now)
            self._events.append(ResourceDeactivated(resource_id, removed.name))
            self._config_is_due = True

    def _release_resource(self, resource_id: str, now: float) -> None:
        self._pending.drop(resource_id)
        self._refused_at.pop(resource_id, None)
        idle_gateway = self._gateways.revoke(resource_id)
        if idle_gateway is not None:
            self.node.close(idle_gateway, control.Goodbye().build().data, now)
            self._forget_gateway(idle_gateway, "its last resource is gone")

    def _authorize(self, message: messages.AuthorizationCreated, now: float) -> None:
        resource = self.resources.get(message.resource_id)
        if resource is None or message.resource_id not in self._pending:
            return
        parameters = Parameters(
            message.gateway_public_key,
            message.preshared_key,
            Credentials(message.client_ice_credentials.username, message.client_ice_credentials.password),
            Credentials(message.gateway_ice_credentials.username, message.gateway_ice_credentials.password),
            controlling=True,
            iceless=message.use_iceless,
        )
        try:
            self.node.upsert_connection(message.gateway_id, parameters, now, CLIENT_PROFILES)
        except NoRelays:
            # The request stays open with its packets, so that traffic asks again, but not at once.
            self._events.append(SendToPortal(messages.NoRelays()))
            return
        self._gateways.authorize(
            message.gateway_id,
            (message.gateway_ipv4.packed, message.gateway_ipv6.packed),
            resource.id,
            self.resources.networks_of(resource.id),
        )
        if not self.node.is_ready(message.gateway_id):
            self._waiting.setdefault(
                message.gateway_id, (PacketBuffer(CONNECTION_BUFFER), PacketBuffer(CONNECTION_BUFFER))
            )
        self._replay(self._pending.resolve(resource.id) or [], now)

    def _authorization_failed(self, resource_id: str, reason: str, now: float) -> None:
        self._events.append(ResourceOffline(resource_id, reason))
        if reason == "offline":
            self._pending.drop(resource_id)

    # what the node reports

    def _candidate_messages(self, batch: CandidateBatch) -> Iterator[messages.Outbound]:
        if batch.added:
            yield messages.NewGatewayIceCandidates(batch.peer_id, batch.added)
        if batch.removed:
            yield messages.WithdrawGatewayIceCandidates(batch.peer_id, batch.removed)

    def _handle_connection_lost(self, peer_id: str, reason: str) -> None:
        self._forget_gateway(peer_id, reason)

    def _handle_connected(self, peer_id: str, now: float) -> None:
        self._flush_waiting(peer_id, now)

    def _flush_waiting(self, gateway_id: str, now: float) -> None:
        waiting = self._waiting.pop(gateway_id, None)
        if waiting is not None:
            self._replay(waiting[0].drain(), now)
            for packet in waiting[1].drain():
                reason = self._send(gateway_id, packet, now, routed=False)
                if reason is not None:
                    self._drop(reason)

    def _replay(self, packets: list[Packet], now: float) -> None:
        for packet in packets:
            reason = self._route(packet, now)
            if reason is not None:
                self._drop(reason)

    def _forget_gateway(self, gateway_id: str, reason: str) -> None:
        self._candidates.forget(gateway_id)
        self._waiting.pop(gateway_id, None)
        if self._gateways.forget(gateway_id):
            self._events.append(ConnectionDown(gateway_id, reason))
