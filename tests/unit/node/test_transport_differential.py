"""What others carry has the effects it has when every packet passes through the node.

The same system with the same seed runs twice: with a pump at both ends, and without. If the pump reports at once,
both send the same datagrams at the same times, to the last byte, and end in the same state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from fz_core.node import Node
from tests.sim.properties import check
from tests.sim.system import Scenario, System
from tests.sim.test_sim_outages import filter_direct, filter_one_way, move_nat
from tests.unit.node.python_pump import PythonPump

REPORT_GAP = 0.1
Story = Callable[[System, Random], None]


class Run:
    """One system, what it sent, and the pumps if there are any."""

    def __init__(self, seed: int, gap: float | None, **scenario: Any) -> None:
        self.system = System(seed, Scenario(**scenario))
        self.sent: list[tuple[float, str, int, Any, str, int]] = []
        send = self.system.net.send

        def recording(host: Any, port: int, remote: Any, payload: bytes, ecn: int = 0) -> None:
            digest = hashlib.sha256(payload).hexdigest()[:16]
            self.sent.append((self.system.world.now, host.name, port, remote, f"{payload[0]} {digest}", ecn))
            send(host, port, remote, payload, ecn)

        self.system.net.send = recording  # type: ignore[method-assign]
        peers = () if gap is None else (self.system.client, self.system.gateway)
        self.pumps = [PythonPump(peer, gap or 0.0) for peer in peers]

    def play(self, story: Story, seed: int) -> None:
        story(self.system, Random(seed))

    @property
    def state(self) -> list[Any]:
        return [state_of(peer.state.node) for peer in (self.system.client, self.system.gateway)]


def state_of(node: Node) -> dict[str, Any]:
    found: dict[Any, Any] = {"poll_timeout": node.poll_timeout()}
    for relay in node._relays:
        found["relay", relay.relay_id] = (
            relay._active_at,
            {number: (c.peer, c.bound_at, c.received_at) for number, c in relay._channels._by_number.items()},
        )
    for peer_id, c in node._connections.by_peer.items():
        health = vars(c.agent._health) if c.is_iceless else {}  # type: ignore[union-attr]
        times = (c.tunnel.last_rx_at, c.tunnel.last_tx_at, c.tunnel.poll_timeout(), c.deadline())
        silence = (c.watch.heard_at, c._last_activity, c.watch.unheard.since, c.watch.mute.since)
        found[peer_id] = (c.state, c.path, c.received_on, times, silence, health)
    return found


def talk(system: System, random: Random, seconds: float, longest_gap: float = 0.3) -> None:
    end = system.world.now + seconds
    while system.world.now < end:
        for _ in range(random.randrange(1, 5)):
            system.ask(random.randbytes(8), 7000 + random.randrange(3))
        system.world.run_for(random.random() * longest_gap)


def plain(system: System, random: Random) -> None:
    talk(system, random, 6.0)


def idle(system: System, random: Random) -> None:
    """Both ends fall asleep, wake up, and keep-alives pass."""
    for pause in (1.0, 12.0, 24.0, 50.0):
        talk(system, random, 2.0)
        system.world.run_for(pause)
    system.ask(b"awake")
    system.world.run_for(0.5)


def rekey(system: System, random: Random) -> None:
    """Longer than two sessions live, and past the first refresh of a channel."""
    talk(system, random, 420.0, 4.0)


def one_way(system: System, random: Random) -> None:
    """The peer cannot be heard on the path in use."""
    talk(system, random, 4.0)
    filter_one_way(system)
    talk(system, random, 12.0)


def moved(system: System, random: Random) -> None:
    """The router gets another address, then only relays are left."""
    talk(system, random, 4.0)
    move_nat(system, system.client)
    talk(system, random, 12.0)
    filter_direct(system)
    talk(system, random, 12.0)


def unanswered(system: System, random: Random) -> None:
    """Data in one direction only."""
    talk(system, random, 3.0)
    system.gateway.on_packet = None
    talk(system, random, 25.0)


def relay_lost(system: System, random: Random) -> None:
    """What carries the data goes away unannounced."""
    talk(system, random, 3.0)
    system.relays[0].die()
    talk(system, random, 30.0)


STORIES = [plain, idle, rekey, one_way, moved, unanswered, relay_lost]


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
@pytest.mark.parametrize("relayed", [False, True], ids=["direct", "relayed"])
@pytest.mark.parametrize("iceless", [False, True], ids=["ice", "iceless"])
def test_what_is_reported_at_once_counts_as_if_it_had_passed_here(story: Story, relayed: bool, iceless: bool) -> None:
    seed = len(story.__name__)
    scenario = {"iceless": iceless, "blocked": relayed, "relays": 2}
    slow, fast = Run(seed, None, **scenario), Run(seed, 0.0, **scenario)
    for run in (slow, fast):
        run.play(story, seed)
    assert fast.sent == slow.sent
    assert fast.state == slow.state
    assert len(fast.system.answers) == len(slow.system.answers) > 0
    for pump in fast.pumps:
        assert pump.sent > 10, "the pump carried nothing"
        assert pump.opened > 10 or story in (one_way, relay_lost)


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
@pytest.mark.parametrize("relayed", [False, True], ids=["direct", "relayed"])
@pytest.mark.parametrize("iceless", [False, True], ids=["ice", "iceless"])
def test_what_is_reported_later_keeps_the_connection_as_well(story: Story, relayed: bool, iceless: bool) -> None:
    seed = len(story.__name__)
    scenario = {"iceless": iceless, "blocked": relayed, "relays": 2}
    slow, fast = Run(seed, None, **scenario), Run(seed, REPORT_GAP, **scenario)
    for run in (slow, fast):
        run.play(story, seed)
        run.system.world.run_for(REPORT_GAP)
    check(fast.system, story.__name__)
    lost = [len({*answers(slow)} - {*answers(fast)}), len({*answers(fast)} - {*answers(slow)})]
    assert max(lost) <= len(slow.system.answers) // 10, lost
    for node in (run.system.client.state.node for run in (slow, fast)):
        (connection,) = node._connections.by_peer.values()
        assert connection.path is not None


def answers(run: Run) -> list[bytes]:
    return run.system.answers
