"""A node's relays come, go and change (spec/connectivity.md §3.6, §3.8)."""

from __future__ import annotations

from typing import Any

import pytest

from fz_core.node import events
from fz_core.node.node import Node
from fz_core.packet import Address, DropReason, build_udp
from fz_core.portal import client as c
from fz_core.portal.types import RelayEntry, merge_relays
from fz_core.stun import Message
from fz_core.tunnel.events import PathInUse, SendToPortal
from fz_core.turn.server_auth import relay_credentials
from tests.sim.raw_client import RawClient
from tests.sim.system import EPOCH, RESOURCE, SERVER, Scenario, SimRelay, System

REFRESH, BINDING = 4, 1


def system_of(**scenario: Any) -> System:
    return System(2, Scenario(**scenario), RawClient)


def connect(system: System) -> None:
    system.portal._request(system.client_id, RESOURCE.id)
    assert system.world.run_until(lambda: bool(node_of(system).is_ready(system.gateway_id)), 3.0)
    system.world.run_for(1.0)


def node_of(system: System) -> Node:
    node: Node = system.client.state.node
    return node


def entries(system: System, salt: str = "") -> tuple[RelayEntry, ...]:
    system.portal.relay_round = salt
    return merge_relays(system.portal.relay_entries(system.client_id))


def node_events(node: Node) -> list[events.NodeEvent]:
    found = []
    while (event := node.poll_event()) is not None:
        found.append(event)
    return found


def stun_methods(node: Node) -> list[tuple[int, Address]]:
    found = []
    while (transmit := node.poll_transmit()) is not None:
        message = Message.parse_untrusted(transmit.payload)
        if isinstance(message, Message):
            found.append((message.method, transmit.remote))
    return found


def test_the_same_relay_again_is_left_alone() -> None:
    system = system_of()
    node = node_of(system)
    before = node._relays.get(system.relays[0].id)
    node.update_relays((), entries(system), system.world.now)
    assert node._relays.get(system.relays[0].id) is before
    assert stun_methods(node) == []
    assert node.has_relay


def test_relays_that_are_not_mentioned_are_checked_once() -> None:
    system = system_of(relays=2)
    node = node_of(system)
    first, second = entries(system)
    node.update_relays((), [first], system.world.now)
    assert stun_methods(node) == [(REFRESH, second.v4)]
    node.update_relays((), [first, second], system.world.now)
    assert stun_methods(node) == []
    system.world.run_for(0.9)
    assert node.relay_count == 2
    node.handle_timeout(system.world.now + 0.2)
    assert REFRESH not in [method for method, _ in stun_methods(node)]  # one attempt of one second


def test_other_credentials_make_a_new_allocation() -> None:
    system = system_of(blocked=True)
    connect(system)
    node = node_of(system)
    (relay,) = node._relays
    old = relay.relayed_v4
    system.client.events.clear()
    system.client.tell(c.RelaysPresence((), relays_of(system, "other")))
    withdrawn = [e.message for e in system.client.events if isinstance(e, SendToPortal)]
    assert [type(m) for m in withdrawn] == [c.WithdrawGatewayIceCandidates]
    system.world.run_for(3.0)
    (fresh,) = node._relays
    assert fresh is not relay
    assert fresh.relayed_v4 not in (None, old)
    assert is_alive(system)


def relays_of(system: System, salt: str) -> Any:
    system.portal.relay_round = salt
    return system.portal.relay_entries(system.client_id)


def is_alive(system: System) -> bool:
    count = len(system.gateway.packets)
    system.client.send(build_udp(system.client_ip, SERVER, 1, 2, b"%d" % count))
    return system.world.run_until(lambda: len(system.gateway.packets) > count, 0.5)


@pytest.mark.shows("connectivity", 53)
def test_withdrawal_names_the_candidate_in_the_other_dialect() -> None:
    """spec/connectivity.md §11 item 53."""
    system = system_of()
    connect(system)
    connection = node_of(system)._connections.by_peer[system.gateway_id]
    gateway_side = system.gateway.state.node._connections.by_peer[system.client_id]
    (relay,) = node_of(system)._relays
    address = relay.relayed_v4
    assert address in [r.address for r in gateway_side.agent.remote_candidates]
    system.client.events.clear()
    system.client.tell(c.RelaysPresence((relay.relay_id,), ()))
    (message,) = [e.message for e in system.client.events if isinstance(e, SendToPortal)]
    (line,) = message.candidates
    words = line.split()
    ending = f"udp 50331391 {address.host} {address.port} typ relay raddr 0.0.0.0 rport 0"
    assert words[2:] == ending.split()
    system.world.run_for(0.1)
    assert address not in [r.address for r in gateway_side.agent.remote_candidates]
    assert address not in [c.address for c in connection.agent.local_candidates]


