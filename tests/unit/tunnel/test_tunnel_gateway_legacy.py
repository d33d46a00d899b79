"""The control protocol of clients before 1.4 on a gateway (`spec/portal-protocol.md` §9)."""

from __future__ import annotations

from typing import Any

from gateway_access import PASSED, PROHIBITED, UNREACHABLE, Access, cidr, packed, uuid

from fz_core.packet import DropReason, build_udp
from fz_core.portal import client as c
from fz_core.portal import gateway as g
from fz_core.portal.types import DnsResource, IceCredentials, ProxiedName
from fz_core.tunnel.events import ConnectionUp, ResolveName, SendToPortal
from tests.sim.system import EPOCH, credentials, preshared_key

NAMED = DnsResource(uuid(7), "*.corp.example", "wiki")
PROXIES = ("100.96.0.1", "100.96.0.2", "100.96.0.3", "100.96.0.4")


class Legacy(Access):
    """The same client, brought to the gateway by the old messages only."""

    def request(self, resource: Any, domain: ProxiedName | None = None, ref: str = "ref", round: str = "") -> None:
        _, _, key, (v4, v6) = self.system.portal.peers[self.client_id]
        keys = key + self.system.portal.peers[self.system.gateway_id][2]
        client = g.Client(self.client_id, key, preshared_key(keys), v4, v6)
        theirs = credentials(keys + round.encode())[0]
        self.tell(g.RequestConnection(ref, client, resource, theirs, None, domain, 25))

    def allow(self, resource: Any, domain: ProxiedName | None = None, expires_at: int | None = None) -> None:
        _, _, _, (v4, v6) = self.system.portal.peers[self.client_id]
        self.tell(g.AllowAccess("ref", self.client_id, v4, v6, resource, expires_at, domain))

    def answers(self) -> list[g.ConnectionReady]:
        sent = [e.message for e in self.system.gateway.events if isinstance(e, SendToPortal)]
        return [m for m in sent if isinstance(m, g.ConnectionReady)]

    def grants(self) -> set[str]:
        access = self.state._clients.get(self.client_id)
        return set() if access is None else access.resource_ids


def name(*proxies: str) -> ProxiedName:
    from ipaddress import ip_address

    return ProxiedName("wiki.corp.example", tuple(ip_address(ip) for ip in proxies or PROXIES))


def test_a_connection_is_answered_with_credentials_of_our_own() -> None:
    legacy = Legacy()
    legacy.request(cidr(1, "10.0.0.0/24"), ref="one")
    assert [a.ref for a in legacy.answers()] == ["one"]
    local = legacy.answers()[0].ice_credentials
    assert (len(local.username), len(local.password)) == (8, 32)
    assert legacy.grants() == {uuid(1)}
    assert legacy.state.node.is_known(legacy.client_id)


def test_a_repeated_request_is_an_upsert_with_the_same_answer() -> None:
    legacy = Legacy()
    for ref in ("one", "two", "three"):
        legacy.request(cidr(1, "10.0.0.0/24"), ref=ref)
    answers = legacy.answers()
    assert [a.ref for a in answers] == ["one", "two", "three"]
    assert len({a.ice_credentials for a in answers}) == 1
    legacy.request(cidr(1, "10.0.0.0/24"), ref="four", round="a restarted client")
    assert legacy.answers()[-1].ice_credentials != answers[0].ice_credentials


def test_access_before_the_connection_makes_the_peer_and_its_list() -> None:
    legacy = Legacy()
    legacy.allow(cidr(2, "10.2.0.0/24"))
    assert legacy.grants() == {uuid(2)}
    assert not legacy.state.node.is_known(legacy.client_id)
    assert legacy.answers() == []
    legacy.request(cidr(1, "10.0.0.0/24"))
    assert legacy.grants() == {uuid(1), uuid(2)}
    legacy.allow(cidr(2, "10.2.0.0/24"))
    legacy.allow(cidr(3, "10.3.0.0/24"))
    assert legacy.grants() == {uuid(1), uuid(2), uuid(3)}
    assert len(legacy.answers()) == 1


