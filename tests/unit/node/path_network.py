"""Two ends with path agents and real tunnels, and a lossy, filtered network in virtual time.

Time jumps to announced deadlines only. Each end has a host address and, on a relay, a relayed one. A way is named
after what a datagram crosses: "direct", or the relays ("relay-a", "relay-b", both). `block` stops one direction of
a way. An end has an outer address, which a NAT may change, and if it is firewalled only those reach it there whom it
sent something within the last 30 s.
"""

from __future__ import annotations

import heapq
from itertools import count
from random import Random

from fz_core.crypto import PrivateKey
from fz_core.ice import Candidate, Nominated, PathSilent
from fz_core.node.path_agent import PathAgent
from fz_core.node.path_events import AllPathsSilent, PathEvent
from fz_core.node.path_pair import Key
from fz_core.node.path_probe import is_probe
from fz_core.packet import Address, build_udp
from fz_core.wireguard import Tunnel

INIT, RESPONSE, DATA = 1, 2, 4
EPOCH = 1_700_000_000.0
PSK = bytes(range(32))
# of a strict home router
PINHOLE_TTL = 30.0


class End:
    """What a connection does around an agent: the hooks in their order."""

    def __init__(self, net: Network, name: str, number: int, private: PrivateKey, peer: bytes) -> None:
        controlling = name == "a"
        self.net = net
        self.name = name
        self.host = Address(bytes((10, number, 0, 1)), 52625)
        self.outer = self.host
        self.relay = Address(bytes((203, 0, 113, number)), 50000)
        self.agent = PathAgent(controlling, net.now)
        self.tunnel = Tunnel(
            private,
            peer,
            PSK,
            number,
            net.now,
            EPOCH,
            net.random.randbytes,
            rekey_attempt_time=90.0,
            keepalive_timeout=5.0,
            rekey_timeout=2.0,
        )
        # the reference watches no data, so it leaves a path on signals and handshakes only
        self.is_reference = False
        self.path: Key | None = None
        self.events: list[tuple[float, PathEvent]] = []
        self.received: list[tuple[float, Key]] = []
        self.probes: list[tuple[float, Key]] = []
        self.inner = build_udp(bytes((100, 64, 0, number)), bytes((100, 64, 0, 3 - number)), 1, 2, b"x")

    def connect(self) -> None:
        self.tunnel.start_handshake(self.net.now)
        self.flush()

    def send_data(self) -> None:
        sealed = None if self.path is None else self.tunnel.seal(self.inner.data, self.net.now)
        if isinstance(sealed, bytes) and self.path is not None:
            if not self.is_reference:
                self.agent.note_data_sent(self.net.now)
            self.net.send(self, *self.path, sealed)

    def receive(self, local: Address, remote: Address, datagram: bytes) -> None:
        now, agent, kind = self.net.now, self.agent, datagram[0]
        if kind in (INIT, RESPONSE) and agent.is_copy(local, remote, datagram, now):
            self.flush()
            return
        inner = self.tunnel.handle_untrusted(datagram, remote.ip, now)
        if kind == INIT and inner is None:
            answer = self.tunnel.poll_datagram()
            assert answer is not None
            assert answer[0] == RESPONSE
            agent.note_init_accepted(local, remote, datagram, answer, now)
        elif kind == RESPONSE and inner is None:
            agent.note_response_accepted(local, remote, datagram, now)
        elif isinstance(inner, bytes) and is_probe(inner):
            agent.handle_probe(local, remote, inner, now)
        elif isinstance(inner, bytes):
            agent.note_data_received(local, remote, now)
            if inner:
                self.received.append((now, (local, remote)))
        self.flush()

    def flush(self) -> None:
        now = self.net.now
        while (event := self.agent.poll_event()) is not None:
            self.events.append((now, event))
            if isinstance(event, Nominated):
                self.path = event.local, event.remote
        while (datagram := self.tunnel.poll_datagram()) is not None:
            if datagram[0] == INIT:
                self.agent.send_init(datagram, now)
            elif self.path is not None:
                self.net.send(self, *self.path, datagram)
        while (transmit := self.agent.poll_transmit()) is not None:
            assert transmit.local is not None
            self.net.send(self, transmit.local, transmit.remote, transmit.payload)
        while (probe := self.agent.poll_probe()) is not None:
            local, remote, packet = probe
            self.probes.append((now, (local, remote)))
            sealed = self.tunnel.seal(packet, now)
            if isinstance(sealed, bytes):
                self.net.send(self, local, remote, sealed)
            else:
                self.agent.note_probe_unsealed(now)

    def handle_timeout(self) -> None:
        self.agent.handle_timeout(self.net.now)
        due = self.agent.poll_timeout()
        assert due is None or due > self.net.now
        self.tunnel.handle_timeout(self.net.now)
        self.flush()

    def deadline(self) -> float:
        due = (self.agent.poll_timeout(), self.tunnel.poll_timeout())
        return min((at for at in due if at is not None), default=float("inf"))

    def count(self, kind: type[PathEvent]) -> int:
        return sum(isinstance(event, kind) for _, event in self.events)

    @property
    def silent_paths(self) -> int:
        return self.count(PathSilent)

    @property
    def outages(self) -> int:
        return self.count(AllPathsSilent)


