"""Joining, authorizations, relays, candidates, time: `spec/portal-protocol.md` §8 and §10.2 in virtual time."""

from __future__ import annotations

import base64
import hashlib
import hmac
from pathlib import Path
from typing import Any

import pytest
from embedded_portal_world import UNIX, World, policy_of

from fz_core.embedded.portal_derivation import (
    client_preshared_key,
    ice_credentials,
    ingest_token,
    preshared_key,
    turn_credentials,
)
from fz_core.embedded.portal_session import Refusal
from fz_core.portal import client_wire, gateway
from fz_core.portal.codec import ParseFailure
from fz_core.portal.types import read_ingest_token
from fz_core.turn import relay_id, relay_password

LINES = ["candidate:1 1 udp 1 192.0.2.1 5 typ host"]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(policy_of(tmp_path))


def request(world: World, name: str = "net", connected: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"resource_id": world.resource(name), "connected_gateway_ids": list(connected)}


def reasons(peer: Any) -> list[str]:
    return [p["reason"] for p in peer.take("authorization_creation_failed")]


def test_derivations_match_the_published_vectors() -> None:
    client, gw = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
    client_key, gateway_key = (base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2))
    mine, theirs = ice_credentials(client, client_key, gw, gateway_key)
    assert (mine.username, mine.password) == ("eokn", "5enp7ct6775ebzonvunxjy")
    assert (theirs.username, theirs.password) == ("6m26", "gj5f2zjrxg6cwvtrtqgfva")
    arguments = (client, client_key, b"\3" * 32, gw, gateway_key, b"\4" * 32)
    assert base64.b64encode(preshared_key(*arguments)) == b"XW093AoW7OpBXD0nxDlmJyPhoh/To8j1k3f6UZyTtoM="
    assert base64.b64encode(client_preshared_key(*arguments)) == b"2j3deVQcC5JuZrhJiRDcs8fGZ9XjddDdKZU7RE4bcwo="
    username, password = turn_credentials(client_key, 1_800_000_000, "0" * 64)
    assert username == "1800000000:xXzDtV05+ab3cvUI44IeCigIIjUsDQ8NJZ+6Y7dNqaA"
    assert password == "VBKr2t+qO7sQSfqZQmYaUSvYpE/Vnx3oVkCoGnKHvmE"
    assert relay_id("0" * 64) == "60e05bd1-b195-4f2f-9411-2fa7197a5c88"
    reference = relay_password(1685984278, "uvdgKvS9GXYZ_vmv", "1cab293a-4032-46f4-862a-40e5d174b0d2")
    assert reference == "6xUIoZ+QvxKhRasLifwfRkMXl+ETLJUsFkHlXjlHAkg"


def test_the_signature_of_an_ingest_token_is_hmac_sha256() -> None:
    signed, _, signature = ingest_token({"a": 1}, b"k").rpartition(".")
    digest = hmac.new(b"k", signed.encode(), hashlib.sha256).digest()
    assert signature == base64.urlsafe_b64encode(digest).decode().rstrip("=")


def test_a_client_gets_addresses_dns_and_what_its_groups_allow(world: World) -> None:
    init = world.client().init
    assert init["interface"]["upstream_do53"] == [{"ip": "1.1.1.1"}]
    assert init["interface"]["upstream_doh"] == [{"url": "https://dns.example/dns-query"}]
    assert init["interface"]["search_domain"] == "corp.example"
    assert {r["name"] for r in init["resources"]} == {"net", "web", "internet", "pool"}
    bob = world.client(token="client-token-bob-001", params={"external_id": "b"})
    assert {r["name"] for r in bob.init["resources"]} == {"web"}
    assert not isinstance(client_wire.TO_CLIENT.parse("init", init), ParseFailure)


def test_addresses_are_distinct_and_survive_reconnects(world: World) -> None:
    first = world.client().init["interface"]
    other = world.client(params={"external_id": "second"}).init["interface"]
    assert first["ipv4"] != other["ipv4"]
    assert first["ipv6"] != other["ipv6"]
    assert world.client(key=b"n" * 32).init["interface"] == first


def test_a_newer_connection_replaces_the_older(world: World) -> None:
    for role in ("client", "gateway"):
        old, new = (getattr(world, role)() for _ in range(2))
        assert old.is_closed
        assert not new.is_closed
        assert "disconnect" not in old.events()


