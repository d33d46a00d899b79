"""The gateway's translation table against the plainest reading of its rules (spec/tunnel.md §15.2 to §15.4)."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fz_core.packet import (
    DropReason,
    Packet,
    build_echo,
    build_icmp_unreachable,
    build_tcp,
    build_udp,
    verify_checksums,
)
from fz_core.tunnel.nat import NatTable

CLIENT = (ip_address("100.64.0.9").packed, ip_address("fd00:2021:1111::9").packed)
PROXIES = [ip_address(ip).packed for ip in ("100.96.0.1", "100.96.0.2", "fd00:2021:1111:8000::1")]
REALS = [ip_address(ip).packed for ip in ("192.0.2.1", "192.0.2.2", "2001:db8::1")]
PORTS = [0, 1, 5000, 5001, 65534, 65535]
FIN, RST = 0x01, 0x04
FLAGS = [0x02, 0x10, 0x10, 0x10 | FIN, 0x10 | FIN, RST]

kinds = st.sampled_from(["udp", "tcp", "echo"])
proxies = st.sampled_from(PROXIES)
reals = st.sampled_from(REALS)
numbers = st.sampled_from(PORTS)
tcp_flags = st.sampled_from(FLAGS)
Inside = tuple[str, int, bytes]
Outside = tuple[str, int, bytes]


@dataclass
class Known:
    """A session as the rules speak of it."""

    outside: Outside
    last_out: float
    last: float
    answered: bool = False
    fin_out: bool = False
    fin_in: bool = False
    was_reset: bool = False

    def ends_at(self) -> float:
        ends = [self.last + (7440 if self.outside[0] == "tcp" else 120)]
        if not self.answered:
            ends.append(self.last_out + 60)
        if self.fin_out and self.fin_in:
            ends.append(self.last + 5)
        if self.was_reset:
            ends.append(self.last)
        return min(ends)


def own_ip(other: bytes) -> bytes:
    return CLIENT[0] if len(other) == 4 else CLIENT[1]


def build(kind: str, src: bytes, dst: bytes, src_port: int, dst_port: int, flags: int, *, reply: bool) -> Packet:
    if kind == "udp":
        return build_udp(src, dst, src_port, dst_port)
    if kind == "tcp":
        return build_tcp(src, dst, src_port, dst_port, flags)
    return build_echo(src, dst, dst_port if reply else src_port, reply=reply)


class NatMachine(RuleBasedStateMachine):
    """Packets of few flows in both directions, and time; every answer must be the model's."""

    @initialize()
    def start(self) -> None:
        self.nat = NatTable(CLIENT)
        self.sessions: dict[Inside, Known] = {}
        self.lapsed: set[Outside] = set()
        self.now = 0.0

    @rule(kind=kinds, proxy=proxies, port=numbers, real=reals, flags=tcp_flags)
    def send(self, kind: str, proxy: bytes, port: int, real: bytes, flags: int) -> None:
        inside = (kind, port, proxy)
        known = self.sessions.get(inside)
        if known is None:
            used = {k.outside for k in self.sessions.values()}
            order = [*range(port, 65536), *range(1, port)]
            outside_port = next(n for n in order if (kind, n, real) not in used)
            known = self.sessions[inside] = Known((kind, outside_port, real), self.now, self.now)
            self.lapsed.discard(known.outside)
        else:
            known.last_out = known.last = self.now
            if kind == "tcp":
                known.fin_out |= bool(flags & FIN)
                known.was_reset |= bool(flags & RST)
        packet = build(kind, own_ip(proxy), proxy, port, 443, flags, reply=False)
        result = self.nat.translate_outgoing(packet, real, self.now)
        assert isinstance(result, Packet)
        assert verify_checksums(result) == ()
        _, outside_port, known_real = known.outside
        assert (result.src, result.dst, result.src_port) == (own_ip(known_real), known_real, outside_port)

    @precondition(lambda self: self.sessions)
    @rule(which=st.integers(0, 99), real=reals, flags=tcp_flags)
    def send_again(self, which: int, real: bytes, flags: int) -> None:
        kind, port, proxy = list(self.sessions)[which % len(self.sessions)]
        self.send(kind=kind, proxy=proxy, port=port, real=real, flags=flags)

    @precondition(lambda self: self.sessions)
    @rule(which=st.integers(0, 99), flags=tcp_flags)
    def answer_known(self, which: int, flags: int) -> None:
        kind, port, real = list(self.sessions.values())[which % len(self.sessions)].outside
        self.answer(kind=kind, real=real, port=port, flags=flags)

    @precondition(lambda self: self.sessions)
    @rule(which=st.integers(0, 99))
    def refuse_known(self, which: int) -> None:
        kind, port, real = list(self.sessions.values())[which % len(self.sessions)].outside
        self.refuse(kind=kind, real=real, port=port)

    @rule(kind=kinds, real=reals, port=numbers, flags=tcp_flags)
    def answer(self, kind: str, real: bytes, port: int, flags: int) -> None:
        outside = (kind, port, real)
        packet = build(kind, real, own_ip(real), 443, port, flags, reply=True)
        result = self.nat.translate_incoming(packet, self.now)
        found = self.note_answer(outside)
        if found is None:
            assert result is (DropReason.EXPIRED_NAT_SESSION if outside in self.lapsed else None)
            return
        inside, known = found
        if kind == "tcp":
            known.fin_in |= bool(flags & FIN)
            known.was_reset |= bool(flags & RST)
        assert isinstance(result, Packet)
        assert verify_checksums(result) == ()
        assert (result.src, result.dst, result.dst_port) == (inside[2], own_ip(inside[2]), inside[1])

    @rule(kind=kinds, real=reals, port=numbers)
    def refuse(self, kind: str, real: bytes, port: int) -> None:
        """The resource answers by an ICMP error."""
        outside = (kind, port, real)
        refused = build(kind, own_ip(real), real, port, 443, 0x02, reply=False)
        result = self.nat.translate_incoming(build_icmp_unreachable(refused), self.now)
        found = self.note_answer(outside)
        if found is None:
            assert result is (DropReason.EXPIRED_NAT_SESSION if outside in self.lapsed else None)
            return
        (_, inside_port, proxy), _ = found
        assert isinstance(result, Packet)
        assert verify_checksums(result) == ()
        quoted = Packet.parse_untrusted(result.data[28 if result.version == 4 else 48 :])
        # An IPv4 error quotes 8 bytes of transport: whole for UDP and echo only.
        if isinstance(quoted, Packet):
            assert (quoted.src, quoted.dst, quoted.src_port) == (own_ip(proxy), proxy, inside_port)
        assert (result.src, result.dst) == (proxy, own_ip(proxy))

    @rule(seconds=st.sampled_from([0.0, 1.0, 4.0, 5.0, 30.0, 59.0, 60.0, 119.0, 120.0, 7440.0]))
    def wait(self, seconds: float) -> None:
        """Time passes, and jumps to the end of a session at most."""
        end = self.now + seconds
        while (deadline := self.nat.poll_timeout()) is not None and deadline <= end:
            self.tick(max(deadline, self.now))
        self.tick(end)

    @precondition(lambda self: len(self.sessions) > 6)
    @rule()
    def clear(self) -> None:
        self.nat.clear()
        self.sessions.clear()
        self.lapsed.clear()

    @invariant()
    def sizes_and_deadlines_agree(self) -> None:
        assert len(self.nat) == len(self.sessions)
        deadlines = [known.ends_at() for known in self.sessions.values()]
        announced = self.nat.poll_timeout()
        assert (announced is None) == (not deadlines)
        if announced is not None:
            assert announced == min(deadlines)

    def note_answer(self, outside: Outside) -> tuple[Inside, Known] | None:
        for inside, known in self.sessions.items():
            if known.outside == outside:
                known.answered, known.last = True, self.now
                return inside, known
        return None

    def tick(self, now: float) -> None:
        self.now = now
        self.nat.handle_timeout(now)
        for inside, known in list(self.sessions.items()):
            if known.ends_at() <= now:
                del self.sessions[inside]
                self.lapsed.add(known.outside)


TestNat = NatMachine.TestCase
TestNat.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
pytestmark = pytest.mark.shows("tunnel", 81, 82, 83)
