"""What must hold after every run, whatever the network did."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from fz_core.packet import DropReason
from tests.sim.system import Peer, System

# Loss, delay, restarts and revocation explain these; every other reason would be of our own making.
EXPLICABLE = {
    DropReason.UNKNOWN_CONNECTION,
    DropReason.UNKNOWN_CHANNEL,
    DropReason.STUN_UNEXPECTED,
    DropReason.WG_BAD_HANDSHAKE,
    DropReason.WG_REPLAYED_HANDSHAKE,
    DropReason.WG_UNKNOWN_SESSION,
    DropReason.WG_EXPIRED_SESSION,
    DropReason.WG_REPLAYED_PACKET,
    DropReason.WG_NO_SESSION,
    DropReason.NOT_ALLOWED,
    DropReason.NO_PEER_STATE,
    DropReason.NOT_CONNECTED,
    DropReason.NO_CHANNEL,
}

# A peer that was started anew has another key, and before `init` no configuration and no relay whose data it knows.
AFTER_RESTART = EXPLICABLE | {DropReason.WG_BAD_MAC, DropReason.NOT_CONFIGURED, DropReason.UNKNOWN_DATAGRAM}


def check(system: System, label: object, allowed: set[DropReason] = EXPLICABLE) -> None:
    """No error of our own making, nothing delivered twice, no table that grew."""
    for peer in (*system.clients, *system.gateways):
        reasons = {error.reason for error in peer.errors}  # type: ignore[attr-defined]
        assert reasons <= allowed, f"{label}: {peer.name} reports {reasons - allowed}"
        deliveries = Counter((p.src, p.payload) for p in peer.packets if p.protocol == 17)
        twice = [key for key, count in deliveries.items() if count > 1]
        assert not twice, f"{label}: {peer.name} got twice {twice[:3]}"
        check_tables(peer, label)


def check_tables(peer: Peer, label: object) -> None:
    """Sizes follow from the number of peers and relays, not from time."""
    node = peer.state.node
    connections = node._connections
    count = len(connections.by_peer)
    assert len(connections.by_index) == count, label
    assert len(connections._by_key) <= count, label
    assert sum(map(len, connections._by_ufrag.values())) == count, label
    assert len(connections._transactions) <= 1500 * count, label
    for connection in connections.by_peer.values():
        assert len(connection.agent._pairs) <= 100, label
        assert len(connection.agent.remote_candidates) <= 100, label
        assert not connection.agent._transmits, label
        assert not connection.agent._events, label
    assert not node._transmits, label
    assert not node._events, label


def footprint(root: object) -> int:
    """How many entries all containers reachable from here hold."""
    seen: set[int] = set()
    todo: deque[Any] = deque([root])
    total = 0
    while todo:
        item = todo.popleft()
        if id(item) in seen or isinstance(item, (str, bytes, int, float, type)) or item is None:
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            total += len(item)
            todo.extend(item.keys())
            todo.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset, deque)):
            total += len(item)
            todo.extend(item)
        elif type(item).__module__.startswith("fz_core"):
            todo.extend(getattr(item, "__dict__", {}).values())
            for slot in slots_of(type(item)):
                todo.append(getattr(item, slot, None))
    return total


def slots_of(kind: type) -> list[str]:
    return [slot for base in kind.__mro__ for slot in getattr(base, "__slots__", ()) if isinstance(slot, str)]
