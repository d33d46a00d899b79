"""Two roles that get the same input: one handles every packet, one has a flow table in front of it.

Whatever the table carries must be what the other role does with the packet, and nothing else may come of it:
no question to the portal, no announcement, no drop. All other outcomes must be equal, and so must deadlines,
flow logs and counters. The table notes what it carried before anything else happens.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from random import Random
from typing import Any

from fz_core.node import events as node_events
from fz_core.node.connection import Path
from fz_core.packet import Address, DropReason, Packet, Transmit, verify_checksums
from fz_core.tunnel import TunnelRole
from fz_core.tunnel.flow_record import FlowRecord
from fz_core.tunnel.verdict import FlowKey, Verdict
from tests.unit.fastpath.pump_rig import rewritten

LOCAL, REMOTE = Address.parse("192.0.2.1:52625"), Address.parse("198.51.100.7:52625")
V6_GROWTH, MAX_PACKET = 20, 1280
FIN_OR_RST, SYN = 0x05, 0x02


class StandInNode:
    """A node without network and keys: what is sent to a peer stays readable."""

    has_relay = expects_relay = True
    public_key = bytes(32)

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}
        self.paths: dict[str, Path] = {}
        self.aged: set[str] = set()
        self._ports = 1000
        self._events: deque[Any] = deque()

    # what a test does

    def establish(self, peer_id: str) -> None:
        if peer_id in self.known and peer_id not in self.paths:
            self._events.append(node_events.ConnectionEstablished(peer_id))
            self.move(peer_id)

    def move(self, peer_id: str) -> None:
        if peer_id in self.known:
            self._ports += 1
            path = self.paths[peer_id] = Path(Address(LOCAL.ip, self._ports), REMOTE, False, False)
            self._events.append(node_events.PathChanged(peer_id, str(path.local), str(path.remote), False))

    def fail(self, peer_id: str) -> None:
        if peer_id in self.known:
            self.remove(peer_id)
            self._events.append(node_events.ConnectionFailed(peer_id, "failed"))

    # what a role asks

    def upsert_connection(self, peer_id: str, parameters: Any, _now: float, _profiles: Any) -> bool:
        if self.known.get(peer_id) == parameters:
            return False
        self.remove(peer_id)
        self.known[peer_id] = parameters
        return True

    def encapsulate(self, peer_id: str, packet: Any, ecn: int, _now: float) -> Any:
        if peer_id not in self.paths:
            return DropReason.NOT_CONNECTED
        return None if peer_id in self.aged else Transmit(bytes(packet), peer_id, None, ecn)  # type: ignore[arg-type]

    def handle_opened(self, peer_id: str, _local: Address, _remote: Address, plaintext: bytes, _now: float) -> Any:
        return (peer_id, plaintext) if peer_id in self.known else None

    def close(self, peer_id: str, _goodbye: bytes, _now: float) -> None:
        if peer_id in self.paths:
            self._events.append(node_events.ConnectionClosed(peer_id))
        self.remove(peer_id)

    def remove(self, peer_id: str) -> None:
        self.known.pop(peer_id, None)
        self.paths.pop(peer_id, None)
        self.aged.discard(peer_id)

    def reset(self, _key: Any, _now: float) -> list[str]:
        gone = list(self.known)
        for peer_id in gone:
            self.remove(peer_id)
        return gone

    def poll_event(self) -> Any:
        return self._events.popleft() if self._events else None

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    @property
    def peers(self) -> list[str]:
        return list(self.known)

    def is_known(self, peer_id: str) -> bool:
        return peer_id in self.known

    def is_ready(self, peer_id: str) -> bool:
        return peer_id in self.paths

    is_busy = is_ready

    def path(self, peer_id: str) -> Path | None:
        return self.paths.get(peer_id)

    def first_hop(self, _peer_id: str) -> None:
        return None

    def poll_transmit(self) -> None:
        return None

    def poll_timeout(self) -> None:
        return None

    def handle_timeout(self, _now: float) -> None: ...

    def handle_portal_connected(self, _now: float) -> None: ...

    def update_relays(self, *_: Any) -> None: ...


class Entry:
    """A verdict in force, and what was carried under it."""

    def __init__(self, verdict: Verdict, now: float) -> None:
        self.verdict = verdict
        self.last_at = now
        self.packets = self.payload = self.turn = 0


class FlowTable:
    """What a driver does with verdicts."""

    def __init__(self, role: TunnelRole) -> None:
        self._role = role
        self._generation = role.generation
        self._entries: dict[tuple[str | None, FlowKey], Entry] = {}
        self._void: list[Entry] = []
        self._turn = 0
        self.voided: Counter[str] = Counter()

    def find(self, sender: str | None, packet: Packet, now: float) -> Entry | None:
        """The entry for a packet of this peer, or of the device."""
        if packet.src_port < 0 or packet.tcp_flags & (FIN_OR_RST | SYN):
            return None
        place = sender, FlowKey.of(packet)
        entry = self._entries.get(place)
        if entry is None:
            return None
        if now - entry.last_at >= entry.verdict.ttl or now >= entry.verdict.until:
            self._drop(place, "lapsed")
            return None
        grows = entry.verdict.after.version > packet.version
        return None if grows and len(packet) + V6_GROWTH > MAX_PACKET else entry

    def carry(self, entry: Entry, packet: Packet, now: float) -> None:
        self._turn += 1
        entry.last_at, entry.turn = now, self._turn
        entry.packets += 1
        entry.payload += packet.payload_length

    def sync(self, now: float) -> None:
        """After each call to the role: first what is void, then what is new."""
        role = self._role
        stale, revoked = role.take_stale(), role.take_revoked()
        for place in list(self._entries):
            if role.generation != self._generation:
                self._drop(place, "generation")
            elif self._entries[place].verdict.peer_id in stale:
                self._drop(place, "stale")
        self._generation = role.generation
        for verdict in revoked:
            self._drop(place_of(verdict), "revoked")
        offered = role.take_verdict()
        if offered is not None:
            self._entries.setdefault(place_of(offered), Entry(offered, now))

    def flush(self) -> None:
        """Note what was carried, under void verdicts too, in the order of time."""
        used = [entry for entry in (*self._void, *self._entries.values()) if entry.packets]
        for entry in sorted(used, key=lambda entry: entry.turn):
            entry.verdict.note(entry.packets, entry.payload, entry.last_at)
            entry.packets = entry.payload = 0
        self._void.clear()

    def in_force(self, now: float) -> list[Verdict]:
        entries = [e for e in self._entries.values() if now - e.last_at < e.verdict.ttl and now < e.verdict.until]
        return [entry.verdict for entry in entries]

    def _drop(self, place: tuple[str | None, FlowKey], why: str) -> None:
        entry = self._entries.pop(place, None)
        if entry is not None:
            self._void.append(entry)
            self.voided[why] += 1


class Twins:
    """`slow` handles everything; `fast` sees what its table does not carry."""

    def __init__(self, new_role: Callable[[], TunnelRole], now: float) -> None:
        self.now = now
        self.slow, self.fast = new_role(), new_role()
        for role in (self.slow, self.fast):
            role.node = StandInNode()  # type: ignore[assignment]
        self.fast.wants_verdicts = True
        self.table = FlowTable(self.fast)
        self.carried: Counter[str] = Counter()
        self.records = 0
        self.events: list[Any] = []
        self.sent: list[tuple[str, bytes]] = []
        self.delivered: list[bytes] = []

    @property
    def node(self) -> StandInNode:
        """To look at; what changes a node goes through `do`."""
        return self.slow.node  # type: ignore[return-value]

    def do(self, act: Callable[[Any], Any]) -> None:
        """Something other than a packet."""
        self.table.flush()
        for role in (self.slow, self.fast):
            act(role)
        self.table.sync(self.now)
        assert self._drained(self.slow) == self._drained(self.fast)

    def settle(self, act: Callable[[Any], Any]) -> None:
        """Something happens to the node, and the role is told."""
        self.do(lambda role: (act(role.node), role.handle_timeout(self.now)))

    def advance(self, seconds: float) -> None:
        """Let time pass, from deadline to deadline."""
        end = self.now + seconds
        while True:
            due = self.slow.poll_timeout()
            assert due == self.fast.poll_timeout()
            if due is None or due[0] > end:
                break
            self.table.flush()
            self.now = max(due[0], self.now)
            self.do(lambda role: role.handle_timeout(self.now))
            left = self.slow.poll_timeout()
            assert left is None or left[0] > self.now, left
        self.table.flush()
        self.now = end

    def from_device(self, packet: Packet) -> Any:
        """The drop reason, if any."""
        return self._give(None, packet, lambda role, data: role.handle_tun_input(data, self.now))

    def from_peer(self, peer_id: str, packet: Packet) -> Any:
        """The drop reason, if any."""

        def hand(role: TunnelRole, data: bytes) -> Any:
            return role.handle_opened(peer_id, LOCAL, REMOTE, 0, data, self.now)

        return self._give(peer_id, packet, hand)

    def probe(self, build: Callable[[FlowKey], Packet], random: Random, most: int) -> None:
        """A packet for some of the verdicts in force."""
        in_force = self.table.in_force(self.now)
        for verdict in random.sample(in_force, min(most, len(in_force))):
            packet = build(verdict.before)
            if verdict.is_inbound:
                self.from_peer(verdict.peer_id, packet)
            else:
                self.from_device(packet)

    def _give(self, sender: str | None, packet: Packet, hand: Callable[[TunnelRole, bytes], Any]) -> Any:
        data, entry = packet.data, self.table.find(sender, packet, self.now)
        drops = dict(self.slow.drops.items())
        error = hand(self.slow, data)
        outcome = self._drained(self.slow)
        if entry is None:
            self.table.flush()
            other = hand(self.fast, data)
            self.table.sync(self.now)
            assert (error and error.reason) == (other and other.reason)
            assert outcome == self._drained(self.fast)
            return error and error.reason
        verdict = entry.verdict
        went = normalised(carried_as(verdict, packet))
        expected = ([], [went]) if verdict.is_inbound else ([(verdict.peer_id, went)], [])
        assert error is None, (error, verdict.before)
        assert outcome == (*expected, [], []), verdict.before
        assert drops == dict(self.slow.drops.items())
        self.table.carry(entry, packet, self.now)
        self.carried[kind_of(verdict)] += 1
        return None

    def _drained(self, role: TunnelRole) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        sent: list[Any] = []
        while (transmit := role.poll_transmit()) is not None:
            sent.append((transmit.remote, normalised(Packet.parse_untrusted(transmit.payload))))
        delivered, events, records = [], [], []
        while (packet := role.poll_packet()) is not None:
            delivered.append(normalised(packet))
        while (event := role.poll_event()) is not None:
            events.append(event)
        while (record := role.flows.poll_record()) is not None:
            records.append(told(record))
        if role is self.slow:
            self.events, self.sent, self.delivered = events, sent, delivered
            self.records += len(records)
        return sent, delivered, events, records


def place_of(verdict: Verdict) -> tuple[str | None, FlowKey]:
    return (verdict.peer_id if verdict.is_inbound else None), verdict.before


def kind_of(verdict: Verdict) -> str:
    protocol = {6: "tcp", 17: "udp"}.get(verdict.before.protocol, "echo")
    change = "crossing" if verdict.before.version != verdict.after.version else "translated"
    return (
        f"{'in' if verdict.is_inbound else 'out'} {protocol} {'as is' if verdict.before == verdict.after else change}"
    )


def carried_as(verdict: Verdict, packet: Packet) -> Packet:
    """What a flow table makes of a packet."""
    carried = rewritten(packet, verdict.after)
    assert FlowKey.of(carried) == verdict.after
    return carried


def normalised(packet: Packet | DropReason) -> bytes:
    """Without what differs from packet to packet: IPv4 identification, and the checksum over it."""
    assert isinstance(packet, Packet), packet
    assert verify_checksums(packet) == ()
    data = bytearray(packet.data)
    if packet.version == 4:
        data[4:6] = data[10:12] = bytes(2)
    return bytes(data)


def told(record: FlowRecord) -> tuple[Any, ...]:
    """A record with its token as text, which two roles parse each for themselves."""
    return record.token.text, *(getattr(record, name) for name in record.__slots__ if name != "token")
