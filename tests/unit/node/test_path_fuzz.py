"""Whatever is called in whatever order: nothing raises, nothing grows, and timers lie ahead."""

from __future__ import annotations

from random import Random

import pytest

from fz_core.ice import Candidate
from fz_core.node.path_agent import PathAgent
from fz_core.node.path_probe import build_probe
from fz_core.packet import Address

STEPS = 250


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_random_calls(first: int) -> None:
    for seed in range(first, first + 40):
        random, agent, now = Random(seed), PathAgent(seed % 2 == 0, 0.0), 0.0
        for _ in range(STEPS):
            now += random.choice((0.0, 0.001, 0.05, 0.5, 3.0))
            call(agent, random, now)
            check(agent, random, now)


def call(agent: PathAgent, random: Random, now: float) -> None:
    local, remote = some_address(random), some_address(random)
    datagram = random.randbytes(2)
    number = random.randrange(16)
    if number == 0:
        agent.add_local_candidate(some_candidate(random), now)
    elif number == 1:
        agent.remove_local_candidate(some_candidate(random), now)
    elif number in (2, 3):
        agent.add_remote_candidate(some_candidate(random), now)
    elif number == 4:
        agent.remove_remote_candidate(some_candidate(random), now)
    elif number == 5 and random.random() < 0.1:
        agent.rebuild(now, agent.local_candidates[:1])
    elif number == 6:
        agent.send_init(datagram, now)
    elif number == 7 and not agent.is_copy(local, remote, datagram, now):
        agent.note_init_accepted(local, remote, datagram, b"\x02", now)
    elif number == 8 and not agent.is_copy(local, remote, datagram, now):
        agent.note_response_accepted(local, remote, datagram, now)
    elif number == 9:
        agent.note_data_sent(now)
    elif number == 10:
        agent.note_data_received(local, remote, now)
    elif number == 11:
        agent.handle_probe(local, remote, random.randbytes(random.randrange(60)), now)
    elif number == 12:
        agent.note_probe_unsealed(now)
    else:
        probe = build_probe(random.random() < 0.3, random.randrange(40), random.randrange(30))
        agent.handle_probe(*random.choice(agent.pairs or ((local, remote),)), probe, now)


def check(agent: PathAgent, random: Random, now: float) -> None:
    for poll in (agent.poll_transmit, agent.poll_probe, agent.poll_event):
        while poll() is not None:
            pass
    due = agent.poll_timeout()
    if random.random() < 0.5 or (due is not None and due <= now):
        agent.handle_timeout(now)
        due = agent.poll_timeout()
        assert due is None or due > now
        assert agent.poll_timeout() == due
        agent.handle_timeout(now)
        assert agent.poll_timeout() == due
    assert len(agent.local_candidates) <= 18
    assert len(agent.remote_candidates) <= 22
    assert agent.primary is None or agent.primary in agent.pairs
    assert all(local.is_ipv4 == remote.is_ipv4 for local, remote in agent.pairs)


def some_address(random: Random) -> Address:
    if random.random() < 0.3:
        return Address(bytes(15) + bytes((random.randrange(1, 9),)), random.randrange(3))
    return Address(bytes((10, 0, 0, random.randrange(30))), random.randrange(3))


def some_candidate(random: Random) -> Candidate:
    address = some_address(random)
    base = Address(address.ip[:-1] + b"\x01", 5)
    return random.choice(
        (
            Candidate.host(address),
            Candidate.srflx(address, base),
            Candidate.relay(address, random.random() < 0.5),
        )
    )
