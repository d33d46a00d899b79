"""How long traffic stops when something breaks, in virtual time, over many networks and moments.

The worst of all seeds counts. The same events with real programs are `python -m fz_core.lab.faults`.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from fz_core.tunnel.events import PathInUse
from tests.sim.properties import check
from tests.sim.system import System
from tests.sim.test_sim_faults import Faults, Talk, kill, random_scenario

GAP = 0.05
Incident = Callable[[System], None]


@pytest.fixture(params=[False, True], ids=["ice", "iceless"])
def iceless(request: pytest.FixtureRequest) -> bool:
    """Both modes must do the same."""
    return bool(request.param)


def connected(seed: int, **fixed: Any) -> tuple[System, Talk]:
    """A system in use for a random while, so that the incident hits any phase of its periods."""
    system = System(seed, random_scenario(seed, **{"faults": Faults(), "blocked": False, **fixed}))
    talk = Talk(system)
    assert talk.is_answered(10.0), f"seed {seed}"
    talk.for_seconds(3.0 + Random(seed).random() * 3.0, GAP)
    return system, talk


def outage(system: System, talk: Talk, incident: Incident, limit: float) -> float:
    """Seconds from the incident until questions are answered for good (nothing unanswered in 2 s)."""
    world = system.world
    incident(system)
    began = world.now
    asked: dict[bytes, float] = {}
    while world.now < began + limit:
        asked[talk.ask()] = world.now
        world.run_for(GAP)
    world.run_for(0.5)
    answered = {p.payload for p in system.client.packets if p.protocol == 17}
    lost = [at for payload, at in asked.items() if payload not in answered]
    return max(lost, default=began) - began


def is_direct(system: System) -> bool:
    return not [e for e in system.client.events if isinstance(e, PathInUse)][-1].relayed


def filter_direct(system: System) -> None:
    """From now on only the relays can be reached."""
    relay_ips = {ip for relay in system.relays for ip in relay.host.ips.values()}
    for peer in (system.client, system.gateway):
        peer.host.nat.blocked = lambda _inner, remote: remote.ip not in relay_ips


def filter_one_way(system: System) -> None:
    """Nothing of the gateway's reaches the client directly any more."""
    relay_ips = {ip for relay in system.relays for ip in relay.host.ips.values()}
    system.gateway.host.nat.blocked = lambda _inner, remote: remote.ip not in relay_ips


def move_nat(system: System, peer: Any) -> None:
    """The router comes back with another public address, and knows nothing of before."""
    nat = peer.host.nat
    nat.reboot()
    for family, ip in list(nat.public.items()):
        nat.public[family] = ip[:-1] + bytes((ip[-1] ^ 0x40,))


@pytest.mark.parametrize("seed", range(40))
def test_direct_path_is_filtered(seed: int, iceless: bool) -> None:
    system, talk = connected(seed, client_nat="cone", gateway_nat="cone", iceless=iceless)
    if not is_direct(system):
        pytest.fail("two cone NATs let a direct path through")
    assert outage(system, talk, filter_direct, 12.0) <= 4.0, f"seed {seed}"
    check(system, f"seed {seed}")


@pytest.mark.parametrize("seed", range(20))
def test_one_direction_is_filtered(seed: int, iceless: bool) -> None:
    system, talk = connected(seed, client_nat="cone", gateway_nat="cone", iceless=iceless)
    assert outage(system, talk, filter_one_way, 12.0) <= 4.0, f"seed {seed}"
    check(system, f"seed {seed}")


@pytest.mark.parametrize("who", ["client", "gateway"])
@pytest.mark.parametrize("seed", range(20))
def test_the_router_gets_another_address(seed: int, iceless: bool, who: str) -> None:
    system, talk = connected(seed, client_nat="cone", gateway_nat="cone", iceless=iceless)
    assert outage(system, talk, lambda s: move_nat(s, getattr(s, who)), 20.0) <= 7.0, f"seed {seed}"
    check(system, f"seed {seed}")


@pytest.mark.parametrize("who", ["client", "gateway"])
@pytest.mark.parametrize("seed", range(30))
def test_the_router_reboots(seed: int, iceless: bool, who: str) -> None:
    system, talk = connected(seed, iceless=iceless)
    peer = getattr(system, who)
    assert outage(system, talk, lambda s: peer.host.nat.reboot(), 20.0) <= 7.0, f"seed {seed}"
    check(system, f"seed {seed}")


