"""The relays of a node: which there are, were, and which to choose (spec/connectivity.md section 3.8)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from fz_core.packet import Address
from fz_core.turn.client import Allocation

MAD_FLOOR = 0.002
THRESHOLD_FACTOR = 1.5
OUTLIER_FACTOR = 3
REMEMBERED_ADDRESSES = 64


def rtt_threshold(rtts: Iterable[float]) -> float:
    """The slowest round-trip time in seconds that is good enough, given those of all relays."""
    values = sorted(rtts)
    if len(values) <= 2:
        return values[0] * THRESHOLD_FACTOR
    middle = _median(values)
    deviation = _median(sorted(abs(value - middle) for value in values))
    return middle + OUTLIER_FACTOR * max(deviation, MAD_FLOOR)


def _median(values: Sequence[float]) -> float:
    """Of values in order; `statistics` takes longer to import than the rest of this room."""
    half = len(values) // 2
    return (values[half] + values[~half]) / 2


def choose_relay(rtts: Mapping[str, float | None], random_bytes: Callable[[int], bytes]) -> str | None:
    """The id of a relay for a new connection: any of the fast ones; None if none has answered."""
    known = {relay: rtt for relay, rtt in rtts.items() if rtt is not None}
    if not known:
        return None
    threshold = rtt_threshold(known.values())
    fast = [relay for relay, rtt in known.items() if rtt <= threshold]
    return fast[int.from_bytes(random_bytes(8), "big") % len(fast)]


class Relays:
    """All allocations, by relay id and by address of the relay."""

    def __init__(self, random_bytes: Callable[[int], bytes]) -> None:
        self._random_bytes = random_bytes
        self._by_id: dict[str, Allocation] = {}
        self._by_address: dict[Address, Allocation] = {}
        self._previous: deque[bytes] = deque(maxlen=REMEMBERED_ADDRESSES)

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Allocation]:
        return iter(list(self._by_id.values()))

    def get(self, relay_id: str) -> Allocation | None:
        """The allocation on that relay."""
        return self._by_id.get(relay_id)

    def by_address(self, address: Address) -> Allocation | None:
        """The allocation whose relay has this address."""
        return self._by_address.get(address)

    def is_disconnected(self, address: Address) -> bool:
        """Whether this is the IP of a relay dropped lately: its late datagrams are nobody else's."""
        return address not in self._by_address and address.ip in self._previous

    def add(self, allocation: Allocation) -> Allocation | None:
        """Take a new allocation in; returns the one it replaces."""
        replaced = self.remove(allocation.relay_id)
        self._by_id[allocation.relay_id] = allocation
        for address in allocation.server_addresses:
            self._by_address[address] = allocation
        return replaced

    def remove(self, relay_id: str) -> Allocation | None:
        """Drop one; returns it."""
        allocation = self._by_id.pop(relay_id, None)
        if allocation is None:
            return None
        for address in allocation.server_addresses:
            if self._by_address.get(address) is allocation:
                del self._by_address[address]
            if address.ip not in self._previous:
                self._previous.append(address.ip)
        return allocation

    def remove_useless(self) -> tuple[list[tuple[Allocation, str]], bool]:
        """Drop those of no more use, with their reasons; and whether the last one went with them."""
        dead = [(allocation, reason) for allocation in self if (reason := allocation.free_reason)]
        for allocation, _ in dead:
            self.remove(allocation.relay_id)
        return dead, bool(dead) and not self._by_id

    def choose(self, other_than: str | None = None) -> Allocation | None:
        """A relay for a new connection."""
        rtts = {a.relay_id: a.rtt for a in self if a.relay_id != other_than}
        relay_id = choose_relay(rtts, self._random_bytes)
        return None if relay_id is None else self._by_id[relay_id]
