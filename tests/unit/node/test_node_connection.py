"""Life of a connection: how it starts, sleeps, is renewed, fails and ends (spec/connectivity.md §6.4, §6.5, §8)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from fz_core.crypto import PrivateKey
from fz_core.ice import CLIENT_DEFAULT, CLIENT_IDLE, SERVER_DEFAULT, SERVER_IDLE, Credentials
from fz_core.node import NoRelays, Parameters
from fz_core.node import events as node_events
from fz_core.node.connection import Connection, State
from fz_core.node.node import Node
from fz_core.packet import Address, DropReason, Transmit, build_udp
from fz_core.portal import client as c
from fz_core.tunnel.events import ConnectionDown, ConnectionUp, SendToPortal
from fz_core.wireguard import Tunnel
from tests.sim.raw_client import RawClient
from tests.sim.system import EPOCH, PORT, RESOURCE, SERVER, Scenario, System

INIT, RESPONSE, COOKIE, DATA = 1, 2, 3, 4
SIZES = {INIT: 148, RESPONSE: 92, COOKIE: 64}


class Wire:
    """Counts WireGuard messages and STUN by sender on its way through the underlay."""

    def __init__(self, system: System) -> None:
        self.sent: Counter[tuple[str, Any]] = Counter()
        self.no_checks_until = 0.0
        send = system.net.send

        def counting(host: Any, port: int, remote: Address, payload: bytes, ecn: int = 0) -> None:
            kind = payload[0] if SIZES.get(payload[0]) == len(payload) else None
            if kind is None and payload[:2] == b"\x00\x01" and remote.port != 3478:
                kind = "check"
            if kind is not None:
                self.sent[host.name, kind] += 1
            if (kind == "check" or 0x40 <= payload[0] <= 0x4F) and system.world.now < self.no_checks_until:
                return
            send(host, port, remote, payload, ecn)

        system.net.send = counting  # type: ignore[method-assign]


def raw(**scenario: Any) -> System:
    return System(4, Scenario(**scenario), RawClient)


def connect(system: System) -> None:
    system.portal._request(system.client_id, RESOURCE.id)
    assert system.world.run_until(lambda: both_ready(system), 3.0)
    system.world.run_for(1.0)


def both_ready(system: System) -> bool:
    return bool(
        system.client.state.node.is_ready(system.gateway_id) and system.gateway.state.node.is_ready(system.client_id)
    )


def of_client(system: System) -> Connection:
    connection: Connection = system.client.state.node._connections.by_peer[system.gateway_id]
    return connection


def of_gateway(system: System) -> Connection:
    connection: Connection = system.gateway.state.node._connections.by_peer[system.client_id]
    return connection


def node_of(system: System) -> Node:
    node: Node = system.client.state.node
    return node


def events_of(node: Node) -> list[Any]:
    found = []
    while (event := node.poll_event()) is not None:
        found.append(event)
    return found


def ups_of(peer: Any) -> list[ConnectionUp]:
    return [event for event in peer.events if isinstance(event, ConnectionUp)]


PARAMETERS = Parameters(
    PrivateKey(b"\x22" * 32).public,
    b"\x03" * 32,
    Credentials("aaaa", "x" * 22),
    Credentials("bbbb", "y" * 22),
    controlling=True,
    iceless=False,
)


# start


def test_without_relays_no_connection_is_made() -> None:
    node = Node(PrivateKey(b"\x01" * 32), 0.0, EPOCH, Random(1).randbytes)
    with pytest.raises(NoRelays):
        node.upsert_connection("p", PARAMETERS, 0.0)
    assert node.peers == []
    assert node.poll_timeout() is None


@pytest.mark.shows("connectivity", 50)
def test_a_response_waits_for_the_path_and_then_the_connection_stands() -> None:
    """spec/connectivity.md §11 item 50: the init arrives before nomination."""
    system = raw(client_nat="public", gateway_nat="public")
    wire = Wire(system)
    system.portal._request(system.client_id, RESOURCE.id)
    assert system.world.run_until(lambda: node_of(system).is_known(system.gateway_id), 1.0)
    wire.no_checks_until = system.world.now + 0.8  # before the init is repeated
    connection = of_client(system)
    connection.tunnel.start_handshake(system.world.now)
    init = connection.tunnel.poll_datagram()
    assert init is not None
    system.net.send(system.client.host, PORT, Address(system.gateway.host.ips[4], PORT), init)
    system.world.run_for(0.5)
    assert wire.sent["g", RESPONSE] == 0
    assert of_gateway(system).path is None
    assert not ups_of(system.gateway)
    assert system.world.run_until(lambda: both_ready(system), 4.0)
    assert len(ups_of(system.gateway)) == 1
    # an unanswered init is repeated, and each is answered once
    assert wire.sent["g", RESPONSE] == wire.sent["c", INIT] in (1, 2, 3)


def test_the_controlling_side_starts_the_only_handshake() -> None:
    """spec/connectivity.md §6.5."""
    system = raw()
    wire = Wire(system)
    connect(system)
    system.world.run_for(10.0)
    assert (wire.sent["c", INIT], wire.sent["g", INIT], wire.sent["g", RESPONSE]) == (1, 0, 1)
    assert len([e for e in system.client.events if isinstance(e, ConnectionUp)]) == 1
    assert len([e for e in system.gateway.events if isinstance(e, ConnectionUp)]) == 1


# renewal


@pytest.mark.shows("connectivity", 52)
def test_the_same_parameters_wake_the_connection() -> None:
    """spec/connectivity.md §11 item 52, first half."""
    system = raw()
    connect(system)
    wire = Wire(system)
    node, connection = node_of(system), of_client(system)
    system.world.run_for(20.0)
    for attempt in range(80):
        node.upsert_connection(system.gateway_id, connection.parameters, system.world.now)
        lines = [e.candidate for e in events_of(node) if isinstance(e, node_events.CandidateAdded)]
        assert len(lines) == len(set(lines)) >= 3, attempt  # host, reflexive, relayed
        system.client.drain()
        system.world.run_for(0.5)
    assert of_client(system) is connection
    assert wire.sent["c", INIT] == 2  # within 40 s
    assert len([e for e in system.client.events if isinstance(e, ConnectionUp)]) == 1
    assert len([e for e in system.gateway.events if isinstance(e, ConnectionUp)]) == 1


@pytest.mark.shows("connectivity", 52)
@pytest.mark.parametrize(
    "change",
    [
        {"preshared_key": b"\x55" * 32},
        {"local": Credentials("cccc", "z" * 22)},
        {"remote": Credentials("cccc", "z" * 22)},
        {"remote_key": PrivateKey(b"\x44" * 32).public},
        {"iceless": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_parameters_replace_the_connection(change: dict[str, Any]) -> None:
    """spec/connectivity.md §11 item 52, second half."""
    system = raw()
    connect(system)
    gateway, old = system.gateway.state.node, of_gateway(system)
    packet = build_udp(system.client_ip, SERVER, 1, 2, b"late")
    late = node_of(system).encapsulate(system.gateway_id, packet, 0, system.world.now)
    assert isinstance(late, Transmit)
    changed = replace(old.parameters, **change)
    gateway.upsert_connection(system.client_id, changed, system.world.now)
    fresh = of_gateway(system)
    assert fresh is not old
    assert fresh.index != old.index
    assert not gateway.is_ready(system.client_id)
    local, remote = Address(system.gateway.host.ips[4], PORT), Address(b"\x01\x02\x03\x04", 5)
    assert gateway.handle_network_input(local, remote, late.payload, system.world.now) is DropReason.WG_UNKNOWN_SESSION
    assert not [e for e in events_of(gateway) if not isinstance(e, node_events.CandidateAdded)]  # dropped silently


def test_indices_are_given_back() -> None:
    system = raw()
    node = node_of(system)
    for n in range(300):
        node.upsert_connection("p", replace(PARAMETERS, preshared_key=bytes([n % 256]) * 32), system.world.now)
        if n % 3 == 0:
            node.remove("p")
    assert len(node._connections.by_index) <= 1
    node.remove("p")
    assert node._connections.by_index == node._connections._by_key == node._connections._by_ufrag == {}


# failure


@pytest.mark.shows("connectivity", 51)
def test_ten_seconds_without_candidates_end_it() -> None:
    """spec/connectivity.md §11 item 51."""
    system = raw()
    node, start = node_of(system), system.world.now
    node.upsert_connection("p", PARAMETERS, start)
    node.add_remote_candidate("p", "candidate:1 1 udp 100 192.0.2.1 5 typ host ufrag zzzz", start)  # not ours
    node.add_remote_candidate("p", "rubbish", start)
    system.client.drain()
    system.world.run_until(lambda: not node.is_known("p"), 20.0)
    assert round(system.world.now - start, 3) == 10.0
    down = [e for e in system.client.events if isinstance(e, ConnectionDown)]
    assert [(e.peer_id, e.reason) for e in down] == [("p", "the peer sent no candidates within 10 s")]


@pytest.mark.shows("connectivity", 51)
def test_with_a_dead_candidate_ice_decides() -> None:
    """spec/connectivity.md §11 items 23 and 51: about 16.5 s and 2 s from the candidate on."""
    system = raw()
    node, start = node_of(system), system.world.now
    node.upsert_connection("p", PARAMETERS, start)
    node.add_remote_candidate("p", "candidate:1 1 udp 100 192.0.2.1 5 typ host ufrag bbbb", start)
    system.client.drain()
    system.world.run_until(lambda: not node.is_known("p"), 60.0)
    assert 16.0 < system.world.now - start < 19.0
    assert [e.reason for e in system.client.events if isinstance(e, ConnectionDown)] == ["ICE found no working path"]


@pytest.mark.shows("connectivity", 51)
def test_a_silent_gateway_is_noticed_and_a_silent_client_waited_for() -> None:
    """spec/connectivity.md §5.4: the client detects loss, the gateway waits."""
    system = raw(client_nat="public", gateway_nat="public")
    connect(system)
    system.gateway.is_dead = True
    start = system.world.now
    system.world.run_until(lambda: not node_of(system).is_known(system.gateway_id), 60.0)
    assert 16.5 < system.world.now - start < 24.0
    other = raw(client_nat="public", gateway_nat="public")
    connect(other)
    other.client.is_dead = True
    other.world.run_for(100.0)
    assert other.gateway.state.node.is_known(other.client_id)


def test_a_path_that_returns_in_time_is_kept() -> None:
    system = raw()
    connect(system)
    system.net.faults.loss = 1.0
    system.world.run_for(12.0)
    system.net.faults.loss = 0.0
    system.world.run_for(20.0)
    assert node_of(system).is_ready(system.gateway_id)
    assert not [e for e in system.client.events if isinstance(e, ConnectionDown)]


# idle


def test_twenty_seconds_without_packets_slow_the_checks_down() -> None:
    """spec/connectivity.md §8.1."""
    system = raw(client_nat="public", gateway_nat="public")
    connect(system)
    system.client.send(build_udp(system.client_ip, SERVER, 1, 2, b"x"))
    system.world.run_for(19.0)
    assert of_client(system).state is State.CONNECTED
    system.world.run_for(2.0)
    client, gateway = of_client(system), of_gateway(system)
    assert (client.state, gateway.state) == (State.IDLE, State.IDLE)
    assert (client.agent.profile, gateway.agent.profile) == (CLIENT_IDLE, SERVER_IDLE)
    system.world.run_for(30.0)
    wire = Wire(system)
    system.world.run_for(100.0)
    pairs = len(client.agent._pairs)
    assert wire.sent["c", "check"] <= 5 * pairs
    system.client.send(build_udp(system.client_ip, SERVER, 1, 2, b"y"))
    system.world.run_for(0.1)
    assert system.gateway.packets[-1].payload == b"y"
    assert (client.state, gateway.state) == (State.CONNECTED, State.CONNECTED)
    assert (client.agent.profile, gateway.agent.profile) == (CLIENT_DEFAULT, SERVER_DEFAULT)


@pytest.mark.parametrize("how", ["candidate", "withdrawal", "authorization"])
def test_news_wake_an_idle_connection(how: str) -> None:
    system = raw()
    connect(system)
    system.world.run_for(25.0)
    connection, node, now = of_client(system), node_of(system), system.world.now
    assert connection.state is State.IDLE
    line = "candidate:1 1 udp 100 192.0.2.1 5 typ host"
    if how == "candidate":
        node.add_remote_candidate(system.gateway_id, line, now)
    elif how == "withdrawal":
        node.remove_remote_candidate(system.gateway_id, line, now)
    else:
        node.upsert_connection(system.gateway_id, connection.parameters, now)
    assert connection.state is State.CONNECTED


# end


def test_closing_says_goodbye_only_if_the_connection_stands() -> None:
    """spec/connectivity.md §8.6."""
    system = raw()
    node = node_of(system)
    node.upsert_connection("p", PARAMETERS, system.world.now)
    system.client.drain()
    node.close("p", b"x" * 48, system.world.now)
    assert node.poll_transmit() is None
    assert events_of(node) == []
    node.close("p", b"x" * 48, system.world.now)
    connect(system)
    node.close(system.gateway_id, build_udp(system.client_ip, SERVER, 1, 2, b"bye").data, system.world.now)
    assert events_of(node) == [node_events.ConnectionClosed(system.gateway_id)]
    system.client.drain()
    system.world.run_for(0.1)
    assert system.gateway.packets[-1].payload == b"bye"


@pytest.mark.shows("connectivity", 25)
@pytest.mark.parametrize("how", ["removed", "failed"])
def test_packets_of_a_lost_connection_are_unknown_at_once(how: str) -> None:
    """The official programs remember lost connections for 5 s to log less; ours only count (docs/deviations.md)."""
    system = raw()
    connect(system)
    system.client.is_dead = True
    gateway = system.gateway.state.node
    if how == "failed":
        other = replace(of_gateway(system).parameters, preshared_key=b"\x55" * 32)
        gateway.upsert_connection(system.client_id, other, system.world.now)
    late = late_datagrams(system)
    if how == "failed":
        assert system.world.run_until(lambda: not gateway.is_known(system.client_id), 11.0)
    else:
        gateway.remove(system.client_id)
    local, remote = Address(system.gateway.host.ips[4], PORT), Address(b"\x01\x02\x03\x04", 5)
    lost_at = system.world.now
    for age in (1.0, 5.1):
        verdicts = [gateway.handle_network_input(local, remote, datagram, lost_at + age) for datagram in late]
        unknown = DropReason.UNKNOWN_CONNECTION
        assert verdicts == [DropReason.WG_UNKNOWN_SESSION, unknown, unknown, unknown, unknown]
        packet = build_udp(SERVER, system.client_ip, 1, 2, b"x")
        assert gateway.encapsulate(system.client_id, packet, 0, lost_at + age) is DropReason.NOT_CONNECTED
        gateway.add_remote_candidate(system.client_id, of_client_line(system), lost_at + age)
        assert gateway.poll_event() is None
        assert gateway.poll_transmit() is None


def late_datagrams(system: System) -> list[bytes]:
    """Found by index: data, response, cookie; by key: an init; by ufrag: a check."""
    connection, now = of_client(system), system.world.now
    index = (of_gateway(system).index << 8 | 1).to_bytes(4, "little")
    connection.tunnel.start_handshake(now, force=True)
    init = connection.tunnel.poll_datagram()
    connection.agent.handle_timeout(now + 2.0)
    check = connection.agent.poll_transmit()
    assert init is not None
    assert check is not None
    data, cookie = (bytes((kind, 0, 0, 0)) + index + bytes(56) for kind in (4, 3))
    response = b"\x02\0\0\0" + bytes(4) + index + bytes(80)
    return [data, response, cookie, init, check.payload]


def of_client_line(system: System) -> str:
    candidate = of_client(system).agent.local_candidates[0]
    return str(candidate.to_sdp(of_client(system).parameters.local.ufrag))


# time and output


@pytest.mark.shows("connectivity", 28)
def test_a_deadline_that_does_not_change_is_due_once() -> None:
    system = raw()
    node, start = node_of(system), system.world.now
    node.upsert_connection("p", PARAMETERS, start)
    node.update_relays([system.relays[0].id], (), start)  # whose timers would come in between
    events_of(node)
    for now, due, told in (
        (start, start + 2.5, []),
        (start + 2.5, start + 5.0, [node_events.PeerLost("p")]),  # no path yet: the portal may tell the peer again
        (start + 5.0, start + 7.5, [node_events.PeerLost("p")]),
        (start + 9.999, start + 10.0, [node_events.PeerLost("p")]),
        (start + 9.9995, start + 10.0, []),
    ):
        node.handle_timeout(now)
        assert node.poll_timeout() == due
        assert events_of(node) == told
    node.handle_timeout(start + 10.0)
    assert [type(event) for event in events_of(node)] == [node_events.ConnectionFailed]
    node.handle_timeout(start + 10.0)
    assert node.poll_event() is None
    assert node.poll_timeout() is None


def test_a_packet_waits_for_a_handshake_that_is_under_way() -> None:
    """After a long sleep the session is over; the first packet starts a handshake, the second finds it under way."""
    system = raw()
    connect(system)
    node, later = node_of(system), system.world.now + 600.0
    packet = build_udp(system.client_ip, SERVER, 1, 2, b"x")
    assert node.encapsulate(system.gateway_id, packet, 0, later) is None
    assert node.encapsulate(system.gateway_id, packet, 0, later) is None
    sent = []
    while (transmit := node.poll_transmit()) is not None:
        sent.append(transmit)
    assert sent
    assert all(transmit.payload for transmit in sent)


@pytest.mark.shows("connectivity", 29)
def test_what_cannot_be_encrypted_is_not_sent() -> None:
    system = raw()
    connect(system)
    node, now = node_of(system), system.world.now
    assert node.encapsulate(system.gateway_id, bytes(1301), 0, now) is DropReason.TOO_BIG
    gateway = system.gateway.state.node
    stale = now + 181.0  # of the gateway's session, which it may not renew
    packet = build_udp(SERVER, system.client_ip, 1, 2, b"x")
    assert gateway.encapsulate(system.client_id, packet, 0, stale) is DropReason.WG_NO_SESSION
    for one in (node, gateway):
        assert one.poll_transmit() is None
    sent = node.encapsulate(system.gateway_id, build_udp(system.client_ip, SERVER, 1, 2, b"next"), 0, now)
    assert isinstance(sent, Transmit)


@pytest.mark.shows("connectivity", 30)
def test_a_list_with_bad_candidates_keeps_the_good_ones() -> None:
    """spec/connectivity.md §4.2, through the portal's message."""
    system = raw()
    node = node_of(system)
    node.upsert_connection(system.gateway_id, PARAMETERS, system.world.now)
    good = [f"candidate:1 1 udp {100 + n} 192.0.2.{n} 5 typ host ufrag bbbb" for n in (1, 2)]
    changes = [(" 101 ", " x "), (" 101 ", " -1 "), ("udp", "tcp"), ("192.", "1922."), ("candidate:", "")]
    bad = ["", "rubbish", *(good[0].replace(*change) for change in changes)]
    system.client.tell(c.GatewayIceCandidates(system.gateway_id, (bad[0], good[0], *bad[1:], good[1])))
    known = of_client(system).agent.remote_candidates
    assert [str(candidate.address) for candidate in known] == ["192.0.2.1:5", "192.0.2.2:5"]


