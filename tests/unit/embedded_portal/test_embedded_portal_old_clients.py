"""Clients before 1.4 (`spec/portal-protocol.md` §9): reply-based, with secrets of their own choice."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from embedded_portal_world import UNIX, Peer, World, policy_of, policy_text

OLD_CLIENT = "Debian/12 connlib/1.3.7 (x86_64)"
OLD_GATEWAY = "Debian/12 connlib/1.4.2 (x86_64)"
SECRET = base64.b64encode(b"s" * 32).decode()
ICE = {"username": "mine", "password": "my-password-of-22-chars"}
READY = {"ConnectionAccepted": {"ice_parameters": {"username": "theirs", "password": "their-password-of-22-ch"}}}
NAME = {"name": "www.example.com", "proxy_ips": ["100.96.0.1", "fd00:2021:1111:8000::1"]}
LINES = ["candidate:1 1 udp 1 192.0.2.1 5 typ host"]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(policy_of(tmp_path))


def old_client(world: World, **options: Any) -> Peer:
    return world.client(legacy=True, agent=OLD_CLIENT, **options)


def old_gateway(world: World, **options: Any) -> Peer:
    return world.gateway(legacy=True, agent=OLD_GATEWAY, **options)


def reply_to(peer: Peer, ref: int) -> dict[str, Any] | None:
    """The payload of the reply to a frame."""
    replies = [f["payload"] for f in peer.inbox if f["event"] == "phx_reply" and f["ref"] == ref]
    return replies[0] if replies else None


def ask(world: World, client: Peer, event: str, name: str, **fields: Any) -> int:
    return client.send(event, {"resource_id": world.resource(name), **fields})


def prepare(world: World, client: Peer, name: str = "net", connected: tuple[str, ...] = ()) -> dict[str, Any]:
    """The response to a client that asks which gateway to use."""
    reply = reply_to(client, ask(world, client, "prepare_connection", name, connected_gateway_ids=list(connected)))
    assert reply is not None
    assert reply["status"] == "ok"
    response: dict[str, Any] = reply["response"]
    return response


def connect(world: World, client: Peer, gateway_id: str, name: str = "web") -> int:
    payload = {"ice_parameters": ICE, "domain": NAME}
    fields = {"gateway_id": gateway_id, "client_payload": payload, "client_preshared_key": SECRET}
    return ask(world, client, "request_connection", name, **fields)


def test_a_gateway_is_named_with_its_site_and_address(world: World) -> None:
    client = old_client(world)
    old_gateway(world)
    response = prepare(world, client)
    site = world.state.policy.sites["office"]
    gateway = world.store.devices_of(site.id)[0]
    assert response == {
        "resource_id": world.resource("net"), "site_id": site.id, "gateway_group_id": site.id, "gateway_id": gateway.id,
        "gateway_remote_ip": "192.0.2.9",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("token", "name", "agent", "reason"),
    [
        ("client-token-alice-1", "net", None, "offline"),
        ("client-token-alice-1", "net", "Debian/12 gateway/1.5.0 (x86_64)", "version_mismatch"),
        ("client-token-bob-001", "net", OLD_GATEWAY, "forbidden"),
        ("client-token-alice-1", "pool", OLD_GATEWAY, "not_found"),
    ],
)
def test_why_there_is_no_gateway(world: World, token: str, name: str, agent: str | None, reason: str) -> None:
    client = old_client(world, token=token)
    if agent is not None:
        world.gateway(agent=agent)
    reply = reply_to(client, ask(world, client, "prepare_connection", name))
    assert reply == {"status": "error", "response": {"reason": reason}}


def test_a_connected_gateway_is_preferred(world: World) -> None:
    for n in range(5):
        old_gateway(world, params={"external_id": f"g{n}"})
    client = old_client(world)
    for device in world.store.devices_of(world.state.policy.sites["office"].id):
        for _ in range(4):
            assert prepare(world, client, connected=(device.id,))["gateway_id"] == device.id


def test_a_connection_is_requested_accepted_and_replied(world: World) -> None:
    gateway, client = old_gateway(world), old_client(world)
    gateway_id = prepare(world, client, "web")["gateway_id"]
    ref = connect(world, client, gateway_id)
    assert reply_to(client, ref) is None
    (order,) = gateway.take("request_connection")
    interface = client.init["interface"]  # type: ignore[attr-defined]
    assert order["client"]["payload"] == {"ice_parameters": ICE, "domain": NAME}
    assert order["client"]["peer"] == {
        "persistent_keepalive": 25, "public_key": base64.b64encode(b"c" * 32).decode(), "preshared_key": SECRET,
        "ipv4": interface["ipv4"], "ipv6": interface["ipv6"],
    }  # fmt: skip
    assert order["resource"] == {
        "id": world.resource("web"), "type": "dns", "name": "web", "address": "*.example.com", "filters": [],
    }  # fmt: skip
    assert order["expires_at"] == 2145916800
    answer = gateway.send("connection_ready", {"ref": order["ref"], "gateway_payload": READY})
    assert reply_to(gateway, answer) == {"status": "ok", "response": {}}
    assert reply_to(client, ref) == {
        "status": "ok",
        "response": {
            "resource_id": world.resource("web"), "persistent_keepalive": 25,
            "gateway_public_key": base64.b64encode(b"g" * 32).decode(), "gateway_payload": READY,
        },
    }  # fmt: skip
    assert "authorization_created" not in client.events()


def test_candidates_pass_under_the_names_of_old_clients(world: World) -> None:
    gateway, client = old_gateway(world), old_client(world)
    gateway_id = prepare(world, client, "web")["gateway_id"]
    connect(world, client, gateway_id)
    client_id = gateway.take("request_connection")[0]["client"]["id"]
    mine = {"gateway_ids": [gateway_id], "candidates": LINES}
    client.send("broadcast_ice_candidates", mine)
    client.send("broadcast_invalidated_ice_candidates", mine)
    assert gateway.take("ice_candidates") == [{"client_id": client_id, "candidates": LINES}]
    assert gateway.take("invalidate_ice_candidates") == [{"client_id": client_id, "candidates": LINES}]
    gateway.send("broadcast_ice_candidates", {"client_ids": [client_id], "candidates": LINES})
    assert client.take("ice_candidates") == [{"gateway_id": gateway_id, "candidates": LINES}]


@pytest.mark.parametrize("domain", [None, NAME])
def test_a_connection_is_reused_without_waiting_for_an_answer(world: World, domain: Any) -> None:
    gateway, client = old_gateway(world), old_client(world)
    gateway_id = prepare(world, client, "web")["gateway_id"]
    ref = ask(world, client, "reuse_connection", "web", gateway_id=gateway_id, payload=domain)
    (order,) = gateway.take("allow_access")
    interface = client.init["interface"]  # type: ignore[attr-defined]
    assert (order["client_ipv4"], order["client_ipv6"]) == (interface["ipv4"], interface["ipv6"])
    assert order["payload"] == domain
    assert order["resource"]["id"] == world.resource("web")
    world.keep_alive(60.0)
    assert reply_to(client, ref) is None
    (grant,) = world.store.grants()
    assert (grant.client_id, grant.resource_id) == (order["client_id"], world.resource("web"))


def test_a_gateway_that_answers_allow_access_is_passed_on(world: World) -> None:
    gateway, client = old_gateway(world), old_client(world)
    gateway_id = prepare(world, client, "web")["gateway_id"]
    ref = ask(world, client, "reuse_connection", "web", gateway_id=gateway_id, payload=None)
    (order,) = gateway.take("allow_access")
    gateway.send("connection_ready", {"ref": order["ref"], "gateway_payload": READY})
    reply = reply_to(client, ref)
    assert reply is not None
    assert reply["response"]["gateway_payload"] == READY


def test_a_silent_or_lost_gateway_is_offline(world: World) -> None:
    gateway, client = old_gateway(world), old_client(world)
    gateway_id = prepare(world, client, "web")["gateway_id"]
    offline = {"status": "error", "response": {"reason": "offline"}}
    silent = connect(world, client, gateway_id)
    (order,) = gateway.take("request_connection")
    world.advance(14.9)
    assert reply_to(client, silent) is None
    world.advance(0.1)
    assert reply_to(client, silent) == offline
    late = gateway.send("connection_ready", {"ref": order["ref"], "gateway_payload": READY})
    assert reply_to(gateway, late) == {"status": "error", "response": {"reason": "invalid_ref"}}
    lost = connect(world, client, gateway_id)
    gateway.leave()
    assert reply_to(client, lost) == offline
    assert reply_to(client, connect(world, client, gateway_id)) == offline


def test_a_gateway_must_serve_the_site_and_the_version(world: World) -> None:
    client = old_client(world)
    old_gateway(world)
    old_gateway(world, token="gateway-token-lab-00", params={"external_id": "lab"})
    (elsewhere,) = world.store.devices_of(world.state.policy.sites["lab"].id)
    reply = reply_to(client, connect(world, client, elsewhere.id))
    assert reply == {"status": "error", "response": {"reason": "offline"}}


def test_another_gateway_cannot_answer(world: World) -> None:
    client, gateway = old_client(world), old_gateway(world)
    other = old_gateway(world, token="gateway-token-lab-00", params={"external_id": "lab"})
    ref = connect(world, client, prepare(world, client, "web")["gateway_id"])
    (order,) = gateway.take("request_connection")
    other.send("connection_ready", {"ref": order["ref"], "gateway_payload": READY})
    assert reply_to(client, ref) is None


def test_a_gateway_of_any_version_serves_old_clients_if_the_policy_says_so(tmp_path: Path) -> None:
    world = World(policy_of(tmp_path, top="old_clients = true"))
    gateway, client = world.gateway(), old_client(world)
    ref = connect(world, client, prepare(world, client, "web")["gateway_id"])
    (order,) = gateway.take("request_connection")
    gateway.send("connection_ready", {"ref": order["ref"], "gateway_payload": READY})
    reply = reply_to(client, ref)
    assert reply is not None
    assert reply["status"] == "ok"
    modern = world.client(agent="Debian/12 headless-client/1.8.0 (x86_64)", params={"external_id": "other"})
    modern.send("request_authorization", {"resource_id": world.resource("web"), "connected_gateway_ids": []})
    assert [p["reason"] for p in modern.take("authorization_creation_failed")] == ["version_mismatch"]


def test_what_was_granted_is_listed_revoked_and_refreshed_like_any_grant(tmp_path: Path) -> None:
    world = World(policy_of(tmp_path, rule="expires_in = 60"))
    gateway, client = old_gateway(world), old_client(world)
    gateway_id = prepare(world, client)["gateway_id"]
    ref = connect(world, client, gateway_id, "net")
    (order,) = gateway.take("request_connection")
    gateway.send("connection_ready", {"ref": order["ref"], "gateway_payload": READY})
    assert reply_to(client, ref) is not None
    client_id, net = order["client"]["id"], world.resource("net")
    again = old_gateway(world)
    listed = {"client_id": client_id, "resource_id": net, "expires_at": UNIX + 60}
    assert again.init["authorizations"] == [listed]  # type: ignore[attr-defined]
    client.inbox.clear()
    world.keep_alive(62.0)
    assert client.events() == ["resource_deleted", "resource_created_or_updated"]
    connect(world, client, gateway_id, "net")
    world.state.set_policy(
        policy_of(tmp_path, policy_text().replace('resource = "net"', 'resource = "web"')), world.now
    )
    world.drain()
    assert again.take("reject_access") == [{"client_id": client_id, "resource_id": net}]
    assert client.take("resource_deleted") == [net]


def test_a_grant_revoked_while_the_gateway_was_asked_is_not_confirmed(tmp_path: Path) -> None:
    world = World(policy_of(tmp_path))
    gateway, client = old_gateway(world), old_client(world)
    ref = connect(world, client, prepare(world, client)["gateway_id"], "net")
    (order,) = gateway.take("request_connection")
    world.state.set_policy(
        policy_of(tmp_path, policy_text().replace('resource = "net"', 'resource = "web"')), world.now
    )
    world.drain()
    gateway.send("connection_ready", {"ref": order["ref"], "gateway_payload": READY})
    assert reply_to(client, ref) == {"status": "error", "response": {"reason": "forbidden"}}


def test_waiting_requests_are_bounded(world: World) -> None:
    gateway, client = old_gateway(world), old_client(world)
    gateway_id = prepare(world, client, "web")["gateway_id"]
    for _ in range(300):
        connect(world, client, gateway_id)
    assert len(gateway.take("request_connection")) == 256
    client.leave()
    assert not [k for k in world.state._hub.timers._due if k[0] == "waiting"]
