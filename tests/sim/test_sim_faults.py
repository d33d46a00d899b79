"""What networks, portals, relays and peers do to a tunnel, over many seeds; afterwards it works, nothing has grown."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from fz_core.packet import DropReason
from fz_core.tunnel.events import ConnectionDown
from tests.sim.properties import AFTER_RESTART, EXPLICABLE, check, footprint
from tests.sim.system import RESOURCE, Peer, Scenario, System
from tests.sim.underlay import Faults

NATS = ("public", "cone", "symmetric")


class Talk:
    """A client that asks now and then; every payload is unique."""

    def __init__(self, system: System, client: Peer | None = None) -> None:
        self.system, self.client = system, client or system.client
        self.count = 0

    def ask(self) -> bytes:
        self.count += 1
        payload = b"%s-%d" % (self.client.name.encode(), self.count)
        self.system.ask(payload, client=self.client)
        return payload

    def for_seconds(self, seconds: float, gap: float = 0.25) -> None:
        end = self.system.world.now + seconds
        while self.system.world.now < end:
            self.ask()
            self.system.world.run_for(gap)

    def is_answered(self, within: float, gap: float = 0.25) -> bool:
        """Whether anything asked from now on comes back in time."""
        fresh: set[bytes] = set()
        known = len(self.client.packets)
        end = self.system.world.now + within
        while self.system.world.now < end:
            fresh.add(self.ask())
            self.system.world.run_for(gap)
            if any(p.payload in fresh for p in self.client.packets[known:] if p.protocol == 17):
                return True
        return False


def random_scenario(seed: int, **fixed: object) -> Scenario:
    random = Random(seed)
    v4_only, v6_only, dual = ((4,), False), ((16,), True), ((4, 16), True)
    families = random.choice([v4_only] * 3 + [v6_only, dual])
    options: dict[str, object] = {
        "client_nat": random.choice(NATS),
        "gateway_nat": random.choice(NATS),
        "client_families": families[0],
        "gateway_families": families[0],
        "relay_v6": families[1],
        "relays": random.choice((1, 2)),
        "blocked": random.random() < 0.2,
        "faults": Faults(random.choice((0, 0.05, 0.15)), random.choice((0, 0.1)), random.choice((0, 0.03))),
        "latency": random.choice((0.001, 0.01, 0.05)),
    }
    return Scenario(**(options | fixed))  # type: ignore[arg-type]


def play(
    seed: int,
    scenario: Scenario,
    incident: Callable[[System, Talk], None],
    recovery: float,
    allowed: set[DropReason] = EXPLICABLE,
) -> System:
    """Connect, have something happen, and be answered again in time."""
    system = System(seed, scenario)
    talk = Talk(system)
    assert talk.is_answered(80.0), f"seed {seed}: no connection, {scenario}"
    incident(system, talk)
    assert talk.is_answered(recovery), f"seed {seed}: no answer within {recovery} s, {scenario}"
    check(system, f"seed {seed}", allowed)
    return system


# the network


def test_any_mix_of_networks() -> None:
    for seed in range(600):
        play(seed, random_scenario(seed), lambda _s, talk: talk.for_seconds(1.0), 10.0)


@pytest.mark.parametrize(
    ("client", "gateway", "relay_v4"),
    [((16,), (16,), False), ((4,), (16,), True), ((16,), (4,), True), ((4, 16), (4,), True), ((4, 16), (4, 16), True)],
)
def test_families_without_faults_make_no_error_at_all(
    client: tuple[int, ...], gateway: tuple[int, ...], relay_v4: bool
) -> None:
    for seed in range(10):
        scenario = random_scenario(
            seed,
            client_families=client,
            gateway_families=gateway,
            relay_v4=relay_v4,
            relay_v6=True,
            faults=Faults(),
            relays=1,
        )
        system = System(seed, scenario)
        talk = Talk(system)
        assert talk.is_answered(3.0), f"seed {seed}: {scenario}"
        talk.for_seconds(2.0)
        system.world.run_for(40.0)
        assert talk.is_answered(1.0)
        check(system, f"seed {seed}", allowed=set())


def test_nat_reboots() -> None:
    def reboot(system: System, talk: Talk) -> None:
        which = system.world.random.randrange(1, 4)
        if which & 1:
            system.client.host.nat.reboot()
        if which & 2:
            system.gateway.host.nat.reboot()

    for seed in range(50):
        play(seed, random_scenario(seed, faults=Faults()), reboot, 80.0)


def test_blackouts() -> None:
    def blackout(system: System, talk: Talk) -> None:
        before, system.net.faults = system.net.faults, Faults(loss=1.0)
        talk.for_seconds(system.world.random.choice((1.0, 5.0, 12.0, 30.0)), 1.0)
        system.net.faults = before

    for seed in range(50):
        play(seed, random_scenario(seed), blackout, 60.0)


# relays


def test_relay_credentials_are_replaced_midway() -> None:
    def replace(system: System, talk: Talk) -> None:
        for n in range(3):
            system.portal.replace_relay_credentials(f"round {n}")
            talk.for_seconds(2.0)

    for seed in range(40):
        system = play(seed, random_scenario(seed, faults=Faults()), replace, 25.0)
        for peer in (system.client, system.gateway):
            assert peer.state.node.relay_count == len(system.relays), f"seed {seed}"


def test_a_relay_dies_and_another_takes_over() -> None:
    for seed in range(60):
        system = System(seed, random_scenario(seed, faults=Faults(), relays=2))
        talk = Talk(system)
        assert talk.is_answered(10.0), f"seed {seed}"
        system.relays[system.world.random.randrange(2)].die()
        assert talk.is_answered(60.0), f"seed {seed}"
        check(system, f"seed {seed}")


# the portal


def test_portal_outages_hold_candidates_back() -> None:
    for seed in range(80):
        system = System(seed, random_scenario(seed, faults=Faults(), relays=1))
        random, talk = system.world.random, Talk(system)
        talk.ask()
        system.world.run_for(random.random() * 0.2)
        who = random.choice((system.client_id, system.gateway_id))
        system.portal.disconnect(who)
        talk.for_seconds(random.choice((0.1, 1.0, 5.0)), 0.1)
        system.portal.reconnect(who)
        assert talk.is_answered(80.0), f"seed {seed}"
        check(system, f"seed {seed}")


def test_an_outage_is_not_noticed_by_a_tunnel() -> None:
    for seed in range(30):
        system = System(seed, random_scenario(seed, faults=Faults()))
        talk = Talk(system)
        assert talk.is_answered(10.0)
        for peer_id in (system.client_id, system.gateway_id):
            system.portal.disconnect(peer_id)
        before = len(system.answers)
        start = talk.count
        talk.for_seconds(5.0)
        for peer_id in (system.client_id, system.gateway_id):
            system.portal.reconnect(peer_id)
        talk.for_seconds(2.0)
        system.world.run_for(0.5)
        assert len(system.answers) - before >= talk.count - start, f"seed {seed}"
        assert not [e for e in system.client.events if isinstance(e, ConnectionDown)]
        check(system, f"seed {seed}")


def test_revocation_during_a_transfer_ends_it_at_once() -> None:
    for seed in range(50):
        system = System(seed, random_scenario(seed))
        talk = Talk(system)
        assert talk.is_answered(80.0), f"seed {seed}"
        system.portal.denied.add(system.client_id)
        system.portal.revoke(system.client_id, RESOURCE.id)
        system.world.run_for(system.portal.latency + 0.001)
        received = len(system.gateway.packets)
        talk.for_seconds(10.0)
        assert len(system.gateway.packets) == received, f"seed {seed}"
        assert system.gateway.state._clients == {}
        system.portal.denied.clear()
        assert talk.is_answered(30.0), f"seed {seed}"
        check(system, f"seed {seed}")


# peers


def kill(system: System, role: str, peer: Peer, away: float) -> None:
    """As SIGKILL does: no goodbye; later a new process on the same ports."""
    peer.is_dead = True
    peer.errors.clear()
    system.portal.disconnect(system.gateway_id if role == "gateway" else system.client_id)
    system.world.run_for(away)
    system.start(role, peer)


@pytest.mark.parametrize("role", ["client", "gateway"])
def test_a_peer_is_killed_and_started_again(role: str) -> None:
    for seed in range(50):

        def restart(system: System, talk: Talk) -> None:
            peer = system.client if role == "client" else system.gateway
            kill(system, role, peer, system.world.random.choice((0.1, 3.0, 30.0)))
            system.world.run_for(1.0)

        play(seed, random_scenario(seed, faults=Faults()), restart, 60.0, AFTER_RESTART)


def test_two_clients_and_two_gateways() -> None:
    for seed in range(20):
        system = System(seed, random_scenario(seed, clients=2, gateways=2, faults=Faults(0.03, 0.03, 0.01)))
        talks = [Talk(system, client) for client in system.clients]
        for talk in talks:
            talk.ask()
        for talk in talks:
            assert talk.is_answered(80.0), f"seed {seed}: {talk.client.name}"
        kill(system, "gateway", system.gateways[0], 1.0)
        system.world.run_for(1.0)
        for talk in talks:
            assert talk.is_answered(60.0), f"seed {seed}: {talk.client.name} after the restart"
        check(system, f"seed {seed}", AFTER_RESTART)


def test_a_gateway_that_stays_away_is_replaced_by_another() -> None:
    for seed in range(40):
        system = System(seed, random_scenario(seed, gateways=2, faults=Faults()))
        talk = Talk(system)
        assert talk.is_answered(10.0)
        (used,) = system.client.state.node.peers
        dead = next(g for g in system.gateways if system.portal.peers[used][1] is g)
        dead.is_dead = True
        assert talk.is_answered(45.0), f"seed {seed}"
        check(system, f"seed {seed}")


# everything at once


def test_chaos_ends_in_a_working_tunnel() -> None:
    for seed in range(20):
        system = System(seed, random_scenario(seed, clients=2))
        random = system.world.random
        talks = [Talk(system, client) for client in system.clients]
        incidents: list[Callable[[], None]] = [
            system.client.host.nat.reboot,
            system.gateway.host.nat.reboot,
            lambda s=system: s.portal.replace_relay_credentials(str(s.world.now)),  # type: ignore[misc]
            lambda s=system: s.portal.revoke(s.client_id, RESOURCE.id),  # type: ignore[misc]
            lambda s=system: kill(s, "client", s.client, 0.5),  # type: ignore[misc]
            lambda s=system: kill(s, "gateway", s.gateway, 0.5),  # type: ignore[misc]
            lambda s=system: s.portal.disconnect(s.client_id),  # type: ignore[misc]
            lambda s=system: s.portal.reconnect(s.client_id),  # type: ignore[misc]
            lambda s=system: s.client.state.handle_timeout(s.world.now),  # type: ignore[misc]
            lambda s=system: s.gateway.state.handle_timeout(s.world.now),  # type: ignore[misc]
        ]
        for _ in range(12):
            random.choice(talks).for_seconds(random.choice((0.1, 1.0, 4.0)))
            random.choice(incidents)()
        system.portal.reconnect(system.client_id)
        for talk in talks:
            assert talk.is_answered(80.0, 0.5), f"seed {seed}: {talk.client.name}"
        check(system, f"seed {seed}", AFTER_RESTART)


def test_restarts_and_replacements_leave_nothing_behind() -> None:
    system = System(1, Scenario(client_nat="symmetric", gateway_nat="symmetric", relays=2))
    talk = Talk(system)
    sizes: list[int] = []
    for n in range(30):
        kill(system, "client", system.client, 0.1)
        system.portal.replace_relay_credentials(str(n))
        assert talk.is_answered(60.0, 0.5), n
        system.client.errors.clear()
        system.client.packets.clear()
        sizes.append(footprint(system.gateway.state))
    assert max(sizes[20:]) <= max(sizes[5:15]) * 1.1


def test_ten_quiet_hours_leave_nothing_behind() -> None:
    system = System(1, Scenario())
    talk = Talk(system)
    assert talk.is_answered(3.0)
    sizes: list[tuple[int, int]] = []
    for _ in range(10):
        system.world.run_for(3600.0)
        assert talk.is_answered(1.0)
        sizes.append((footprint(system.client.state), footprint(system.gateway.state)))
    assert max(sizes[5:]) <= max(sizes[:5])
    check(system, "quiet", allowed=set())
