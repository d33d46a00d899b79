"""A bounded ring of packets that wait for a decision (`spec/tunnel.md` §6.1, de-duplication)."""

from __future__ import annotations

from collections import OrderedDict

from fz_core.packet import Packet

TCP, SYN, ACK = 6, 0x02, 0x10


class PacketBuffer:
    """Keeps at most `capacity` packets in order, overwriting the oldest.

    A byte-identical packet is stored once, and a retransmitted SYN replaces the stored one.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._packets: OrderedDict[object, Packet] = OrderedDict()
        self.overwritten = 0

    def __len__(self) -> int:
        return len(self._packets)

    def push(self, packet: Packet) -> None:
        """Store a packet, dropping the oldest when full."""
        key = _identity(packet)
        if key in self._packets:
            self._packets[key] = packet
            return
        if len(self._packets) >= self._capacity:
            self._packets.popitem(last=False)
            self.overwritten += 1
        self._packets[key] = packet

    def drain(self) -> list[Packet]:
        """Take everything out, oldest first."""
        packets = list(self._packets.values())
        self._packets.clear()
        return packets


def _identity(packet: Packet) -> object:
    if packet.protocol == TCP and packet.tcp_flags & (SYN | ACK) == SYN:
        data = packet.data
        sequence = data[packet.l4_offset + 4 : packet.l4_offset + 8]
        return packet.src, packet.dst, packet.src_port, packet.dst_port, sequence
    return packet.data
