"""Devices that reach each other: both kinds of pool (`spec/portal-protocol.md` §5, §8.9, §8.11, §10.2, §11)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from embedded_portal_world import UNIX, Peer, World, policy_of, policy_text

from fz_core.portal import client_wire
from fz_core.portal.codec import ParseFailure

LINES = ["candidate:1 1 udp 1 192.0.2.1 5 typ host"]
BOB = "client-token-bob-001"
DYNAMIC = """
[[resources]]
name = "names"
type = "dynamic_device_pool"
address = "*.devices.example"
[[policies]]
group = "staff"
resource = "names"
"""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(policy_of(tmp_path))


@pytest.fixture
def named(tmp_path: Path) -> World:
    """With a dynamic pool."""
    return World(policy_of(tmp_path, policy_text() + DYNAMIC))


def bob_of(world: World, **options: Any) -> Peer:
    params = {"external_id": "b", "name": "bobs"} | options.pop("params", {})
    return world.client(token=BOB, params=params, key=options.pop("key", b"b" * 32), **options)


def address_of(peer: Peer) -> str:
    address: str = peer.init["interface"]["ipv4"]  # type: ignore[attr-defined]
    return address


def ask(world: World, client: Peer, target: str, name: str = "pool") -> None:
    client.send(
        "request_authorization", {"resource_id": world.resource(name), "connected_gateway_ids": [], "ipv4": target}
    )


def introduce(world: World, client: Peer, target: Peer) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the target and the initiator were told."""
    ask(world, client, address_of(target))
    (inbound,), (outbound,) = (p.take("client_device_access_authorized") for p in (target, client))
    return inbound, outbound


def change(world: World, folder: Path, *edits: tuple[str, str], extra: str = "") -> None:
    text = policy_text() + extra
    for old, new in edits:
        assert old in text
        text = text.replace(old, new, 1)
    world.state.set_policy(policy_of(folder, text), world.now)
    world.drain()


def test_two_clients_are_introduced_the_target_first(world: World) -> None:
    bob, alice = bob_of(world), world.client()
    (pool,) = [r for r in alice.init["resources"] if r["type"] == "static_device_pool"]  # type: ignore[attr-defined]
    (device,) = pool["devices"]
    assert device["ipv4"] == address_of(bob) + "/32"
    assert device["ipv6"].endswith("/128")
    world.log.clear()
    inbound, outbound = introduce(world, alice, bob)
    assert [session for session, _ in world.log] == [bob.session_id, alice.session_id]
    assert (inbound["ice_role"], outbound["ice_role"]) == ("controlled", "controlling")
    assert inbound["preshared_key"] == outbound["preshared_key"]
    assert inbound["local_ice_credentials"] == outbound["remote_ice_credentials"]
    assert inbound["remote_ice_credentials"] == outbound["local_ice_credentials"]
    assert inbound["resource"] == {"id": world.resource("pool"), "filters": []}
    assert inbound["expires_at"] == inbound["authorization_expires_at"] == 2145916800
    assert not {"resource", "expires_at"} & set(outbound)
    assert (outbound["client_name"], outbound["client_ipv4"]) == ("bobs", address_of(bob))
    assert (inbound["client_name"], inbound["client_ipv4"]) == ("client-name", address_of(alice))
    for message in (inbound, outbound):
        parsed = client_wire.TO_CLIENT.parse("client_device_access_authorized", message)
        assert not isinstance(parsed, ParseFailure)


def test_candidates_pass_between_those_introduced(world: World) -> None:
    bob, alice = bob_of(world), world.client()
    inbound, outbound = introduce(world, alice, bob)
    for sender, receiver, to, of in ((alice, bob, outbound, inbound), (bob, alice, inbound, outbound)):
        lines = {"client_id": to["client_id"], "candidates": LINES}
        sender.send("new_client_ice_candidates", lines)
        sender.send("invalidate_client_ice_candidates", lines)
        forwarded = {"client_id": of["client_id"], "candidates": LINES}
        assert receiver.take("client_ice_candidates") == [forwarded]
        assert receiver.take("invalidate_client_ice_candidates") == [forwarded]
    bob.leave()
    alice.send("new_client_ice_candidates", {"client_id": outbound["client_id"], "candidates": LINES})
    assert alice.take("client_ice_candidate_error") == []
    alice.send("invalidate_client_ice_candidates", {"client_id": outbound["client_id"], "candidates": LINES})
    assert alice.take("client_ice_candidate_error") == [{"client_id": outbound["client_id"], "reason": "offline"}]