@pytest.mark.shows("connectivity", 22)
def test_late_datagrams_of_a_dropped_relay_are_nobodys() -> None:
    """spec/connectivity.md §2 stage A, §11 item 22."""
    system = system_of()
    node = node_of(system)
    (relay,) = system.relays
    source = Address(relay.host.ips[4], 3478)
    local = Address(system.client.host.ips[4], 52625)
    node.update_relays([relay.id], (), system.world.now)
    binding = b"\x01\x01\x00\x00\x21\x12\xa4\x42" + bytes(12)
    for datagram in (binding, b"\x40\x00\x00\x01x"):
        assert node.handle_network_input(local, source, datagram, system.world.now) is DropReason.UNKNOWN_CONNECTION
    # WireGuard from there is a peer's own
    data = b"\x04\x00\x00\x00" + bytes(28)
    assert node.handle_network_input(local, source, data, system.world.now) is DropReason.WG_UNKNOWN_SESSION


def test_a_connection_without_relay_moves_as_soon_as_one_answers() -> None:
    """spec/connectivity.md §11 item 27: not at some later timer."""
    system = system_of()
    connect(system)
    node = node_of(system)
    (old,) = system.relays
    system.client.tell(c.RelaysPresence((old.id,), ()))
    system.world.run_for(5.0)
    connection = node._connections.by_peer[system.gateway_id]
    assert connection.relay_id == old.id
    assert is_alive(system)
    other = SimRelay(system.world, system.net, "203.0.113.150", None)
    key = system.portal.peers[system.client_id][2]
    system.client.tell(c.RelaysPresence((), other.entries(key)))
    assert system.world.run_until(lambda: connection.relay_id == other.id, 0.021)
    system.world.run_for(1.0)
    (relay,) = node._relays
    assert relay.relayed_v4 in [c.address for c in connection.agent.local_candidates]


def test_a_connection_moves_to_the_relay_that_is_left() -> None:
    system = system_of(relays=2, blocked=True)
    connect(system)
    connection = node_of(system)._connections.by_peer[system.gateway_id]
    used = connection.relay_id
    system.client.tell(c.RelaysPresence((used,), ()))
    assert connection.relay_id != used
    system.world.run_for(3.0)
    assert is_alive(system)
    assert system.client.state.node.peers == [system.gateway_id]


def test_the_end_of_the_last_relay_is_told_without_any_timer() -> None:
    """spec/connectivity.md §3.5, §3.6: the answer 401 to expired credentials ends it, and nothing else is pending."""
    system = system_of()
    node = node_of(system)
    (relay,) = system.relays
    expires_at = int(EPOCH + system.world.now + 5)
    username, password = relay_credentials(expires_at, "salt", relay.secret)
    address = Address(relay.host.ips[4], 3478)
    node.update_relays((), [RelayEntry(relay.id, address, None, username, password)], system.world.now)
    system.client.drain()
    system.world.run_for(10.0)
    assert node.has_relay
    node.update_relays((), (), system.world.now)
    system.client.drain()
    assert system.world.run_until(lambda: SendToPortal(c.NoRelays()) in system.client.events, 0.5)
    assert node.relay_count == 0
    assert node.poll_timeout() is None


def connections_of(peer: Any) -> list[Any]:
    return list(peer.state.node._connections.by_peer.values())


def test_a_dead_relay_is_found_out_and_told() -> None:
    system = system_of()
    system.relays[0].die()
    assert system.world.run_until(lambda: SendToPortal(c.NoRelays()) in system.client.events, 40.0)
    assert not node_of(system).has_relay


def test_a_dead_relay_is_asked_again_and_serves_once_it_is_back() -> None:
    """The portal may be away too, so that nobody else would bring it back."""
    system = system_of()
    (relay,) = system.relays
    ports = dict(relay.host.ports)
    relay.die()
    assert system.world.run_until(lambda: not node_of(system).has_relay, 60.0)
    system.world.run_for(300.0)
    relay.host.ports.update(ports)
    assert system.world.run_until(lambda: node_of(system).has_relay, 70.0)


def test_paths_over_a_lost_relay_send_nothing_from_its_address() -> None:
    """The underlay refuses datagrams from addresses that are not the host's."""
    system = system_of(client_nat="symmetric", gateway_nat="symmetric")
    connect(system)
    assert [e for e in system.gateway.events if isinstance(e, PathInUse)][-1].relayed
    (connection,) = connections_of(system.gateway)
    assert connection.path.via_relay
    connection.tunnel.start_handshake(system.world.now, True)
    system.gateway.tell(c.RelaysPresence((system.relays[0].id,), ()))
    system.world.run_for(6.0)
    assert connection.path.via_relay  # nothing better was found
