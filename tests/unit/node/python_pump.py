"""Carries the data of one node as the compiled pump does, packet by packet and in Python.

It knows of the node what `take_changed` and `transport` say, and tells it what `handle_opened` and `note_traffic` take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fz_core.node import Carried, Hop, Node, Transport
from fz_core.node.path_probe import is_probe
from fz_core.packet import Address, DropReason, Transmit
from fz_core.stun import build_channel_data
from tests.sim.system import Peer

DATA, RELAY_PORT = 4, 3478


@dataclass
class Account:
    """What was carried for one peer."""

    sent_at: float | None = None
    heard_at: float | None = None
    unheard_since: float | None = None

    def send(self, now: float) -> None:
        self.sent_at = now
        if self.unheard_since is None:
            self.unheard_since = now

    def hear(self, now: float) -> None:
        self.heard_at = now
        self.unheard_since = None


class PythonPump:
    """Takes the place of a node's `encapsulate` and `handle_network_input`; reports every `gap` seconds, or at once."""

    def __init__(self, peer: Peer, gap: float = 0.0) -> None:
        self.peer, self.gap = peer, gap
        self.node: Node = peer.state.node
        self.sent = self.opened = self.handed_over = 0
        self._transports: dict[str, Transport] = {}
        self._accounts: dict[str, Account] = {}
        self._unreported: set[str] = set()
        self._slow_send, self._slow_receive = self.node.encapsulate, self.node.handle_network_input
        self.node.encapsulate = self._send  # type: ignore[method-assign]
        self.node.handle_network_input = self._receive  # type: ignore[method-assign]

    def _learn(self, now: float) -> None:
        for peer_id in self.node.take_changed():
            transport = self.node.transport(peer_id, now)
            if transport is None:
                self._transports.pop(peer_id, None)
                self._accounts.pop(peer_id, None)
            else:
                self._transports[peer_id] = transport

    def _send(self, peer_id: str, packet: Any, ecn: int, now: float) -> Transmit | DropReason | None:
        self._learn(now)
        transport = self._transports.get(peer_id)
        hop = None if transport is None or now >= transport.send_until else transport.send
        session = None if transport is None else transport.tunnel.current_session()
        if transport is None or hop is None or session is None or now >= session.send_until:
            return self._slow_send(peer_id, packet, ecn, now)
        sealed = transport.tunnel.seal(packet, now)
        if not isinstance(sealed, bytes):
            return sealed
        self.sent += 1
        self._account(peer_id).send(now)
        self._report(peer_id, now)
        payload = build_channel_data(hop.channel, sealed) if hop.channel else sealed
        return Transmit(payload, hop.remote, hop.local, ecn)

    def _receive(
        self, local: Address, remote: Address, datagram: bytes, now: float
    ) -> tuple[str, bytes] | DropReason | None:
        self._learn(now)
        hop, data = Hop(remote, local, 0), datagram
        if remote.port == RELAY_PORT and 0x40 <= datagram[0] <= 0x4F:
            hop = Hop(remote, None, int.from_bytes(datagram[:2], "big"))
            data = datagram[4 : 4 + int.from_bytes(datagram[2:4], "big")]
        index = int.from_bytes(data[4:8], "little")
        transport = next((t for t in self._transports.values() if t.index == index >> 8), None)
        session = None if transport is None else transport.tunnel.session(index)
        if data[0] != DATA or transport is None or session is None or not session.is_confirmed:
            return self._slow_receive(local, remote, datagram, now)
        opened = transport.tunnel.handle_untrusted(data, remote.ip, now)
        if not isinstance(opened, bytes):
            return self._slow_receive(local, remote, datagram, now)
        if hop == transport.receive and opened and not is_probe(opened):
            self.opened += 1
            self._account(transport.peer_id).hear(now)
            self._report(transport.peer_id, now)
            return transport.peer_id, opened
        self.handed_over += 1
        ends = self.node.ends_of(hop)
        assert ends is not None
        return self.node.handle_opened(transport.peer_id, *ends, opened, now)

    def _account(self, peer_id: str) -> Account:
        return self._accounts.setdefault(peer_id, Account())

    def _report(self, peer_id: str, now: float) -> None:
        if not self.gap:
            self._tell(peer_id, now)
            return
        if not self._unreported:
            self.peer.world.after(self.gap, self._tell_all)
        self._unreported.add(peer_id)

    def _tell_all(self) -> None:
        now = self.peer.world.now
        for peer_id in sorted(self._unreported):
            self._tell(peer_id, now)
        self._unreported.clear()
        self.peer.state.handle_timeout(now)
        self.peer.drain()

    def _tell(self, peer_id: str, now: float) -> None:
        account = self._account(peer_id)
        self.node.note_traffic(peer_id, Carried(account.sent_at, account.heard_at, account.unheard_since), now)