def test_strangers_cannot_send_each_other_candidates(world: World) -> None:
    bob, alice = bob_of(world), world.client()
    (pool,) = [r for r in alice.init["resources"] if r["type"] == "static_device_pool"]  # type: ignore[attr-defined]
    alice.send("new_client_ice_candidates", {"client_id": pool["devices"][0]["client_id"], "candidates": LINES})
    assert bob.take("client_ice_candidates") == []


@pytest.mark.parametrize(
    ("extra", "reason"),
    [({}, "missing_address"), ({"ipv4": "100.64.9.9"}, "not_found"),
     ({"ipv4": "100.64.9.9", "ipv6": "fd00:2021:1111::9"}, "ambiguous_address")],
)  # fmt: skip
def test_why_a_device_is_denied(world: World, extra: dict[str, str], reason: str) -> None:
    alice = world.client()
    alice.send("request_authorization", {"resource_id": world.resource("pool"), "connected_gateway_ids": [], **extra})
    (denied,) = alice.take("client_device_access_denied")
    assert denied == {"ipv4": None, "ipv6": None, **extra, "reason": reason}


def test_who_may_not_ask_or_is_away_or_too_old(world: World) -> None:
    bob, alice = bob_of(world), world.client()
    ask(world, bob, address_of(bob))
    assert bob.take("client_device_access_denied")[0]["reason"] == "forbidden"
    gone = "00000000-0000-4000-8000-000000000000"
    alice.send("request_authorization", {"resource_id": gone, "connected_gateway_ids": [], "ipv4": "100.64.0.9"})
    assert alice.take("client_device_access_denied")[0]["reason"] == "not_found"
    for agent, reason in (("1.5.6", "version_mismatch"), ("1.6.0", "version_mismatch"), ("1.5.7", None)):
        bob_of(world, agent=f"Debian/12 headless-client/{agent} (x86_64)")
        ask(world, alice, address_of(bob))
        assert [d["reason"] for d in alice.take("client_device_access_denied")] == ([reason] if reason else [])
    for session in [p for p in world.peers.values() if p is not alice and not p.is_closed]:
        session.leave()
    ask(world, alice, address_of(bob))
    assert alice.take("client_device_access_denied")[0]["reason"] == "offline"


def test_a_client_cannot_reach_itself(tmp_path: Path) -> None:
    world = World(policy_of(tmp_path, policy_text().replace('devices = ["bob"]', 'devices = ["alice"]')))
    alice = world.client()
    ask(world, alice, address_of(alice))
    assert alice.take("client_device_access_denied")[0]["reason"] == "invalid_address"


@pytest.mark.parametrize(
    ("agent", "is_listed"),
    [("headless-client/1.5.8", False), ("headless-client/1.5.9", True), ("gui-client/1.5.12", False),
     ("gui-client/1.5.13", True), ("android-client/1.5.11", True), ("apple-client/1.5.15", False)],
)  # fmt: skip
def test_pools_are_listed_to_those_who_know_them(named: World, agent: str, is_listed: bool) -> None:
    alice = named.client(agent=f"Debian/12 {agent} (x86_64)")
    kinds = {r["type"] for r in alice.init["resources"]}  # type: ignore[attr-defined]
    assert ({"static_device_pool", "dynamic_device_pool"} <= kinds) is is_listed
    assert {"dns", "cidr"} <= kinds


def test_a_new_device_appears_in_pools_at_once(world: World) -> None:
    alice = world.client()
    bob_of(world)
    (pool,) = alice.take("resource_created_or_updated")
    assert len(pool["devices"]) == 1


# names


