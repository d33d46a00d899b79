"""ICE or not: one answer per pair, the same at both ends, for as long as both ends are the same."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from embedded_portal_world import Peer, World, policy_of

ON = "iceless = true"


def can(peer: Peer, iceless: bool = True) -> Peer:
    peer.send("set_snownet_capabilities", {"iceless": iceless})
    return peer


def mode(world: World, client: Peer, gateway: Peer, name: str = "net") -> bool:
    """What both were told."""
    both = world.authorize(client, gateway, name)
    assert both["order"]["use_iceless"] is both["answer"]["use_iceless"]
    answer: bool = both["answer"]["use_iceless"]
    return answer


@pytest.mark.parametrize("top", ["", ON])
@pytest.mark.parametrize("client_can", [True, False, None])
@pytest.mark.parametrize("gateway_can", [True, False, None])
def test_it_takes_the_switch_and_both_ends(
    tmp_path: Path, top: str, client_can: bool | None, gateway_can: bool | None
) -> None:
    world = World(policy_of(tmp_path, top=top))
    client, gateway = world.client(), world.gateway()
    for peer, able in ((client, client_can), (gateway, gateway_can)):
        if able is not None:
            can(peer, able)
    world.keep_alive(1.0)
    assert mode(world, client, gateway) is bool(top and client_can and gateway_can)


def test_the_answer_outlives_the_switch(tmp_path: Path) -> None:
    world = World(policy_of(tmp_path, top=ON))
    client, gateway = can(world.client()), can(world.gateway())
    assert mode(world, client, gateway)
    world.state.set_policy(policy_of(tmp_path), world.now)
    world.drain()
    assert mode(world, client, gateway)
    assert mode(world, client, gateway, "web")
    # a new pair is another matter
    fresh = can(world.client(key=b"n" * 32))
    assert not mode(world, fresh, gateway)
    world.state.set_policy(policy_of(tmp_path, top=ON), world.now)
    world.drain()
    assert not mode(world, fresh, gateway)


@pytest.mark.parametrize("role", ["client", "gateway"])
def test_the_answer_outlives_a_lost_portal_connection(tmp_path: Path, role: str) -> None:
    world = World(policy_of(tmp_path, top=ON))
    peers = {"client": can(world.client()), "gateway": can(world.gateway())}
    assert mode(world, peers["client"], peers["gateway"])
    peers[role].leave()
    peers[role] = getattr(world, role)()
    assert mode(world, peers["client"], peers["gateway"]), "before it has said again what it can do"
    can(peers[role])
    assert mode(world, peers["client"], peers["gateway"], "web")


@pytest.mark.parametrize("role", ["client", "gateway"])
def test_a_peer_that_can_do_less_now_is_believed(tmp_path: Path, role: str) -> None:
    world = World(policy_of(tmp_path, top=ON))
    peers = {"client": can(world.client()), "gateway": can(world.gateway())}
    assert mode(world, peers["client"], peers["gateway"])
    peers[role].leave()
    peers[role] = can(getattr(world, role)(), iceless=False)
    assert not mode(world, peers["client"], peers["gateway"])


def test_a_new_key_is_a_new_pair(tmp_path: Path) -> None:
    world = World(policy_of(tmp_path, top=ON))
    client, gateway = can(world.client()), can(world.gateway(), iceless=False)
    assert not mode(world, client, gateway)
    assert mode(world, client, can(world.gateway(key=b"2" * 32)))


def test_requests_wait_for_a_gateway_that_is_about_to_say_what_it_can_do(tmp_path: Path) -> None:
    world = World(policy_of(tmp_path, top=ON))
    client, gateway = can(world.client()), world.gateway()
    request = {"resource_id": world.resource("net"), "connected_gateway_ids": []}
    client.send("request_authorization", request)
    client.send("request_authorization", request)
    assert gateway.take("create_authorization") == []
    can(gateway)
    (order,) = gateway.take("create_authorization")
    assert order["use_iceless"] is True


def test_but_not_for_long(tmp_path: Path) -> None:
    world = World(policy_of(tmp_path, top=ON))
    client, gateway = can(world.client()), world.gateway()
    client.send("request_authorization", {"resource_id": world.resource("net"), "connected_gateway_ids": []})
    world.advance(0.5)
    (order,) = gateway.take("create_authorization")
    assert order["use_iceless"] is False


def test_another_gateway_serves_if_that_one_leaves_instead(tmp_path: Path) -> None:
    world = World(policy_of(tmp_path, top=ON))
    client, gateway = can(world.client()), world.gateway()
    client.send("request_authorization", {"resource_id": world.resource("net"), "connected_gateway_ids": []})
    other = can(world.gateway(params={"external_id": "other"}))
    gateway.leave()
    assert len(other.take("create_authorization")) == 1


def test_two_clients_agree_too(tmp_path: Path) -> None:
    def modes(world: World, one: Peer, other: Peer) -> list[Any]:
        address = other.init["interface"]["ipv4"]  # type: ignore[attr-defined]
        wanted = {"resource_id": world.resource("pool"), "connected_gateway_ids": [], "ipv4": address}
        one.send("request_authorization", wanted)
        told = [peer.take("client_device_access_authorized") for peer in (one, other)]
        return [message["use_iceless"] for (message,) in told]

    bob_is = {"key": b"b" * 32, "token": "client-token-bob-001", "params": {"external_id": "bob"}}
    for able, expected in ((True, True), (False, False)):
        world = World(policy_of(tmp_path, top=ON))
        alice, bob = can(world.client()), can(world.client(**bob_is), able)
        assert modes(world, alice, bob) == [expected, expected]
        world.state.set_policy(policy_of(tmp_path, top="" if able else ON), world.now)
        world.drain()
        assert modes(world, alice, bob) == [expected, expected]


def test_clients_before_1_4_never(tmp_path: Path) -> None:
    world = World(policy_of(tmp_path, top=f"{ON}\nold_clients = true"))
    client, gateway = can(world.client(legacy=True, agent="Debian/12 connlib/1.3.7 (x86_64)")), can(world.gateway())
    client.send("prepare_connection", {"resource_id": world.resource("web"), "connected_gateway_ids": []})
    prepared = client.take("phx_reply")[-1]
    client.send(
        "request_connection",
        {
            "gateway_id": prepared["response"]["gateway_id"],
            "resource_id": world.resource("web"),
            "client_payload": {"ice_parameters": {"username": "u", "password": "p" * 22}, "domain": None},
            "client_preshared_key": base64.b64encode(b"s" * 32).decode(),
        },
    )
    (order,) = gateway.take("request_connection")
    assert not any("iceless" in name for name in order)
