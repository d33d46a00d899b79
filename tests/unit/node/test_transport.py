"""What a node says of how data travels, and what it is told of data that travelled without it."""

from __future__ import annotations

from typing import Any

import pytest

from fz_core.crypto import PrivateKey
from fz_core.node import Carried, Hop, Node, Transport
from fz_core.node.connection import Connection, State
from fz_core.node.path_health import PathHealth, Verdict
from fz_core.node.path_probe import build_probe
from fz_core.node.transport import Changes, Unheard
from fz_core.packet import Address, Transmit, build_udp
from fz_core.portal import client as c
from tests.sim.system import PORT, SERVER, Scenario, System

CHANNEL_LIFETIME, CHANNEL_REFRESH = 600.0, 300.0
SESSION_LIFETIME = 180.0
ELSEWHERE = Address.parse("198.51.100.77:4500")
FOREVER = float("inf")


class Scene:
    """A client that talks to a gateway, and what its node has said since it was last asked."""

    def __init__(self, seed: int = 3, **scenario: Any) -> None:
        self.system = System(seed, Scenario(**scenario))
        self.node.take_changed()
        for _ in range(4):
            self.ask()
            self.system.world.run_for(1.0)
        assert self.system.answers

    def ask(self) -> None:
        self.system.ask(b"%d" % self.now)

    @property
    def now(self) -> float:
        return self.system.world.now

    @property
    def node(self) -> Node:
        return node_of(self.system.client)

    @property
    def peer_id(self) -> str:
        return self.system.gateway_id

    @property
    def connection(self) -> Connection:
        return self.node._connections.by_peer[self.peer_id]

    @property
    def transport(self) -> Transport:
        transport = self.node.transport(self.peer_id, self.now)
        assert transport is not None
        return transport

    @property
    def packet(self) -> Any:
        return build_udp(SERVER, self.system.client_ip, 7, 7000, b"data")

    def sealed_by_gateway(self) -> bytes:
        """A data datagram as the gateway sends it."""
        tunnel = node_of(self.system.gateway)._connections.by_peer[self.system.client_id].tunnel
        sealed = tunnel.seal(self.packet, self.now)
        assert isinstance(sealed, bytes)
        return sealed


def node_of(peer: Any) -> Node:
    node: Node = peer.state.node
    return node


def direct(**scenario: Any) -> Scene:
    return Scene(client_nat="public", gateway_nat="public", **scenario)


