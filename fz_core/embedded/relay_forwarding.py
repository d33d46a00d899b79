"""The path of data through a relay: two dict look-ups for a whole batch, no protocol.

Tables are keyed by socket addresses as the kernel reports them and hold bound channels only. A peer that is an
allocation of this very relay is reached in process, which also works where the router has no hairpin NAT; other
programs on the relay's own address are peers like any other.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from fz_core.embedded.relay_sockets import MAX_DATAGRAM, MAX_SEGMENTS, SockAddr, UdpPort

HEADER = struct.Struct("!HH")
HEADER_LENGTH = 4
FIRST_CHANNEL_BYTE, LAST_CHANNEL_BYTE = 0x40, 0x4F


class Route:
    """Where a channel of a client leads to."""

    __slots__ = ("hairpin", "peer", "port")

    def __init__(self, port: UdpPort, peer: SockAddr, hairpin: tuple[int, int, SockAddr] | None) -> None:
        self.port = port
        self.peer = peer
        self.hairpin = hairpin


class Forwarder:
    """Forwarding tables and what they have carried. What is not ChannelData goes to `on_request`."""

    def __init__(self, on_request: Callable[[bytes, SockAddr], None]) -> None:
        self._on_request = on_request
        self.outward: dict[tuple[SockAddr, int], Route] = {}
        self.ports: dict[tuple[int, int], UdpPort] = {}
        self.relayed_bytes = 0
        self.dropped = 0

    def from_client(self, view: memoryview, size: int, segment: int, source: SockAddr) -> None:
        """`size` bytes of one client in datagrams of `segment` bytes. Runs of one channel stay together."""
        parts: list[memoryview] = []
        run_number = run_size = 0
        for at in range(0, size, segment):
            end = min(at + segment, size)
            if not FIRST_CHANNEL_BYTE <= view[at] <= LAST_CHANNEL_BYTE:
                self._on_request(bytes(view[at:end]), source)
                continue
            if end - at < HEADER_LENGTH:
                self.dropped += 1
                continue
            number, length = HEADER.unpack_from(view, at)
            if length > end - at - HEADER_LENGTH:
                self.dropped += 1
                continue
            if parts and (number != run_number or length > run_size or len(parts[-1]) != run_size):
                self._send_outward(parts, run_number, run_size, source)
                parts = []
            if not parts:
                run_number, run_size = number, length
            parts.append(view[at + HEADER_LENGTH : at + HEADER_LENGTH + length])
        if parts:
            self._send_outward(parts, run_number, run_size, source)

    def from_peer(self, port: UdpPort, view: memoryview, size: int, segment: int, source: SockAddr) -> None:
        """Datagrams of one peer on the port of an allocation."""
        target = port.routes.get(source)
        if target is None:
            self.dropped += 1
            return
        if size <= segment:
            self._send_inward(target, [view[:size]], size)
        else:
            self._send_inward(target, [view[at : min(at + segment, size)] for at in range(0, size, segment)], segment)

    def _send_outward(self, parts: list[memoryview], number: int, size: int, source: SockAddr) -> None:
        route = self.outward.get((source, number))
        if route is None:
            self.dropped += len(parts)
            return
        if route.hairpin is not None and route.hairpin[:2] in self.ports:
            self._send_hairpin(route.hairpin, parts, size)
            return
        self.relayed_bytes += sum(map(len, parts))
        if size:
            route.port.send(parts, len(parts), size, route.peer)
        else:
            route.port.send([b""], 1, 0, route.peer)

    def _send_hairpin(self, hairpin: tuple[int, int, SockAddr], parts: list[memoryview], size: int) -> None:
        family, number, own = hairpin
        target = self.ports[family, number].routes.get(own)
        if target is None:
            self.dropped += len(parts)
        else:
            self._send_inward(target, parts, size)

    def _send_inward(self, target: tuple[UdpPort, SockAddr, int], parts: list[memoryview], size: int) -> None:
        """Put a header before each part. A batch that outgrows one send is cut."""
        listen, client, number = target
        limit = min(MAX_SEGMENTS, max(1, MAX_DATAGRAM // (size + HEADER_LENGTH)))
        for start in range(0, len(parts), limit):
            batch: list[Any] = []
            header = HEADER.pack(number, size)
            for part in parts[start : start + limit]:
                batch.append(header if len(part) == size else HEADER.pack(number, len(part)))
                batch.append(part)
                self.relayed_bytes += len(part)
            listen.send(batch, len(batch) // 2, size + HEADER_LENGTH, client)
