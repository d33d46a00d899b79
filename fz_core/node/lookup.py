"""Finding the connection a datagram belongs to, by what the datagram says (`spec/connectivity.md` §2).

The source address plays no role for WireGuard; STUN requests are found by ufrag, answers by
transaction id.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from itertools import islice

from fz_core.node.connection import Connection

TRANSACTION_TTL = 10.0
INDEX_BITS = 24
INIT_TTL = 10.0
MAX_INITS = 4096


class Connections:
    """Connections by peer, WireGuard index, public key, ufrag, and outstanding STUN transaction.

    What remembers datagrams names connections by their index, so that nothing of a removed one stays. It forgets from
    the front, which a plain dict is slow at.
    """

    def __init__(self) -> None:
        self.by_peer: dict[str, Connection] = {}
        self.by_index: dict[int, Connection] = {}
        self._by_key: dict[bytes, Connection] = {}
        self._by_ufrag: dict[str, list[Connection]] = {}
        self._by_relay: Counter[str] = Counter()
        self._transactions: OrderedDict[bytes, tuple[float, int]] = OrderedDict()
        self._inits: OrderedDict[bytes, tuple[float, int]] = OrderedDict()

    def add(self, connection: Connection) -> None:
        """Register a connection; one for the same peer must have been removed."""
        self.by_peer[connection.peer_id] = connection
        self.by_index[connection.index] = connection
        self._by_key[connection.parameters.remote_key] = connection
        self._by_ufrag.setdefault(connection.parameters.local.ufrag, []).append(connection)
        self._by_relay[connection.relay_id] += 1

    def remove(self, peer_id: str) -> Connection | None:
        """Unregister everything about a peer's connection."""
        connection = self.by_peer.pop(peer_id, None)
        if connection is None:
            return None
        del self.by_index[connection.index]
        if self._by_key.get(connection.parameters.remote_key) is connection:
            del self._by_key[connection.parameters.remote_key]
        same_ufrag = self._by_ufrag[connection.parameters.local.ufrag]
        same_ufrag.remove(connection)
        if not same_ufrag:
            del self._by_ufrag[connection.parameters.local.ufrag]
        self._leave_relay(connection)
        return connection

    @property
    def relay_ids(self) -> list[str]:
        """The relays that connections use."""
        return list(self._by_relay)

    def use_relay(self, connection: Connection, relay_id: str) -> None:
        """Another relay serves a connection."""
        self._leave_relay(connection)
        connection.relay_id = relay_id
        self._by_relay[relay_id] += 1

    def _leave_relay(self, connection: Connection) -> None:
        self._by_relay[connection.relay_id] -= 1
        if not self._by_relay[connection.relay_id]:
            del self._by_relay[connection.relay_id]

    def by_key(self, public_key: bytes) -> Connection | None:
        """The connection to the holder of this WireGuard key."""
        return self._by_key.get(public_key)

    def by_username(self, username: str) -> Connection | None:
        """The connection a STUN request's USERNAME `<local ufrag>:<remote ufrag>` names."""
        local, _, remote = username.partition(":")
        for connection in self._by_ufrag.get(local, ()):
            if connection.parameters.remote.ufrag == remote:
                return connection
        return None

    def expect(self, transaction_id: bytes, connection: Connection, now: float) -> None:
        """Remember whose request this transaction is."""
        self._expire(now)
        self._transactions[transaction_id] = (now, connection.index)

    def answered(self, transaction_id: bytes, now: float) -> Connection | None:
        """The connection whose request was answered in time; each transaction counts once."""
        entry = self._transactions.pop(transaction_id, None)
        return self.by_index.get(entry[1]) if entry and now - entry[0] <= TRANSACTION_TTL else None

    def remember_init(self, datagram: bytes | memoryview, connection: Connection, now: float) -> None:
        """This init was accepted; copies follow, and must cost neither curve operations nor a share of the limit."""
        for known, (at, _) in list(islice(self._inits.items(), 2)):
            if now - at > INIT_TTL or len(self._inits) >= MAX_INITS:
                del self._inits[known]
        self._inits[bytes(datagram)] = (now, connection.index)

    def by_init(self, datagram: bytes | memoryview) -> Connection | None:
        """The connection that has accepted this very init."""
        entry = self._inits.get(bytes(datagram))
        return None if entry is None else self.by_index.get(entry[1])

    def free_index(self, start: int) -> int:
        """A 24-bit index no connection uses, searched from `start`."""
        index = start % (1 << INDEX_BITS)
        while index in self.by_index:
            index = (index + 1) % (1 << INDEX_BITS)
        return index

    def _expire(self, now: float) -> None:
        # Entries are in the order of their time, so the first young one ends the search.
        for transaction_id, (sent_at, _) in list(islice(self._transactions.items(), 8)):
            if now - sent_at <= TRANSACTION_TTL:
                break
            del self._transactions[transaction_id]
