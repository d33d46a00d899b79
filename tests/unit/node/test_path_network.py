"""Two ends without ICE: they connect, and stay on live paths (spec/connectivity.md §7)."""

from __future__ import annotations

from random import Random

import pytest
from path_network import End, Network

from fz_core.ice import Candidate, PathSilent
from fz_core.node.path_events import AllPathsSilent
from fz_core.packet import Address

# 1 s of silence, twelve probes, and the first answer elsewhere.
RECOVERY = 3.2
CONNECTED = 8.0


def connected(seed: int = 1, loss: float = 0.0, latency: float = 0.02) -> Network:
    net = Network(seed, loss, latency)
    net.start()
    net.run(CONNECTED)
    return net


def way(net: Network, end: End) -> tuple[str, ...]:
    assert end.path is not None
    return net.way_of(end, *end.path)


def test_both_ends_move_from_the_relay_to_the_direct_path() -> None:
    net = Network(1)
    net.start()
    net.run(0.1)
    assert net.a.path is not None
    assert net.b.path is not None
    net.run(1.0)
    assert way(net, net.a) == way(net, net.b) == ("direct",)


@pytest.mark.parametrize("firewalled", [{"a"}, {"b"}, {"a", "b"}])
def test_probes_open_firewalls_and_keep_them_open(firewalled: set[str]) -> None:
    net = Network(1)
    net.firewalled = firewalled
    net.start()
    net.run(3.0)
    assert way(net, net.a) == way(net, net.b) == ("direct",)
    net.run(150.0)
    net.b.received.clear()
    net.talk(150.5, net.a)
    net.run(151.0)
    assert len(net.b.received) in (5, 6)
    assert net.a.silent_paths == 0


def test_a_filtered_direct_path_is_left_within_three_seconds() -> None:
    net = connected()
    net.block("direct")
    net.talk(CONNECTED + RECOVERY, net.a, net.b)
    assert "direct" not in way(net, net.a) + way(net, net.b)
    net.run(net.now + 1.0)
    before = len(net.b.received)
    net.talk(net.now + 1.0, net.a)
    net.run(net.now + 1.0)
    assert len(net.b.received) - before in (10, 11)
    assert net.a.outages == net.b.outages == 0


def test_who_only_sends_notices_too() -> None:
    net = connected()
    net.block("direct")
    net.talk(CONNECTED + RECOVERY, net.a)
    assert "direct" not in way(net, net.a)


def test_the_direct_path_is_taken_again_when_it_works_again() -> None:
    net = connected()
    net.block("direct")
    net.talk(CONNECTED + RECOVERY, net.a, net.b)
    net.unblock("direct")
    for end in net.ends:
        # a new candidate makes both look again
        net.signal(end, Candidate.srflx(Address(bytes((198, 51, 100, 1)), 40000), end.host))
    net.run(net.now + 2.0)
    assert way(net, net.a) == way(net, net.b) == ("direct",)


@pytest.mark.parametrize("deaf", ["a", "b"])
def test_a_path_filtered_in_one_direction_is_left_by_who_is_not_heard(deaf: str) -> None:
    net = connected()
    sender = net.b if deaf == "a" else net.a
    net.block("direct", sender)
    net.talk(CONNECTED + 12, net.a, net.b)
    assert "direct" not in way(net, sender)


def test_a_one_way_filter_is_noticed_while_the_peer_goes_on_there() -> None:
    """A reference peer, which hears us no more but sends on: it never probes a primary it hears nothing of."""
    net = connected()
    net.block("direct", net.a)
    for _ in range(120):
        net.a.send_data()
        # what b sends keeps coming, and b itself never looks for another path
        assert net.a.path is not None
        net.a.agent.note_data_received(net.a.host, net.b.host, net.now)
        net.run(net.now + 0.1)
    assert "direct" not in way(net, net.a)


def test_a_changed_address_of_the_peer_is_found_by_its_probes() -> None:
    net = connected()
    net.a.outer = Address(bytes((198, 51, 100, 7)), 1024)
    net.talk(CONNECTED + RECOVERY, net.a, net.b)
    assert net.b.path == (net.b.host, net.a.outer)
    assert way(net, net.a) == ("direct",)


def test_a_reference_peer_holds_on_until_a_candidate_is_signalled_again() -> None:
    """What the connection does on `PathSilent`: it withdraws the candidates of that path and tells them anew."""
    net = connected()
    net.b.is_reference = True
    net.block("direct")
    net.talk(CONNECTED + RECOVERY, net.a, net.b)
    assert "direct" not in way(net, net.a)
    assert way(net, net.b) == ("direct",)
    net.signal_again(net.a, Candidate.host(net.a.host), Candidate.srflx(net.a.outer, net.a.host))
    net.talk(net.now + 1.0, net.a, net.b)
    assert "direct" not in way(net, net.b)


