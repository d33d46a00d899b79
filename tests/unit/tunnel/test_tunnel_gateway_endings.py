"""When a gateway looks at what it granted, and that clients of whom nothing ends are not looked at."""

from __future__ import annotations

from collections import Counter
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from random import Random
from typing import Any

import pytest

from fz_core.crypto import PrivateKey
from fz_core.packet import DropReason, Packet, build_tcp, build_udp
from fz_core.portal import client as c
from fz_core.portal import gateway as g
from fz_core.portal.types import CidrResource, DnsResource, GatewayInterface, IceCredentials
from fz_core.tunnel import GatewayTunnel, control
from fz_core.tunnel.client_access import ClientAccess
from fz_core.tunnel.events import AccessEnded
from tests.unit.tunnel.gateway_access import Access, packed, uuid

EPOCH = 1_700_000_000
NET = CidrResource(uuid(1), ip_network("10.0.0.0/24"), "net", ())
V4, V6 = IPv4Address("100.64.1.0"), IPv6Address("fd00:2021:1111::1:0")
PROXY, SERVER = "100.96.0.1", "10.20.0.80"
SYN, RST, ACK = 0x02, 0x04, 0x10
CREDENTIALS = IceCredentials("ufrag", "password")


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> GatewayTunnel:
    state = GatewayTunnel(PrivateKey(b"\x01" * 32), 0.0, EPOCH, Random(1).randbytes)
    monkeypatch.setattr(state.node, "upsert_connection", lambda *_: True)  # a relay would answer
    state.handle_portal_message(g.Init(GatewayInterface(V4 - 1, V6 - 1)), 0.0)
    return state


def grant(gateway: GatewayTunnel, number: int, expires_at: int | None, address: int | None = None) -> str:
    at = number if address is None else address
    client = g.Client(f"c{number}", b"k" * 32, bytes(32), V4 + at, V6 + at)
    expiry = None if expires_at is None else EPOCH + expires_at
    message = g.CreateAuthorization("ref", client, NET, CREDENTIALS, CREDENTIALS, expiry)
    gateway.handle_portal_message(message, 0.0)
    return client.id


def due_at(gateway: GatewayTunnel) -> float | None:
    due = gateway.poll_timeout()
    return None if due is None or due[1] != "access expiry" else due[0]


def ended(gateway: GatewayTunnel, now: float) -> list[str]:
    """Whose grants end."""
    gateway.handle_timeout(now)
    clients = []
    while (event := gateway.poll_event()) is not None:
        if isinstance(event, AccessEnded) and event.reason == "expired":
            clients.append(event.client_id)
    return clients


def test_each_grant_ends_in_its_time(gateway: GatewayTunnel) -> None:
    for number, expires_at in ((1, 90), (2, 70), (3, None), (4, 70)):
        grant(gateway, number, expires_at)
    assert due_at(gateway) == 70.0
    assert ended(gateway, 69.0) == []
    assert ended(gateway, 70.0) == ["c2", "c4"]
    assert due_at(gateway) == 90.0
    assert ended(gateway, 90.0) == ["c1"]
    assert due_at(gateway) is None


def test_what_ends_within_a_second_ends_together(gateway: GatewayTunnel) -> None:
    """The look after one at 70 s is not before 71 s."""
    for number, expires_at in ((1, 70), (2, 71), (3, -5)):
        grant(gateway, number, expires_at)
    assert due_at(gateway) == 1.0
    assert ended(gateway, 1.0) == ["c3"]
    assert ended(gateway, 70.5) == ["c1"]
    assert due_at(gateway) == 71.5
    assert ended(gateway, 71.4) == []
    assert ended(gateway, 71.5) == ["c2"]


def test_a_grant_may_be_prolonged_or_cut_short(gateway: GatewayTunnel) -> None:
    grant(gateway, 1, 70)
    grant(gateway, 2, 200)
    grant(gateway, 1, 300)
    assert ended(gateway, 70.0) == []
    assert due_at(gateway) == 200.0
    grant(gateway, 1, 150)
    assert due_at(gateway) == 150.0
    assert ended(gateway, 150.0) == ["c1"]
    assert ended(gateway, 200.0) == ["c2"]