@pytest.fixture(params=[False, True], ids=["ice", "iceless"])
def iceless(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


# the way


def test_a_direct_path_is_two_addresses(iceless: bool) -> None:
    scene = direct(iceless=iceless)
    ours = Address(scene.system.client.host.ips[4], PORT)
    theirs = Address(scene.system.gateway.host.ips[4], PORT)
    hop = Hop(theirs, ours, 0)
    expected = Transport(scene.peer_id, scene.connection.index, scene.connection.tunnel, hop, FOREVER, hop)
    assert scene.transport == expected
    assert scene.node.ends_of(hop) == (ours, theirs)


def test_nothing_travels_before_there_is_a_session() -> None:
    system = System(3, Scenario())
    node = node_of(system.client)
    assert node.transport(system.gateway_id, system.world.now) is None
    system.ask(b"x")
    assert system.world.run_until(lambda: node.is_known(system.gateway_id), 1.0)
    assert node.transport(system.gateway_id, system.world.now) is None


def test_a_relayed_path_is_a_channel_with_an_end() -> None:
    scene = relayed()
    path = scene.connection.path
    assert path is not None
    (relay,) = scene.node._relays
    channel = relay._channels._by_peer[path.remote]
    assert relay.server is not None
    assert channel.bound_at is not None
    assert scene.transport.send == Hop(relay.server, None, channel.number)
    assert scene.transport.send_until == channel.bound_at + CHANNEL_LIFETIME
    hop = scene.transport.send
    assert hop is not None
    assert scene.node.ends_of(hop) == (path.local, path.remote)
    late = scene.node.transport(scene.peer_id, channel.bound_at + CHANNEL_LIFETIME)
    assert late is not None
    assert late.send is None


def test_data_may_come_over_a_channel(iceless: bool) -> None:
    scenes = [Scene(blocked=True, iceless=iceless)]
    scenes.append(turned(scenes[0]))
    ways = [scene.transport.receive for scene in scenes]
    (relay,) = scenes[0].system.relays
    over_channel = [(scene, hop) for scene, hop in zip(scenes, ways, strict=True) if hop is not None and hop.channel]
    assert over_channel
    for scene, hop in over_channel:
        assert (hop.remote, hop.local) == (Address(relay.host.ips[4], 3478), None)
        assert scene.node.ends_of(hop) == scene.connection.received_on


def turned(scene: Scene) -> Scene:
    """The same system seen from the gateway, whose relayed address is the one in use."""
    other = object.__new__(Turned)
    other.system = scene.system
    return other


class Turned(Scene):
    """The gateway's end."""

    @property
    def node(self) -> Node:
        return node_of(self.system.gateway)

    @property
    def peer_id(self) -> str:
        return self.system.client_id


def relayed(**scenario: Any) -> Scene:
    """The end that sends through its own relay."""
    scene = Scene(**{"blocked": True, **scenario})
    path = scene.connection.path
    assert path is not None
    scene = scene if path.via_relay else turned(scene)
    assert scene.connection.path is not None
    assert scene.connection.path.via_relay
    for _ in range(2):
        scene.node.take_changed()
    return scene


def test_an_unconfirmed_channel_is_not_sent_on() -> None:
    scene = relayed()
    (relay,) = scene.node._relays
    path = scene.connection.path
    assert path is not None
    channel = relay._channels._by_peer[path.remote]
    channel.bound_at = None
    channel.is_in_flight = True
    assert isinstance(scene.node.encapsulate(scene.peer_id, scene.packet, 0, scene.now), Transmit)
    assert scene.transport.send is None
    assert scene.transport.send_until == FOREVER


def test_a_refreshed_channel_lives_longer_and_is_told() -> None:
    scene = relayed()
    first = scene.transport
    talk(scene, CHANNEL_REFRESH - 20.0)
    scene.node.take_changed()
    talk(scene, 40.0)
    assert scene.peer_id in scene.node.take_changed()
    assert scene.transport.send == first.send
    assert scene.transport.send_until >= first.send_until + CHANNEL_REFRESH - 1.0


def talk(scene: Scene, seconds: float) -> None:
    end = scene.now + seconds
    while scene.now < end:
        scene.ask()
        scene.system.world.run_for(1.0)


def test_a_lost_allocation_is_told() -> None:
    scene = relayed(client_nat="symmetric", gateway_nat="symmetric", blocked=False)
    before = scene.transport.send
    scene.system.relays[0].die()
    (relay,) = scene.node._relays
    assert scene.system.world.run_until(lambda: relay.relayed_v4 is None, 60.0)
    assert scene.node.take_changed() == {scene.peer_id}
    assert before is not None
    assert before.channel
    path = scene.connection.path
    assert path is not None
    assert scene.transport.send == (None if path.via_relay else Hop(path.remote, path.local, 0))


def test_a_relay_that_the_portal_takes_away_is_told() -> None:
    scene = relayed(client_nat="symmetric", gateway_nat="symmetric", blocked=False)
    (relay,) = scene.node._relays
    scene.node.update_relays([relay.relay_id], (), scene.now)
    assert scene.node.take_changed() == {scene.peer_id}
    path = scene.connection.path
    assert path is not None
    assert path.via_relay  # nothing better is known
    assert scene.transport.send is None


def test_a_way_over_a_forgotten_channel_leads_nowhere() -> None:
    scene = relayed()
    hop = scene.transport.send
    assert hop is not None
    assert scene.node.ends_of(hop._replace(channel=0x4FFF)) is None
    assert scene.node.ends_of(hop._replace(remote=ELSEWHERE)) is None
    assert scene.node.ends_of(Hop(ELSEWHERE, None, 0)) is None


# changes


def test_the_first_time_all_are_named_and_then_who_changed() -> None:
    system = System(3, Scenario())
    node = node_of(system.client)
    system.ask(b"x")
    assert system.world.run_until(lambda: bool(system.answers), 5.0)
    assert node.take_changed() == {system.gateway_id}
    assert node.take_changed() == set()
    for number in range(5):
        system.ask(b"%d" % number)
        system.world.run_for(0.1)
    assert node.take_changed() == set()


def test_what_was_taken_stays_as_it_is() -> None:
    changes = Changes()
    changes.take(())
    taken = changes.take(())
    changes.note("p", (ELSEWHERE,))
    assert taken == set()
    assert changes.take(()) == {"p"}


def test_channels_concern_those_who_use_them() -> None:
    changes = Changes()
    changes.take(())
    changes.note("p", (ELSEWHERE,))
    changes.note("q", (SERVER_ADDRESS,))
    changes.take(())
    changes.note_channel(ELSEWHERE)
    assert changes.take(()) == {"p"}
    changes.note("p", (SERVER_ADDRESS,))
    changes.take(())
    changes.note_channel(ELSEWHERE)
    assert changes.take(()) == set()
    changes.note_channel(SERVER_ADDRESS)
    assert changes.take(()) == {"p", "q"}
    changes.note_relay_gone()
    assert changes.take(()) == {"p", "q"}
    changes.note("p", ())
    changes.note("q", ())
    assert (changes._users, changes._remotes) == ({}, {})


SERVER_ADDRESS = Address(SERVER, 7)


def test_new_keys_are_told_at_both_ends(iceless: bool) -> None:
    scene = direct(iceless=iceless)
    other = turned(scene)
    other.node.take_changed()
    scene.node.take_changed()
    before, other_before = scene.connection.tunnel.version, other.connection.tunnel.version
    scene.connection.tunnel.start_handshake(scene.now)
    scene.node._settle(scene.connection, scene.now)
    scene.system.client.drain()
    scene.system.world.run_for(1.0)
    assert scene.node.take_changed() == {scene.peer_id}
    assert other.node.take_changed() == {other.peer_id}
    assert scene.connection.tunnel.version > before
    assert other.connection.tunnel.version > other_before


def test_a_session_that_data_confirms_is_told() -> None:
    """The initiator's keep-alive is lost, so its first packet is what makes the session usable."""
    scene = direct()
    other = turned(scene)
    scene.connection.tunnel.start_handshake(scene.now)
    init = scene.connection.tunnel.poll_datagram()
    assert init is not None
    theirs = Address(scene.system.client.host.ips[4], PORT)
    ours = Address(scene.system.gateway.host.ips[4], PORT)
    other.node.handle_network_input(ours, theirs, init, scene.now)
    response = other.node.poll_transmit()
    assert response is not None
    scene.connection.tunnel.handle_untrusted(response.payload, ours.ip, scene.now)
    assert scene.connection.tunnel.poll_datagram() is not None
    other.node.take_changed()
    session = other.connection.tunnel.current_session()
    data = scene.connection.tunnel.seal(build_udp(scene.system.client_ip, SERVER, 1, 2, b"x"), scene.now)
    assert isinstance(data, bytes)
    assert isinstance(other.node.handle_network_input(ours, theirs, data, scene.now), tuple)
    assert other.connection.tunnel.current_session() is not session
    assert other.node.take_changed() == {other.peer_id}


def test_a_session_past_its_age_is_told() -> None:
    scene = turned(direct())
    scene.system.world.run_for(30.0)
    scene.node.take_changed()
    scene.connection.tunnel.handle_timeout(scene.now + SESSION_LIFETIME)
    scene.node._settle(scene.connection, scene.now + SESSION_LIFETIME)
    assert scene.node.take_changed() == {scene.peer_id}
    assert scene.node.transport(scene.peer_id, scene.now) is None


def test_data_that_comes_another_way_is_told() -> None:
    scene = direct()
    scene.node.take_changed()
    local = Address(scene.system.client.host.ips[4], PORT)
    send = scene.transport.send
    received = scene.node.handle_network_input(local, ELSEWHERE, scene.sealed_by_gateway(), scene.now)
    assert isinstance(received, tuple)
    assert scene.node.take_changed() == {scene.peer_id}
    assert (scene.transport.send, scene.transport.receive) == (send, Hop(ELSEWHERE, local, 0))
    home = scene.connection.path
    assert home is not None
    assert scene.node.handle_opened(scene.peer_id, local, home.remote, b"\x45data", scene.now)
    assert scene.node.take_changed() == {scene.peer_id}
    assert scene.transport.receive == send


@pytest.mark.parametrize("how", ["remove", "close", "reset", "replace", "fail"])
def test_the_end_of_a_connection_is_told(how: str) -> None:
    scene = direct()
    scene.node.take_changed()
    connection = scene.connection
    match how:
        case "remove":
            scene.node.remove(scene.peer_id)
        case "close":
            scene.node.close(scene.peer_id, scene.packet, scene.now)
        case "reset":
            scene.node.reset(PrivateKey(b"\x07" * 32), scene.now)
        case "replace":
            parameters = connection.parameters
            other = type(parameters)(**{**vars(parameters), "preshared_key": b"\x09" * 32})
            scene.node.upsert_connection(scene.peer_id, other, scene.now)
        case "fail":
            connection.received_on = ELSEWHERE, ELSEWHERE
            connection.fail("no more")
            scene.node._settle(connection, scene.now)
    assert scene.node.take_changed() == {scene.peer_id}
    assert scene.node.transport(scene.peer_id, scene.now) is None
    if how != "replace":
        assert (scene.node._changes._remotes, scene.node._changes._users) == ({}, {})


def test_a_failed_connection_has_no_transport() -> None:
    scene = direct()
    scene.connection.fail("no more")
    assert scene.node.transport(scene.peer_id, scene.now) is None


# what others carried


def test_strangers_are_nobody() -> None:
    scene = direct()
    assert scene.node.handle_opened("nobody", ELSEWHERE, ELSEWHERE, b"x", scene.now) is None
    scene.node.note_traffic("nobody", Carried(scene.now, scene.now, None), scene.now)
    assert scene.node.peers == [scene.peer_id]


def test_a_probe_is_answered_and_is_no_data() -> None:
    scene = direct(iceless=True)
    scene.node.take_changed()
    hop = scene.transport.receive
    assert hop is not None
    heard_at = scene.connection.watch.heard_at
    ends = scene.node.ends_of(hop)
    assert ends is not None
    probe = build_probe(True, 77, 1)
    assert scene.node.handle_opened(scene.peer_id, ends[0], ELSEWHERE, probe, scene.now) is None
    reply = scene.node.poll_transmit()
    assert reply is not None
    assert reply.remote == ELSEWHERE
    assert scene.transport.receive == hop
    assert scene.connection.watch.heard_at == heard_at
    assert scene.node.take_changed() == set()


def test_a_keep_alive_is_heard_and_no_activity() -> None:
    scene = direct()
    before = scene.connection._last_activity
    path = scene.connection.path
    assert path is not None
    assert scene.node.handle_opened(scene.peer_id, path.local, path.remote, b"", scene.now) is None
    assert scene.connection.watch.heard_at == scene.now
    assert scene.connection._last_activity == before


def test_a_late_report_wakes_a_sleeper() -> None:
    scene = direct()
    scene.system.world.run_for(25.0)
    assert scene.connection.state is State.IDLE
    at = scene.now - 0.05
    scene.node.note_traffic(scene.peer_id, Carried(at, None, at), scene.now)
    assert scene.connection.state.name == "CONNECTED"
    assert scene.connection._last_activity == at
    scene.node.note_traffic(scene.peer_id, Carried(at, None, at), scene.now + 21.0)
    scene.node.handle_timeout(scene.now + 21.0)
    assert scene.connection.state.name == "IDLE"  # an old report is no activity
    scene.node.note_traffic(scene.peer_id, Carried(at - 1.0, at - 1.0, None), scene.now + 21.1)
    assert scene.connection.state.name == "IDLE"


def test_a_report_from_before_the_last_bind_keeps_no_channel() -> None:
    scene = relayed()
    (relay,) = scene.node._relays
    received_on = scene.connection.received_on
    assert received_on is not None
    channel = relay._channels._by_peer[received_on[1]]
    channel.bound_at, channel.received_at = scene.now, None
    scene.node.note_traffic(scene.peer_id, Carried(None, scene.now - 0.05, None), scene.now)
    assert channel.received_at is None
    scene.node.note_traffic(scene.peer_id, Carried(None, scene.now + 0.05, None), scene.now + 0.1)
    assert channel.received_at == scene.now + 0.05


def test_reports_leave_the_first_unheard_moment_where_it_was() -> None:
    unheard = Unheard()
    unheard.note_carried(5.0, 5.1)
    unheard.note_carried(5.0, 5.2)
    assert unheard.since == 5.0
    unheard.clear(5.3)  # the node heard what the reporter did not
    assert unheard.since is None
    unheard.note_carried(5.0, 5.25)
    assert unheard.since is None
    unheard.note_carried(5.0, 5.4)
    assert unheard.since == 5.4
    unheard.note_carried(5.35, 5.5)  # it has heard too, and sent since
    assert unheard.since == 5.35
    unheard.clear(5.32)  # an old receipt does not undo it
    assert unheard.since == 5.35


def test_a_late_report_undoes_nothing_of_a_path_s_health() -> None:
    health = PathHealth(0.0)
    health.watch(ELSEWHERE, SERVER_ADDRESS, 0.0)
    health.note_sent(2.0)
    health.note_received(ELSEWHERE, SERVER_ADDRESS, 1.9)  # before what was sent
    assert health.poll_timeout() == 3.0
    assert health.step(None, 3.0) is Verdict.PROBE
    health.watch(ELSEWHERE, SERVER_ADDRESS, 5.0)
    health.note_received(ELSEWHERE, SERVER_ADDRESS, 4.9)
    assert health.note_carried(4.8, 4.95)  # from before the path was chosen: watched, but not waited for
    assert health.step(None, 5.95) is Verdict.NOTHING
    assert health.poll_timeout() is None


def test_a_receipt_counts_once() -> None:
    """Said again, it would hide that the peer is in distress: two initiations with nothing heard between."""
    scene = direct(iceless=True)
    health = scene.connection.agent._health  # type: ignore[union-attr]
    carried = Carried(None, scene.now, None)
    scene.node.note_traffic(scene.peer_id, carried, scene.now)
    assert not health.is_second_peer_init()
    scene.node.note_traffic(scene.peer_id, carried, scene.now + 0.1)
    assert health.is_second_peer_init()


def test_an_initiation_between_reports_does_not_hide_silence() -> None:
    """Handshakes are heard, and yet data that nothing follows makes the path be checked."""
    scene = direct()
    sent_at = scene.now
    scene.connection.watch.heard_at = sent_at + 0.05  # by a handshake
    scene.node.note_traffic(scene.peer_id, Carried(sent_at, None, sent_at), sent_at + 0.1)
    deadline = scene.connection.deadline()
    assert deadline is not None
    assert deadline <= sent_at + 0.5


def test_other_gateways_are_not_named() -> None:
    system = System(5, Scenario(clients=2))
    node = node_of(system.gateway)
    for client in system.clients:
        system.ask(b"x", client=client)
    system.world.run_for(5.0)
    node.take_changed()
    (first, second) = node.peers
    node.remove(second)
    assert node.take_changed() == {second}
    assert node.transport(first, system.world.now) is not None


def test_relays_of_the_portal_that_stay_change_nothing() -> None:
    scene = relayed()
    scene.system.client.tell(c.RelaysPresence((), ()))
    assert scene.node.take_changed() == set()
