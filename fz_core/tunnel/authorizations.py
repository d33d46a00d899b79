"""Requests for access that the portal has not answered yet (`spec/tunnel.md` §7)."""

from __future__ import annotations

from fz_core.packet import Packet
from fz_core.tunnel.buffers import PacketBuffer

BUFFERED_PACKETS = 128
RETRY_INTERVAL = 2.0


class _Pending:
    __slots__ = ("packets", "requested_at")

    def __init__(self, now: float) -> None:
        self.requested_at = now
        self.packets = PacketBuffer(BUFFERED_PACKETS)


class PendingAuthorizations:
    """One entry per resource. There is no timer: retries are driven by further traffic only."""

    def __init__(self) -> None:
        self._pending: dict[str, _Pending] = {}

    def __contains__(self, resource_id: str) -> bool:
        return resource_id in self._pending

    def trigger(self, resource_id: str, packet: Packet | None, now: float) -> bool:
        """Note that access is wanted; True when the portal must be asked (again) now."""
        entry = self._pending.get(resource_id)
        due = entry is None or now - entry.requested_at >= RETRY_INTERVAL
        if entry is None:
            entry = self._pending[resource_id] = _Pending(now)
        elif due:
            entry.requested_at = now
        if packet is not None:
            entry.packets.push(packet)
        return due

    def resolve(self, resource_id: str) -> list[Packet] | None:
        """The answer came: its waiting packets, or None if nobody asked."""
        entry = self._pending.pop(resource_id, None)
        return None if entry is None else entry.packets.drain()

    def drop(self, resource_id: str) -> None:
        """Forget a request and its packets."""
        self._pending.pop(resource_id, None)
