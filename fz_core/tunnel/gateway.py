"""The gateway's side of a tunnel: clients, what each was granted, and the packets of both directions.

Source: `spec/tunnel.md` §14, §16; `spec/portal-protocol.md` §6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fz_core.crypto import PrivateKey
from fz_core.ice import Credentials
from fz_core.node import GATEWAY_PROFILES, NoRelays, Parameters
from fz_core.packet import (
    DropReason,
    Packet,
    build_icmp_prohibited,
    build_icmp_unreachable,
)
from fz_core.portal import client as shared
from fz_core.portal import gateway as messages
from fz_core.portal.types import GatewayInterface, merge_relays
from fz_core.tunnel import control
from fz_core.tunnel.candidates import CandidateBatch
from fz_core.tunnel.client_access import ClientAccess, Decision
from fz_core.tunnel.events import (
    AccessEnded,
    AccessGranted,
    ConnectionDown,
    SendToPortal,
    TunConfigChanged,
)
from fz_core.tunnel.ranges import PEER_RANGE, PEERS
from fz_core.tunnel.role import TunnelRole

TICK = 1.0
OVERFLOWING_EXPIRY = 86_400.0
LAST_UNIX_TIME = 253_402_300_799  # the end of the year 9999


class GatewayTunnel(TunnelRole):
    """Sans-IO state of a gateway. One mutation, then drain every `poll_*`, then wait for `poll_timeout`."""

    def __init__(
        self, private_key: PrivateKey, now: float, unix_epoch: float, random_bytes: Callable[[int], bytes]
    ) -> None:
        super().__init__(private_key, now, unix_epoch, random_bytes)
        self._unix_epoch = unix_epoch
        self._started_at = now
        self._interface: GatewayInterface | None = None
        self._clients: dict[str, ClientAccess] = {}
        self._by_ip: dict[bytes, str] = {}
        self._tick_at = now + TICK

    # commands

    def _handle_message(self, message: messages.Inbound, now: float) -> None:
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

    def shutdown(self, now: float) -> None:
        """Say goodbye to every peer."""
        for client_id in self.node.peers:
            self.node.close(client_id, control.Goodbye().build().data, now)
        self._collect(now)

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

    # data

    def _route(self, packet: Packet, now: float) -> DropReason | None:
        client_id = self._by_ip.get(packet.dst)
        if client_id is None:
            return DropReason.NO_PEER_STATE if packet.dst in PEER_RANGE else DropReason.NOT_A_PEER
        if not self._clients[client_id].admits(packet):
            return DropReason.NOT_ALLOWED
        return self._transmit(client_id, packet, now)

    def _accept(self, client_id: str, packet: Packet, ecn: int, now: float) -> DropReason | None:
        access = self._clients.get(client_id)
        if access is None:
            # A client whose last grant is gone may still say goodbye.
            return self._handle_control(client_id, packet, now) if packet.is_fz_control else DropReason.NO_PEER_STATE
        match access.decide(packet):
            case Decision.PASS:
                self._deliver(packet, ecn)
            case Decision.CONTROL:
                return self._handle_control(client_id, packet, now)
            case Decision.PROHIBITED:
                self.drops.add(DropReason.FILTERED)
                return self._transmit(client_id, build_icmp_prohibited(packet), now)
            case Decision.UNREACHABLE:
                self.drops.add(DropReason.FILTERED)
                return self._transmit(client_id, build_icmp_unreachable(packet), now)
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
                return self._transmit(client_id, control.DomainStatus(resource_id, domain, active=False).build(), now)
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

    def _candidate_messages(self, batch: CandidateBatch) -> Iterator[messages.Outbound]:
        if batch.added:
            yield messages.BroadcastIceCandidates((batch.peer_id,), batch.added)
        if batch.removed:
            yield messages.BroadcastInvalidatedIceCandidates((batch.peer_id,), batch.removed)

    def _handle_connected(self, peer_id: str, now: float) -> None:
        """A gateway keeps no packets back."""

    def _handle_connection_lost(self, peer_id: str, reason: str) -> None:
        # The grants stay: the client may still count on them when it returns.
        self._events.append(ConnectionDown(peer_id, reason))
