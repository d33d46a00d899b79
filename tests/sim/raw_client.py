"""A client without policy: a bare node that sends what no honest client would and shows every answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from fz_core.crypto import PrivateKey
from fz_core.ice import Credentials
from fz_core.node import Node, NoRelays, Parameters
from fz_core.node import events as node_events
from fz_core.packet import Address, DropReason, Packet, Transmit
from fz_core.portal import client as c
from fz_core.portal.types import merge_relays
from fz_core.tunnel import PacketError
from fz_core.tunnel.events import ConnectionDown, ConnectionUp, PathInUse, SendToPortal


class RawClient:
    """Has the shape of a `ClientTunnel`. Packets go to the last gateway that was authorized."""

    def __init__(
        self, private_key: PrivateKey, now: float, unix_epoch: float, random_bytes: Callable[[int], bytes]
    ) -> None:
        self.node = Node(private_key, now, unix_epoch, random_bytes)
        self.gateway_id = ""
        self._transmits: deque[Transmit] = deque()
        self._packets: deque[Packet] = deque()
        self._events: deque[Any] = deque()

    def handle_portal_connected(self, now: float) -> None: ...

    def handle_portal_disconnected(self, now: float) -> None: ...

    def handle_portal_message(self, message: c.Inbound, now: float) -> None:
        match message:
            case c.Init():
                self.node.update_relays((), merge_relays(message.relays), now)
            case c.RelaysPresence():
                self.node.update_relays(message.disconnected_ids, merge_relays(message.connected), now)
            case c.AuthorizationCreated():
                self.gateway_id = message.gateway_id
                self._connect(message, now)
            case c.GatewayIceCandidates(gateway_id, candidates):
                for line in candidates:
                    self.node.add_remote_candidate(gateway_id, line, now)
            case c.InvalidateGatewayIceCandidates(gateway_id, candidates):
                for line in candidates:
                    self.node.remove_remote_candidate(gateway_id, line, now)
            case _:
                pass

    def _connect(self, message: c.AuthorizationCreated, now: float) -> None:
        parameters = Parameters(
            message.gateway_public_key,
            message.preshared_key,
            Credentials(message.client_ice_credentials.username, message.client_ice_credentials.password),
            Credentials(message.gateway_ice_credentials.username, message.gateway_ice_credentials.password),
            controlling=True,
            iceless=message.use_iceless,
        )
        try:
            self.node.upsert_connection(message.gateway_id, parameters, now)
        except NoRelays:
            self._events.append(SendToPortal(c.NoRelays()))

    def handle_tun_input(self, packet: Packet, now: float) -> PacketError | None:
        sent = self.node.encapsulate(self.gateway_id, packet, packet.ecn, now)
        if isinstance(sent, DropReason):
            return PacketError(sent)
        self._transmits.append(sent)
        return None

    def handle_network_input(
        self, local: Address, remote: Address, datagram: bytes, ecn: int, now: float
    ) -> PacketError | None:
        received = self.node.handle_network_input(local, remote, datagram, now)
        if isinstance(received, DropReason):
            return PacketError(received, remote, local)
        if received is not None:
            packet = Packet.parse_untrusted(received[1])
            assert isinstance(packet, Packet)
            self._packets.append(packet)
        return None

    def handle_timeout(self, now: float) -> None:
        self.node.handle_timeout(now)

    def poll_timeout(self) -> tuple[float, str] | None:
        due = self.node.poll_timeout()
        return None if due is None else (due, "connections")

    def poll_transmit(self) -> Transmit | None:
        return self._transmits.popleft() if self._transmits else self.node.poll_transmit()

    def poll_packet(self) -> Packet | None:
        return self._packets.popleft() if self._packets else None

    def poll_event(self) -> Any:
        while (event := self.node.poll_event()) is not None:
            match event:
                case node_events.CandidateAdded(peer_id, line):
                    self._events.append(SendToPortal(c.NewGatewayIceCandidates(peer_id, (line,))))
                case node_events.CandidateRemoved(peer_id, line):
                    self._events.append(SendToPortal(c.WithdrawGatewayIceCandidates(peer_id, (line,))))
                case node_events.ConnectionEstablished(peer_id):
                    self._events.append(ConnectionUp(peer_id))
                case node_events.ConnectionFailed(peer_id, reason):
                    self._events.append(ConnectionDown(peer_id, reason))
                case node_events.PathChanged(peer_id, local, remote, relayed):
                    self._events.append(PathInUse(peer_id, local, remote, relayed))
                case node_events.RelaysExhausted():
                    self._events.append(SendToPortal(c.NoRelays()))
        return self._events.popleft() if self._events else None
