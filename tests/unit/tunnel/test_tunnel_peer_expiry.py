"""When a client looks at what it granted to other clients, and that those at rest are not asked each turn."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest

from fz_core.portal import client as c
from fz_core.portal.types import Authorization, Filter, IceCredentials, Interface
from fz_core.tunnel.events import AccessEnded
from fz_core.tunnel.peer_access import PeerAccess
from fz_core.tunnel.peer_clients import PeerClients
from tests.unit.tunnel.bare_client import OWN4, OWN6, Client, uuid

EPOCH = 1_700_000_000
POOL = uuid(90)
OPEN = (Filter("tcp", 80, 80),)
V4, V6 = IPv4Address("100.64.1.0"), IPv6Address("fd00:2021:1111::1:0")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    client = Client()
    monkeypatch.setattr(client.state.node, "upsert_connection", lambda *args: True)  # a relay would answer
    return client


def grant(client: Client, number: int, expires_at: float | None) -> str:
    peer, credentials = uuid(number), IceCredentials("u", "p")
    expiry = None if expires_at is None else EPOCH + int(expires_at)
    grant = c.PoolGrant(POOL, OPEN)
    keys = b"k" * 32, V4 + number, V6 + number, bytes(32)
    client.tell(
        c.ClientDeviceAccessAuthorized(peer, "laptop", *keys, credentials, credentials, True, False, grant, expiry)
    )
    return peer


def due_at(client: Client) -> float | None:
    due = client.state.poll_timeout()
    return None if due is None or due[1] != "access expiry" else due[0]


def ended(client: Client, now: float) -> list[tuple[str, str]]:
    client.state.handle_timeout(now)
    return [(event.client_id, event.reason) for event in client.events(AccessEnded)]


def test_each_grant_ends_in_its_time(client: Client) -> None:
    for number, expires_at in ((1, 90.0), (2, 70.0), (3, None), (4, 70.0)):
        grant(client, number, expires_at)
    assert due_at(client) == 70.0
    assert ended(client, 69.0) == []
    assert ended(client, 70.0) == [(uuid(2), "expired"), (uuid(4), "expired")]
    assert due_at(client) == 90.0
    assert ended(client, 90.0) == [(uuid(1), "expired")]
    assert due_at(client) is None


def test_a_grant_may_be_prolonged_or_cut_short(client: Client) -> None:
    first = grant(client, 1, 70.0)
    grant(client, 2, 200.0)
    assert due_at(client) == 70.0
    grant(client, 1, 300.0)
    assert due_at(client) == 200.0
    listed = tuple(Authorization(uuid(n), POOL, EPOCH + at) for n, at in ((1, 150), (2, 200)))
    client.tell(c.Init(Interface(OWN4, OWN6), (), authorizations=listed))
    assert due_at(client) == 150.0
    client.tell(c.RejectAccess(first, POOL))
    assert due_at(client) == 200.0


def test_peers_at_rest_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    peers, asked = PeerClients(), 0
    for number in range(1000):
        peers.upsert(uuid(number), "laptop", (V4 + number, V6 + number)).access.grant(POOL, OPEN, 1000.0 + number)
    assert peers.next_expiry() == 1000.0
    next_expiry = PeerAccess.next_expiry

    def asking(access: PeerAccess) -> float | None:
        nonlocal asked
        asked += 1
        return next_expiry(access)

    monkeypatch.setattr(PeerAccess, "next_expiry", asking)
    for _ in range(10):
        assert peers.next_expiry() == 1000.0
    assert peers.expire(999.0) == []
    assert asked == 0
    assert peers.expire(1000.0) == [(uuid(0), POOL)]
    assert peers.next_expiry() == 1001.0
    assert asked == 1
    peers.forget(uuid(1))
    assert peers.next_expiry() == 1002.0
