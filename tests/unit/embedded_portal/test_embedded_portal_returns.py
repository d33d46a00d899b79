"""Peers that go and come back: relays that only lost the portal, gateways that restart, two of one identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from embedded_portal_world import Peer, World, policy_of, policy_text

from fz_core.embedded.store import Store


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(policy_of(tmp_path))


def request(world: World, name: str = "net") -> dict[str, Any]:
    return {"resource_id": world.resource(name), "connected_gateway_ids": []}


def reasons(client: Peer) -> list[str]:
    return [failed["reason"] for failed in client.take("authorization_creation_failed")]


# relays


def relayed(world: World, count: int = 2) -> tuple[list[Peer], Peer, Peer, list[str]]:
    """Relays with their ids, and a client and a gateway that know them."""
    relays = [world.relay(secret=f"{n:064d}") for n in range(count)]
    world.advance(1.0)
    client, gateway = world.client(), world.gateway()
    found = {relay.session_id: world.state._hub.sessions[relay.session_id].relay_id for relay in relays}
    return relays, client, gateway, [str(found[relay.session_id]) for relay in relays]


def test_a_relay_that_only_lost_the_portal_is_waited_for(world: World) -> None:
    relays, client, gateway, _ = relayed(world)
    relays[0].leave()
    world.advance(0.9)
    world.relay(secret=f"{0:064d}")
    world.advance(5.0)
    assert client.take("relays_presence") == gateway.take("relays_presence") == []


def test_a_dead_relay_is_told_to_both_ends_at_once_with_a_replacement(world: World) -> None:
    relays, client, gateway, ids = relayed(world, 3)
    given = {entry["id"] for entry in client.init["relays"]}  # type: ignore[attr-defined]
    lost = next(n for n in range(3) if ids[n] in given)
    relays[lost].leave()
    (look,) = world.looks
    assert look.relay_id == ids[lost]
    assert [str(a) for a in look.addresses] == ["192.0.2.1:3478", "[2001:db8::1]:3478"]
    world.state.handle_relay_dead(look.relay_id, world.now)
    world.advance(0.0)
    (presence,) = client.take("relays_presence")
    assert presence["disconnected_ids"] == [ids[lost]]
    assert {entry["id"] for entry in presence["connected"]} == set(ids) - {ids[lost]}
    told = gateway.take("relays_presence")
    assert all(p["disconnected_ids"] in ([], [ids[lost]]) for p in told)
    world.advance(5.0)
    assert client.take("relays_presence") == []


def test_a_relay_that_is_back_cannot_be_declared_dead(world: World) -> None:
    relays, client, _, ids = relayed(world)
    relays[0].leave()
    world.relay(secret=f"{0:064d}")
    world.state.handle_relay_dead(ids[0], world.now)
    world.advance(5.0)
    assert client.take("relays_presence") == []


def test_one_that_asks_for_relays_meanwhile_is_still_told_of_the_loss(world: World) -> None:
    relays, client, _, ids = relayed(world)
    relays[0].leave()
    world.advance(0.5)
    fresh = world.client(key=b"f" * 32, token="client-token-bob-001", params={"external_id": "bob"})
    client.send("no_relays", {})
    (answer,) = client.take("relays_presence")
    assert {entry["id"] for entry in answer["connected"]} == {ids[1]}
    assert {entry["id"] for entry in fresh.init["relays"]} == {ids[1]}  # type: ignore[attr-defined]
    back = world.relay(secret=f"{0:064d}")
    world.advance(1.0)
    for peer in (client, fresh):
        (presence,) = peer.take("relays_presence")
        assert {entry["id"] for entry in presence["connected"]} == set(ids)
    back.leave()
    world.advance(1.0)
    assert [p["disconnected_ids"] for p in client.take("relays_presence")] == [[ids[0]]]


# gateways


def test_a_request_waits_for_a_gateway_that_restarts(world: World) -> None:
    client, gateway = world.client(), world.gateway()
    world.authorize(client, gateway)
    gateway.leave()
    client.send("request_authorization", request(world))
    world.advance(1.2)
    assert reasons(client) == []
    gateway = world.gateway(key=b"G" * 32)
    assert client.take("resource_deleted") == [], "that would void its request"
    assert gateway.inbox[-1]["event"] == "create_authorization"
    (order,) = gateway.take("create_authorization")
    gateway.send("authorization_created", {"ref": order["ref"]})
    assert len(client.take("authorization_created")) == 1


def test_other_resources_of_that_gateway_are_asked_for_anew(world: World) -> None:
    client, gateway = world.client(), world.gateway()
    for name in ("net", "web"):
        world.authorize(client, gateway, name)
    gateway.leave()
    client.send("request_authorization", request(world))
    world.gateway(key=b"G" * 32)
    assert client.take("resource_deleted") == [world.resource("web")]


def test_the_wait_ends_with_offline(world: World) -> None:
    client, gateway = world.client(), world.gateway()
    gateway.leave()
    world.advance(2.0)
    for _ in range(2):
        client.send("request_authorization", request(world))
    world.advance(2.9)
    assert reasons(client) == []
    world.advance(0.1)
    assert reasons(client) == ["offline"]
    client.send("request_authorization", request(world))
    assert reasons(client) == ["offline"], "nobody is expected any more"


def test_nobody_waits_for_a_gateway_that_was_expelled(world: World, tmp_path: Path) -> None:
    client, _ = world.client(), world.gateway()
    text = policy_text().replace("gateway-token-office", "another-token-office")
    world.state.set_policy(policy_of(tmp_path, text), world.now)
    world.drain()
    client.send("request_authorization", request(world))
    assert reasons(client) == ["offline"]


def test_after_a_restart_of_the_portal_known_gateways_are_waited_for(tmp_path: Path) -> None:
    before = World(policy_of(tmp_path))
    before.gateway()
    store: Store = before.store
    world = World(policy_of(tmp_path), store)
    client = world.client()
    client.send("request_authorization", request(world))
    world.advance(3.0)
    assert reasons(client) == []
    assert len(world.gateway().take("create_authorization")) == 1


def test_what_waits_is_dropped_with_its_client_and_its_permission(world: World, tmp_path: Path) -> None:
    client, gateway = world.client(), world.gateway()
    gateway.leave()
    client.send("request_authorization", request(world))
    world.state.set_policy(
        policy_of(tmp_path, policy_text().replace('resource = "net"', 'resource = "web"')), world.now
    )
    world.drain()
    client.send("request_authorization", request(world, "web"))
    client.leave()
    assert world.gateway().take("create_authorization") == []
    assert not world.state._access.held._held


def test_a_gateway_without_answer_is_replaced_by_its_new_connection(world: World) -> None:
    """Its machine was cut off and came back; the portal still believes in the old connection."""
    client, gateway = world.client(), world.gateway()
    client.send("request_authorization", request(world))
    fresh = world.open("gateway")
    assert gateway.is_closed
    assert reasons(client) == []
    fresh.join()
    assert len(fresh.take("create_authorization")) == 1


def test_an_order_that_found_no_relay_is_repeated(world: World) -> None:
    """An official gateway that just started answers `no_relays`, and no more."""
    world.relay()
    client, gateway = world.client(), world.gateway()
    client.send("request_authorization", request(world))
    (order,) = gateway.take("create_authorization")
    gateway.send("no_relays", {})
    world.advance(0.1)
    assert gateway.take("create_authorization") == [order]
    gateway.send("authorization_created", {"ref": order["ref"]})
    assert len(client.take("authorization_created")) == 1
    world.advance(20.0)
    assert gateway.take("create_authorization") == []


def test_but_less_and_less_often(world: World) -> None:
    client, gateway = world.client(), world.gateway()
    client.send("request_authorization", request(world))
    times = []
    while world.now < 1014.0:
        world.advance(0.1)
        if gateway.take("create_authorization"):
            times.append(world.now)
            gateway.send("no_relays", {})
    assert len(times) <= 8
    world.advance(1.0)
    assert reasons(client) == ["offline"]
    world.advance(20.0)
    assert gateway.take("create_authorization") == []


# two of one identity


def test_a_process_that_comes_back_is_no_rival(world: World) -> None:
    for role in ("client", "gateway"):
        old = getattr(world, role)()
        assert world.state.rival_of(world.knock_of(role), world.now) is None
        world.open(role)
        assert old.is_closed
        assert old.last_word is None


def test_another_key_is_another_process(world: World) -> None:
    for role in ("client", "gateway"):
        old = getattr(world, role)()
        assert world.state.rival_of(world.knock_of(role, key=b"2" * 32), world.now) == old.session_id
        assert world.state.rival_of(world.knock_of(role, params={"external_id": "other"}), world.now) is None
    assert world.state.rival_of(world.knock_of("client", token="nobody's"), world.now) is None
    assert world.state.rival_of(world.knock_of("relay"), world.now) is None


def test_of_two_clients_the_older_is_told_to_stop(world: World) -> None:
    old = world.client()
    world.client(key=b"2" * 32)
    assert old.is_closed
    assert old.last_word == {
        "topic": "client", "event": "disconnect", "payload": {"reason": "token_expired"}, "ref": None
    }  # fmt: skip
    old.send("request_authorization", request(world))
    assert reasons(old) == [], "it is not heard any more"