def resolve(world: World, client: Peer, domain: str, name: str = "names") -> dict[str, Any]:
    client.send("resolve_device_pool_domain", {"resource_id": world.resource(name), "domain": domain})
    (frame,) = [f for f in client.inbox if f["event"].startswith("device_pool_domain_")]
    client.inbox.clear()
    answer: dict[str, Any] = frame["payload"]
    return answer


def test_a_name_is_resolved_to_bare_addresses(named: World) -> None:
    bob, alice = bob_of(named, params={"name": "Bob's laptop.local"}), named.client()
    interface = bob.init["interface"]  # type: ignore[attr-defined]
    for domain in ("bob-s-laptop-local.devices.example", "Bob-s-Laptop-Local.DEVICES.example"):
        assert resolve(named, alice, domain) == {
            "resource_id": named.resource("names"), "domain": domain, "ipv4": interface["ipv4"],
            "ipv6": interface["ipv6"],
        }  # fmt: skip


@pytest.mark.parametrize(
    ("domain", "pool", "reason"),
    [("nobody.devices.example", "names", "not_found"), ("devices.example", "names", "not_found"),
     ("bobs.elsewhere.example", "names", "not_found"), ("bobs.devices.example", "pool", "not_found")],
)  # fmt: skip
def test_why_a_name_is_not_resolved(named: World, domain: str, pool: str, reason: str) -> None:
    bob_of(named)
    alice = named.client()
    assert resolve(named, alice, domain, pool) == {
        "resource_id": named.resource(pool), "domain": domain, "reason": reason,
    }  # fmt: skip


def test_a_name_of_two_devices_and_of_a_pool_one_may_not_use(named: World) -> None:
    bob, alice = bob_of(named), named.client()
    bob_of(named, params={"external_id": "b2"})
    assert resolve(named, alice, "bobs.devices.example")["reason"] == "ambiguous_address"
    assert resolve(named, bob, "client-name.devices.example")["reason"] == "forbidden"


def test_a_named_device_is_reached_through_the_static_pool(named: World) -> None:
    bob, alice = bob_of(named), named.client()
    found = resolve(named, alice, "bobs.devices.example")
    ask(named, alice, found["ipv4"])
    assert len(bob.take("client_device_access_authorized")) == 1


# what changes later


def test_a_device_that_leaves_a_pool_is_denied_to_both(world: World, tmp_path: Path) -> None:
    bob, alice = bob_of(world), world.client()
    introduce(world, alice, bob)
    alice.inbox.clear()
    bob.inbox.clear()
    change(world, tmp_path, ('devices = ["bob"]', "devices = []"))
    assert bob.events() == ["reject_access"]
    assert [f["event"] for f in alice.inbox] == ["client_device_access_denied", "resource_created_or_updated"]
    (denied,) = alice.take("client_device_access_denied")
    assert (denied["ipv4"], denied["reason"]) == (address_of(bob), "forbidden")
    (updated,) = alice.take("resource_created_or_updated")
    assert updated["devices"] == []


def test_a_lost_policy_deletes_the_pool_and_rejects(world: World, tmp_path: Path) -> None:
    bob, alice = bob_of(world), world.client()
    inbound, _ = introduce(world, alice, bob)
    alice.inbox.clear()
    change(world, tmp_path, ('group = "staff"\nresource = "pool"', 'group = "admins"\nresource = "pool"'))
    rejected = {"client_id": inbound["client_id"], "resource_id": world.resource("pool")}
    assert bob.take("reject_access") == [rejected]
    assert alice.events() == ["client_device_access_denied", "resource_deleted"]
    assert world.store.grants() == []


def test_a_member_that_is_away_learns_from_init(world: World, tmp_path: Path) -> None:
    bob, alice = bob_of(world), world.client()
    introduce(world, alice, bob)
    assert len(bob_of(world).init["authorizations"]) == 1  # type: ignore[attr-defined]
    for peer in [p for p in world.peers.values() if p is not alice and not p.is_closed]:
        peer.leave()
    change(world, tmp_path, ('devices = ["bob"]', "devices = []"))
    assert bob_of(world).init["authorizations"] == []  # type: ignore[attr-defined]