@pytest.mark.parametrize("seed", range(30))
def test_a_relay_dies_unannounced(seed: int, iceless: bool) -> None:
    """The portal would tell at once; here nobody does."""
    system, talk = connected(seed, relays=2, iceless=iceless)
    which = Random(seed).randrange(2)
    assert outage(system, talk, lambda s: s.relays[which].die(), 20.0) <= 11.0, f"seed {seed}"
    check(system, f"seed {seed}")


@pytest.mark.parametrize("seed", range(30))
def test_a_gateway_is_killed_and_started_again(seed: int, iceless: bool) -> None:
    system, talk = connected(seed, iceless=iceless)
    took = outage(system, talk, lambda s: kill(s, "gateway", s.gateway, 1.0), 15.0)
    assert took <= 5.0, f"seed {seed}"


@pytest.mark.parametrize("seed", range(20))
def test_a_blackout_of_half_a_minute(seed: int, iceless: bool) -> None:
    system, talk = connected(seed, iceless=iceless)

    def blackout(system: System) -> None:
        system.net.faults = Faults(loss=1.0)
        talk.for_seconds(30.0, GAP)
        system.net.faults = Faults()

    assert outage(system, talk, blackout, 20.0) <= 5.0, f"seed {seed}"
    check(system, f"seed {seed}")


@pytest.mark.parametrize("is_in_use", [False, True])
@pytest.mark.parametrize("dark", [1.0, 12.0])
@pytest.mark.parametrize("seed", range(20))
def test_a_gateway_drops_a_client_that_is_away(seed: int, iceless: bool, dark: float, is_in_use: bool) -> None:
    """Access was taken away and given back while the client heard neither its gateway nor its portal."""
    system, talk = connected(seed, iceless=iceless)

    def drop(system: System) -> None:
        system.net.faults = Faults(loss=1.0)
        system.portal.revoke(*next(iter(system.portal.grants)))
        if is_in_use:
            talk.for_seconds(dark, GAP)
        else:
            system.world.run_for(dark)
        system.net.faults = Faults()

    assert outage(system, talk, drop, dark + 20.0) <= dark + 8.0, f"seed {seed}"
    check(system, f"seed {seed}")


def test_connecting_with_twenty_percent_loss() -> None:
    """Every datagram, also to and from the relay, which is asked for the first time here."""
    slow = []
    for seed in range(100):
        fixed = {"client_nat": "cone", "gateway_nat": "cone", "faults": Faults(loss=0.2), "blocked": False}
        system = System(seed, random_scenario(seed, **fixed))
        talk = Talk(system)
        if not talk.is_answered(4.0, GAP):
            slow.append(seed)
            assert talk.is_answered(6.0, GAP), f"seed {seed}"
    assert len(slow) <= 10, f"seeds {slow}"


@pytest.mark.parametrize("seed", range(40))
def test_a_client_roams(seed: int, iceless: bool) -> None:
    system, talk = connected(seed, iceless=iceless)

    def roam(system: System) -> None:
        client = system.client
        client.host.nat.reboot()
        system.portal.disconnect(system.client_id)
        client.state.reset(system.world.now)
        client.drain()
        system.portal.connect("client", client.name, client, client.state.public_key)

    before = system.client.state.public_key
    assert outage(system, talk, roam, 10.0) <= 1.3, f"seed {seed}"
    assert (system.client.state.public_key == before) == iceless
    check(system, f"seed {seed}")


@pytest.mark.parametrize("seed", range(20))
def test_after_roaming_the_far_end_may_speak_first(seed: int, iceless: bool) -> None:
    """A download whose client has nothing to say: the connection must come back without a packet of ours."""
    system, _talk = connected(seed, iceless=iceless)
    client = system.client
    system.portal.disconnect(system.client_id)
    client.state.reset(system.world.now)
    client.drain()
    system.portal.connect("client", client.name, client, client.state.public_key)
    gateway = system.gateway.state.node

    def stands() -> bool:
        known = gateway._connections.by_peer.get(system.client_id)
        if known.parameters.remote_key != client.state.public_key or not gateway.is_ready(system.client_id):
            return False
        return bool(known.agent.has_live_path)

    assert system.world.run_until(stands, 4.0)
