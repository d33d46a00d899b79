"""Packets for peers whose connection is still being made (`spec/tunnel.md` §6.1)."""

from __future__ import annotations

from typing import NamedTuple

from fz_core.packet import Packet
from fz_core.tunnel.buffers import PacketBuffer

CONNECTION_BUFFER = 128


class _Queues(NamedTuple):
    routed: PacketBuffer
    fixed: PacketBuffer


class WaitingPackets:
    """Two queues per peer: packets that will be routed anew, and those meant for this peer alone."""

    def __init__(self) -> None:
        self._by_peer: dict[str, _Queues] = {}

    def open(self, peer_id: str) -> None:
        """From now on packets for this peer wait."""
        self._by_peer.setdefault(peer_id, _Queues(PacketBuffer(CONNECTION_BUFFER), PacketBuffer(CONNECTION_BUFFER)))

    def push(self, peer_id: str, packet: Packet, *, routed: bool) -> bool:
        """Keep a packet; False if nothing waits for this peer."""
        queues = self._by_peer.get(peer_id)
        if queues is None:
            return False
        (queues.routed if routed else queues.fixed).push(packet)
        return True

    def close(self, peer_id: str) -> tuple[list[Packet], list[Packet]]:
        """End the wait: the packets to route anew, and those for this peer."""
        queues = self._by_peer.pop(peer_id, None)
        return ([], []) if queues is None else (queues.routed.drain(), queues.fixed.drain())
