"""One path agent, and what a connection does with it, in virtual time that jumps to announced deadlines."""

from __future__ import annotations

from dataclasses import dataclass, field

from fz_core.ice import Candidate, Nominated
from fz_core.node.path_agent import PathAgent
from fz_core.node.path_events import PathEvent
from fz_core.node.path_pair import Key
from fz_core.node.path_probe import build_probe, parse_probe
from fz_core.packet import Address

HOST, PUBLIC = Address.parse("10.0.0.1:52625"), Address.parse("198.51.100.1:40001")
RELAY, PEER_RELAY = Address.parse("203.0.113.1:50000"), Address.parse("203.0.113.2:50000")
PEER_HOST = Address.parse("10.0.0.2:52625")
STRANGER = Address.parse("198.51.100.9:1024")
DIRECT: Key = HOST, PEER_HOST
OWN_RELAY: Key = RELAY, PEER_HOST
THEIR_RELAY: Key = HOST, PEER_RELAY
BOTH_RELAYS: Key = RELAY, PEER_RELAY
INIT, RESPONSE = b"\x01init", b"\x02response"


@dataclass
class Driver:
    """Plays the connection: drains after each call, jumps to deadlines, and answers the probes it is told to."""

    agent: PathAgent = field(default_factory=lambda: PathAgent(True, 0.0))
    now: float = 0.0
    rtt: float = 0.02
    sent: list[tuple[float, Key, bytes]] = field(default_factory=list)
    probes: list[tuple[float, Key, int, int]] = field(default_factory=list)
    replies: list[tuple[Key, int, int]] = field(default_factory=list)
    events: list[PathEvent] = field(default_factory=list)
    answered: set[Key] = field(default_factory=set)
    _answers: list[tuple[float, Key, int, int]] = field(default_factory=list)

    def drain(self) -> None:
        while (transmit := self.agent.poll_transmit()) is not None:
            assert transmit.local is not None
            self.sent.append((self.now, (transmit.local, transmit.remote), transmit.payload))
        while (item := self.agent.poll_probe()) is not None:
            local, remote, packet = item
            probe = parse_probe(packet)
            assert probe is not None
            if not probe.is_request:
                self.replies.append(((local, remote), probe.id, probe.seq))
                continue
            self.probes.append((self.now, (local, remote), probe.id, probe.seq))
            if (local, remote) in self.answered:
                self._answers.append((self.now + self.rtt, (local, remote), probe.id, probe.seq))
        while (event := self.agent.poll_event()) is not None:
            self.events.append(event)

    def run(self, until: float) -> None:
        self.drain()
        while True:
            due = min([at for at in (self.agent.poll_timeout(),) if at is not None] + [a[0] for a in self._answers[:1]])
            if due > until:
                break
            self.now = max(self.now, due)
            if self._answers and self._answers[0][0] <= self.now:
                _, key, id, seq = self._answers.pop(0)
                self.agent.handle_probe(*key, build_probe(False, id, seq), self.now)
            else:
                self.agent.handle_timeout(self.now)
                following = self.agent.poll_timeout()
                assert following is None or following > self.now
            self.drain()
        self.now = until

    def reply_now(self, key: Key, id: int | None = None) -> None:
        """Answer the last probe of this pair."""
        _, _, own, seq = [probe for probe in self.probes if probe[1] == key][-1]
        self.agent.handle_probe(*key, build_probe(False, own if id is None else id, seq), self.now)
        self.drain()

    def request(self, key: Key) -> None:
        self.agent.handle_probe(*key, build_probe(True, 7, 9), self.now)
        self.drain()

    def probes_of(self, key: Key) -> list[float]:
        return [at for at, pair, _, _ in self.probes if pair == key]

    def sent_to(self, datagram: bytes) -> list[Key]:
        return [key for _, key, payload in self.sent if payload == datagram]

    @property
    def primaries(self) -> list[Key]:
        return [(event.local, event.remote) for event in self.events if isinstance(event, Nominated)]


def bootstrapped() -> Driver:
    driver = Driver()
    for candidate in (Candidate.host(HOST), Candidate.relay(RELAY)):
        assert driver.agent.add_local_candidate(candidate, 0.0) == candidate
    for candidate in (Candidate.host(PEER_HOST), Candidate.relay(PEER_RELAY)):
        driver.agent.add_remote_candidate(candidate, 0.0)
    return driver


def initiator(path: Key = OWN_RELAY) -> Driver:
    """Its session was made over `path`."""
    driver = bootstrapped()
    driver.agent.send_init(INIT, 0.0)
    driver.drain()
    driver.agent.note_response_accepted(*path, RESPONSE, 0.0)
    driver.drain()
    driver.sent.clear()
    return driver


def settled(*answered: Key) -> Driver:
    """Past its budgets, with these pairs alive."""
    driver = initiator()
    driver.answered |= set(answered)
    driver.run(30.0)
    driver.events.clear()
    driver.probes.clear()
    return driver