class Network:
    """Both ends and what is between them."""

    def __init__(self, seed: int, loss: float = 0.0, latency: float = 0.02) -> None:
        self.now = 0.0
        self.random = Random(seed)
        self.loss = loss
        self.latency = latency
        self.blocked: set[tuple[str, str]] = set()
        self.firewalled: set[str] = set()
        self._asked: dict[tuple[str, Address], float] = {}
        self._queue: list[tuple[float, int, End, Address, Address, bytes]] = []
        self._order = count()
        keys = [PrivateKey(self.random.randbytes(32)) for _ in range(2)]
        self.a = End(self, "a", 1, keys[0], keys[1].public)
        self.b = End(self, "b", 2, keys[1], keys[0].public)
        self.ends = (self.a, self.b)

    def other(self, end: End) -> End:
        return self.b if end is self.a else self.a

    def signal(self, end: End, *candidates: Candidate) -> None:
        """`end` learns these of itself and tells the other."""
        for candidate in candidates:
            if end.agent.add_local_candidate(candidate, self.now) is not None:
                self.other(end).agent.add_remote_candidate(candidate, self.now)
        for each in self.ends:
            each.flush()

    def signal_again(self, end: End, *candidates: Candidate) -> None:
        """`end` withdraws these and tells them anew."""
        for candidate in candidates:
            self.other(end).agent.remove_remote_candidate(candidate, self.now)
        for candidate in candidates:
            self.other(end).agent.add_remote_candidate(candidate, self.now)
        self.other(end).flush()

    def introduce(self, with_direct: bool = True) -> None:
        for end in self.ends:
            direct = (Candidate.host(end.host), Candidate.srflx(end.outer, end.host)) if with_direct else ()
            self.signal(end, *direct, Candidate.relay(end.relay))

    def start(self) -> None:
        self.introduce()
        self.a.connect()

    def way_of(self, sender: End, local: Address, remote: Address) -> tuple[str, ...]:
        relays = {end.relay: f"relay-{end.name}" for end in self.ends}
        return tuple(relays[address] for address in (local, remote) if address in relays) or ("direct",)

    def block(self, way: str, sender: End | None = None) -> None:
        """Nothing from `sender` (None: from either) crosses that way any more."""
        self.blocked |= {(way, end.name) for end in self.ends if sender in (None, end)}

    def unblock(self, way: str) -> None:
        self.blocked -= {(way, end.name) for end in self.ends}

    def send(self, sender: End, local: Address, remote: Address, datagram: bytes) -> None:
        receiver = self.other(sender)
        ways = self.way_of(sender, local, remote)
        if local == sender.host:
            self._asked[sender.name, remote] = self.now
        if any((way, sender.name) in self.blocked for way in ways) or self.random.random() < self.loss:
            return
        if remote not in (receiver.outer, receiver.relay):
            return
        source = sender.outer if local == sender.host else local
        if remote == receiver.outer and receiver.name in self.firewalled:
            asked_at = self._asked.get((receiver.name, source), float("-inf"))
            if self.now - asked_at > PINHOLE_TTL:
                return
        if remote == receiver.relay and all(c.address != source for c in receiver.agent.remote_candidates):
            return  # no channel is bound to that peer
        target = receiver.host if remote == receiver.outer else remote
        at = self.now + self.latency * len(ways) * self.random.uniform(0.9, 1.1)
        heapq.heappush(self._queue, (at, next(self._order), receiver, target, source, datagram))

    def run(self, until: float) -> None:
        while True:
            at = min([end.deadline() for end in self.ends] + [item[0] for item in self._queue[:1]])
            if at > until:
                break
            self.now = max(self.now, at)
            while self._queue and self._queue[0][0] <= self.now:
                _, _, end, local, remote, datagram = heapq.heappop(self._queue)
                end.receive(local, remote, datagram)
            for end in self.ends:
                if end.deadline() <= self.now:
                    end.handle_timeout()
        self.now = until

    def talk(self, until: float, *senders: End, gap: float = 0.1) -> None:
        """Run while these send a packet every `gap`."""
        while self.now < until:
            for end in senders:
                end.send_data()
            self.run(min(self.now + gap, until))