# load


class Flood:
    """Well-formed handshakes of nobody."""

    def __init__(self, system: System, per_second: int) -> None:
        self.system, self.outcomes = system, Counter[DropReason | None]()
        self.gap = 1.0 / per_second
        key = system.portal.peers[system.gateway_id][2]
        self.local = Address(system.gateway.host.ips[4], PORT)
        tunnel = Tunnel(PrivateKey(b"\x77" * 32), key, bytes(32), 1, 0.0, EPOCH, system.world.bytes)
        tunnel.start_handshake(0.0)
        init = tunnel.poll_datagram()
        assert init is not None
        self.init = init
        self.until = 0.0

    def run(self, seconds: float) -> None:
        self.until = self.system.world.now + seconds
        self._send()

    def _send(self) -> None:
        now = self.system.world.now
        if now < self.until:
            source = Address(b"\xc6\x33\x64\x07", 4000)
            state = self.system.gateway.state
            self.outcomes[state.node.handle_network_input(self.local, source, self.init, now)] += 1
            self.system.gateway.drain()
            self.system.world.after(self.gap, self._send)


@pytest.mark.shows("connectivity", 49)
def test_under_load_the_flood_gets_cookies_and_peers_get_in() -> None:
    """spec/connectivity.md §6.4, §11 item 49, through the node."""
    system = raw()
    wire = Wire(system)
    flood = Flood(system, 400)
    flood.run(12.0)
    system.world.run_for(0.9)
    assert flood.outcomes[DropReason.UNKNOWN_CONNECTION] == 100
    assert flood.outcomes[DropReason.WG_UNDER_LOAD] == wire.sent["g", COOKIE] > 200
    system.portal._request(system.client_id, RESOURCE.id)
    assert system.world.run_until(lambda: both_ready(system), 8.0)
    assert wire.sent["c", INIT] == 2  # the second proves the address
    assert system.gateway.state.node.peers == [system.client_id]