def test_the_receiver_hears_first_and_both_get_the_same_secrets(world: World) -> None:
    world.relay()
    client, gw = world.client(), world.gateway()
    client.send("request_authorization", request(world))
    assert client.events() == []
    (order,) = gw.take("create_authorization")
    assert not isinstance(gateway.TO_GATEWAY.parse("create_authorization", order), ParseFailure)
    ref = gw.send("authorization_created", {"ref": order["ref"]})
    assert {"status": "ok", "response": {}} in [f["payload"] for f in gw.inbox if f["ref"] == ref]
    (answer,) = client.take("authorization_created")
    assert not isinstance(client_wire.TO_CLIENT.parse("authorization_created", answer), ParseFailure)
    assert answer["preshared_key"] == order["client"]["preshared_key"]
    for name in ("client_ice_credentials", "gateway_ice_credentials", "use_iceless"):
        assert answer[name] == order[name]
    assert answer["resource_id"] == order["resource"]["id"]
    assert answer["flow_logs_ingest_token"] != order["flow_logs_ingest_token"]
    for token in (answer["flow_logs_ingest_token"], order["flow_logs_ingest_token"]):
        assert read_ingest_token(token) == token


def test_secrets_are_stable_until_a_key_changes(world: World) -> None:
    gw = world.gateway()
    first = world.authorize(world.client(), gw)["answer"]
    again = world.authorize(world.client(), gw)["answer"]
    changed = world.authorize(world.client(key=b"z" * 32), gw)["answer"]
    for name in ("preshared_key", "client_ice_credentials", "gateway_ice_credentials"):
        assert first[name] == again[name] != changed[name]


def test_an_unknown_or_late_ref_is_an_error(world: World) -> None:
    gw, client = world.gateway(), world.client()
    gw.inbox.clear()
    gw.send("authorization_created", {"ref": "nope"})
    client.send("request_authorization", request(world))
    (order,) = gw.take("create_authorization")
    world.advance(15.0)
    assert reasons(client) == ["offline"]
    gw.send("authorization_created", {"ref": order["ref"]})
    assert [f["payload"]["response"] for f in gw.inbox] == [{"reason": "invalid_ref"}] * 2
    assert client.events() == []


def test_a_newer_request_supersedes_the_pending_one(world: World) -> None:
    gw, client = world.gateway(), world.client()
    for _ in range(2):
        client.send("request_authorization", request(world))
    old, new = gw.take("create_authorization")
    gw.send("authorization_created", {"ref": old["ref"]})
    assert client.events() == []
    gw.send("authorization_created", {"ref": new["ref"]})
    assert client.events() == ["authorization_created"]
    world.keep_alive(30.0)
    assert reasons(client) == []


def test_another_gateway_cannot_answer(world: World) -> None:
    gw, client = world.gateway(), world.client()
    other = world.gateway(token="gateway-token-lab-00", params={"external_id": "lab"})
    client.send("request_authorization", request(world))
    (order,) = gw.take("create_authorization")
    other.send("authorization_created", {"ref": order["ref"]})
    assert client.events() == []


@pytest.mark.parametrize(
    ("token", "name", "reason"),
    [
        ("client-token-alice-1", "net", "offline"),
        ("client-token-bob-001", "net", "forbidden"),
        ("client-token-bob-001", None, "not_found"),
    ],
)
def test_why_a_request_fails(world: World, token: str, name: str | None, reason: str) -> None:
    client = world.client(token=token)
    payload = request(world) if name else {"resource_id": "00000000-0000-4000-8000-000000000000"}
    client.send("request_authorization", payload)
    assert reasons(client) == [reason]


@pytest.mark.parametrize(
    ("agent", "is_fit"),
    [("gateway/1.3.9", False), ("gateway/1.4.0", True), ("gateway/1.6.9", True), ("gateway/1.7.0", False),
     ("gateway/x", False), ("something", False)],
)  # fmt: skip
def test_gateways_serve_clients_of_neighbouring_versions(world: World, agent: str, is_fit: bool) -> None:
    gw, client = world.gateway(agent=f"Debian/12 {agent} (x86_64)"), world.client()
    client.send("request_authorization", request(world))
    assert reasons(client) == ([] if is_fit else ["version_mismatch"])
    assert len(gw.take("create_authorization")) == is_fit


