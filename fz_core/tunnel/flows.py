"""Which packets make up a flow, when it starts and when it ends (`spec/tunnel.md` §19).

    tracker.handle_tx(scope, packet, token, path, now)      # initiator to responder, once it passed
    tracker.handle_rx(peer_id, packet, now)                 # responder to initiator, once it passed
    while (record := tracker.poll_record()) is not None: ...

Not here: whose packet it is and whether it may pass. The tracker sees packets as they are recorded: on a
gateway as the resource sees them, on a client with the addresses the client uses. Whatever is neither TCP
nor UDP is no flow. A known flow costs one look-up per packet; time is looked at only when it runs out.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from functools import partial
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from typing import Literal, NamedTuple

from fz_core.node.connection import Path
from fz_core.packet import Address, Packet
from fz_core.tunnel.flow_record import FlowRecord, IngestToken, Outer, OuterPath, RecordKind
from fz_core.tunnel.verdict import Basis, Verdict

Scope = str | tuple[str, str]


class FlowTracker:
    """All flows of one client or gateway. One mutation, then drain `poll_record`, then wait for `poll_timeout`.

    A scope is the peer's id on a client, `(client id, resource id)` on a gateway. Of more than `max_flows`
    flows the one unused for longest ends early; `evictions` counts these. Verdicts that stood on a flow go to
    `revoked` when it ends, or when its end is near.
    """

    def __init__(
        self,
        role: Literal["client", "gateway"],
        unix_epoch: float,
        max_flows: int = 65536,
        revoked: list[Verdict] | None = None,
    ) -> None:
        self._is_gateway = role == "gateway"
        self._unix_epoch = unix_epoch
        self._max_flows = max_flows
        self._revoked = [] if revoked is None else revoked
        self._flows: dict[Key, Flow] = {}
        self._by_peer: dict[str, dict[Key, Flow]] = {}
        self._records: deque[FlowRecord | Ended] = deque()
        # Each live flow has one entry, two once it is closing; the time is that of its end if no packet comes.
        self._due: list[tuple[float, int, Flow]] = []
        self._numbers = count()
        self._swept_at = -math.inf
        self._last_start = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._flows)

    # packets

    def handle_tx(
        self,
        scope: Scope,
        packet: Packet,
        token: IngestToken | None,
        path: Path | None,
        now: float,
        *,
        domain: str | None = None,
        opened_by_peer: bool = False,
    ) -> None:
        """A packet from the initiator passed. Without token or path it starts no flow.

        `path` is the connection's own object, which stays the same until the path changes. A gateway's
        flows are always opened by the peer; a client says so for those that another client opened.
        """
        protocol = packet.protocol
        if protocol != TCP and protocol != UDP:
            return
        peer_id: str = scope[0] if self._is_gateway else scope  # type: ignore[assignment]
        key = (peer_id, protocol, packet.src, packet.src_port, packet.dst, packet.dst_port)
        flags = packet.tcp_flags if protocol == TCP else 0
        flow = self._flows.get(key)
        is_split = False
        if flow is not None:
            is_over = (
                now > flow.last_at + flow.lifetime
                or flow.scope != scope
                or flow.domain != domain
                or (flags & SYN and flow.tx_beyond_syn and not flags & (FIN | RST | ACK))
            )
            if not is_over and path is not flow.path and path is not None:
                is_over = is_split = not self._follow(flow, path, flags, now)
            if is_over:
                self._end(flow, now)
                flow = None
        if flow is None:
            if token is None or path is None or not (is_split or _may_start(packet, flags)):
                return
            flow = self._start(Flow(key, scope, token, domain, self._is_gateway or opened_by_peer), path, now)
        flow.last_at = now
        flow.tx_packets += 1
        flow.tx_bytes += packet.payload_length
        if protocol == TCP:
            if not flags & SYN:
                flow.tx_beyond_syn = True
            if flags & FIN_OR_RST:
                self._note_flags(flow, flags, TX_FIN, now)

    def handle_rx(self, peer_id: str, packet: Packet, now: float) -> None:
        """A packet from the responder passed."""
        flow = self.match_rx(peer_id, packet, now)
        if flow is not None:
            self.count_rx(flow, packet, now)

    def match_rx(self, peer_id: str, packet: Packet, now: float) -> Flow | None:
        """The flow of a packet from the responder, to be asked before the packet is translated."""
        flow = self._flows.get((peer_id, packet.protocol, packet.dst, packet.dst_port, packet.src, packet.src_port))
        if flow is not None and now > flow.last_at + flow.lifetime:
            self._end(flow, now)
            return None
        return flow

    def count_rx(self, flow: Flow, packet: Packet, now: float) -> None:
        """The packet that was matched passed, translated or not."""
        if flow.has_ended:
            return
        flow.last_at = now
        flow.rx_packets += 1
        flow.rx_bytes += packet.payload_length
        if flow.key[1] == TCP and (flags := packet.tcp_flags) & FIN_OR_RST:
            self._note_flags(flow, flags, RX_FIN, now)

    # packets that a flow table carries

    def support(self, verdict: Verdict, *, is_tx: bool) -> bool:
        """Let a verdict about a packet that was just counted stand on its flow; False if no flow goes on.

        Flows are named as the resource sees them: a gateway translates what it gets from a peer before it counts.
        From an initiator who has sent nothing but SYNs all is counted here: what follows, if it were carried, would be
        noted later than another SYN comes, which would then look like one more of the same.
        """
        seen = verdict.after if verdict.is_inbound else verdict.before
        if seen.protocol != TCP and seen.protocol != UDP:
            return True
        key = seen if is_tx else seen.back
        flow = self._flows.get((verdict.peer_id, key.protocol, key.src, key.src_port, key.dst, key.dst_port))
        if flow is None or flow.is_closing or (is_tx and key.protocol == TCP and not flow.tx_beyond_syn):
            return False
        verdict.stand_on(flow.lifetime, partial(self._note_carried, flow, is_tx))
        flow.bear(verdict, self._revoked)
        return True

    def has_flows(self, peer_id: str) -> bool:
        """Whether any flow of a peer is live."""
        return peer_id in self._by_peer

    def _note_carried(self, flow: Flow, is_tx: bool, packets: int, payload_bytes: int, last_at: float) -> None:
        if not packets:
            return
        flow.last_at = max(flow.last_at, last_at)
        if is_tx:
            flow.tx_packets += packets
            flow.tx_bytes += payload_bytes
            flow.tx_beyond_syn = True  # a SYN is never carried
        else:
            flow.rx_packets += packets
            flow.rx_bytes += payload_bytes

    # ends

    def end_scope(self, scope: Scope, now: float) -> None:
        """The access is gone: its flows end."""
        peer_id = scope if isinstance(scope, str) else scope[0]
        self._end_all([flow for flow in self._by_peer.get(peer_id, {}).values() if flow.scope == scope], now)

    def end_peer(self, peer_id: str, now: float) -> None:
        """The peer is gone: all its flows end, whatever their resource."""
        self._end_all(list(self._by_peer.get(peer_id, {}).values()), now)

    def shutdown(self, now: float) -> None:
        """Tracking stops: every flow ends."""
        self._end_all(list(self._flows.values()), now)

    # time and output

    def handle_timeout(self, now: float) -> None:
        """End flows that were idle for too long, and those closed by both sides."""
        while self._due and self._due[0][0] < now:
            if self._is_accurate(self._due[0]):
                self._end(heappop(self._due)[2], now)
            else:
                self._correct_first()
        self._swept_at = now

    def poll_timeout(self) -> float | None:
        """When to look again; at most once a second."""
        if not self._due:
            return None
        # "More than 120 s": the moment itself is not late enough.
        return max(math.nextafter(self._due[0][0], math.inf), self._swept_at + SWEEP_INTERVAL)

    def poll_record(self) -> FlowRecord | None:
        """Something to log and report; what is noted of a flow that ended counts until then."""
        if not self._records:
            return None
        record = self._records.popleft()
        if isinstance(record, FlowRecord):
            return record
        flow, end = record
        last = max(self._unix(flow.last_at), flow.start)
        return flow.record(RecordKind.END, last if flow.is_closing else end, last)

    # one flow

    def _start(self, flow: Flow, path: Path, now: float) -> Flow:
        if len(self._flows) >= self._max_flows:
            self._evict(now)
        # Reports of the same tuple are told apart by their start alone, so no two flows share one.
        flow.start = self._last_start = max(self._unix(now), self._last_start + 1)
        flow.last_at = now
        flow.path = path
        flow.outers.append(Outer(flow.outer_path(path), flow.start))
        self._flows[flow.key] = flow
        self._by_peer.setdefault(flow.key[0], {})[flow.key] = flow
        self._schedule(flow)
        self._records.append(flow.record(RecordKind.START, flow.start, flow.start))
        return flow

    def _end(self, flow: Flow, now: float) -> None:
        if flow.has_ended:
            return
        flow.has_ended = True
        flow.revoke(self._revoked)
        del self._flows[flow.key]
        flows = self._by_peer[flow.key[0]]
        del flows[flow.key]
        if not flows:
            del self._by_peer[flow.key[0]]
        self._records.append(Ended(flow, max(self._unix(now), flow.start)))

    def _end_all(self, flows: Iterable[Flow], now: float) -> None:
        for flow in flows:
            self._end(flow, now)

    def _follow(self, flow: Flow, path: Path, flags: int, now: float) -> bool:
        """Take over a path. False: the record has no room for it, so a new one must start.

        A packet that only closes a flow starts none, and so does not divide one either.
        """
        outer = flow.outer_path(path)
        if outer != flow.outers[-1].path:
            if len(flow.outers) >= MAX_OUTERS:
                return bool(flags & FIN_OR_RST)
            flow.outers.append(Outer(outer, max(self._unix(now), flow.start)))
        flow.path = path
        return True

    def _note_flags(self, flow: Flow, flags: int, direction: int, now: float) -> None:
        if flags & RST:
            flow.fins = 0
            self._end(flow, now)
        elif flow.fins | direction != flow.fins:
            flow.fins |= direction
            if flow.is_closing:
                # Late and repeated packets still belong to it; without it, they would look like a new flow.
                flow.lifetime = CLOSING_TIME
                flow.revoke(self._revoked)
                self._schedule(flow)

    # deadlines

    def _schedule(self, flow: Flow) -> None:
        if len(self._due) > 4 * len(self._flows) + 1024:  # flows that ended before their time left entries
            self._due = [(f.ends_at, next(self._numbers), f) for f in self._flows.values() if f is not flow]
            heapify(self._due)
        heappush(self._due, (flow.ends_at, next(self._numbers), flow))

    def _is_accurate(self, entry: tuple[float, int, Flow]) -> bool:
        due, _, flow = entry
        return not flow.has_ended and flow.ends_at == due

    def _correct_first(self) -> None:
        _, number, flow = self._due[0]
        if flow.has_ended:
            heappop(self._due)
        else:
            heapreplace(self._due, (flow.ends_at, number, flow))

    def _evict(self, now: float) -> None:
        # No entry is later than the end of its flow, so the first one that is accurate belongs to the first to end.
        while not self._is_accurate(self._due[0]):
            self._correct_first()
        self._end(self._due[0][2], now)
        self.evictions += 1

    def _unix(self, now: float) -> int:
        return int((self._unix_epoch + now) * 1e6)


class Flow(Basis):
    """One live flow, named as the initiator sends; opaque to callers."""

    __slots__ = (
        "domain", "fins", "has_ended", "is_received", "key", "last_at", "lifetime", "outers", "path", "rx_bytes",
        "rx_packets", "scope", "start", "token", "tx_beyond_syn", "tx_bytes", "tx_packets",
    )  # fmt: skip

    def __init__(self, key: Key, scope: Scope, token: IngestToken, domain: str | None, is_received: bool) -> None:
        super().__init__()
        self.key = key
        self.scope = scope
        self.token = token
        self.domain = domain
        self.is_received = is_received
        self.path: Path | None = None
        self.outers: list[Outer] = []
        self.start = 0
        self.last_at = 0.0
        self.lifetime = IDLE_TIMEOUT
        self.fins = 0
        self.tx_beyond_syn = False
        self.has_ended = False
        self.tx_packets = self.rx_packets = self.tx_bytes = self.rx_bytes = 0

    @property
    def is_closing(self) -> bool:
        """Whether both sides have said that they are done."""
        return self.fins == TX_FIN | RX_FIN

    @property
    def ends_at(self) -> float:
        """When the flow ends, at a moment later than this, if no packet comes."""
        return self.last_at + self.lifetime

    def outer_path(self, path: Path) -> OuterPath:
        """A connection's path in the direction of this flow."""
        return OuterPath.of_received(path) if self.is_received else OuterPath.of_sent(path)

    def record(self, kind: RecordKind, end: int, last: int) -> FlowRecord:
        """The flow as it is now."""
        _, protocol, src, src_port, dst, dst_port = self.key
        named = ("tcp" if protocol == TCP else "udp", Address(src, src_port), Address(dst, dst_port))
        opened = (*named, tuple(self.outers), self.start, self.domain)
        if kind is RecordKind.START:
            return FlowRecord(kind, self.token, *opened)
        counters = (self.rx_packets, self.tx_packets, self.rx_bytes, self.tx_bytes)
        return FlowRecord(kind, self.token, *opened, end, last, *counters)


class Ended(NamedTuple):
    """A flow that is over, and when that was noticed, in unix microseconds."""

    flow: Flow
    at: int


Key = tuple[str, int, bytes, int, bytes, int]
TCP, UDP = 6, 17
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
FIN_OR_RST = FIN | RST
TX_FIN, RX_FIN = 1, 2
IDLE_TIMEOUT = 120.0
CLOSING_TIME = 1.0
SWEEP_INTERVAL = 1.0
MAX_OUTERS = 16


def _may_start(packet: Packet, flags: int) -> bool:
    """Not the tail of a connection that nobody saw: FIN, RST, or a bare ACK."""
    if flags & FIN_OR_RST:
        return False
    return not flags & ACK or bool(flags & SYN) or packet.payload_length > 0