def test_a_handshake_of_a_stranger_is_an_unknown_connection() -> None:
    system = raw()
    flood = Flood(system, 50)
    flood.run(1.0)
    system.world.run_for(1.1)
    assert set(flood.outcomes) == {DropReason.UNKNOWN_CONNECTION}
    assert SendToPortal not in [type(e) for e in system.gateway.events[2:]]


# a peer that starts over with the same credentials


def test_a_silent_peer_that_asks_again_is_looked_for_anew() -> None:
    """The controlled side would hold on to a pair for minutes that its peer has given up."""
    system = raw()
    connect(system)
    system.client.is_dead = True
    gateway, connection = system.gateway.state.node, of_gateway(system)
    before, path = connection.agent, connection.path
    system.world.run_for(1.0)
    gateway.upsert_connection(system.client_id, connection.parameters, system.world.now)
    assert connection.agent is before
    system.world.run_for(15.0)
    gateway.upsert_connection(system.client_id, connection.parameters, system.world.now)
    assert connection.agent is not before
    assert connection.path == path  # in use until there is a better one
    kinds = {candidate.kind.value for candidate in connection.agent.local_candidates}
    assert kinds == {"host", "srflx", "relay"}


def test_the_controlling_side_finds_out_by_itself() -> None:
    system = raw()
    connect(system)
    node, connection = node_of(system), of_client(system)
    before = connection.agent
    system.world.run_for(60.0)
    node.upsert_connection(system.gateway_id, connection.parameters, system.world.now)
    assert connection.agent is before


def test_a_restart_of_ice_interrupts_no_traffic() -> None:
    system = raw()
    connect(system)
    system.world.run_for(100.0)
    of_gateway(system).restart_ice(system.world.now)
    system.portal._request(system.client_id, RESOURCE.id)
    for n in range(40):
        system.client.send(build_udp(system.client_ip, SERVER, 1, 2, b"%d" % n))
        system.world.run_for(0.5)
    system.world.run_for(0.5)
    assert [p.payload for p in system.gateway.packets] == [b"%d" % n for n in range(40)]
    assert of_gateway(system).agent.nominated is not None
