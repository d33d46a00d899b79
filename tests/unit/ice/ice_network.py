"""Two agents and the network between them, in virtual time that jumps only to announced deadlines.

A side sits behind a NAT or not, and may have an address on a relay. A NAT lets in only what was asked for
(address and port), keeps one outer port per inner address ("cone") or one per destination ("symmetric").
"""

from __future__ import annotations

import heapq
import random
from itertools import count

from fz_core.ice import (
    CLIENT_DEFAULT,
    SERVER_DEFAULT,
    Agent,
    Candidate,
    Credentials,
    IceState,
    Nominated,
    StateChanged,
    TimingProfile,
)
from fz_core.packet import Address, Transmit
from fz_core.stun import Message


class Nat:
    """Maps inner to outer addresses and remembers who was asked."""

    def __init__(self, ip: bytes, kind: str) -> None:
        self.ip = ip
        self.kind = kind
        self._ports = count(40000)
        self._outer: dict[tuple[Address, Address | None], Address] = {}
        self._inner: dict[Address, Address] = {}
        self._asked: set[tuple[Address, Address]] = set()

    def outward(self, source: Address, destination: Address) -> Address:
        key = (source, destination if self.kind == "symmetric" else None)
        if key not in self._outer:
            self._outer[key] = Address(self.ip, next(self._ports))
            self._inner[self._outer[key]] = source
        self._asked.add((self._outer[key], destination))
        return self._outer[key]

    def inward(self, source: Address, destination: Address) -> Address | None:
        return self._inner.get(destination) if (destination, source) in self._asked else None


class Side:
    """One agent with its surroundings."""

    def __init__(self, name: str, agent: Agent, host: Address, nat: Nat | None, relay: Address | None) -> None:
        self.name = name
        self.agent = agent
        self.host = host
        self.nat = nat
        self.relay = relay
        self.nominated: list[tuple[float, Nominated]] = []
        self.states: list[tuple[float, IceState]] = []
        self.sent: list[tuple[float, Transmit]] = []
        self.signalled: list[Candidate] = []

    def candidates(self) -> list[Candidate]:
        found = [Candidate.host(self.host)]
        if self.nat is not None:
            stun_server = Address(b"\xc6\x33\x64\x01", 3478)
            found.append(Candidate.srflx(self.nat.outward(self.host, stun_server), self.host))
        if self.relay is not None:
            found.append(Candidate.relay(self.relay))
        return found


class Network:
    """Delivers datagrams after a delay, or not at all."""

    def __init__(
        self,
        seed: int = 1,
        *,
        nats: tuple[str | None, str | None] = (None, None),
        relays: tuple[bool, bool] = (False, False),
        loss: float = 0.0,
        latency: tuple[float, float] = (0.01, 0.01),
        roles: tuple[bool, bool] = (True, False),
        profiles: tuple[TimingProfile, TimingProfile] = (CLIENT_DEFAULT, SERVER_DEFAULT),
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 100.0
        self.loss = loss
        self.latency = latency
        self.blocked: set[Address] = set()
        self._heap: list[tuple[float, int, Address, Address, bytes]] = []
        self._order = count()
        credentials = (Credentials("aaaa", "a" * 22), Credentials("bbbb", "b" * 22))
        sides = []
        for n in (0, 1):
            agent = Agent(credentials[n], credentials[1 - n], roles[n], self.rng.randbytes, self.now, profiles[n])
            kind = nats[n]
            host = Address(bytes((10, 0, n, 2)) if kind else bytes((203, 0, 113, n + 1)), 52625)
            nat = Nat(bytes((203, 0, 113, n + 1)), kind) if kind else None
            relay = Address(b"\xc6\x33\x64\x01", 50000 + n) if relays[n] else None
            sides.append(Side("ab"[n], agent, host, nat, relay))
        self.a, self.b = sides
        self.sides = sides

    def gather(self) -> None:
        """Give each agent its own candidates and signal them to the other."""
        for side, other in ((self.a, self.b), (self.b, self.a)):
            for candidate in side.candidates():
                ranked = side.agent.add_local_candidate(candidate, self.now)
                assert ranked is not None
                side.signalled.append(ranked)
                text = ranked.to_sdp(side.agent.local_credentials.ufrag)
                parsed = Candidate.parse_untrusted(text)
                assert parsed is not None
                other.agent.add_remote_candidate(parsed, self.now)
        self.flush()

    def flush(self) -> None:
        for side in self.sides:
            while (transmit := side.agent.poll_transmit()) is not None:
                side.sent.append((self.now, transmit))
                self.send(side, transmit)
            while (event := side.agent.poll_event()) is not None:
                if isinstance(event, Nominated):
                    side.nominated.append((self.now, event))
                elif isinstance(event, StateChanged):
                    side.states.append((self.now, event.state))

    def send(self, side: Side, transmit: Transmit) -> None:
        source = transmit.local
        assert source is not None
        if source == side.host and side.nat is not None:
            if transmit.remote.ip[0] == 10:
                return  # private addresses are not reachable from elsewhere
            source = side.nat.outward(source, transmit.remote)
        if self.rng.random() >= self.loss and not {source, transmit.remote} & self.blocked:
            at = self.now + self.rng.uniform(*self.latency)
            heapq.heappush(self._heap, (at, next(self._order), source, transmit.remote, transmit.payload))

    def deliver(self, source: Address, destination: Address, payload: bytes) -> None:
        for side in self.sides:
            inner: Address | None = None
            if destination in (side.host, side.relay) and (side.nat is None or destination == side.relay):
                inner = destination
            elif side.nat is not None and destination.ip == side.nat.ip:
                inner = side.nat.inward(source, destination)
            if inner is not None:
                message = Message.parse_untrusted(payload)
                assert isinstance(message, Message)
                side.agent.handle_input(inner, source, message, self.now)

    def run(self, seconds: float) -> None:
        """Jump from deadline to deadline."""
        end = self.now + seconds
        while (at := self.next_at()) is not None and at <= end:
            self.now = max(at, self.now)
            while self._heap and self._heap[0][0] <= self.now:
                _, _, source, destination, payload = heapq.heappop(self._heap)
                self.deliver(source, destination, payload)
            for side in self.sides:
                side.agent.handle_timeout(self.now)
                later = side.agent.poll_timeout()
                assert later is None or later > self.now
            self.flush()
        self.now = end

    def next_at(self) -> float | None:
        times = [self._heap[0][0]] if self._heap else []
        times += [at for side in self.sides if (at := side.agent.poll_timeout()) is not None]
        return min(times, default=None)