def test_a_connected_gateway_is_preferred(world: World) -> None:
    gateways = [world.gateway(params={"external_id": f"g{n}"}, key=bytes([n + 1]) * 32) for n in range(5)]
    client = world.client()
    site = world.state.policy.sites["office"].id
    ids = {g: world.store.find_or_create("gateway", site, f"g{n}", "x", UNIX).id for n, g in enumerate(gateways)}
    for wanted in gateways:
        for _ in range(4):
            client.send("request_authorization", request(world, connected=(ids[wanted],)))
            assert len(wanted.take("create_authorization")) == 1
    chosen = set()
    for _ in range(60):
        client.send("request_authorization", request(world))
        chosen |= {ids[g] for g in gateways if g.take("create_authorization")}
    assert chosen == set(ids.values())


def test_a_pending_request_moves_on_when_its_gateway_leaves(world: World) -> None:
    first, second = (world.gateway(params={"external_id": f"g{n}"}) for n in range(2))
    client = world.client()
    client.send("request_authorization", request(world))
    asked, other = (first, second) if first.take("create_authorization") else (second, first)
    asked.leave()
    assert len(other.take("create_authorization")) == 1
    other.leave()
    assert reasons(client) == [], "it may be back soon"
    world.advance(5.0)
    assert reasons(client) == ["offline"]


def test_legacy_sockets_speak_legacy_names(world: World) -> None:
    gw = world.gateway(legacy=True, agent="Debian/12 gateway/1.5.2 (x86_64)")
    client = world.client(legacy=True, agent="Debian/12 headless-client/1.5.4 (x86_64)")
    groups = [r for r in client.init["resources"] if r["type"] in ("dns", "cidr", "internet")]
    assert all("gateway_groups" in r and "sites" not in r for r in groups)
    assert "static_device_pool" not in [r["type"] for r in client.init["resources"]]
    client.send("create_flow", request(world))
    (order,) = gw.take("authorize_flow")
    gw.send("flow_authorized", {"ref": order["ref"]})
    (answer,) = client.take("flow_created")
    assert "gateway_group_id" in answer
    assert "site_id" not in answer
    client.inbox.clear()
    client.send("request_authorization", request(world))
    assert client.inbox[0]["payload"] == {"status": "error", "response": {"reason": "unknown_message"}}


@pytest.mark.parametrize(
    ("agent", "name"),
    [("headless-client/1.5.5", "gateway_groups"), ("headless-client/1.5.6", "sites"), ("connlib/1.5.6", "sites"),
     ("gui-client/1.5.9", "gateway_groups"), ("gui-client/1.5.10", "sites")],
)  # fmt: skip
def test_sites_have_the_name_the_client_knows(world: World, agent: str, name: str) -> None:
    client = world.client(agent=f"Debian/12 {agent} (x86_64)")
    assert all(name in r for r in client.init["resources"] if r["type"] == "cidr")


def test_candidates_pass_verbatim_in_both_directions(world: World) -> None:
    client, gw = world.client(), world.gateway()
    both = world.authorize(client, gw)
    client_id, gateway_id = both["order"]["client"]["id"], both["answer"]["gateway_id"]
    client.send("new_gateway_ice_candidates", {"gateway_id": gateway_id, "candidates": LINES})
    client.send("invalidate_gateway_ice_candidates", {"gateway_id": gateway_id, "candidates": LINES})
    gw.send("broadcast_ice_candidates", {"client_ids": [client_id], "candidates": LINES})
    gw.send("broadcast_invalidated_ice_candidates", {"client_ids": [client_id], "candidates": LINES})
    to_gateway = {"client_id": client_id, "candidates": LINES}
    to_client = {"gateway_id": gateway_id, "candidates": LINES}
    assert gw.take("ice_candidates") == gw.take("invalidate_ice_candidates") == [to_gateway]
    assert client.take("ice_candidates") == client.take("invalidate_ice_candidates") == [to_client]
    client.leave()
    gw.send("broadcast_ice_candidates", {"client_ids": [client_id], "candidates": LINES})  # nobody there: dropped


def test_relays_are_announced_a_second_later_with_credentials_per_peer(world: World) -> None:
    client, gw = world.client(), world.gateway()
    world.relay()
    world.advance(0.9)
    assert client.events() == []
    world.advance(0.1)
    (seen,), (other,) = client.take("relays_presence"), gw.take("relays_presence")
    assert seen["disconnected_ids"] == []
    assert [r["addr"] for r in seen["connected"]] == ["192.0.2.1:3478", "[2001:db8::1]:3478"]
    assert {r["id"] for r in seen["connected"]} == {"60e05bd1-b195-4f2f-9411-2fa7197a5c88"}
    assert seen["connected"][0]["username"].startswith("2145916800:")
    assert seen["connected"][0]["username"] != other["connected"][0]["username"]


