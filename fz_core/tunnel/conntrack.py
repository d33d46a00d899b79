"""Flows between this client and a peer client, by who opened them (`spec/tunnel.md` §12).

Not here: whether a peer may open a flow (`peer_access`). A flow is `(protocol, our port, the peer's port, our
address, the peer's address)`; for ICMP echo both ports are the identifier. The lookups about a packet that
passes count it as traffic of its flow.
"""

from __future__ import annotations

from functools import partial

from fz_core.packet import IcmpError, Packet
from fz_core.tunnel.aging import Aging, earliest, longest_unused
from fz_core.tunnel.verdict import Basis, Verdict


class ConnTrack:
    """Flows we opened and flows the peer opened; each kind holds at most half of `max_flows`, the oldest goes.

    A lapsed flow is never found, whether or not `handle_timeout` ran since; that only frees memory. Verdicts that
    stood on a flow go to `revoked` when it is forgotten.
    """

    def __init__(self, max_flows: int = 65536, revoked: list[Verdict] | None = None) -> None:
        revoked = [] if revoked is None else revoked
        self._ours = FlowTable(max_flows // 2, revoked)
        self._theirs = FlowTable(max_flows // 2, revoked)

    def __len__(self) -> int:
        return len(self._ours) + len(self._theirs)

    def handle_outbound(self, packet: Packet, now: float) -> None:
        """A packet goes to the peer: the flow is ours, unless the peer opened it."""
        flow = sent(packet)
        if not self._theirs.refresh(flow, now):
            self._ours.note(flow, now)

    def handle_inbound(self, packet: Packet, now: float) -> None:
        """A packet of a flow that the peer may open was accepted."""
        self._theirs.note(received(packet), now)

    def is_peer_opened(self, packet: Packet, now: float) -> bool:
        """Whether a packet to the peer belongs to a flow that the peer opened; if so, refreshes it."""
        return self._theirs.refresh(sent(packet), now)

    def is_reply(self, packet: Packet, now: float) -> bool:
        """Whether a packet from the peer belongs to a flow that we opened; if so, refreshes it."""
        return self._ours.refresh(received(packet), now)

    def may_accept_error(self, packet: Packet, now: float) -> bool:
        """Whether an ICMP error from the peer quotes a packet that we sent in a known flow."""
        error = packet.icmp_error()
        if not isinstance(error, IcmpError):
            return False
        return self._is_known((error.protocol, error.src_port, error.dst_port, error.src, error.dst), now)

    def may_send_error(self, packet: Packet, now: float) -> bool:
        """Whether an ICMP error to the peer quotes a packet that the peer sent in a known flow."""
        error = packet.icmp_error()
        if not isinstance(error, IcmpError):
            return False
        return self._is_known((error.protocol, error.dst_port, error.src_port, error.dst, error.src), now)

    def support(self, verdict: Verdict, now: float) -> bool:
        """Let a verdict about a packet that was just counted stand on its flow; False if there is none."""
        key = verdict.before.back if verdict.is_inbound else verdict.before
        flow = key.protocol, key.src_port, key.dst_port, key.src, key.dst
        return any(table.support(verdict, flow, now) for table in (self._ours, self._theirs))

    def handle_timeout(self, now: float) -> None:
        """Forget lapsed flows."""
        self._ours.sweep(now)
        self._theirs.sweep(now)

    def poll_timeout(self) -> float | None:
        """When the next flow lapses."""
        return earliest(*self._ours.queues, *self._theirs.queues)

    def clear(self) -> None:
        """Forget every flow."""
        self._ours.clear()
        self._theirs.clear()

    def _is_known(self, flow: Flow, now: float) -> bool:
        return self._ours.is_live(flow, now) or self._theirs.is_live(flow, now)


class FlowTable:
    """Flows of one opener, with the lifetime of their protocol. What has no ports is never stored."""

    def __init__(self, capacity: int, revoked: list[Verdict]) -> None:
        self._capacity = capacity
        self._revoked = revoked
        self._bases: dict[Flow, Basis] = {}
        self._tcp: Aging[Flow] = Aging(TCP_TTL)
        self._other: Aging[Flow] = Aging(UDP_AND_ICMP_TTL)
        self.queues = (self._tcp, self._other)

    def __len__(self) -> int:
        return len(self._tcp) + len(self._other)

    def is_live(self, flow: Flow, now: float) -> bool:
        return self._queue(flow).is_live(flow, now)

    def refresh(self, flow: Flow, now: float) -> bool:
        """Note traffic of a flow, if it is known."""
        queue = self._queue(flow)
        if not queue.is_live(flow, now):
            return False
        queue.touch(flow, now)
        return True

    def note(self, flow: Flow, now: float) -> None:
        """Note traffic of a known or new flow."""
        if flow[1] < 0:
            return
        if flow not in self._queue(flow):
            self.sweep(now)
            if len(self) >= self._capacity:
                self._evict()
        self._queue(flow).touch(flow, now)

    def support(self, verdict: Verdict, flow: Flow, now: float) -> bool:
        queue = self._queue(flow)
        if not queue.is_live(flow, now):
            return False
        verdict.stand_on(queue.ttl, partial(self._note, flow))
        self._bases.setdefault(flow, Basis()).bear(verdict, self._revoked)
        return True

    def sweep(self, now: float) -> None:
        for queue in self.queues:
            for flow in queue.sweep(now):
                self._forget(flow)

    def clear(self) -> None:
        for queue in self.queues:
            queue.clear()
        for flow in list(self._bases):
            self._forget(flow)

    def _note(self, flow: Flow, _packets: int, _payload_bytes: int, last_at: float) -> None:
        self._queue(flow).note(flow, last_at)

    def _forget(self, flow: Flow) -> None:
        """A flow that is in no queue any more."""
        basis = self._bases.pop(flow, None)
        if basis is not None:
            basis.revoke(self._revoked)

    def _queue(self, flow: Flow) -> Aging[Flow]:
        return self._tcp if flow[0] == TCP else self._other

    def _evict(self) -> None:
        queue = longest_unused(*self.queues)
        if queue is not None and queue.oldest is not None:
            flow = queue.oldest.key
            queue.remove(flow)
            self._forget(flow)


Flow = tuple[int, int, int, bytes, bytes]
TCP = 6
TCP_TTL, UDP_AND_ICMP_TTL = 7440.0, 120.0


def sent(packet: Packet) -> Flow:
    """The flow of a packet to the peer."""
    return packet.protocol, packet.src_port, packet.dst_port, packet.src, packet.dst


def received(packet: Packet) -> Flow:
    """The flow of a packet from the peer."""
    return packet.protocol, packet.dst_port, packet.src_port, packet.dst, packet.src