def test_a_client_that_left_and_returned_has_only_what_it_was_granted_since(gateway: GatewayTunnel) -> None:
    client_id = grant(gateway, 1, 70)
    gateway.handle_portal_message(c.RejectAccess(client_id, NET.id), 0.0)
    grant(gateway, 1, 90)
    grant(gateway, 2, 70)
    grant(gateway, 2, 80, address=20)  # by other addresses: another client, as it were
    assert ended(gateway, 70.0) == []
    assert ended(gateway, 80.0) == ["c2"]
    assert ended(gateway, 90.0) == ["c1"]


def test_one_address_of_two_clients_is_two_endings(gateway: GatewayTunnel) -> None:
    """The portal never says so; each grant must end all the same."""
    grant(gateway, 1, 70)
    grant(gateway, 2, 80, address=1)
    assert ended(gateway, 70.0) == ["c1"]
    assert ended(gateway, 80.0) == ["c2"]


def test_clients_of_whom_nothing_ends_are_not_looked_at(
    gateway: GatewayTunnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1000):
        grant(gateway, number, 1000 + 10 * number)
    assert due_at(gateway) == 1000.0
    looks: Counter[str] = Counter()
    for name in ("expire", "next_expiry"):
        monkeypatch.setattr(ClientAccess, name, counting(name, looks))
    assert ended(gateway, 999.0) == []
    assert looks == {}
    assert ended(gateway, 1000.0) == ["c0"]
    assert due_at(gateway) == 1010.0
    assert looks == {"expire": 1}
    grant(gateway, 7, 1500)
    assert looks == {"expire": 1, "next_expiry": 1}


# translated flows


@pytest.fixture
def named() -> Access:
    """A client that uses 100.96.0.1 for a name, whose address is 10.20.0.80."""
    resource = DnsResource(uuid(3), "*.example.com", "dns")
    access = Access(resource)
    access.system.gateway.zone = {"a.example.com": (SERVER,)}
    assigned = control.AssignedIps(resource.id, "a.example.com", (ip_address(PROXY),))
    assert access.give_control(assigned.build())["status"] == "Active"
    return access


def test_a_flow_that_nobody_answers_ends_after_a_minute(named: Access) -> None:
    send(named, build_udp(packed(named.own()), packed(PROXY), 1000, 80, b"question"))
    named.world.run_for(61.1)
    assert named.answer(SERVER) is DropReason.EXPIRED_NAT_SESSION


def test_a_flow_that_is_answered_lives_on(named: Access) -> None:
    send(named, build_udp(packed(named.own()), packed(PROXY), 1000, 80, b"question"))
    named.world.run_for(30.0)
    assert named.answer(SERVER) is None
    named.world.run_for(61.1)
    assert named.answer(SERVER) is None
    named.world.run_for(121.1)
    assert named.answer(SERVER) is DropReason.EXPIRED_NAT_SESSION


@pytest.mark.parametrize("by_client", [True, False])
def test_a_flow_that_was_reset_ends_within_about_a_second(named: Access, by_client: bool) -> None:
    there, back = (packed(named.own()), packed(PROXY), 1000, 80), (packed(SERVER), packed(named.own()), 80, 1000)
    send(named, build_tcp(*there, flags=SYN))
    assert named.from_tun(build_tcp(*back, flags=SYN | ACK)) is None
    if by_client:
        send(named, build_tcp(*there, flags=RST))
    else:
        assert named.from_tun(build_tcp(*back, flags=RST)) is None
    named.world.run_for(1.1)
    assert named.from_tun(build_tcp(*back, flags=ACK)) is DropReason.EXPIRED_NAT_SESSION


def send(access: Access, packet: Packet) -> None:
    """A packet of the client, which reaches the server."""
    before = len(access.system.gateway.packets)
    access.system.client.send(packet)
    access.world.run_for(0.02)
    assert [p.dst for p in access.system.gateway.packets[before:]] == [packed(SERVER)]


def counting(name: str, looks: Counter[str]) -> Any:
    original = getattr(ClientAccess, name)

    def look(access: ClientAccess, *arguments: Any) -> Any:
        looks[name] += 1
        return original(access, *arguments)

    return look
