"""The gateway's side: who may reach what, for how long, and what a refusal looks like.

`shows` marks name items of the lists in spec/.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from random import Random
from typing import Any

import pytest
from gateway_access import ICMP, PASSED, PROHIBITED, TCP, UDP, UNREACHABLE, Access, cidr, create, packed, uuid

from fz_core.crypto import PrivateKey
from fz_core.packet import (
    DropReason,
    Packet,
    build_control,
    build_icmp,
    build_icmp_prohibited,
    build_icmp_unreachable,
    build_ip,
    build_tcp,
    build_udp,
)
from fz_core.portal import client as c
from fz_core.portal import gateway as g
from fz_core.portal.types import (
    CidrResource,
    DnsResource,
    Filter,
    InternetResource,
)
from fz_core.tunnel import GatewayTunnel, control
from fz_core.tunnel.events import (
    AccessGranted,
    ConnectionDown,
    ConnectionUp,
    ResolveName,
    SendToPortal,
    TunConfigChanged,
)
from tests.sim.raw_client import RawClient
from tests.sim.system import EPOCH, Scenario, System

# which packets pass


@pytest.mark.shows("tunnel", 71)
def test_filters_and_prefixes_decide() -> None:
    """spec/tunnel.md §23 item 71, in both directions."""
    access = Access(cidr(1, "10.0.0.0/8", Filter(TCP, 80, 90)), cidr(2, "10.1.0.0/16", Filter(UDP, 53, 53)))
    assert access.tcp("10.1.0.1", 80) == PASSED
    assert access.udp("10.1.0.1", 53) == PASSED
    assert access.udp("10.2.0.1", 53) == PROHIBITED
    assert access.tcp("10.1.0.1", 91) == PROHIBITED
    assert access.udp("11.0.0.1", 53) == PROHIBITED
    assert access.answer("10.1.0.1", 53) is None
    assert access.answer("10.1.0.1", 54) is DropReason.NOT_ALLOWED
    assert access.answer("10.2.0.1", 53) is DropReason.NOT_ALLOWED
    access.tell(c.RejectAccess(access.client_id, uuid(2)))
    assert access.udp("10.1.0.1", 53) == PROHIBITED
    assert access.tcp("10.1.0.1", 80) == PASSED


@pytest.mark.shows("tunnel", 71)
def test_random_resources_against_a_simple_reading_of_the_rules() -> None:
    """spec/tunnel.md §23 item 71."""
    random = Random(7)
    for _ in range(10):
        grants = []
        for number in range(1, 5):
            ports = sorted(random.randrange(10) for _ in range(2))
            filters = () if random.random() < 0.2 else (Filter(random.choice((TCP, UDP)), *ports),)
            prefix = random.choice((8, 16, 24, 32))
            network = ip_network((f"10.{random.randrange(2)}.{random.randrange(2)}.1", prefix), strict=False)
            grants.append(CidrResource(uuid(number), network, "net", filters))
        access = Access(*grants)
        for _ in range(30):
            dst = f"10.{random.randrange(2)}.{random.randrange(2)}.1"
            protocol, port = random.choice((TCP, UDP)), random.randrange(10)
            allowed = any(
                ip_address(dst) in r.address
                and (
                    not r.filters
                    or any(f.protocol == protocol and f.port_range_start <= port <= f.port_range_end for f in r.filters)
                )
                for r in grants
            )
            outcome = access.tcp(dst, port) if protocol == TCP else access.udp(dst, port)
            assert outcome == (PASSED if allowed else PROHIBITED), (dst, protocol, port, grants)


def test_both_families() -> None:
    access = Access(cidr(1, "2001:db8::/64", Filter(UDP, 80, 80)))
    assert access.udp("2001:db8::1") == PASSED
    assert access.udp("2001:db8::1", 81) == PROHIBITED
    assert access.udp("10.0.0.1") == PROHIBITED
    assert access.answer("2001:db8::1") is None


@pytest.mark.shows("tunnel", 74)
def test_the_gateways_own_address_needs_no_grant() -> None:
    """spec/tunnel.md §23 item 74."""
    access = Access(cidr(1, "10.0.0.0/24"))
    assert access.udp(access.gateway_ip(4), 53535) == PASSED
    assert access.tcp(access.gateway_ip(6), 53535) == PASSED
    assert access.answer(access.gateway_ip(4), 53535) is None
    assert access.answer(access.gateway_ip(6), 53535) is None


def test_spoofed_sources_are_refused_visibly() -> None:
    """spec/tunnel.md §14 step 4, §16."""
    access = Access(cidr(1, "10.0.0.0/24"))
    assert access.udp("10.0.0.1", src="10.0.0.99") == PROHIBITED
    assert access.udp("10.0.0.1", src="100.64.0.99") == PROHIBITED


def test_multicast_is_ignored() -> None:
    """spec/tunnel.md §14 step 1."""
    access = Access(cidr(1, "0.0.0.0/0"))
    assert access.udp("224.0.0.251") is None
    assert access.udp("ff02::fb") is None
    assert access.state.drops[DropReason.MULTICAST] == 2


@pytest.mark.shows("tunnel", 78)
def test_errors_sent_by_a_client_are_refused() -> None:
    """spec/tunnel.md §23 item 78."""
    access = Access(cidr(1, "10.0.0.0/24"))
    refused = build_udp(packed("10.0.0.1"), packed(access.own()), 80, 1000, b"x")
    for error in (build_icmp_prohibited(refused), build_icmp_unreachable(refused)):
        assert access.give(error) is DropReason.OUTBOUND_ICMP_ERROR


def test_any_ip_protocol_passes_an_empty_filter_outwards_only() -> None:
    """spec/tunnel.md §14: out by filter; back only TCP, UDP, echo and errors."""
    access = Access(cidr(1, "10.0.0.0/24"), cidr(2, "10.0.1.0/24", Filter(ICMP)))
    gre = build_ip(packed(access.own()), packed("10.0.0.1"), 47, bytes(8))
    assert access.give(gre) == PASSED
    assert access.give(build_icmp(packed(access.own()), packed("10.0.1.1"), 13, 0, bytes(16))) == PASSED
    back = build_ip(packed("10.0.0.1"), packed(access.own()), 47, bytes(8))
    assert access.from_tun(back) is DropReason.NOT_ALLOWED
    timestamp = build_icmp(packed("10.0.1.1"), packed(access.own()), 14, 0, bytes(16))
    assert access.from_tun(timestamp) is DropReason.NOT_ALLOWED


def test_errors_of_the_network_reach_the_client() -> None:
    """spec/tunnel.md §14 from TUN, step 5."""
    access = Access(cidr(1, "10.0.0.0/24", Filter(UDP, 80, 80)))
    sent = build_udp(packed(access.own()), packed("10.0.0.1"), 1000, 80, b"x")
    too_far = build_icmp(packed("192.0.2.1"), packed(access.own()), 11, 0, bytes(4) + sent.data[:28])
    assert access.from_tun(too_far) is None
    access.world.run_for(0.1)
    assert access.system.client.packets[-1].data == too_far.data


def test_strange_packets_from_tun() -> None:
    """spec/tunnel.md §14 from TUN, step 1."""
    access = Access(cidr(1, "10.0.0.0/24"))
    assert access.answer("10.0.0.1", dst="8.8.8.8") is DropReason.NOT_A_PEER
    assert access.answer("10.0.0.1", dst="100.64.0.77") is DropReason.NO_PEER_STATE
    error = access.state.handle_tun_input(b"\x45\x00", access.world.now)
    assert error is not None
    assert error.reason is DropReason.MALFORMED_PACKET


# the internet resource


@pytest.mark.shows("tunnel", 76)
def test_the_internet_resource() -> None:
    """spec/tunnel.md §23 item 76."""
    access = Access(InternetResource(uuid(9)), cidr(1, "10.0.0.0/24"))
    for public in ("1.1.1.1", "172.32.0.1", "2606:4700::1"):
        assert access.udp(public) == PASSED
        assert access.answer(public) is None
    for private in (
        "10.0.0.1", "172.16.0.1", "192.168.0.1", "127.0.0.1", "169.254.1.1", "100.127.255.1" , "240.0.0.1",
        "255.255.255.255", "::1", "::ffff:1.2.3.4", "fc00::1", "fe80::1",
    ):  # fmt: skip
        expected = PROHIBITED if private == "100.127.255.1" else UNREACHABLE
        assert access.udp(private) == expected, private
        assert access.answer(private) is DropReason.NOT_ALLOWED
    for proxy in ("100.96.0.1", "fd00:2021:1111:8000::1"):
        assert access.udp(proxy) == PROHIBITED
        assert access.answer(proxy) is DropReason.NOT_ALLOWED
    access.tell(c.RejectAccess(access.client_id, uuid(9)))
    assert access.udp("1.1.1.1") == PROHIBITED
    assert access.udp("10.0.0.1") == PASSED


@pytest.mark.shows("tunnel", 77)
def test_clients_do_not_reach_each_other() -> None:
    """spec/tunnel.md §23 item 77."""
    access = Access(InternetResource(uuid(9)), clients=2)
    access.grant(InternetResource(uuid(9)), client=1)
    access.world.run_for(1.0)
    for version in (4, 6):
        assert access.udp(access.own(version, client=1)) == PROHIBITED
        assert access.answer(access.own(version, client=1)) is DropReason.NOT_ALLOWED


# grants and their end


def test_a_grant_is_confirmed_and_told() -> None:
    access = Access(cidr(1, "10.0.0.0/24"))
    events = access.system.gateway.events
    assert [e for e in events if isinstance(e, AccessGranted)] == [AccessGranted(access.client_id, uuid(1), None)]
    told = [e.message for e in events if isinstance(e, SendToPortal)]
    kinds = [type(m) for m in told]
    # the portal drops candidates for a client it did not hear a confirmation about
    assert kinds.index(g.AuthorizationCreated) < kinds.index(g.BroadcastIceCandidates)
    assert c.SetSnownetCapabilities(iceless=True) in told


def test_a_second_grant_changes_filters_but_not_the_network() -> None:
    """spec/tunnel.md §14: granting again."""
    access = Access(cidr(1, "10.0.0.0/24", Filter(UDP, 80, 80)))
    access.grant(cidr(1, "10.9.0.0/24", Filter(UDP, 81, 81)))
    assert access.udp("10.0.0.1", 80) == PROHIBITED
    assert access.udp("10.0.0.1", 81) == PASSED
    assert access.udp("10.9.0.1", 81) == PROHIBITED
    assert access.answer("10.0.0.1", 80) is DropReason.NOT_ALLOWED


def test_delivered_twice_is_delivered_once() -> None:
    access = Access(cidr(1, "10.0.0.0/24"))
    for _ in range(5):
        access.grant(cidr(1, "10.0.0.0/24"))
        assert access.udp("10.0.0.1") == PASSED
    assert len([e for e in access.system.gateway.events if isinstance(e, ConnectionUp)]) == 1
    assert access.state.node.peers == [access.client_id]


@pytest.mark.parametrize("other", [InternetResource(uuid(1)), DnsResource(uuid(1), "*.example.com", "dns")])
def test_the_type_of_a_resource_never_changes(other: Any) -> None:
    """spec/tunnel.md §14: a type change under the same id is refused."""
    access = Access(cidr(1, "10.0.0.0/24"))
    access.grant(other)
    access.tell(g.ResourceUpdated(other))
    assert access.udp("10.0.0.1") == PASSED
    assert access.udp("1.1.1.1") == PROHIBITED
    assert len([e for e in access.system.gateway.events if isinstance(e, AccessGranted)]) == 1


def test_updated_filters_apply_to_every_client_that_has_the_resource() -> None:
    access = Access(cidr(1, "10.0.0.0/24"), clients=2)
    access.grant(cidr(1, "10.0.0.0/24"), client=1)
    access.world.run_for(1.0)
    access.tell(g.ResourceUpdated(cidr(1, "10.9.0.0/24", Filter(UDP, 81, 81))))
    access.tell(g.ResourceUpdated(cidr(77, "10.0.0.0/24")))
    for client in (0, 1):
        own = packed(access.own(4, client))
        assert access.give(build_udp(own, packed("10.0.0.1"), 1, 80, b""), client) == PROHIBITED
        assert access.give(build_udp(own, packed("10.0.0.1"), 1, 81, b""), client) == PASSED


@pytest.mark.shows("tunnel", 72)
def test_each_grant_expires_on_its_own() -> None:
    """spec/tunnel.md §23 item 72."""
    access = Access()
    access.grant(cidr(1, "10.0.0.0/24", Filter(TCP, 80, 80)), expires_in=10)
    access.grant(cidr(2, "10.0.0.0/24", Filter(UDP, 80, 80)), expires_in=60)
    access.world.run_for(7.0)
    assert access.tcp("10.0.0.1", 80) == PASSED
    access.world.run_for(4.0)
    assert access.tcp("10.0.0.1", 80) == PROHIBITED
    assert access.udp("10.0.0.1", 80) == PASSED
    assert access.ended() == [(uuid(1), "expired")]
    access.world.run_for(60.0)
    assert access.ended() == [(uuid(1), "expired"), (uuid(2), "expired")]
    assert access.state.node.peers == []
    assert access.answer("10.0.0.1") is DropReason.NO_PEER_STATE


@pytest.mark.shows("tunnel", 73)
def test_a_past_expiry_holds_until_the_next_tick() -> None:
    """spec/tunnel.md §23 item 73."""
    access = Access(cidr(1, "10.0.0.0/24"), cidr(2, "10.0.1.0/24"))
    message = create(access, cidr(1, "10.0.0.0/24"), int(EPOCH + access.world.now - 1000))
    access.state.handle_portal_message(message, access.world.now)
    packet = build_udp(packed("10.0.0.1"), packed(access.own()), 80, 1000, b"")
    assert access.state.handle_tun_input(packet, access.world.now) is None
    access.system.gateway.drain()
    access.world.run_for(1.1)
    assert access.answer("10.0.0.1") is DropReason.NOT_ALLOWED
    assert access.answer("10.0.1.1") is None


def test_a_deadline_moves_either_way_and_leaves_no_timer() -> None:
    access = Access(cidr(2, "10.0.1.0/24"))
    for expires_in in (5, 100, 3, None, 6):
        access.grant(cidr(1, "10.0.0.0/24"), expires_in=expires_in)
    access.world.run_for(4.0)
    assert access.udp("10.0.0.1") == PASSED
    access.tell(c.RejectAccess(access.client_id, uuid(1)))
    access.world.run_for(10.0)
    assert access.ended() == [(uuid(1), "revoked")]


@pytest.mark.parametrize(
    ("unix_time", "passes_after", "gone_after"),
    [
        (None, 200_000.0, None),
        (0, 0.0, 1.1),
        (int(EPOCH) - 5, 0.0, 1.1),
        (int(EPOCH) + 1030, 25.0, 40.0),
        (2**63, 86_000.0, 86_500.0),
        (10**30, 86_000.0, 86_500.0),
    ],
)
def test_portal_time(unix_time: int | None, passes_after: float, gone_after: float | None) -> None:
    """spec/tunnel.md §7, last row: before our start, beyond reason, never."""
    access = Access()
    state, start = access.state, access.world.now
    state.handle_portal_message(create(access, cidr(1, "10.0.0.0/24"), unix_time), start)
    expires_at = state._clients[access.client_id]._grants[uuid(1)].expires_at
    if gone_after is None:
        assert expires_at is None
    else:
        assert expires_at is not None
        assert expires_at <= start + gone_after
        assert expires_at > start + passes_after or unix_time in (0, int(EPOCH) - 5)


def test_reject_access_of_the_last_resource_says_goodbye() -> None:
    """spec/tunnel.md §3 goodbye, §14."""
    access = Access(cidr(1, "10.0.0.0/24"))
    access.tell(c.RejectAccess(access.client_id, uuid(5)))
    access.tell(c.RejectAccess(uuid(7), uuid(1)))
    assert access.udp("10.0.0.1") == PASSED
    access.tell(c.RejectAccess(access.client_id, uuid(1)))
    access.world.run_for(0.1)
    last = access.system.client.packets[-1]
    assert last.data == bytes.fromhex("600000000008ff00" + "00" * 32 + "0200000000000000")
    assert access.state.node.peers == []
    assert [e.peer_id for e in access.system.gateway.events if isinstance(e, ConnectionDown)] == [access.client_id]
    assert access.state.poll_timeout() is not None  # relays


@pytest.mark.shows("tunnel", 79, 80)
def test_init_takes_away_what_it_does_not_list() -> None:
    """spec/tunnel.md §23 items 79 and 80."""
    access = Access(cidr(1, "10.0.0.0/24"), cidr(2, "10.0.1.0/24"), clients=2)
    access.grant(cidr(1, "10.0.0.0/24"), client=1)
    portal = access.system.portal
    portal.disconnect(access.system.gateway_id)
    portal.revoke(access.client_ids[1], uuid(1))
    portal.revoke(access.client_ids[0], uuid(2))
    access.world.run_for(1.0)
    assert access.udp("10.0.1.1") == PASSED  # not heard of yet
    portal.reconnect(access.system.gateway_id)
    access.world.run_for(0.1)
    assert access.udp("10.0.1.1") == PROHIBITED
    assert access.udp("10.0.0.1") == PASSED
    assert access.state.node.peers == [access.client_id]
    assert access.ended() == [(uuid(2), "not listed by the portal"), (uuid(1), "not listed by the portal")]


def test_init_moves_deadlines_and_ignores_strangers() -> None:
    access = Access(cidr(1, "10.0.0.0/24"), cidr(2, "10.0.1.0/24"))
    portal = access.system.portal
    portal.expires_at = int(EPOCH + access.world.now + 5)
    portal.grants[uuid(66), uuid(1)] = None
    portal.to(access.system.gateway_id, portal.init(access.system.gateway_id))
    access.world.run_for(3.0)
    assert access.udp("10.0.0.1") == PASSED
    access.world.run_for(4.0)
    assert sorted(access.ended()) == [(uuid(1), "expired"), (uuid(2), "expired")]


def test_a_lost_connection_leaves_the_grants() -> None:
    """spec/tunnel.md §14: the access list never depends on the connection."""
    access = Access(cidr(1, "10.0.0.0/24"))
    access.state.node.remove(access.client_id)
    assert access.answer("10.0.0.1") is DropReason.NOT_CONNECTED
    access.grant(cidr(2, "10.0.1.0/24"))
    access.world.run_for(1.0)
    # the client kept its connection, so it hears nothing; a new one is built from the same parameters
    assert access.state._clients[access.client_id].resource_ids == {uuid(1), uuid(2)}


def test_a_client_with_new_addresses_starts_anew() -> None:
    """spec/tunnel.md §14: peer whose TUN addresses differ."""
    access = Access(cidr(1, "10.0.0.0/24"), cidr(2, "10.0.1.0/24"))
    old = access.own()
    message = create(access, cidr(1, "10.0.0.0/24"), None, ips=("100.64.9.9", "fd00:2021:1111::99"))
    access.tell(message)
    assert access.answer("10.0.0.1", dst=old) is DropReason.NO_PEER_STATE
    assert access.answer("10.0.0.1", dst="100.64.9.9") is None
    assert access.answer("10.0.1.1", dst="100.64.9.9") is DropReason.NOT_ALLOWED


def test_an_address_that_moved_to_another_client_stays_with_it() -> None:
    access = Access(cidr(1, "10.0.0.0/24"), clients=2)
    access.grant(cidr(2, "10.0.1.0/24"), client=1)
    first, second = access.client_ids
    ips = access.own(4), access.own(6)
    access.tell(create(access, cidr(2, "10.0.1.0/24"), None, client_id=second, ips=ips))
    access.tell(c.RejectAccess(first, uuid(1)))
    assert access.state._by_ip == {packed(ip): second for ip in ips}


def test_before_init_a_connection_is_made_but_nothing_granted() -> None:
    """spec/tunnel.md §14: granting before init."""
    access = Access()
    gateway, portal = access.system.gateway, access.system.portal
    gateway.state = GatewayTunnel(PrivateKey(b"\x05" * 32), access.world.now, EPOCH, Random(3).randbytes)
    gateway.tell(c.RelaysPresence((), portal.relay_entries(access.system.gateway_id)))
    access.world.run_for(1.0)
    gateway.tell(create(access, cidr(1, "10.0.0.0/24"), None))
    assert gateway.state.node.peers == [access.client_id]
    assert gateway.state._clients == {}
    gateway.state.node.remove(access.client_id)


def test_without_relays_nothing_is_confirmed() -> None:
    """spec/tunnel.md §14: not enough relays."""
    access = Access()
    fresh = GatewayTunnel(PrivateKey(b"\x05" * 32), access.world.now, EPOCH, Random(3).randbytes)
    fresh.handle_portal_message(g.Init(access.system.portal.init(access.system.gateway_id).interface), access.world.now)
    fresh.handle_portal_message(create(access, cidr(1, "10.0.0.0/24"), None), access.world.now)
    events = []
    while (event := fresh.poll_event()) is not None:
        events.append(event)
    assert [type(e) for e in events] == [TunConfigChanged, SendToPortal]
    assert events[1] == SendToPortal(c.NoRelays())
    assert fresh._clients == {}


def test_new_addresses_of_the_gateway_itself_count_at_once() -> None:
    access = Access(cidr(1, "10.0.0.0/24"))
    portal = access.system.portal
    role, peer, key, _ = portal.peers[access.system.gateway_id]
    moved: Any = (ip_address("100.64.7.7"), ip_address("fd00:2021:1111::77"))
    portal.peers[access.system.gateway_id] = (role, peer, key, moved)
    old = access.gateway_ip()
    access.tell(portal.init(access.system.gateway_id))
    assert old == "100.64.7.7"
    assert access.udp("100.64.7.7", 53535) == PASSED
    assert access.udp("fd00:2021:1111::77", 53535) == PASSED


# names, not yet


def assigned(resource_id: str, domain: str) -> Packet:
    return control.AssignedIps(resource_id, domain, (ip_address("100.96.0.1"),)).build()


@pytest.mark.parametrize(
    "granted", [DnsResource(uuid(3), "*.other.com", "dns"), DnsResource(uuid(3), "***", "dns"), cidr(3, "10.0.0.0/24")]
)
def test_a_name_the_client_may_not_use_is_answered_inactive(granted: Any) -> None:
    """spec/tunnel.md §15.1: not granted, not matching, no pattern, no DNS resource."""
    access = Access(granted)
    for resource_id in (uuid(3), uuid(4)):
        assert access.give_control(assigned(resource_id, "a.example.com")) == {
            "resource": resource_id,
            "domain": "a.example.com",
            "status": "Inactive",
        }
    assert access.udp("100.96.0.1") == PROHIBITED
    assert [e for e in access.system.gateway.events if isinstance(e, ResolveName)] == []


def test_a_name_is_answered_active_even_without_addresses() -> None:
    access = Access(DnsResource(uuid(3), "*.example.com", "dns"))
    access.system.gateway.zone = {"a.example.com": (), "slow.example.com": None}
    assert access.give_control(assigned(uuid(3), "a.example.com"))["status"] == "Active"
    assert access.udp("100.96.0.1") == UNREACHABLE
    assert access.give_control(assigned(uuid(3), "slow.example.com"))["status"] == "Inactive"


def test_proxies_outside_their_range_are_no_way_around_the_list() -> None:
    """spec/tunnel.md §24: a granted name must not open any other address."""
    access = Access(DnsResource(uuid(3), "*.example.com", "dns"))
    access.system.gateway.zone = {"a.example.com": ("10.20.0.80",)}
    for bad in ("10.20.0.80", "100.64.0.77", "100.100.111.1", "fd00:2021:1111::7", "8.8.8.8"):
        control_packet = control.AssignedIps(uuid(3), "a.example.com", (ip_address(bad),)).build()
        assert access.give(control_packet) is DropReason.BAD_CONTROL
        assert access.udp(bad) == PROHIBITED
    many = tuple(ip_address(f"100.96.0.{n}") for n in range(1, 18))
    assert access.give(control.AssignedIps(uuid(3), "a.example.com", many).build()) is DropReason.BAD_CONTROL
    assert access.give(control.AssignedIps(uuid(3), "a.example.com", ()).build()) is DropReason.BAD_CONTROL


@pytest.mark.shows("tunnel", 75)
def test_a_name_and_a_network_do_not_open_each_other() -> None:
    access = Access(
        DnsResource(uuid(3), "*.example.com", "dns", (Filter(TCP, 80, 80),)),
        cidr(4, "10.20.0.0/24", Filter(UDP, 53, 53)),
    )
    access.system.gateway.zone = {"a.example.com": ("10.20.0.80",)}
    assert access.give_control(assigned(uuid(3), "a.example.com"))["status"] == "Active"
    assert access.tcp("10.20.0.80", 80) == PROHIBITED
    assert access.udp("10.20.0.80", 53) == PASSED
    assert access.udp("100.96.0.1", 53) == PROHIBITED
    before = len(access.system.gateway.packets)
    access.system.client.send(build_tcp(packed(access.own()), packed("100.96.0.1"), 1000, 80, flags=2))
    access.world.run_for(0.1)
    assert [(p.dst, p.dst_port) for p in access.system.gateway.packets[before:]] == [(packed("10.20.0.80"), 80)]


@pytest.mark.shows("tunnel", 76)
def test_the_internet_resource_does_not_widen_a_names_filter() -> None:
    access = Access(InternetResource(uuid(5)), DnsResource(uuid(3), "*.example.com", "dns", (Filter(TCP, 80, 80),)))
    access.system.gateway.zone = {"a.example.com": ("10.20.0.80",)}
    assert access.udp("100.96.0.1") == PROHIBITED
    assert access.give_control(assigned(uuid(3), "a.example.com"))["status"] == "Active"
    assert access.udp("100.96.0.1") == PROHIBITED
    assert access.udp("1.1.1.1") == PASSED
    assert access.udp("10.20.0.80") == UNREACHABLE


def test_look_ups_of_one_client_are_bounded_and_joined() -> None:
    """spec/tunnel.md §24."""
    access = Access(DnsResource(uuid(3), "*.example.com", "dns"))
    for number in range(400):
        for _ in range(3):
            access.system.client.send(assigned(uuid(3), f"{number}.example.com"))
    access.world.run_for(1.0)
    assert len([e for e in access.system.gateway.events if isinstance(e, ResolveName)]) <= 400
    assert access.state.drops[DropReason.DNS_BUSY] > 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'{"resource":"%s","domain":"%s","proxy_ips":[]}' % (uuid(3).encode(), b"a" * 1100),
        b'{"resource":"%s","domain":"%s","proxy_ips":[]}' % (uuid(3).encode(), "ü".encode() * 500),
        b'{"resource":"%s","domain":"%s","proxy_ips":[]}' % (uuid(3).encode(), b"\\u0001" * 150),
        b'{"resource":"%s","domain":"a","proxy_ips":[1]}' % uuid(3).encode(),
        b'{"resource":"%s","domain":"\\ud800","proxy_ips":[]}' % uuid(3).encode(),
    ],
)
def test_undecodable_names_are_ignored(body: bytes) -> None:
    access = Access(cidr(1, "10.0.0.0/24"))
    assert access.give(build_control(0, body)) is DropReason.BAD_CONTROL
    assert access.give(build_control(9, body)) is DropReason.BAD_CONTROL


def test_a_clients_goodbye_ends_its_grants() -> None:
    """spec/tunnel.md §3: goodbye."""
    access = Access(cidr(1, "10.0.0.0/24"))
    assert access.give(build_control(2)) is None
    assert access.state.node.peers == []
    assert access.answer("10.0.0.1") is DropReason.NO_PEER_STATE
    assert access.state._by_ip == {}


def test_the_first_data_announces_the_connection_at_once() -> None:
    """The packet that confirms the keys may be a payload when the empty one before it was lost."""
    system = System(1, Scenario(client_nat="public", gateway_nat="public"), RawClient)
    system.portal.resources = [cidr(1, "10.0.0.0/24")]
    dropped = []

    def receive(to: Any, source: Any, data: bytes, ecn: int) -> None:
        if data[0] == 4 and len(data) == 32 and not dropped:
            dropped.append(data)
            return
        system.gateway._receive(to, source, data, ecn)

    system.gateway.host.listen(4, 52625, receive)
    system.portal._request(system.client_id, uuid(1))
    assert system.world.run_until(lambda: bool(dropped), 2.0)
    assert not any(isinstance(e, ConnectionUp) for e in system.gateway.events)
    system.client.send(build_udp(system.client_ip, packed("10.0.0.1"), 1, 2, b"first"))
    assert system.world.run_until(lambda: bool(system.gateway.packets), 0.1)
    assert any(isinstance(e, ConnectionUp) for e in system.gateway.events)