def test_at_most_two_relays_and_a_replacement_for_a_lost_one(world: World) -> None:
    relays = [world.relay(f"{n}" * 64) for n in range(3)]
    client = world.client()
    given = {r["id"] for r in client.init["relays"]}
    assert len(given) == 2
    ids = {relay_id(f"{n}" * 64): relay for n, relay in enumerate(relays)}
    lost, kept = sorted(given)
    ids[lost].leave()
    world.advance(1.0)
    (presence,) = client.take("relays_presence")
    assert presence["disconnected_ids"] == [lost]
    assert {r["id"] for r in presence["connected"]} == {kept, *(set(ids) - given)}


def test_a_relay_back_within_a_second_is_not_mentioned(world: World) -> None:
    relay = world.relay()
    client = world.client()
    world.advance(2.0)
    client.events()
    relay.leave()
    world.advance(0.5)
    world.relay()
    world.advance(5.0)
    assert client.events() == []


def test_a_peer_that_comes_from_elsewhere_gets_other_relay_credentials(world: World) -> None:
    """Its relays know it at the old address only, and an official peer would not notice."""
    world.relay()

    def expiry(*, leaves: bool = True, **options: Any) -> int:
        client = world.client(**options)
        name = client.init["relays"][0]["username"]
        if leaves:
            client.leave()
        return int(name.partition(":")[0]) - 2145916800

    places = ["192.0.2.9", "192.0.2.9", "2001:db8::9", "192.0.2.77", "2001:db8::9", "192.0.2.77"]
    assert [expiry(remote=place) for place in places] == [0, 0, 0, -1, -1, -1]
    assert expiry(remote="192.0.2.77", leaves=False) == -1
    assert expiry(remote="192.0.2.77") == -2  # the old connection stands: it was cut on the peer's side
    assert expiry(remote="192.0.2.1", key=b"n" * 32) == 0


def test_no_relays_is_always_answered(world: World) -> None:
    client = world.client()
    client.send("no_relays", {})
    assert client.take("relays_presence") == [{"disconnected_ids": [], "connected": []}]


def test_a_relay_without_secret_is_refused(world: World) -> None:
    for payload in (None, {}, {"stamp_secret": ""}, {"stamp_secret": "ü"}, {"stamp_secret": "0" * 999}):
        relay = world.open("relay")
        relay.send("phx_join", payload)
        assert relay.inbox[0]["payload"]["status"] == "error"


def test_turn_credentials_end_with_the_clients_token(tmp_path: Path) -> None:
    world = World(policy_of(tmp_path, alice="expires = 2030-01-01T00:00:00Z"))
    world.relay()
    (first, _) = world.client().init["relays"]
    assert first["username"].startswith("1893456000:")


def test_heartbeats_are_answered_and_silence_ends_the_connection(world: World) -> None:
    client = world.client()
    client.inbox.clear()
    ref = client.send("heartbeat", {}, "phoenix")
    assert client.inbox == [
        {"topic": "phoenix", "event": "phx_reply", "ref": ref, "payload": {"status": "ok", "response": {}}}
    ]
    world.keep_alive(300.0)
    assert not client.is_closed
    world.advance(66.0)
    assert client.is_closed


def test_what_is_no_frame_or_no_event_hurts_nobody(world: World) -> None:
    client = world.client()
    client.inbox.clear()
    for text in ("", "{", "[]", '{"topic":"client"}', "\ud800"):
        world.state.handle_text(client.session_id, text, world.now)
    client.send("request_device_access", {})
    client.send("request_authorization", [])
    assert [f["payload"]["response"] for f in client.inbox] == [{"reason": "unknown_message"}] * 2
    world.state.handle_text(999, "{}", world.now)


def test_a_wrong_topic_is_told_to_join_again(world: World) -> None:
    client = world.open("client")
    client.send("no_relays", {})
    client.send("phx_join", None, "gateway")
    assert [f["payload"]["response"] for f in client.inbox] == [{"reason": "unmatched topic"}] * 2


