"""What client and gateway have in common: a node, queues, the portal's presence, drops.

Not here: any decision about a packet or a message; those are `client.py` and `gateway.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fz_core.crypto import PrivateKey
from fz_core.ice import Credentials
from fz_core.node import Node, Parameters
from fz_core.node import events as node_events
from fz_core.packet import Address, DropCounter, DropReason, Packet, Transmit
from fz_core.portal.client import NoRelays, SetSnownetCapabilities
from fz_core.portal.types import FlowLogs, IceCredentials
from fz_core.tunnel.candidates import CandidateBatch, CandidateOutbox
from fz_core.tunnel.errors import PacketError
from fz_core.tunnel.events import (
    CheckPortal,
    ConnectionUp,
    FlowLogsConfigured,
    PathInUse,
    PathMtuChanged,
    SendToPortal,
    TunnelEvent,
)
from fz_core.tunnel.flow_tracking import FlowTracking
from fz_core.tunnel.path_mtu import SYN, Hop, PathMtus
from fz_core.tunnel.verdict import Verdict

# Drops that are nobody's mistake: counted, but no error.
# How long the portal's word waits for a relay to answer, and how many words.
POSTPONED_SECONDS = 8.0
MAX_POSTPONED = 256
SILENT = frozenset({DropReason.MULTICAST, DropReason.UNMAPPED_SENTINEL})


class TunnelRole(ABC):
    """Sans-IO state of one end. One mutation, then drain every `poll_*`, then wait for `poll_timeout`.

    With `wants_verdicts` there is a flow table in front: after each call it takes what became void (another
    `generation`, `take_stale`, `take_revoked`), and then, about the packet of that call, `take_verdict`. It says with
    `flow_goes_on` before a call whether more like this packet are expected, so that a verdict is worth its making.
    """

    def __init__(
        self,
        private_key: PrivateKey,
        now: float,
        unix_epoch: float,
        random_bytes: Callable[[int], bytes],
        flows: FlowTracking,
    ) -> None:
        self.node = Node(private_key, now, unix_epoch, random_bytes)
        self._random_bytes = random_bytes
        self.flows = flows
        self.drops = DropCounter()
        self.path_mtus = PathMtus()
        self._own_ips: tuple[bytes, bytes] = (b"", b"")
        self._candidates = CandidateOutbox()
        self._portal_is_up = False
        self._postponed: deque[tuple[float, Any]] = deque(maxlen=MAX_POSTPONED)
        self._transmits: deque[Transmit] = deque()
        self._packets: deque[Packet] = deque()
        self._events: deque[TunnelEvent] = deque()
        self._wants_verdicts = False
        self.flow_goes_on = True
        self.generation = 0
        self._may_offer = False  # whether the packet in hand may become a verdict
        self._verdict: Verdict | None = None
        self._stale: set[str] = set()
        self._revoked: list[Verdict] = []

    @property
    def public_key(self) -> bytes:
        """Our key, which the portal must be told at each connect."""
        return self.node.public_key

    # commands

    def handle_portal_connected(self, now: float) -> None:
        """The portal accepted our join: tell it what we can do, and all held candidates."""
        self._portal_is_up = True
        self.node.handle_portal_connected(now)
        self._events.append(SendToPortal(SetSnownetCapabilities(iceless=True)))
        self._collect(now)

    def handle_portal_disconnected(self, now: float) -> None:
        """The portal is away; tunnels go on, candidates are held back."""
        self._portal_is_up = False

    def handle_portal_message(self, message: Any, now: float) -> None:
        """React to a message of the portal."""
        self._handle_message(message, now)
        self._collect(now)

    def handle_network_changed(self, now: float) -> None:
        """Addresses or routes of this host changed, but sockets and connections may live on."""
        self.node.handle_network_changed(now)
        self._collect(now)

    # packets

    def handle_tun_input(self, data: Packet | bytes, now: float) -> PacketError | None:
        """Take an IP packet from the TUN device; the error, if any, concerns this packet alone."""
        if self._wants_verdicts:
            self._may_offer, self._verdict = self.flow_goes_on, None
        packet = data if isinstance(data, Packet) else Packet.parse_untrusted(data)
        if isinstance(packet, DropReason):
            return self._drop(packet)
        reason = self._route(packet, now)
        if self._wants_verdicts and self.node.has_events:
            self._collect(now)  # another path, say, which makes verdicts void
        return None if reason is None else self._drop(reason, packet.src, packet.dst)

    def handle_network_input(
        self, local: Address, remote: Address, datagram: bytes, ecn: int, now: float
    ) -> PacketError | None:
        """Take a UDP datagram; inner packets come out of `poll_packet`."""
        received = self.node.handle_network_input(local, remote, datagram, now)
        return self._handle_received(received, local, remote, ecn, now)

    def handle_opened(
        self, peer_id: str, local: Address, remote: Address, ecn: int, plaintext: bytes, now: float
    ) -> PacketError | None:
        """Take a data datagram of a peer that somebody else has opened; with a relay between, as if it were not."""
        received = self.node.handle_opened(peer_id, local, remote, plaintext, now)
        return self._handle_received(received, local, remote, ecn, now)

    def _handle_received(
        self, received: tuple[str, bytes] | DropReason | None, local: Address, remote: Address, ecn: int, now: float
    ) -> PacketError | None:
        """What the node made of a datagram: a packet of a peer, nothing more to do, or why it was dropped."""
        if self._wants_verdicts:
            self._may_offer, self._verdict = self.flow_goes_on, None
        if received is None:
            self._collect(now)
            return None
        if isinstance(received, DropReason):
            self._collect(now)
            return self._drop(received, remote, local)
        peer_id, plaintext = received
        packet = Packet.parse_untrusted(plaintext)
        if isinstance(packet, DropReason):
            return self._drop(packet, remote, local)
        if self.path_mtus.limits and packet.tcp_flags & SYN:
            self.path_mtus.clamp(peer_id, packet)
        reason = self._accept(peer_id, packet, ecn, now)
        if self.node.has_events:
            self._collect(now)
        return None if reason is None else self._drop(reason, remote, local)

    def handle_path_mtu(self, remote: Address, mtu: int, now: float) -> None:
        """What the kernel knows of the largest IP packet that passes to an address; asked by `path_mtus`."""
        for peer_id in self.path_mtus.set_mtu(remote, mtu, now):
            self.node.probe_mtu(peer_id, now)
        self._tell_path_mtus()

    # verdicts

    @property
    def wants_verdicts(self) -> bool:
        """Whether there is somebody who takes them; then everything below must be taken after each call."""
        return self._wants_verdicts

    @wants_verdicts.setter
    def wants_verdicts(self, wanted: bool) -> None:
        self._wants_verdicts, self._may_offer = wanted, False

    def take_verdict(self) -> Verdict | None:
        """How later packets like the one just handled are treated; None if they must be handled here too."""
        verdict, self._verdict = self._verdict, None
        return verdict

    def take_stale(self) -> set[str]:
        """Peers all of whose verdicts became void."""
        stale, self._stale = self._stale, set()
        return stale

    def take_revoked(self) -> list[Verdict]:
        """Single verdicts that became void."""
        if not self._revoked and not self.flows.revoked:
            return []
        revoked = [*self._revoked, *self.flows.revoked]
        self._revoked.clear()
        self.flows.revoked.clear()
        return revoked

    def _void(self) -> None:
        """Anything may be decided in another way now."""
        self.generation += 1
        self._verdict = None

    def _void_peer(self, peer_id: str) -> None:
        """What concerns this peer may be."""
        if self._wants_verdicts:
            self._stale.add(peer_id)
        self._verdict = None

    # time and output

    @abstractmethod
    def handle_timeout(self, now: float) -> None:
        """Run every timer that is due."""

    @abstractmethod
    def poll_timeout(self) -> tuple[float, str] | None:
        """The next deadline and what it is for."""

    @abstractmethod
    def shutdown(self, now: float) -> None:
        """Say goodbye to every peer."""

    def poll_transmit(self) -> Transmit | None:
        """A datagram to send."""
        return self._transmits.popleft() if self._transmits else self.node.poll_transmit()

    def poll_packet(self) -> Packet | None:
        """An IP packet for the TUN device."""
        return self._packets.popleft() if self._packets else None

    def poll_event(self) -> TunnelEvent | None:
        """Something the owner should act on or show."""
        return self._events.popleft() if self._events else None

    # what a role decides

    @abstractmethod
    def _handle_message(self, message: Any, now: float) -> None: ...

    @abstractmethod
    def _route(self, packet: Packet, now: float) -> DropReason | None: ...

    @abstractmethod
    def _accept(self, peer_id: str, packet: Packet, ecn: int, now: float) -> DropReason | None: ...

    @abstractmethod
    def _candidate_messages(self, batch: CandidateBatch) -> Iterator[Any]: ...

    @abstractmethod
    def _handle_connection_lost(self, peer_id: str, reason: str, now: float) -> None: ...

    def _handle_peer_lost(self, peer_id: str, now: float) -> None:  # noqa: B027  # a gateway waits for its clients
        """No path to a peer works, for longer than a moment."""

    def _handle_peer_stuck(self, peer_id: str, now: float) -> None:  # noqa: B027  # a client's own timers end it
        """A peer does not leave a path that is dead."""

    @abstractmethod
    def _handle_connected(self, peer_id: str, now: float) -> None: ...

    # shared by the roles

    def _transmit(
        self, peer_id: str, packet: Packet, now: float, as_received: Packet | None = None
    ) -> DropReason | None:
        """Encrypt and queue a packet; `as_received` is what it was before translation, if that may matter."""
        if self.path_mtus.limits:
            fitting = self.path_mtus.fit(peer_id, packet)
            if fitting is not None:
                return self._transmit_fitting(peer_id, packet, fitting, as_received or packet, now)
        return self._seal(peer_id, packet, now)

    def _transmit_fitting(
        self, peer_id: str, packet: Packet, fitting: Sequence[Packet], as_received: Packet, now: float
    ) -> DropReason | None:
        """On a path too narrow for a packet: tell its sender, and send what can be sent instead."""
        growth = len(packet) - len(as_received)
        complaint = self.path_mtus.complaint(peer_id, as_received, growth, now)
        if complaint is not None:
            self._packets.append(complaint)
        if not fitting:
            return DropReason.TOO_BIG
        for piece in fitting:
            reason = self._seal(peer_id, piece, now)
            if reason is not None:
                return reason
        return None

    def _seal(self, peer_id: str, packet: Packet, now: float) -> DropReason | None:
        sent = self.node.encapsulate(peer_id, packet, packet.ecn, now)
        if isinstance(sent, DropReason):
            return sent
        if sent is None:
            self._may_offer = False  # it waits for a handshake
        else:
            self._transmits.append(sent)
        return None

    def _use_path(self, peer_id: str, now: float) -> None:
        """Data of a peer travels another way: what fits there?"""
        hop = self.node.first_hop(peer_id)
        if hop is not None:
            self.path_mtus.use_path(peer_id, Hop(*hop), now)
            self._tell_path_mtus()
            self.node.probe_mtu(peer_id, now)

    def _forget_paths(self, peer_id: str) -> None:
        """The connection ended: its peer need not hear of candidates, and no path to it is narrow."""
        self._candidates.forget(peer_id)
        self.path_mtus.forget(peer_id)

    def _tell_path_mtus(self) -> None:
        self._events.extend(PathMtuChanged(*change) for change in self.path_mtus.take_changes())

    def _deliver(self, packet: Packet, ecn: int) -> None:
        if ecn:
            packet.merge_ecn(ecn)
        self._packets.append(packet)

    def _configure_flow_logs(self, settings: FlowLogs, now: float) -> None:
        if self.flows.configure(settings, now):
            self._events.append(FlowLogsConfigured(settings))

    def _collect(self, now: float) -> None:
        """Take over what the node reports, and release candidates while the portal is there."""
        while (event := self.node.poll_event()) is not None:
            match event:
                case node_events.CandidateAdded(peer_id, candidate):
                    self._candidates.add(peer_id, candidate)
                case node_events.CandidateRemoved(peer_id, candidate):
                    self._candidates.remove(peer_id, candidate)
                case node_events.ConnectionEstablished(peer_id):
                    self._events.append(ConnectionUp(peer_id))
                    self._handle_connected(peer_id, now)
                case node_events.PathChanged(peer_id, local, remote, relayed):
                    self._events.append(PathInUse(peer_id, local, remote, relayed))
                    if self.flows.tracker is not None:
                        self._void_peer(peer_id)  # its flows record each path
                    self._use_path(peer_id, now)
                case node_events.ConnectionFailed(peer_id, reason):
                    self._void_peer(peer_id)
                    self._forget_paths(peer_id)
                    self._handle_connection_lost(peer_id, reason, now)
                case node_events.ConnectionClosed(peer_id):
                    self._void_peer(peer_id)
                    self._forget_paths(peer_id)
                case node_events.PeerSilent():
                    self._events.append(CheckPortal())
                case node_events.PeerLost(peer_id):
                    self._handle_peer_lost(peer_id, now)
                case node_events.PeerStuck(peer_id):
                    self._handle_peer_stuck(peer_id, now)
                case node_events.RelaysExhausted():
                    self._events.append(SendToPortal(NoRelays()))
        if self._postponed and self.node.has_relay:
            waiting = list(self._postponed)
            self._postponed.clear()
            for deadline, message in waiting:
                if now <= deadline:
                    self._handle_message(message, now)
            self._collect(now)
        if self._portal_is_up:
            for batch in self._candidates.release():
                self._events.extend(SendToPortal(message) for message in self._candidate_messages(batch))

    def _postpone(self, message: Any, now: float) -> None:
        """No connection can be made before a relay has answered; if none is going to, the portal knows others."""
        self._postponed.append((now + POSTPONED_SECONDS, message))
        if not self.node.expects_relay:
            self._events.append(SendToPortal(NoRelays()))

    def _drop(self, reason: DropReason, source: object = None, destination: object = None) -> PacketError | None:
        self.drops.add(reason)
        return None if reason in SILENT else PacketError(reason, source, destination)


def connection_parameters(
    remote_key: bytes,
    preshared_key: bytes,
    local: IceCredentials,
    remote: IceCredentials,
    *,
    controlling: bool,
    iceless: bool,
) -> Parameters:
    """What the portal says about a connection, as the node wants it."""
    return Parameters(
        remote_key,
        preshared_key,
        Credentials(local.username, local.password),
        Credentials(remote.username, remote.password),
        controlling=controlling,
        iceless=iceless,
    )
