"""A new policy under connected peers, line by line of the revocation matrix (`spec/portal-protocol.md` §8.11)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from embedded_portal_world import UNIX, World, policy_of, policy_text

Scene = tuple[World, Any, Any, dict[str, Any]]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    world = World(policy_of(tmp_path))
    client, gateway = world.client(), world.gateway()
    pair = world.authorize(client, gateway)["order"]
    reject = {"client_id": pair["client"]["id"], "resource_id": world.resource("net")}
    client.inbox.clear()
    gateway.inbox.clear()
    return world, client, gateway, reject


def change(world: World, folder: Path, *edits: tuple[str, str], **parts: str) -> None:
    text = policy_text(**parts)
    for old, new in edits:
        assert old in text
        text = text.replace(old, new, 1)
    world.state.set_policy(policy_of(folder, text), world.now)
    world.drain()


NET_RULE = ('group = "staff"\nresource = "net"', 'group = "admins"\nresource = "net"')


def test_the_same_policy_changes_nothing(scene: Scene, tmp_path: Path) -> None:
    world, client, gateway, _ = scene
    change(world, tmp_path)
    assert client.events() == gateway.events() == []


def test_a_lost_policy_deletes_and_rejects(scene: Scene, tmp_path: Path) -> None:
    world, client, gateway, reject = scene
    change(world, tmp_path, NET_RULE)
    assert client.take("resource_deleted") == [reject["resource_id"]]
    assert gateway.take("reject_access") == [reject]
    assert client.events() == gateway.events() == []
    assert world.store.grants() == []


def test_a_lost_group_does_the_same(scene: Scene, tmp_path: Path) -> None:
    world, client, gateway, reject = scene
    change(world, tmp_path, ('groups = ["staff"]\ntoken', "groups = []\ntoken"))
    assert reject["resource_id"] in client.take("resource_deleted")
    assert gateway.take("reject_access") == [reject]


def test_a_gained_policy_creates(scene: Scene, tmp_path: Path) -> None:
    world, _, _, _ = scene
    bob = world.client(token="client-token-bob-001", params={"external_id": "b"})
    bob.inbox.clear()
    change(world, tmp_path, NET_RULE)
    (created,) = bob.take("resource_created_or_updated")
    assert created["name"] == "net"


def test_a_revoked_client_that_is_away_loses_its_grant_too(scene: Scene, tmp_path: Path) -> None:
    world, client, gateway, reject = scene
    client.leave()
    change(world, tmp_path, NET_RULE)
    assert gateway.take("reject_access") == [reject]


def test_a_gateway_that_is_away_learns_from_init(scene: Scene, tmp_path: Path) -> None:
    world, _, gateway, _ = scene
    gateway.leave()
    change(world, tmp_path, NET_RULE)
    assert world.gateway().init["authorizations"] == []


def test_a_changed_address_updates_and_rejects(scene: Scene, tmp_path: Path) -> None:
    world, client, gateway, reject = scene
    change(world, tmp_path, ("10.0.0.0/8", "10.0.0.0/9"))
    (updated,) = client.take("resource_created_or_updated")
    assert updated["address"] == "10.0.0.0/9"
    assert gateway.take("reject_access") == [reject]
    assert client.take("resource_deleted") == []


def test_a_changed_address_voids_a_pending_request(scene: Scene, tmp_path: Path) -> None:
    world, client, gateway, _ = scene
    client.send("request_authorization", {"resource_id": world.resource("net"), "connected_gateway_ids": []})
    (order,) = gateway.take("create_authorization")
    change(world, tmp_path, ("10.0.0.0/8", "10.0.0.0/9"))
    gateway.send("authorization_created", {"ref": order["ref"]})
    assert client.take("authorization_created") == []


@pytest.mark.parametrize(("version", "deleted"), [("1.5.4", 1), ("1.5.5", 0), ("1.5.11", 0)])
def test_a_changed_site_is_deleted_first_for_old_clients(tmp_path: Path, version: str, deleted: int) -> None:
    world = World(policy_of(tmp_path))
    client, gateway = world.client(agent=f"Debian/12 headless-client/{version} (x)"), world.gateway()
    world.authorize(client, gateway)
    client.inbox.clear()
    change(world, tmp_path, ('address = "10.0.0.0/8"\nsite = "office"', 'address = "10.0.0.0/8"\nsite = "lab"'))
    assert client.events() == ["resource_deleted"] * deleted + ["resource_created_or_updated"]
    assert len(gateway.take("reject_access")) == 1


def test_changed_filters_keep_the_grant(scene: Scene, tmp_path: Path) -> None:
    world, client, gateway, _ = scene
    change(world, tmp_path, net='filters = ["tcp/443", "udp/1000-2000", "icmp"]')
    (seen,), (updated,) = client.take("resource_created_or_updated"), gateway.take("resource_updated")
    assert seen["filters"] == updated["filters"] == [
        {"protocol": "tcp", "port_range_start": 443, "port_range_end": 443},
        {"protocol": "udp", "port_range_start": 1000, "port_range_end": 2000},
        {"protocol": "icmp"},
    ]  # fmt: skip
    assert client.events() == gateway.events() == []


def test_a_changed_description_reaches_the_client_only(scene: Scene, tmp_path: Path) -> None:
    world, client, gateway, _ = scene
    change(world, tmp_path, net='description = "the network"')
    assert client.events() == ["resource_created_or_updated"]
    assert gateway.events() == []


def test_a_changed_type_is_deleted_first(scene: Scene, tmp_path: Path) -> None:
    world, client, gateway, reject = scene
    change(world, tmp_path, ('type = "cidr"\naddress = "10.0.0.0/8"', 'type = "dns"\naddress = "net.example"'))
    assert client.events() == ["resource_deleted", "resource_created_or_updated"]
    assert gateway.take("reject_access") == [reject]


def test_changed_dns_is_a_config_change(scene: Scene, tmp_path: Path) -> None:
    world, client, gateway, _ = scene
    change(world, tmp_path, ("1.1.1.1", "9.9.9.9"))
    (config,) = client.take("config_changed")
    assert config["interface"]["upstream_do53"] == [{"ip": "9.9.9.9"}]
    assert client.events() == gateway.events() == []


def test_a_changed_account_reaches_gateways_with_all_grants(scene: Scene, tmp_path: Path) -> None:
    world, client, gateway, reject = scene
    change(world, tmp_path, ('account = "acme"', 'account = "other"'))
    (init,) = gateway.take("init")
    assert init["account_slug"] == "other"
    assert [a["resource_id"] for a in init["authorizations"]] == [reject["resource_id"]]
    assert client.events() == []


@pytest.mark.parametrize("role", ["client", "gateway", "relay"])
def test_a_revoked_token_ends_the_session_for_good(scene: Scene, tmp_path: Path, role: str) -> None:
    world, client, gateway, _ = scene
    peer = {"client": client, "gateway": gateway, "relay": world.relay()}[role]
    token = {"client": "client-token-alice-1", "gateway": "gateway-token-office", "relay": "relay-token-00000000"}[role]
    change(world, tmp_path, (token, "another-token-altogether"))
    assert peer.take("disconnect") == [{"reason": "token_expired"}]
    assert peer.is_closed


def test_a_revoked_gateways_pending_requests_fail(scene: Scene, tmp_path: Path) -> None:
    world, client, _, _ = scene
    client.send("request_authorization", {"resource_id": world.resource("web"), "connected_gateway_ids": []})
    change(world, tmp_path, ("gateway-token-office", "another-token-altogether"))
    assert client.events() == ["authorization_creation_failed"]


def test_a_token_moved_to_another_client_makes_it_come_back(scene: Scene, tmp_path: Path) -> None:
    world, client, _, _ = scene
    change(world, tmp_path, ('name = "alice"', 'name = "carol"'))
    assert client.is_closed
    assert client.take("disconnect") == []
    assert world.client().init["interface"]


def test_a_shorter_lifetime_ends_longer_grants(scene: Scene, tmp_path: Path) -> None:
    world, client, gateway, reject = scene
    change(world, tmp_path, rule="expires_in = 600")
    assert gateway.take("reject_access") == [reject]
    assert client.events() == ["resource_deleted", "resource_created_or_updated"]
    assert world.authorize(client, gateway)["order"]["expires_at"] == UNIX + 600


def test_a_token_that_gets_an_end_ends(scene: Scene, tmp_path: Path) -> None:
    world, client, gateway, reject = scene
    change(world, tmp_path, alice="expires = 2027-01-15T08:00:30Z")  # UNIX + 30
    assert gateway.take("reject_access") == [reject]
    world.advance(30.0)
    assert client.is_closed