@pytest.mark.parametrize(
    ("role", "options", "status", "code"),
    [
        ("client", {"token": None}, 401, "missing_token"),
        ("client", {"token": "wrong"}, 401, "invalid_token"),
        ("client", {"token": "gateway-token-office"}, 401, "invalid_token"),
        ("relay", {"token": "client-token-alice-1"}, 401, "invalid_token"),
        ("client", {"params": {"public_key": "AAAA"}}, 400, "invalid_connect_params"),
        ("client", {"params": {"external_id": ""}}, 400, "invalid_connect_params"),
        ("gateway", {"params": {"name": "x" * 256}}, 400, "invalid_connect_params"),
        ("client", {"agent": "curl/8"}, 400, "invalid_connect_params"),
        ("relay", {"params": {"ipv4": "", "ipv6": ""}}, 400, "invalid_connect_params"),
        ("relay", {"params": {"port": "99999"}}, 400, "invalid_connect_params"),
        ("relay", {"params": {"ipv4": "somewhere"}}, 400, "invalid_connect_params"),
    ],
)
def test_refusals(world: World, role: str, options: dict[str, Any], status: int, code: str) -> None:
    refusal = world.knock(role, **options)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.code) == (status, code)


def test_an_expired_token_is_refused_and_ends_a_session(tmp_path: Path) -> None:
    world = World(policy_of(tmp_path, alice="expires = 2027-01-15T08:01:00Z"))  # a minute after UNIX
    client = world.client()
    for _ in range(6):
        world.advance(10.0)
        if not client.is_closed:
            client.send("heartbeat", {}, "phoenix")
    assert client.take("disconnect") == [{"reason": "token_expired"}]
    assert client.is_closed
    refusal = world.knock("client")
    assert isinstance(refusal, Refusal)
    assert refusal.code == "invalid_token"


def test_sessions_are_bounded(world: World) -> None:
    world.state._max_sessions = 1
    world.client()
    refusal = world.knock("client", params={"external_id": "x"})
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.retry_after) == (503, 5)


def test_repeated_requests_leave_one_pending(world: World) -> None:
    world.gateway()
    client = world.client()
    for _ in range(50):
        client.send("request_authorization", request(world))
    assert len([k for k in world.state._hub.timers._due if k[0] == "pending"]) == 1


def test_a_gateway_that_returns_keeps_its_grants(world: World) -> None:
    client, gw = world.client(), world.gateway()
    order = world.authorize(client, gw)["order"]
    wanted = {
        "client_id": order["client"]["id"], "resource_id": world.resource("net"), "expires_at": order["expires_at"],
    }  # fmt: skip
    again = world.gateway()
    assert again.init["authorizations"] == [wanted]
    assert [r["id"] for r in again.take("resource_updated")] == [world.resource("net")]


def test_a_gateway_that_starts_anew_makes_its_clients_ask_again(world: World) -> None:
    client, gw = world.client(), world.gateway()
    world.authorize(client, gw)
    world.authorize(client, gw, "internet")
    client.events()
    again = world.gateway(key=b"n" * 32)
    assert client.events() == ["resource_deleted", "resource_created_or_updated"]  # but not for the internet
    assert [a["resource_id"] for a in again.init["authorizations"]] == [world.resource("internet")]
    world.gateway(key=b"n" * 32)
    assert client.events() == []


def test_grants_survive_a_restart_unless_the_policy_changed(tmp_path: Path) -> None:
    world = World(policy_of(tmp_path))
    world.authorize(world.client(), world.gateway())
    assert len(World(policy_of(tmp_path), world.store).gateway().init["authorizations"]) == 1
    moved = policy_of(tmp_path, text=None, net="").resources["net"].fingerprint
    text = (tmp_path / "portal.toml").read_text().replace("10.0.0.0/8", "10.0.0.0/9")
    changed = policy_of(tmp_path, text)
    assert changed.resources["net"].fingerprint != moved
    assert World(changed, world.store).gateway().init["authorizations"] == []


def test_an_expired_grant_makes_the_client_ask_again(tmp_path: Path) -> None:
    world = World(policy_of(tmp_path, rule="expires_in = 60"))
    client, gw = world.client(), world.gateway()
    order = world.authorize(client, gw)["order"]
    assert order["expires_at"] == UNIX + 60
    client.events()
    world.keep_alive(60.0)
    assert client.events() == []
    world.keep_alive(2.0)
    assert client.events() == ["resource_deleted", "resource_created_or_updated"]
    assert world.store.grants() == []


def test_a_renewed_grant_is_looked_at_again_later(tmp_path: Path) -> None:
    world = World(policy_of(tmp_path, rule="expires_in = 60"))
    client, gw = world.client(), world.gateway()
    world.authorize(client, gw)
    world.keep_alive(30.0)
    world.authorize(client, gw)
    client.events()
    world.keep_alive(40.0)
    assert client.events() == []
    world.keep_alive(30.0)
    assert client.events() == ["resource_deleted", "resource_created_or_updated"]
