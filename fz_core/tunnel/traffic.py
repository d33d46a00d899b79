"""Naming traffic for filters and routes: (IP protocol, port on the resource's side)."""

from __future__ import annotations

from fz_core.packet import Packet


def outbound(packet: Packet) -> tuple[int, int]:
    """Traffic towards a resource: its port is the destination's."""
    return packet.protocol, packet.dst_port


def inbound(packet: Packet) -> tuple[int, int]:
    """Traffic from a resource: its port is the source's."""
    return packet.protocol, packet.src_port


def is_classifiable(packet: Packet) -> bool:
    """Whether the packet is TCP, UDP or ICMP echo, the kinds a client routes (`spec/tunnel.md` §2.2)."""
    return packet.src_port >= 0