def test_changed_filters_reach_both_and_keep_the_grant(world: World, tmp_path: Path) -> None:
    bob, alice = bob_of(world), world.client()
    introduce(world, alice, bob)
    alice.inbox.clear()
    bob.inbox.clear()
    change(world, tmp_path, ('devices = ["bob"]', 'devices = ["bob"]\nfilters = ["tcp/22"]'))
    filters = [{"protocol": "tcp", "port_range_start": 22, "port_range_end": 22}]
    assert bob.take("resource_filters_updated") == [{"id": world.resource("pool"), "filters": filters}]
    (updated,) = alice.take("resource_created_or_updated")
    assert updated["filters"] == filters
    assert bob.events() == alice.events() == []


def test_filters_changed_while_the_target_was_away_are_told_after_init(world: World, tmp_path: Path) -> None:
    bob, alice = bob_of(world), world.client()
    introduce(world, alice, bob)
    bob.leave()
    change(world, tmp_path, ('devices = ["bob"]', 'devices = ["bob"]\nfilters = ["icmp"]'))
    again = bob_of(world)
    (told,) = again.take("resource_filters_updated")
    assert told == {"id": world.resource("pool"), "filters": [{"protocol": "icmp"}]}


def test_an_expired_grant_makes_the_initiator_ask_again(tmp_path: Path) -> None:
    rule = 'group = "staff"\nresource = "pool"'
    world = World(policy_of(tmp_path, policy_text().replace(rule, f"{rule}\nexpires_in = 60")))
    bob, alice = bob_of(world), world.client()
    inbound, _ = introduce(world, alice, bob)
    assert inbound["expires_at"] == UNIX + 60
    alice.inbox.clear()
    bob.inbox.clear()
    world.keep_alive(60.0)
    assert alice.events() == []
    world.keep_alive(2.0)
    assert alice.events() == ["resource_deleted", "resource_created_or_updated"]
    assert world.store.grants() == []
    assert bob.events() == []
    again, _ = introduce(world, alice, bob)
    assert again["expires_at"] == UNIX + 122


def test_a_returning_target_keeps_its_grants(world: World) -> None:
    bob, alice = bob_of(world), world.client()
    inbound, _ = introduce(world, alice, bob)
    alice.inbox.clear()
    again = bob_of(world)
    assert again.init["authorizations"] == [  # type: ignore[attr-defined]
        {
            "client_id": inbound["client_id"], "resource_id": world.resource("pool"),
            "expires_at": inbound["expires_at"],
        }
    ]  # fmt: skip
    assert "client_device_access_denied" not in alice.events()


def test_a_target_with_a_new_key_is_introduced_anew(world: World) -> None:
    bob, alice = bob_of(world), world.client()
    first, _ = introduce(world, alice, bob)
    alice.inbox.clear()
    again = bob_of(world, key=b"n" * 32)
    assert again.init["authorizations"] == []  # type: ignore[attr-defined]
    (denied,) = alice.take("client_device_access_denied")
    assert (denied["ipv4"], denied["reason"]) == (address_of(bob), "offline")
    second, outbound = introduce(world, alice, again)
    assert second["preshared_key"] == outbound["preshared_key"] != first["preshared_key"]
    assert second["local_ice_credentials"] != first["local_ice_credentials"]


def test_an_initiator_with_a_new_key_asks_and_is_introduced_anew(world: World) -> None:
    bob = bob_of(world)
    first, _ = introduce(world, world.client(), bob)
    bob.inbox.clear()
    alice = world.client(key=b"n" * 32)
    assert bob.events() == []
    second, outbound = introduce(world, alice, bob)
    assert second["client_public_key"] != first["client_public_key"]
    assert second["preshared_key"] == outbound["preshared_key"] != first["preshared_key"]
    assert len(world.store.grants()) == 1


def test_a_client_removed_from_the_policy_leaves_dynamic_pools_too(named: World, tmp_path: Path) -> None:
    bob, alice = bob_of(named), named.client()
    ask(named, alice, address_of(bob), "names")
    assert len(named.store.grants()) == 1
    edits = (f'[[clients]]\nname = "bob"\ngroups = ["admins"]\ntoken = "{BOB}"\n', ""), ('["bob"]', "[]")
    change(named, tmp_path, *edits, extra=DYNAMIC)
    assert named.store.grants() == []
