"""The gateway's side of a tunnel: clients, what each was granted, and the packets of both directions.

Source: `spec/tunnel.md` §14, §16; `spec/portal-protocol.md` §6.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from fz_core.crypto import PrivateKey
from fz_core.ice import Credentials
from fz_core.node import GATEWAY_PROFILES, Node, NoRelays, Parameters
from fz_core.node import events as node_events
from fz_core.packet import (
    Address,
    DropCounter,
    DropReason,
    Packet,
    Transmit,
    build_icmp_prohibited,
    build_icmp_unreachable,
)
from fz_core.portal import client as shared
from fz_core.portal import gateway as messages
from fz_core.portal.types import GatewayInterface, merge_relays
from fz_core.tunnel import control
from fz_core.tunnel.candidates import CandidateOutbox
from fz_core.tunnel.client_access import ClientAccess, Decision
from fz_core.tunnel.errors import PacketError
from fz_core.tunnel.events import (
    AccessEnded,
    AccessGranted,
    ConnectionDown,
    ConnectionUp,
    PathInUse,
    SendToPortal,
    TunConfigChanged,
    TunnelEvent,
)
from fz_core.tunnel.ranges import PEER_RANGE, PEERS

TICK = 1.0
OVERFLOWING_EXPIRY = 86_400.0
LAST_UNIX_TIME = 253_402_300_799  # the end of the year 9999


class GatewayTunnel:
    """Sans-IO state of a gateway. One mutation, then drain every `poll_*`, then wait for `poll_timeout`."""

    def __init__(
        self, private_key: PrivateKey, now: float, unix_epoch: float, random_bytes: Callable[[int], bytes]
    ) -> None:
        self.node = Node(private_key, now, unix_epoch, random_bytes)
        self.drops = DropCounter()
        self._unix_epoch = unix_epoch
        self._started_at = now
        self._interface: GatewayInterface | None = None
        self._own_ips: tuple[bytes, bytes] = (b"", b"")
        self._clients: dict[str, ClientAccess] = {}
        self._by_ip: dict[bytes, str] = {}
        self._candidates = CandidateOutbox()
        self._portal_is_up = False
        self._tick_at = now + TICK
        self._transmits: deque[Transmit] = deque()
        self._packets: deque[Packet] = deque()
        self._events: deque[TunnelEvent] = deque()

    # commands

    def handle_portal_connected(self, now: float) -> None:
        """The portal accepted our join: tell it what we can do, and all held candidates."""
        self._portal_is_up = True
        self.node.resignal_candidates()
        self._events.append(SendToPortal(shared.SetSnownetCapabilities(iceless=False)))
        self._collect(now)

    def handle_portal_disconnected(self, now: float) -> None:
        """The portal is away; tunnels go on, candidates are held back."""
        self._portal_is_up = False

    def handle_portal_message(self, message: messages.Inbound, now: float) -> None:
        """React to a message of the portal."""
        match message:
            case messages.Init():
                self._init(message, now)
            case messages.CreateAuthorization():
                self._authorize(message, now)
            case shared.RejectAccess(client_id, resource_id):
                self._revoke(client_id, resource_id, "revoked", now)
            case messages.ResourceUpdated(resource):
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
        self._collect(now)

    def shutdown(self, now: float) -> None:
        """Say goodbye to every peer."""
        for client_id in self.node.peers:
            self.node.close(client_id, control.Goodbye().build().data, now)
        self._collect(now)

    # packets

    def handle_tun_input(self, data: Packet | bytes, now: float) -> PacketError | None:
        """Take an IP packet of this host or its network; the error, if any, concerns this packet alone."""
        packet = data if isinstance(data, Packet) else Packet.parse_untrusted(data)
        if isinstance(packet, DropReason):
            return self._drop(packet)
        reason = self._send_to_client(packet, now)
        return None if reason is None else self._drop(reason, packet.src, packet.dst)

    def handle_network_input(
        self, local: Address, remote: Address, datagram: bytes, ecn: int, now: float
    ) -> PacketError | None:
        """Take a UDP datagram; inner packets come out of `poll_packet`."""
        received = self.node.handle_network_input(local, remote, datagram, now)
        if received is None:
            self._collect(now)
            return None
        if isinstance(received, DropReason):
            self._collect(now)
            return self._drop(received, remote, local)
        client_id, plaintext = received
        packet = Packet.parse_untrusted(plaintext)
        if isinstance(packet, DropReason):
            return self._drop(packet, remote, local)
        reason = self._accept(client_id, packet, ecn, now)
        if self.node.has_events:
            self._collect(now)
        return None if reason is None else self._drop(reason, packet.src, packet.dst)

    # time and output

    def handle_timeout(self, now: float) -> None:
        """Run every timer that is due; grants are checked once a second."""
        self.node.handle_timeout(now)
        if now >= self._tick_at:
            self._tick_at = now + TICK
            self._expire(now)
        self._collect(now)

    def poll_timeout(self) -> tuple[float, str] | None:
        """The next deadline and what it is for."""
        due = [(d, "connections") for d in (self.node.poll_timeout(),) if d is not None]
        expiries = [e for access in self._clients.values() if (e := access.next_expiry()) is not None]
        if expiries or any(access.is_empty for access in self._clients.values()):
            due.append((max(self._tick_at, min(expiries, default=0.0)), "access expiry"))
        return min(due, default=None)

    def poll_transmit(self) -> Transmit | None:
        """A datagram to send."""
        return self._transmits.popleft() if self._transmits else self.node.poll_transmit()

    def poll_packet(self) -> Packet | None:
        """An IP packet for the TUN device."""
        return self._packets.popleft() if self._packets else None

    def poll_event(self) -> TunnelEvent | None:
        """Something the owner should act on or show."""
        return self._events.popleft() if self._events else None

    # data

    def _send_to_client(self, packet: Packet, now: float) -> DropReason | None:
        client_id = self._by_ip.get(packet.dst)
        if client_id is None:
            return DropReason.NO_PEER_STATE if packet.dst in PEER_RANGE else DropReason.NOT_A_PEER
        if not self._clients[client_id].admits(packet):
            return DropReason.NOT_ALLOWED
        return self._send(client_id, packet, now)

    def _send(self, client_id: str, packet: Packet, now: float) -> DropReason | None:
        sent = self.node.encapsulate(client_id, packet, packet.ecn, now)
        if isinstance(sent, DropReason):
            return sent
        if sent is not None:
            self._transmits.append(sent)
        return None

    def _accept(self, client_id: str, packet: Packet, ecn: int, now: float) -> DropReason | None:
        access = self._clients.get(client_id)
        if access is None:
            # A client whose last grant is gone may still say goodbye.
            return self._handle_control(client_id, packet, now) if packet.is_fz_control else DropReason.NO_PEER_STATE
        match access.decide(packet):
            case Decision.PASS:
                if ecn:
                    packet.merge_ecn(ecn)
                self._packets.append(packet)
            case Decision.CONTROL:
                return self._handle_control(client_id, packet, now)
            case Decision.PROHIBITED:
                self.drops.add(DropReason.FILTERED)
                return self._send(client_id, build_icmp_prohibited(packet), now)
            case Decision.UNREACHABLE:
                self.drops.add(DropReason.FILTERED)
                return self._send(client_id, build_icmp_unreachable(packet), now)
            case Decision.IGNORE:
                self.drops.add(DropReason.MULTICAST)
            case reason:
                return reason
        return None

    def _handle_control(self, client_id: str, packet: Packet, now: float) -> DropReason | None:
        match control.parse_untrusted(packet.control_event_type, packet.control_body):
            case control.Goodbye():
                self.node.remove(client_id)
                self._forget(client_id, "the client said goodbye")
            case control.AssignedIps(resource_id, domain, _):
                # Names are not translated yet, and the client must not wait for an answer.
                return self._send(client_id, control.DomainStatus(resource_id, domain, active=False).build(), now)
            case _:
                return DropReason.BAD_CONTROL
        return None

    # portal messages

    def _init(self, message: messages.Init, now: float) -> None:
        self._interface = message.interface
        self._own_ips = (message.interface.ipv4.packed, message.interface.ipv6.packed)
        self.node.update_relays((), merge_relays(message.relays), now)
        self._events.append(TunConfigChanged(message.interface.ipv4, message.interface.ipv6, frozenset(PEERS)))
        for access in self._clients.values():
            access.own_ips = self._own_ips
        listed = {(a.client_id, a.resource_id): a.expires_at for a in message.authorizations}
        for client_id, access in list(self._clients.items()):
            for resource_id in sorted(access.resource_ids):
                if (client_id, resource_id) in listed:
                    access.set_expiry(resource_id, self._monotonic(listed[client_id, resource_id], now))
                else:
                    self._revoke(client_id, resource_id, "not listed by the portal", now)

    def _authorize(self, message: messages.CreateAuthorization, now: float) -> None:
        client = message.client
        parameters = Parameters(
            client.public_key,
            client.preshared_key,
            Credentials(message.gateway_ice_credentials.username, message.gateway_ice_credentials.password),
            Credentials(message.client_ice_credentials.username, message.client_ice_credentials.password),
            controlling=False,
            iceless=message.use_iceless,
        )
        try:
            self.node.upsert_connection(client.id, parameters, now, GATEWAY_PROFILES)
        except NoRelays:
            self._events.append(SendToPortal(shared.NoRelays()))
            return
        self._grant(message, now)
        self._events.append(SendToPortal(messages.AuthorizationCreated(message.ref)))

    def _grant(self, message: messages.CreateAuthorization, now: float) -> None:
        if self._interface is None:
            return
        client_id = message.client.id
        ips = (message.client.ipv4.packed, message.client.ipv6.packed)
        access = self._clients.get(client_id)
        if access is None or access.client_ips != ips:
            self._unindex(client_id)
            access = self._clients[client_id] = ClientAccess(ips, self._own_ips)
            for ip in ips:
                self._by_ip[ip] = client_id
        expires_at = self._monotonic(message.expires_at, now)
        if access.grant(message.resource, expires_at):
            self._events.append(AccessGranted(client_id, message.resource.id, message.expires_at))

    def _monotonic(self, unix_time: float | None, now: float) -> float | None:
        """Portal time on our clock; before our start counts as passed, beyond reason as a day from now."""
        if unix_time is None:
            return None
        if unix_time > LAST_UNIX_TIME:
            return now + OVERFLOWING_EXPIRY
        return max(unix_time - self._unix_epoch, self._started_at)

    def _revoke(self, client_id: str, resource_id: str, reason: str, now: float) -> None:
        access = self._clients.get(client_id)
        if access is not None and access.revoke(resource_id):
            self._events.append(AccessEnded(client_id, resource_id, reason))
            self._dismiss_if_empty(client_id, now)

    def _expire(self, now: float) -> None:
        for client_id, access in list(self._clients.items()):
            for resource_id in access.expire(now):
                self._events.append(AccessEnded(client_id, resource_id, "expired"))
            self._dismiss_if_empty(client_id, now)

    def _dismiss_if_empty(self, client_id: str, now: float) -> None:
        if self._clients[client_id].is_empty:
            self.node.close(client_id, control.Goodbye().build().data, now)
            self._forget(client_id, "nothing is granted any more")

    def _forget(self, client_id: str, reason: str) -> None:
        self._unindex(client_id)
        self._candidates.forget(client_id)
        if self._clients.pop(client_id, None) is not None:
            self._events.append(ConnectionDown(client_id, reason))

    def _unindex(self, client_id: str) -> None:
        access = self._clients.get(client_id)
        if access is not None:
            for ip in access.client_ips:
                if self._by_ip.get(ip) == client_id:
                    del self._by_ip[ip]

    # what the node reports

    def _collect(self, now: float) -> None:
        while (event := self.node.poll_event()) is not None:
            match event:
                case node_events.CandidateAdded(peer_id, candidate):
                    self._candidates.add(peer_id, candidate)
                case node_events.CandidateRemoved(peer_id, candidate):
                    self._candidates.remove(peer_id, candidate)
                case node_events.ConnectionEstablished(peer_id):
                    self._events.append(ConnectionUp(peer_id))
                case node_events.PathChanged(peer_id, local, remote, relayed):
                    self._events.append(PathInUse(peer_id, local, remote, relayed))
                case node_events.ConnectionFailed(peer_id, reason):
                    # The grants stay: the client may still count on them when it returns.
                    self._candidates.forget(peer_id)
                    self._events.append(ConnectionDown(peer_id, reason))
                case node_events.ConnectionClosed(peer_id):
                    self._candidates.forget(peer_id)
                case node_events.RelaysExhausted():
                    self._events.append(SendToPortal(shared.NoRelays()))
        if self._portal_is_up:
            for batch in self._candidates.release():
                client_ids = (batch.peer_id,)
                if batch.added:
                    self._events.append(SendToPortal(messages.BroadcastIceCandidates(client_ids, batch.added)))
                if batch.removed:
                    withdrawn = messages.BroadcastInvalidatedIceCandidates(client_ids, batch.removed)
                    self._events.append(SendToPortal(withdrawn))

    def _drop(self, reason: DropReason, source: object = None, destination: object = None) -> PacketError:
        self.drops.add(reason)
        return PacketError(reason, source, destination)
