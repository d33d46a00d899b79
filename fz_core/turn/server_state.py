"""Allocations and channels of a relay, and when they end (spec/relay.md sections 5, 6 and 8).

Only bound channels are in the two forwarding tables, so that the path of data is one look-up each.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from itertools import count

from fz_core.packet import Address

CHANNEL_LIFETIME = 600.0
QUARANTINE = 300.0
HEAP_SLACK = 64


def source_of(client: Address) -> bytes:
    """Whose address it is: an IPv4 address, or the /64 of an IPv6 address, all of which one machine may use."""
    return client.ip if len(client.ip) == 4 else client.ip[:8]


class ServerChannel:
    """One number of one client and its peer. After `expires_at` it is kept for each other only."""

    def __init__(self, client: Address, number: int, port: int, peer: Address) -> None:
        self.client = client
        self.number = number
        self.port = port
        self.peer = peer
        self.is_bound = False
        self.due_at = 0.0
        self.is_gone = False


class ServerAllocation:
    """A port lent to one client socket."""

    def __init__(self, client: Address, port: int, families: tuple[int, ...], username: str) -> None:
        self.client = client
        self.port = port
        self.families = families
        self.username = username
        self.due_at = 0.0
        self.is_gone = False
        self.transaction_id = b""
        self.reply = b""
        self.by_number: dict[int, ServerChannel] = {}
        self.by_peer: dict[Address, ServerChannel] = {}


class RelayState:
    """All allocations and channels. Callbacks tell when forwarding begins and ends and ports are freed."""

    def __init__(
        self,
        on_bound: Callable[[ServerChannel], None],
        on_unbound: Callable[[ServerChannel], None],
        on_freed: Callable[[ServerAllocation], None],
    ) -> None:
        self._on_bound = on_bound
        self._on_unbound = on_unbound
        self._on_freed = on_freed
        self.by_client: dict[Address, ServerAllocation] = {}
        self.by_port: dict[int, ServerAllocation] = {}
        self._by_username: dict[str, ServerAllocation] = {}
        self._by_source: dict[bytes, int] = {}
        self.outward: dict[tuple[Address, int], tuple[int, Address]] = {}
        self.inward: dict[tuple[int, Address], tuple[Address, int]] = {}
        self._heap: list[tuple[float, int, ServerAllocation | ServerChannel]] = []
        self._order = count()

    def held_by(self, client: Address, username: str) -> int:
        """Allocations a source would keep if this user made another one."""
        older = self._by_username.get(username)
        is_replaced = older is not None and source_of(older.client) == source_of(client)
        return self._by_source.get(source_of(client), 0) - is_replaced

    def create(
        self, client: Address, port: int, families: tuple[int, ...], username: str, expires_at: float
    ) -> ServerAllocation:
        """A new allocation; an older one of that user ends."""
        older = self._by_username.get(username)
        if older is not None:
            self.free(older)
        allocation = ServerAllocation(client, port, families, username)
        self.by_client[client] = self.by_port[port] = self._by_username[username] = allocation
        source = source_of(client)
        self._by_source[source] = self._by_source.get(source, 0) + 1
        self._schedule(allocation, expires_at)
        return allocation

    def extend(self, allocation: ServerAllocation, expires_at: float) -> None:
        """Replaces the expiry."""
        self._schedule(allocation, expires_at)

    def free(self, allocation: ServerAllocation) -> None:
        """Ends it and all its channels."""
        for channel in allocation.by_number.values():
            self._unbind(channel)
            channel.is_gone = True
        allocation.is_gone = True
        del self.by_client[allocation.client]
        del self.by_port[allocation.port]
        if self._by_username.get(allocation.username) is allocation:
            del self._by_username[allocation.username]
        source = source_of(allocation.client)
        self._by_source[source] -= 1
        if not self._by_source[source]:
            del self._by_source[source]
        self._on_freed(allocation)

    def bind(self, allocation: ServerAllocation, number: int, peer: Address, now: float) -> bool:
        """Bind, refresh or revive; False if number or peer belongs to another, quarantine included."""
        channel = allocation.by_number.get(number)
        if channel is not allocation.by_peer.get(peer):
            return False
        if channel is None:
            channel = ServerChannel(allocation.client, number, allocation.port, peer)
            allocation.by_number[number] = allocation.by_peer[peer] = channel
        if not channel.is_bound:
            channel.is_bound = True
            self.outward[channel.client, number] = (channel.port, peer)
            self.inward[channel.port, peer] = (channel.client, number)
            self._on_bound(channel)
        self._schedule(channel, now + CHANNEL_LIFETIME)
        return True

    def expire(self, now: float) -> None:
        """End what is due: allocations before channels that end at the same time."""
        due = list(self._pop_due(now))
        for item in due:
            if isinstance(item, ServerAllocation) and not item.is_gone and item.due_at <= now:
                self.free(item)
        for item in due:
            if isinstance(item, ServerChannel) and not item.is_gone and item.due_at <= now:
                self._expire_channel(item)

    def next_at(self) -> float | None:
        """The earliest end of anything."""
        while self._heap and self._is_stale(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def _expire_channel(self, channel: ServerChannel) -> None:
        if channel.is_bound:
            self._unbind(channel)
            self._schedule(channel, channel.due_at + QUARANTINE)
            return
        channel.is_gone = True
        allocation = self.by_port[channel.port]
        del allocation.by_number[channel.number]
        del allocation.by_peer[channel.peer]

    def _unbind(self, channel: ServerChannel) -> None:
        if channel.is_bound:
            channel.is_bound = False
            del self.outward[channel.client, channel.number]
            del self.inward[channel.port, channel.peer]
            self._on_unbound(channel)

    def _schedule(self, item: ServerAllocation | ServerChannel, at: float) -> None:
        item.due_at = at
        heapq.heappush(self._heap, (at, next(self._order), item))
        if len(self._heap) > 2 * (len(self.by_client) + len(self.outward)) + HEAP_SLACK:
            live = {id(entry[2]): entry for entry in self._heap if not self._is_stale(entry)}
            self._heap = sorted(live.values())

    def _pop_due(self, now: float) -> Iterator[ServerAllocation | ServerChannel]:
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            if not self._is_stale(entry):
                yield entry[2]

    def _is_stale(self, entry: tuple[float, int, ServerAllocation | ServerChannel]) -> bool:
        return entry[2].is_gone or entry[2].due_at != entry[0]
