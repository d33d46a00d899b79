"""A network in virtual time: hosts, NATs, latency, loss, duplication, reordering.

The clock jumps from event to event. A run is a function of its seed alone.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from fz_core.packet import Address

Receiver = Callable[[Address, Address, bytes, int], None]


class World:
    """Events in order of time."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 1000.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(when, self.now), next(self._order), action))

    def after(self, delay: float, action: Callable[[], None]) -> None:
        self.at(self.now + delay, action)

    def run_for(self, seconds: float) -> None:
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = end

    def run_until(self, condition: Callable[[], bool], limit: float) -> bool:
        """Whether the condition came true within `limit` seconds."""
        end = self.now + limit
        while not condition():
            if not self._events or self._events[0][0] > end:
                self.now = end
                return condition()
            self.now, _, action = heapq.heappop(self._events)
            action()
        return True

    def bytes(self, count: int) -> bytes:
        return self.random.randbytes(count)


@dataclass
class Nat:
    """One router's translation. `cone` maps a source to one port, `symmetric` one port per destination.

    Both filter by address and port. `none` routes without translation and without filter.
    """

    flavour: str = "none"
    blocked: Callable[[Address, Address], bool] = lambda _inner, _remote: False
    public: dict[int, bytes] = field(default_factory=dict)
    _out: dict[object, int] = field(default_factory=dict)
    _back: dict[tuple[int, int], Address] = field(default_factory=dict)
    _allowed: set[tuple[int, int, Address]] = field(default_factory=set)
    _next_port: int = 20_000

    def outbound(self, source: Address, remote: Address) -> Address | None:
        if self.blocked(source, remote):
            return None
        if self.flavour == "none":
            return source
        family = len(source.ip)
        key = source if self.flavour == "cone" else (source, remote)
        port = self._out.get(key)
        if port is None:
            port = self._out[key] = self._pick(family, source)
            self._back[family, port] = source
        self._allowed.add((family, port, remote))
        return Address(self.public[family], port)

    def inbound(self, to: Address, remote: Address) -> Address | None:
        family = len(to.ip)
        inner = self._back.get((family, to.port))
        if inner is None or (family, to.port, remote) not in self._allowed or self.blocked(inner, remote):
            return None
        return inner

    def reboot(self) -> None:
        """Forget every mapping; ports are not reused."""
        self._out.clear()
        self._back.clear()
        self._allowed.clear()

    def _pick(self, family: int, source: Address) -> int:
        if self.flavour == "cone" and (family, source.port) not in self._back:
            return source.port
        self._next_port += 1
        return self._next_port


@dataclass
class Host:
    """A machine with one address per family, behind a NAT."""

    name: str
    ips: dict[int, bytes]
    nat: Nat
    latency: float = 0.005
    ports: dict[tuple[int, int], Receiver] = field(default_factory=dict)

    def listen(self, family: int, port: int, receive: Receiver) -> None:
        self.ports[family, port] = receive

    def close(self, family: int, port: int) -> None:
        self.ports.pop((family, port), None)


@dataclass
class Faults:
    """What the network does to each datagram."""

    loss: float = 0.0
    duplication: float = 0.0
    jitter: float = 0.0


class Underlay:
    """Connects hosts by public address."""

    def __init__(self, world: World, faults: Faults | None = None) -> None:
        self._world = world
        self.faults = faults or Faults()
        self._hosts: list[Host] = []
        self.delivered = 0

    def add(self, name: str, ips: dict[int, bytes], nat: Nat | None = None, latency: float = 0.005) -> Host:
        host = Host(name, ips, nat or Nat(), latency)
        self._hosts.append(host)
        return host

    def send(self, host: Host, port: int, remote: Address, payload: bytes, ecn: int = 0) -> None:
        ip = host.ips.get(len(remote.ip))
        if ip is None:
            return
        seen_as = host.nat.outbound(Address(ip, port), remote)
        if seen_as is None:
            return
        random = self._world.random
        copies = 1 + (random.random() < self.faults.duplication)
        for _ in range(copies):
            if random.random() < self.faults.loss:
                continue
            delay = host.latency + random.random() * self.faults.jitter
            self._world.after(delay, lambda: self._arrive(seen_as, remote, payload, ecn))

    def _arrive(self, source: Address, to: Address, payload: bytes, ecn: int) -> None:
        found = self._find(to, source)
        if found is None:
            return
        host, inner = found
        receiver = host.ports.get((len(inner.ip), inner.port))
        if receiver is not None:
            self.delivered += 1
            self._world.after(host.latency, lambda: receiver(inner, source, payload, ecn))

    def _find(self, to: Address, source: Address) -> tuple[Host, Address] | None:
        for host in self._hosts:
            family = len(to.ip)
            if host.nat.flavour == "none":
                if host.ips.get(family) == to.ip and not host.nat.blocked(to, source):
                    return host, to
            elif host.nat.public.get(family) == to.ip:
                inner = host.nat.inbound(to, source)
                return None if inner is None else (host, inner)
        return None