def test_any_order_any_number_of_times() -> None:
    from itertools import permutations

    for order in permutations("aarrx"):
        legacy = Legacy()
        for step in order:
            match step:
                case "a":
                    legacy.allow(cidr(2, "10.2.0.0/24"))
                case "r":
                    legacy.request(cidr(1, "10.0.0.0/24"))
                case "x":
                    legacy.tell(c.RejectAccess(legacy.client_id, uuid(2)))
        expected = {uuid(1)} | ({uuid(2)} if "a" in order[order.index("x") :] else set())
        assert legacy.grants() == expected, order


def test_a_name_is_resolved_before_the_answer_without_holding_up_others() -> None:
    legacy = Legacy(cidr(1, "10.0.0.0/24"))
    legacy.system.gateway.zone["wiki.corp.example"] = ("10.20.0.80",)
    legacy.request(NAMED, name(), ref="slow")
    assert legacy.answers() == []
    assert [e.name for e in legacy.system.gateway.events if isinstance(e, ResolveName)] == ["wiki.corp.example"]
    assert (
        legacy.system.gateway.state.handle_tun_input(
            build_udp(packed("10.0.0.1"), packed(legacy.own()), 80, 1000, b"others go on"), legacy.world.now
        )
        is None
    )
    legacy.world.run_for(0.1)
    assert [a.ref for a in legacy.answers()] == ["slow"]
    proxy = legacy.state._clients[legacy.client_id]._proxies.get(packed("100.96.0.1"))
    assert proxy is not None
    assert proxy.real(packed("100.96.0.1")) == packed("10.20.0.80")


def test_a_name_that_takes_too_long_does_not_keep_the_client_waiting() -> None:
    """Such a client holds everything else back until it is answered."""
    legacy = Legacy()
    legacy.system.gateway.zone["wiki.corp.example"] = None
    legacy.request(NAMED, name(), ref="slow")
    legacy.world.run_for(1.0)
    assert [a.ref for a in legacy.answers()] == ["slow"]
    assert legacy.grants() == {uuid(7)}


def connected_legacy() -> Legacy:
    """A client with a connection of the old kind and one name."""
    legacy = Legacy(cidr(1, "10.0.0.0/24"))
    legacy.system.gateway.zone["wiki.corp.example"] = ("10.20.0.80",)
    legacy.state._legacy[legacy.client_id] = legacy.state.node._connections.by_peer[legacy.client_id].parameters
    legacy.allow(NAMED, name())
    legacy.world.run_for(0.1)
    return legacy


def reached(legacy: Legacy, port: int) -> list[bytes]:
    """Where a packet to a proxy of the name comes out."""
    before = len(legacy.system.gateway.packets)
    legacy.system.client.send(build_udp(packed(legacy.own()), packed("100.96.0.2"), port, 80, b"x"))
    legacy.world.run_for(0.1)
    return [p.dst for p in legacy.system.gateway.packets[before:]]


def test_names_are_looked_up_again_for_new_flows() -> None:
    """A client before 1.4 announces a name once; what moves must be found all the same."""
    legacy = connected_legacy()
    assert reached(legacy, 1000) == [packed("10.20.0.80")]
    legacy.system.gateway.zone["wiki.corp.example"] = ("10.20.0.99",)
    assert reached(legacy, 1001) == [packed("10.20.0.80")]
    legacy.world.run_for(6.0)
    assert reached(legacy, 1002) == [packed("10.20.0.80")]  # this flow makes the gateway look
    assert reached(legacy, 1003) == [packed("10.20.0.99")]
    assert reached(legacy, 1000) == [packed("10.20.0.80")]  # and old flows stay
    lookups = [e for e in legacy.system.gateway.events if isinstance(e, ResolveName)]
    assert len(lookups) == 2


