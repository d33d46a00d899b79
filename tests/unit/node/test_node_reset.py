"""A client's network changes under it (spec/connectivity.md §8.9)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fz_core.crypto import PrivateKey
from fz_core.ice import CandidateKind
from fz_core.node import events
from fz_core.node.iceless import IcelessConnection
from fz_core.node.node import Node
from tests.sim.raw_client import RawClient
from tests.sim.system import RESOURCE, Scenario, System


def system_of(**scenario: Any) -> System:
    system = System(2, Scenario(**scenario), RawClient)
    system.portal._request(system.client_id, RESOURCE.id)
    assert system.world.run_until(lambda: bool(node_of(system).is_ready(system.gateway_id)), 3.0)
    system.world.run_for(1.0)
    return system


def node_of(system: System) -> Node:
    node: Node = system.client.state.node
    return node


def reset(system: System) -> list[str]:
    return node_of(system).reset(PrivateKey(system.world.bytes(32)), system.world.now)


@pytest.mark.shows("connectivity", 54)
def test_a_connection_with_ice_ends_and_the_key_changes() -> None:
    system = system_of()
    node, before = node_of(system), node_of(system).public_key
    assert reset(system) == [system.gateway_id]
    assert node.public_key != before
    assert node.peers == []
    assert node.poll_event() == events.ConnectionClosed(system.gateway_id)


def iceless_parameters(system: System) -> Any:
    node = node_of(system)
    known = node._connections.by_peer[system.gateway_id].parameters
    return replace(known, iceless=True)


@pytest.mark.shows("connectivity", 54)
def test_connections_without_ice_live_on_unless_one_has_it() -> None:
    system = system_of()
    node, now = node_of(system), system.world.now
    assert node.upsert_connection(system.gateway_id, iceless_parameters(system), now)
    before = node.public_key
    assert reset(system) == []
    assert node.public_key == before
    assert node.peers == [system.gateway_id]
    with_ice = replace(iceless_parameters(system), iceless=False, remote_key=bytes(range(32)))
    assert node.upsert_connection("another", with_ice, now)
    assert sorted(reset(system)) == sorted([system.gateway_id, "another"])
    assert node.public_key != before


@pytest.mark.shows("connectivity", 27)
def test_after_a_reset_a_connection_without_ice_gets_its_relay_back_and_works() -> None:
    """It waits for a relay as one does whose relay was removed, and the peer finds it by probes and candidates."""
    system = system_of(iceless=True)
    node = node_of(system)
    (connection,) = node._connections.by_peer.values()
    assert isinstance(connection, IcelessConnection)
    system.client.drain()
    assert reset(system) == []
    assert connection.agent.local_candidates == ()
    assert not connection.agent.has_live_path
    system.client.state.handle_timeout(system.world.now)
    system.client.drain()
    assert system.world.run_until(lambda: bool(connection.agent.has_live_path), 2.0)
    system.world.run_for(0.5)
    kinds = {candidate.kind for candidate in connection.agent.local_candidates}
    assert kinds == {CandidateKind.HOST, CandidateKind.SRFLX, CandidateKind.RELAY}
    system.ask(b"after")
    assert system.world.run_until(lambda: b"after" in system.answers, 1.0)
