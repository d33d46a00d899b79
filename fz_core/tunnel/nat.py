"""One client's translation between proxy addresses and the real ones behind them (`spec/tunnel.md` §15.2 to §15.4).

Inside is the client, outside the resource. Not here: which real address a proxy address means (`proxies`),
and whether a packet may pass at all (`client_access`). Deviations: a real address of the other family is reached
by translation (RFC 7915); sessions are bounded.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from functools import partial

from fz_core.packet import DropReason, IcmpError, Packet, TooBig, growth_limit, to_family, translate_error
from fz_core.tunnel.aging import Aging, earliest, longest_unused
from fz_core.tunnel.verdict import Basis, Verdict

__all__ = ["NatTable", "TooBig"]


class NatTable:
    """Sessions of one client.

    Packets are rewritten in place, except where the family changes. Sessions lapse only in `handle_timeout`.
    `opened` counts all sessions there ever were, `evictions` those that ended early because there were too many.
    Verdicts that stood on a session go to `revoked` when it ends, or when its end is near.
    """

    def __init__(
        self, client_ips: tuple[bytes, bytes], max_sessions: int = 16384, revoked: list[Verdict] | None = None
    ) -> None:
        self._client_ips = {len(ip): ip for ip in client_ips}
        self._max_sessions = max_sessions
        self._reserve = max_sessions // UNCONFIRMED_SHARE
        self._inside: dict[Key, Session] = {}
        self._outside: dict[Key, Session] = {}
        self._ports: dict[tuple[int, bytes], list[int]] = {}
        self._lapsed: OrderedDict[Key, None] = OrderedDict()
        self._unconfirmed: Aging[Session] = Aging(UNCONFIRMED_TTL)
        self._tcp: Aging[Session] = Aging(TCP_TTL)
        self._other: Aging[Session] = Aging(UDP_AND_ICMP_TTL)
        self._closing: Aging[Session] = Aging(CLOSING_TTL)
        self._reset: Aging[Session] = Aging(0.0)
        self._queues = (self._reset, self._unconfirmed, self._closing, self._other, self._tcp)
        self._identification = 0
        self._revoked = [] if revoked is None else revoked
        self._strangers: OrderedDict[Key, Basis] = OrderedDict()
        self.opened = self.evictions = 0

    def __len__(self) -> int:
        return len(self._inside)

    # -- from the client

    def translate_outgoing(self, packet: Packet, real: bytes, now: float) -> Packet | DropReason | TooBig:
        """A packet to a proxy address, as the resource shall see it; a new session goes to `real`.

        Tell the client about a `TooBig` (`build_icmp_too_big`). UNSUPPORTED_PROTOCOL for what is not TCP, UDP or
        echo, NAT_EXHAUSTED where no port is free.
        """
        session = self._inside.get((packet.protocol, packet.src_port, packet.dst))
        if session is None:
            opened = self._open(packet, real, now)
            if isinstance(opened, (DropReason, TooBig)):
                return opened
            session = opened
        else:
            if session.crosses and (too_big := growth_limit(packet)) is not None:
                return too_big
            if packet.tcp_flags & FIN_OR_RST:
                self._note_flags(session, packet.tcp_flags, OUT_FIN)
            session.queue.touch(session, now)
        _, port, real = session.outside
        if session.crosses:
            return self._cross(packet, self._client_ips[len(real)], real, src_port=port)
        packet.set_dst(real)
        packet.set_src_port(port)
        return packet

    # -- to the client

    def translate_incoming(self, packet: Packet, now: float) -> Packet | DropReason | TooBig | None:
        """A packet for the client as the client shall see it; None if no session concerns it.

        Tell the packet's sender about a `TooBig`. EXPIRED_NAT_SESSION for what a session would have concerned
        once, UNSUPPORTED_PROTOCOL for what is not TCP, UDP, echo or ICMP error, or an error that the client's
        family cannot express.
        """
        key = (packet.protocol, packet.dst_port, packet.src)
        session = self._outside.get(key)
        if session is None:
            return self._incoming_stranger(packet, key, now)
        if session.crosses and (too_big := growth_limit(packet)) is not None:
            return too_big
        self._note_answer(session, now)
        if packet.tcp_flags & FIN_OR_RST:
            self._note_flags(session, packet.tcp_flags, IN_FIN)
            session.queue.touch(session, now)
        _, port, proxy = session.inside
        if session.crosses:
            return self._cross(packet, proxy, self._client_ips[len(proxy)], dst_port=port)
        packet.set_src(proxy)
        packet.set_dst_port(port)
        return packet

    def _incoming_stranger(self, packet: Packet, key: Key, now: float) -> Packet | DropReason | None:
        if packet.dst_port >= 0:
            return DropReason.EXPIRED_NAT_SESSION if key in self._lapsed else None
        if not packet.is_icmp_error:
            return DropReason.UNSUPPORTED_PROTOCOL
        error = packet.icmp_error()
        if not isinstance(error, IcmpError):
            return error
        key = (error.protocol, error.src_port, error.dst)
        session = self._outside.get(key)
        if session is None:
            return DropReason.EXPIRED_NAT_SESSION if key in self._lapsed else None
        self._note_answer(session, now)
        return self._translate_error(error, session)

    def _translate_error(self, error: IcmpError, session: Session) -> Packet | DropReason:
        _, port, proxy = session.inside
        client = self._client_ips[len(proxy)]
        if session.crosses:
            return translate_error(error, proxy, client, quoted_src=client, quoted_dst=proxy, quoted_src_port=port)
        return error.translated(proxy, client, quoted_dst=proxy, quoted_src_port=port)

    # -- verdicts

    def support(self, verdict: Verdict) -> bool:
        """Let a verdict about a packet that was just translated, or is for no session, stand on that.

        False where each packet counts: the session is about to end.
        """
        before = verdict.before
        session = (
            self._inside.get((before.protocol, before.src_port, before.dst))
            if verdict.is_inbound
            else self._outside.get((before.protocol, before.dst_port, before.src))
        )
        if session is None:
            return not verdict.is_inbound and self._support_stranger(verdict)
        if session.queue is self._closing or session.queue is self._reset:
            return False
        verdict.stand_on(session.queue.ttl, partial(self._note, session))
        session.bear(verdict, self._revoked)
        return True

    def _support_stranger(self, verdict: Verdict) -> bool:
        """What passes as it is would be translated if a session took its place outside."""
        before = verdict.before
        key = before.protocol, before.dst_port, before.src
        basis = self._strangers.pop(key, None) or Basis()
        if len(self._strangers) >= MAX_STRANGERS:
            self._strangers.popitem(last=False)[1].revoke(self._revoked)
        self._strangers[key] = basis
        basis.bear(verdict, self._revoked)
        return True

    def _note(self, session: Session, _packets: int, _payload_bytes: int, last_at: float) -> None:
        # Of answers too this is all: a verdict about them is made only when one has confirmed the session.
        session.queue.note(session, last_at)

    # -- time

    def handle_timeout(self, now: float) -> None:
        """End the sessions whose time has come."""
        for queue in self._queues:
            for session in queue.sweep(now):
                self._forget(session)

    def poll_timeout(self) -> float | None:
        """When the next session ends; in the past for one that was reset."""
        return earliest(*self._queues)

    def clear(self) -> None:
        """Forget every session, lapsed ones too."""
        for basis in (*self._inside.values(), *self._strangers.values()):
            basis.revoke(self._revoked)
        for table in (self._inside, self._outside, self._ports, self._lapsed, self._strangers, *self._queues):
            table.clear()

    # -- sessions

    def _open(self, packet: Packet, real: bytes, now: float) -> Session | DropReason | TooBig:
        if packet.src_port < 0:
            return DropReason.UNSUPPORTED_PROTOCOL
        proxy = packet.dst
        crosses = len(proxy) != len(real)
        if crosses and (too_big := growth_limit(packet)) is not None:
            return too_big
        protocol = OTHER_FAMILY.get(packet.protocol, packet.protocol) if crosses else packet.protocol
        if len(self._inside) >= self._max_sessions:
            self._evict()
        port = self._take_port(protocol, real, packet.src_port)
        if port is None:
            return DropReason.NAT_EXHAUSTED
        session = Session((packet.protocol, packet.src_port, proxy), (protocol, port, real), crosses, self._unconfirmed)
        self._inside[session.inside] = self._outside[session.outside] = session
        self._lapsed.pop(session.outside, None)
        passed = self._strangers.pop(session.outside, None)
        if passed is not None:
            passed.revoke(self._revoked)
        self._unconfirmed.touch(session, now)
        self.opened += 1
        return session

    def _take_port(self, protocol: int, real: bytes, wanted: int) -> int | None:
        """The wanted port, or the next free one upwards to 65535, then from 1 up."""
        ports = self._ports.setdefault((protocol, real), [])
        port = next_free(ports, wanted)
        if port > MAX_PORT:
            port = next_free(ports, 1)
        if port > MAX_PORT:
            return None
        insort(ports, port)
        return port

    def _note_answer(self, session: Session, now: float) -> None:
        if session.queue is self._unconfirmed:
            self._move(session, self._tcp if session.inside[0] == TCP else self._other)
        session.queue.touch(session, now)

    def _note_flags(self, session: Session, flags: int, fin: int) -> None:
        """Take over FIN and RST; the caller touches the session after."""
        if flags & RST:
            self._move(session, self._reset)
        elif flags & FIN and session.queue is not self._reset:
            session.fins |= fin
            if session.fins == OUT_FIN | IN_FIN:
                self._move(session, self._closing)

    def _move(self, session: Session, queue: Aging[Session]) -> None:
        session.queue.remove(session)
        session.queue = queue
        if queue is self._closing or queue is self._reset:
            session.revoke(self._revoked)

    def _evict(self) -> None:
        """End one session early: unanswered ones first, but never so many that none lives to see its answer."""
        queue = self._reset or self._unconfirmed
        if queue is self._unconfirmed and len(queue) <= self._reserve:
            queue = longest_unused(self._closing, self._other, self._tcp) or queue
        if queue.oldest is not None:
            session = queue.oldest.key
            queue.remove(session)
            self._forget(session)
            self.evictions += 1

    def _forget(self, session: Session) -> None:
        """Drop a session that is in no queue any more."""
        session.revoke(self._revoked)
        del self._inside[session.inside], self._outside[session.outside]
        protocol, port, real = session.outside
        ports = self._ports[protocol, real]
        del ports[bisect_left(ports, port)]
        if not ports:
            del self._ports[protocol, real]
        self._lapsed[session.outside] = None
        if len(self._lapsed) > self._max_sessions:
            self._lapsed.popitem(last=False)

    def _cross(
        self, packet: Packet, src: bytes, dst: bytes, *, src_port: int | None = None, dst_port: int | None = None
    ) -> Packet | DropReason | TooBig:
        self._identification = (self._identification + 1) & 0xFFFF
        moved = to_family(packet, src, dst, self._identification)
        if isinstance(moved, Packet):
            if src_port is not None:
                moved.set_src_port(src_port)
            if dst_port is not None:
                moved.set_dst_port(dst_port)
        return moved


class Session(Basis):
    """One flow, by `(protocol, port or echo identifier, address)` as each side names it."""

    __slots__ = ("crosses", "fins", "inside", "outside", "queue")

    def __init__(self, inside: Key, outside: Key, crosses: bool, queue: Aging[Session]) -> None:
        super().__init__()
        self.inside = inside
        self.outside = outside
        self.crosses = crosses
        self.queue = queue
        self.fins = 0


def next_free(ports: list[int], wanted: int) -> int:
    """The smallest number from `wanted` up that is not in the sorted list; may be 65536.

    `ports[i] - i` never falls, and is constant along a run of neighbours: the end of the run is found by halving.
    """
    low = bisect_left(ports, wanted)
    if low == len(ports) or ports[low] != wanted:
        return wanted
    shift, high = wanted - low, len(ports)
    while high - low > 1:
        middle = (low + high) // 2
        if ports[middle] - middle == shift:
            low = middle
        else:
            high = middle
    return ports[low] + 1


Key = tuple[int, int, bytes]
TCP, ICMP, ICMPV6 = 6, 1, 58
OTHER_FAMILY = {ICMP: ICMPV6, ICMPV6: ICMP}
FIN, RST = 0x01, 0x04
FIN_OR_RST = FIN | RST
OUT_FIN, IN_FIN = 1, 2
MAX_PORT = 65535
UNCONFIRMED_TTL, TCP_TTL, UDP_AND_ICMP_TTL, CLOSING_TTL = 60.0, 7440.0, 120.0, 5.0
UNCONFIRMED_SHARE = 8
MAX_STRANGERS = 4096