def test_a_name_found_late_is_reached_late() -> None:
    legacy = connected_legacy()
    legacy.system.gateway.zone["wiki.corp.example"] = ()
    legacy.allow(NAMED, name())
    legacy.world.run_for(6.0)
    assert legacy.udp("100.96.0.2") == UNREACHABLE
    legacy.system.gateway.zone["wiki.corp.example"] = ("10.20.0.80",)
    legacy.world.run_for(6.0)
    assert legacy.udp("100.96.0.2") == UNREACHABLE
    legacy.world.run_for(0.1)
    assert reached(legacy, 1002) == [packed("10.20.0.80")]


def test_a_packet_before_its_announcement_is_dropped_without_a_word() -> None:
    legacy = connected_legacy()
    assert legacy.udp("100.96.0.9") is DropReason.NOT_ALLOWED
    assert legacy.udp("10.99.0.1") == PROHIBITED


def test_access_to_a_name_is_granted_even_if_it_cannot_be_resolved() -> None:
    legacy = Legacy(cidr(1, "10.0.0.0/24"))
    legacy.system.gateway.zone["wiki.corp.example"] = None
    legacy.allow(NAMED, name())
    legacy.world.run_for(1.0)
    assert legacy.grants() == {uuid(1), uuid(7)}
    assert legacy.udp("100.96.0.1") == UNREACHABLE


def test_the_name_of_allowed_access_is_translated() -> None:
    legacy = Legacy(cidr(1, "10.0.0.0/24"))
    legacy.system.gateway.zone["wiki.corp.example"] = ("10.20.0.80",)
    legacy.allow(NAMED, name())
    legacy.world.run_for(0.1)
    before = len(legacy.system.gateway.packets)
    legacy.system.client.send(build_udp(packed(legacy.own()), packed("100.96.0.2"), 1000, 80, b"x"))
    legacy.world.run_for(0.1)
    assert [p.dst for p in legacy.system.gateway.packets[before:]] == [packed("10.20.0.80")]


def test_proxies_outside_their_range_are_refused() -> None:
    legacy = Legacy()
    for bad in ("10.0.0.1", "100.64.0.5", "100.100.111.1", "fd00:2021:1111::5"):
        legacy.request(NAMED, name(bad))
        legacy.allow(NAMED, name(bad))
    legacy.world.run_for(0.1)
    assert legacy.answers() == []
    assert legacy.grants() == set()


def test_grants_of_the_old_protocol_expire_and_pass_traffic_like_others() -> None:
    legacy = Legacy(cidr(1, "10.0.0.0/24"))
    legacy.allow(cidr(2, "10.2.0.0/24"), expires_at=int(EPOCH + legacy.world.now) + 5)
    assert legacy.udp("10.2.0.1") == PASSED
    legacy.world.run_for(7.0)
    assert legacy.udp("10.2.0.1") == PROHIBITED
    assert legacy.udp("10.0.0.1") == PASSED


def test_a_legacy_connection_carries_packets() -> None:
    """The gateway's own credentials let ICE and WireGuard come up with the client that got them."""
    from fz_core.ice import Credentials
    from fz_core.node import CLIENT_PROFILES, Parameters

    legacy = Legacy()
    legacy.request(cidr(1, "10.0.0.0/24"))
    answer: IceCredentials = legacy.answers()[0].ice_credentials
    _, _, key, _ = legacy.system.portal.peers[legacy.client_id]
    gateway_key = legacy.system.portal.peers[legacy.system.gateway_id][2]
    theirs = credentials(key + gateway_key)[0]
    client = legacy.system.client
    client.state.node.upsert_connection(
        legacy.system.gateway_id,
        Parameters(
            gateway_key, preshared_key(key + gateway_key), Credentials(theirs.username, theirs.password),
            Credentials(answer.username, answer.password), controlling=True, iceless=False,
        ),
        legacy.world.now,
        CLIENT_PROFILES,
    )  # fmt: skip
    client.drain()
    legacy.world.run_for(5.0)
    assert any(isinstance(e, ConnectionUp) for e in legacy.system.gateway.events)
