"""The queue of deadlines, and that a turn of a node costs the same however many peers are at rest."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from fz_core.crypto import PrivateKey
from fz_core.ice import Credentials
from fz_core.node import GATEWAY_PROFILES, Node, Parameters
from fz_core.node.connection import Connection
from fz_core.node.deadlines import Deadlines
from tests.sim.system import Scenario, System

PEERS_AT_REST = 2000


class Clocks:
    """Things by name, with the deadlines they claim to have, and how often each was asked."""

    def __init__(self, **at: float | None) -> None:
        self.at: dict[str, float | None] = dict(at)
        self.asked: list[str] = []
        self.queue = Deadlines(self.ask)
        for name in at:
            self.queue.add(name)

    def ask(self, name: str) -> float | None:
        self.asked.append(name)
        return self.at[name]

    def set(self, name: str, at: float | None) -> None:
        self.at[name] = at
        self.queue.note(name)


def test_the_earliest_is_told() -> None:
    clocks = Clocks(a=3.0, b=1.0, c=None)
    assert clocks.queue.poll_timeout() == 1.0
    clocks.set("b", 4.0)
    assert clocks.queue.poll_timeout() == 3.0
    clocks.set("c", 2.0)
    assert clocks.queue.poll_timeout() == 2.0
    clocks.set("c", None)
    clocks.queue.remove("a")
    assert clocks.queue.poll_timeout() == 4.0
    clocks.queue.remove("b")
    assert clocks.queue.poll_timeout() is None


def test_only_what_was_noted_is_asked() -> None:
    clocks = Clocks(a=1.0, b=2.0, c=3.0)
    clocks.queue.poll_timeout()
    clocks.asked.clear()
    assert clocks.queue.poll_timeout() == 1.0
    assert clocks.queue.take(0.5) == []
    assert clocks.asked == []
    for _ in range(3):
        clocks.set("b", 2.5)
    clocks.queue.poll_timeout()
    assert clocks.asked == ["b"]


def test_what_is_due_is_taken_in_the_order_it_was_added() -> None:
    clocks = Clocks(late=9.0, first=2.0, second=1.0, third=2.0)
    assert clocks.queue.take(2.0) == ["first", "second", "third"]


def test_what_was_taken_is_due_again_unless_it_says_otherwise() -> None:
    clocks = Clocks(a=1.0)
    assert clocks.queue.take(1.0) == ["a"]
    assert clocks.queue.poll_timeout() == 1.0
    assert clocks.queue.take(1.0) == ["a"]
    clocks.at["a"] = 2.0  # handled, and not noted again
    assert clocks.queue.poll_timeout() == 2.0
    assert clocks.queue.take(1.5) == []


def test_a_deadline_that_comes_back_is_taken_once() -> None:
    clocks = Clocks(a=1.0)
    for at in (1.0, 2.0, 1.0):
        clocks.set("a", at)
        clocks.queue.poll_timeout()
    assert clocks.queue.take(5.0) == ["a"]


def test_notes_of_the_removed_mean_nothing() -> None:
    clocks = Clocks(a=1.0, b=2.0)
    clocks.queue.poll_timeout()
    clocks.queue.remove("a")
    clocks.queue.remove("never there")
    clocks.asked.clear()
    clocks.set("a", 0.5)
    assert clocks.queue.poll_timeout() == 2.0
    assert clocks.asked == []


def test_one_that_returns_comes_last() -> None:
    clocks = Clocks(a=1.0, b=1.0)
    clocks.queue.poll_timeout()
    clocks.queue.remove("a")
    clocks.queue.add("a")
    assert clocks.queue.take(1.0) == ["b", "a"]


def test_memory_is_that_of_the_things_there_are() -> None:
    clocks = Clocks(**{str(n): 1e9 for n in range(100)})
    for n in range(100_000):
        clocks.set(str(n % 100), 1e9 + n)
        clocks.queue.poll_timeout()
    assert len(clocks.queue._heap) <= 300
    for n in range(100):
        clocks.queue.remove(str(n))
    assert clocks.queue.poll_timeout() is None
    assert not clocks.queue._heap
    assert not clocks.queue._due


@pytest.mark.parametrize("seed", range(20))
def test_it_tells_what_a_look_at_everything_tells(seed: int) -> None:
    random, now = Random(seed), 0.0
    clocks = Clocks()
    there: dict[str, None] = {}
    for _ in range(2000):
        name, at = str(random.randrange(12)), random.choice((None, now + random.randrange(6)))
        match random.randrange(6):
            case 0:
                clocks.queue.remove(name)
                there.pop(name, None)
            case 1 if name not in there:
                clocks.at[name] = at
                clocks.queue.add(name)
                there[name] = None
            case 2:
                now += random.randrange(3)
                due = [n for n in there if (d := clocks.at[n]) is not None and d <= now]
                assert clocks.queue.take(now) == due, f"seed {seed}"
                for n in due:
                    clocks.at[n] = now + random.randrange(1, 6)
            case _ if name in there:
                clocks.set(name, at)
        if random.randrange(2):
            deadlines = [clocks.at[n] for n in there]
            earliest = min((at for at in deadlines if at is not None), default=None)
            assert clocks.queue.poll_timeout() == earliest, f"seed {seed}"


# a node


class Looks:
    """How often a connection was asked for its deadline, told that it has come, or let react."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in ("deadline", "handle_timeout", "settle"):
            patch.setattr(Connection, name, self._counting(getattr(Connection, name)))

    def _counting(self, method: Any) -> Any:
        def counting(*args: Any) -> Any:
            self.count += 1
            return method(*args)

        return counting


def looks_per_turn(peers: int, patch: pytest.MonkeyPatch) -> float:
    """Of a gateway that one client talks to, while others are at rest."""
    system = System(3, Scenario())
    system.ask(b"first")
    system.world.run_for(2.0)
    node: Node = system.gateway.state.node
    for number in range(peers):
        add_at_rest(node, number, system.world.now)
    node._events.clear()  # nobody is there to be told of our candidates
    node.poll_timeout()
    looks, turns, answers = Looks(patch), 40, len(system.answers)
    for number in range(turns):
        system.ask(bytes([number]))
        system.world.run_for(0.1)
    patch.undo()
    assert len(system.answers) - answers == turns
    assert len(node.peers) == peers + 1
    return looks.count / turns


def add_at_rest(node: Node, number: int, now: float) -> None:
    key, name = PrivateKey(number.to_bytes(32, "big")).public, f"{number:04}"
    credentials = Credentials(name, "x" * 22), Credentials(name, "y" * 22)
    parameters = Parameters(key, b"\x03" * 32, *credentials, controlling=False, iceless=False)
    node.upsert_connection(name, parameters, now, GATEWAY_PROFILES)


def test_peers_at_rest_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = looks_per_turn(0, monkeypatch)
    assert alone > 1.0
    assert looks_per_turn(PEERS_AT_REST, monkeypatch) <= alone + 1.0
