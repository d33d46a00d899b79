"""Requests for access that the portal has not answered yet (`spec/tunnel.md` §7)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from fz_core.packet import Packet
from fz_core.tunnel.buffers import PacketBuffer

BUFFERED_PACKETS = 128
BUFFERED_QUERIES = 128
MAX_PENDING = 1024
RETRY_INTERVAL = 2.0
# Where nobody serves a resource, a gateway may be about to return; ask a little later.
REFUSED_INTERVAL = 0.25
LONG_AGO = float("-inf")


class AccessKey(NamedTuple):
    """What is asked for: a resource, or one device of a pool by its packed address."""

    resource_id: str
    device: bytes | None = None


class Waiting(NamedTuple):
    """What waited for an answer: packets, and DNS queries for the resource's site."""

    packets: list[Packet]
    queries: list[Any]


class _Pending:
    __slots__ = ("packets", "queries", "requested_at")

    def __init__(self, now: float) -> None:
        self.requested_at = now
        self.packets = PacketBuffer(BUFFERED_PACKETS)
        self.queries: deque[Any] = deque(maxlen=BUFFERED_QUERIES)


class PendingAuthorizations:
    """Independent entries by key. There is no timer: retries are driven by further traffic only."""

    def __init__(self) -> None:
        self._pending: dict[AccessKey, _Pending] = {}
        self._refused_at: dict[AccessKey, float] = {}

    def __contains__(self, key: AccessKey) -> bool:
        return key in self._pending

    def trigger(self, key: AccessKey, now: float, *, packet: Packet | None = None, query: Any = None) -> bool:
        """Note that access is wanted; True when the portal must be asked (again) now."""
        refused_at = self._refused_at.get(key)
        if refused_at is not None and now - refused_at < REFUSED_INTERVAL:
            return False
        entry = self._pending.get(key)
        due = entry is None or now - entry.requested_at >= RETRY_INTERVAL
        if entry is None:
            if len(self._pending) >= MAX_PENDING:
                del self._pending[next(iter(self._pending))]
            entry = self._pending[key] = _Pending(now)
        elif due:
            entry.requested_at = now
        if packet is not None:
            entry.packets.push(packet)
        if query is not None:
            entry.queries.append(query)
        return due

    def unanswered(self) -> list[AccessKey]:
        """The portal went away with these questions, which may be asked again at once."""
        for entry in self._pending.values():
            entry.requested_at = LONG_AGO
        return list(self._pending)

    def resolve(self, key: AccessKey) -> Waiting | None:
        """The answer came: what waited for it, or None if nobody asked."""
        entry = self._pending.pop(key, None)
        return None if entry is None else Waiting(entry.packets.drain(), list(entry.queries))

    def devices(self, *addresses: bytes) -> Iterator[AccessKey]:
        """Keys that ask for a device with one of these addresses."""
        return iter([key for key in self._pending if key.device in addresses])

    def refuse(self, key: AccessKey, now: float) -> None:
        """Nobody can serve it now: forget the request and its packets, and do not ask again at once."""
        self._pending.pop(key, None)
        if len(self._refused_at) >= MAX_PENDING:
            self._refused_at.clear()
        self._refused_at[key] = now

    def drop(self, key: AccessKey) -> None:
        """Forget a request and its packets."""
        self._pending.pop(key, None)

    def drop_resource(self, resource_id: str) -> None:
        """Forget every request for a resource, or for any device of a pool."""
        for key in [key for key in self._pending if key.resource_id == resource_id]:
            del self._pending[key]