def test_a_changed_address_behind_firewalls_is_found_once_it_is_signalled() -> None:
    net = connected()
    net.firewalled = {"a", "b"}
    net.talk(CONNECTED + 1, net.a, net.b)
    net.a.outer = Address(bytes((198, 51, 100, 7)), 1024)
    net.talk(CONNECTED + 1 + RECOVERY, net.a, net.b)
    assert "direct" not in way(net, net.a) + way(net, net.b)
    net.talk(net.now + 20.0, net.a, net.b)
    net.signal(net.a, Candidate.srflx(net.a.outer, net.a.host))
    net.talk(net.now + 1.5, net.a, net.b)
    assert way(net, net.a) == way(net, net.b) == ("direct",)


def test_an_outage_is_told_once_and_ends_by_itself() -> None:
    net = connected()
    for name in ("direct", "relay-a", "relay-b"):
        net.block(name)
    net.talk(CONNECTED + 4.6, net.a)
    assert [type(event) for _, event in net.a.events[-2:]] == [PathSilent, AllPathsSilent]
    net.talk(CONNECTED + 20, net.a)
    assert net.a.outages == 1
    net.unblock("relay-b")
    net.talk(CONNECTED + 21.2, net.a)
    assert way(net, net.a) in (("relay-b",), ("relay-a", "relay-b"))


def test_an_idle_connection_sends_one_probe_in_25_seconds() -> None:
    net = connected()
    net.run(60.0)
    for end in net.ends:
        end.probes.clear()
    net.run(160.0)
    for end in net.ends:
        own = [at for at, key in end.probes]
        # four keep-alives of its own and four answers
        assert len(own) <= 9
        assert end.silent_paths == 0


def test_an_idle_connection_heals_without_data_after_its_keep_alive_failed() -> None:
    net = connected()
    net.run(60.0)
    net.block("direct")
    net.run(60.0 + 25 + 7 + 2 * 2.4)
    assert "direct" not in way(net, net.a)
    assert net.a.outages == net.a.silent_paths == 0


def test_nothing_is_an_outage_while_no_data_is_sent() -> None:
    net = connected()
    for name in ("direct", "relay-a", "relay-b"):
        net.block(name)
    net.run(80.0)
    assert not net.a.agent.has_live_path
    assert net.a.outages == 0
    net.talk(85.0, net.a)
    assert net.a.outages == 1


def test_a_roamed_end_is_back_without_a_handshake() -> None:
    net = connected()
    a = net.a
    a.host = a.outer = Address(bytes((10, 9, 0, 1)), 52625)
    a.agent.rebuild(net.now)
    assert a.agent.local_candidates == ()
    net.signal(a, Candidate.host(a.host))
    net.talk(CONNECTED + 1.0, a, net.b)
    assert a.path == (a.host, net.b.host)
    assert net.b.path == (net.b.host, a.host)


def test_a_lost_session_is_renewed_over_the_relays() -> None:
    """Both slept past the end of the session on a path that is gone: no probe can leave any more."""
    net = connected()
    net.block("direct")
    net.now += 400.0
    net.talk(net.now + 15, net.a)
    assert net.a.received == []
    assert len(net.b.received) > 50


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_random_filters_and_losses(first: int) -> None:
    for seed in range(first, first + 50):
        random = Random(seed)
        net = Network(seed, loss=random.choice((0.0, 0.05, 0.2)), latency=random.choice((0.005, 0.05, 0.15)))
        net.firewalled = set(random.sample(("a", "b"), random.randint(0, 2)))
        net.start()
        net.talk(CONNECTED, net.a, net.b, gap=0.25)
        for _ in range(2):
            dead = random.sample(("direct", "relay-a", "relay-b"), random.randint(0, 2))
            if {"relay-a", "relay-b"} <= set(dead) and "direct" in dead:
                continue
            net.blocked.clear()
            for name in dead:
                net.block(name, random.choice((None, net.a, net.b)))
            net.talk(net.now + 12, net.a, net.b, gap=0.25)
            for end in net.ends:
                assert not blocked_ways(net, end), f"seed {seed}: {end.name} is on {end.path}, dead: {net.blocked}"


def blocked_ways(net: Network, end: End) -> list[str]:
    return [name for name in way(net, end) if (name, end.name) in net.blocked]


def test_loss_of_a_fifth_is_no_death() -> None:
    deaths = 0
    for seed in range(12):
        net = connected(seed, loss=0.2)
        before = net.a.silent_paths
        net.talk(net.now + 600, net.a, gap=0.5)
        deaths += net.a.silent_paths - before
    assert deaths <= 1
