"""The client's side: what it asks of the portal, where packets go, what it believes of gateways.

`shows` marks name items of the lists in spec/.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from bare_client import OWN4, OWN6, SITE, Client, cidr, packed, uuid

from fz_core.crypto import PrivateKey
from fz_core.node import events as node_events
from fz_core.packet import (
    DropReason,
    Packet,
    build_control,
    build_icmp,
    build_icmp_prohibited,
    build_tcp,
    build_udp,
    verify_checksums,
)
from fz_core.portal import client as c
from fz_core.portal import gateway as g
from fz_core.portal.types import (
    Filter,
    IceCredentials,
    InternetResource,
    Resource,
)
from fz_core.tunnel import ClientTunnel
from fz_core.tunnel.authorizations import REFUSED_INTERVAL
from fz_core.tunnel.events import (
    ConnectionDown,
    ConnectionUp,
    ResourceOffline,
    SendToPortal,
)
from tests.sim.system import RESOURCE, SERVER, Peer, Scenario, System


def test_iceless_connections_are_offered() -> None:
    """spec/connectivity.md §7.1."""
    client = Client()
    assert [e.message for e in client.start if isinstance(e, SendToPortal)] == [c.SetSnownetCapabilities(True)]


# TUN to network


@pytest.mark.shows("tunnel", 19)
def test_packets_to_ourselves_ask_for_nothing() -> None:
    """spec/tunnel.md §23 item 19."""
    client = Client(cidr(1, "0.0.0.0/0"), cidr(2, "::/0"))
    assert client.send(str(OWN4)) is DropReason.PACKET_TO_SELF
    assert client.send(str(OWN6)) is DropReason.PACKET_TO_SELF
    assert client.asked() == []


@pytest.mark.shows("tunnel", 20)
def test_strange_sources_and_multicast() -> None:
    """spec/tunnel.md §23 item 20."""
    client = Client(cidr(1, "10.0.0.0/8"))
    assert client.send("10.0.0.1", src="192.168.1.1") is DropReason.NOT_TUNNEL_SOURCE_IP
    assert client.send("224.0.0.251") is None
    assert client.send("ff02::fb") is None
    assert client.asked() == []
    assert client.state.drops[DropReason.MULTICAST] == 2


def test_nothing_is_routed_before_init() -> None:
    state = ClientTunnel(PrivateKey(b"\x01" * 32), 0.0, 1.7e9, Random(1).randbytes)
    error = state.handle_tun_input(build_udp(OWN4.packed, packed("10.0.0.1"), 1, 2, b""), 0.0)
    assert error is not None
    assert error.reason is DropReason.NOT_CONFIGURED


@pytest.mark.shows("tunnel", 39)
@pytest.mark.shows("tunnel", 53)
def test_the_hosts_word_on_late_answers_stays_here() -> None:
    """The kernel answers a reply to a closed socket with an ICMP error; it neither leaves nor asks for anything."""
    client = Client(cidr(1, "10.0.0.0/8"))
    late = build_udp(packed("10.0.0.53"), OWN4.packed, 53, 40000, b"late answer")
    error = build_icmp(OWN4.packed, packed("10.0.0.53"), 3, 3, bytes(4) + late.data[:28])
    assert client.give(error) is DropReason.UNSUPPORTED_PROTOCOL
    assert (client.asked(), client.tun()) == ([], [])


def test_traffic_to_unassigned_sentinels_is_swallowed() -> None:
    """spec/tunnel.md §23 item 39."""
    client = Client(InternetResource(uuid(5), sites=(SITE,)))
    client.state.set_internet_resource(True, client.now)
    assert client.send("100.100.111.3", 443) is None
    assert client.send("fd00:2021:1111:8000:100:100:111:3", 53) is None
    assert client.asked() == []


@pytest.mark.shows("tunnel", 17)
def test_the_internet_resource_takes_what_is_left_over_but_no_peer() -> None:
    """spec/tunnel.md §23 item 17."""
    client = Client(InternetResource(uuid(5), sites=(SITE,)), cidr(1, "10.0.0.0/8"))
    assert client.send("1.1.1.1") is DropReason.UNKNOWN_RESOURCE
    client.state.set_internet_resource(True, client.now)
    assert client.send("100.64.0.77") is DropReason.UNKNOWN_RESOURCE
    assert client.send("fd00:2021:1111::77") is DropReason.UNKNOWN_RESOURCE
    for dst in ("1.1.1.1", "2606:4700::1", "10.0.0.1"):
        assert client.send(dst) is None
    assert client.asked() == [uuid(5), uuid(1)]


@pytest.mark.shows("tunnel", 21)
def test_one_request_then_again_after_two_seconds_of_silence() -> None:
    """spec/tunnel.md §23 item 21."""
    client = Client(cidr(1, "10.0.0.0/8"))
    asked = []
    for at in (0.0, 1.0, 3.0, 3.5, 5.1):
        client.now = 50.0 + at
        client.send("10.0.0.1")
        asked.append(len(client.asked()))
    assert asked == [1, 0, 1, 0, 1]


@pytest.mark.shows("tunnel", 22)
def test_resources_of_one_site_are_requested_separately() -> None:
    """spec/tunnel.md §23 item 22."""
    client = Client(cidr(1, "10.0.0.0/8"), cidr(2, "192.0.2.0/24"))
    client.send("10.0.0.1")
    client.send("192.0.2.1")
    client.send("10.0.0.2")
    assert client.asked() == [uuid(1), uuid(2)]


@pytest.mark.shows("tunnel", 14, 23)
def test_what_filters_deny_is_refused_here_and_asks_for_nothing() -> None:
    """spec/tunnel.md §23 items 14 and 23: exact bytes of the answer."""
    client = Client(cidr(1, "10.0.0.0/8", Filter("icmp")))
    packet = build_udp(OWN4.packed, packed("10.0.0.1"), 1000, 80, b"payload of some length")
    assert client.give(packet) is None
    assert client.asked() == []
    (answer,) = client.tun()
    assert (answer.src, answer.dst) == (packed("10.0.0.1"), OWN4.packed)
    assert (answer.icmp_type, answer.icmp_code) == (3, 13)
    header = bytes.fromhex("45000038000000001401") + answer.data[10:12] + packed("10.0.0.1") + OWN4.packed
    assert answer.data == header + bytes.fromhex("030d") + answer.data[22:24] + bytes(4) + packet.data[:28]
    assert verify_checksums(answer) == ()


def test_the_same_for_ipv6() -> None:
    client = Client(cidr(1, "2001:db8::/64", Filter("tcp", 80, 80)))
    packet = build_udp(OWN6.packed, packed("2001:db8::1"), 1000, 80, b"payload")
    assert client.give(packet) is None
    (answer,) = client.tun()
    start = bytes.fromhex("60000000") + (8 + len(packet)).to_bytes(2, "big") + b"\x3a\x14"
    assert answer.data[:40] == start + packed("2001:db8::1") + OWN6.packed
    assert answer.data[40:42] == b"\x01\x01"
    assert answer.data[44:] == bytes(4) + packet.data
    assert verify_checksums(answer) == ()


@pytest.mark.shows("tunnel", 14)
def test_the_broader_resource_that_allows_wins() -> None:
    """spec/tunnel.md §23 item 14."""
    client = Client(cidr(1, "10.0.0.0/8", Filter("tcp", 443, 443)), cidr(2, "10.0.0.0/24", Filter("udp", 80, 80)))
    client.give(build_tcp(OWN4.packed, packed("10.0.0.1"), 1000, 443, flags=2))
    client.send("10.0.0.1", 80)
    client.send("10.0.0.1", 81)
    assert client.asked() == [uuid(1), uuid(2)]
    assert [p.icmp_code for p in client.tun()] == [13]


def test_unclassifiable_packets_are_refused() -> None:
    client = Client(cidr(1, "10.0.0.0/8"))
    assert client.give(build_icmp(OWN4.packed, packed("10.0.0.1"), 13, 0, bytes(16))) is DropReason.UNSUPPORTED_PROTOCOL
    assert client.give(build_control(2)) is DropReason.NOT_TUNNEL_SOURCE_IP


def test_tun_garbage_is_an_error_about_itself_only() -> None:
    client = Client(cidr(1, "10.0.0.0/8"))
    for data in (b"", b"\x45", b"\x00" * 40, build_udp(OWN4.packed, packed("10.0.0.1"), 1, 2, b"x").data[:-1]):
        error = client.state.handle_tun_input(data, client.now)
        assert error is not None
        assert error.reason is DropReason.MALFORMED_PACKET
    assert client.send("10.0.0.1") is None


# answers of the portal


def grant(resource_id: str, gateway: int = 40) -> c.AuthorizationCreated:
    return c.AuthorizationCreated(
        resource_id, uuid(gateway), SITE.id, b"\x09" * 32,
        IPv4Address("100.64.0.40"), IPv6Address("fd00:2021:1111::40"),
        b"\x07" * 32, IceCredentials("aaaa", "b" * 22), IceCredentials("cccc", "d" * 22),
    )  # fmt: skip


@pytest.mark.shows("tunnel", 28)
def test_an_answer_nobody_waits_for_makes_no_connection() -> None:
    """spec/tunnel.md §23 item 28."""
    client = Client(cidr(1, "10.0.0.0/8"))
    client.tell(grant(uuid(1)))
    client.tell(grant(uuid(9)))
    assert client.state.node.peers == []
    assert client.events() == []


def test_without_relays_the_portal_is_told_and_packets_wait() -> None:
    """spec/tunnel.md §7: no relays."""
    client = Client(cidr(1, "10.0.0.0/8"))
    client.send("10.0.0.1")
    client.events()
    client.tell(grant(uuid(1)))
    assert [e.message for e in client.events(SendToPortal)] == [c.NoRelays()]
    assert client.state.node.peers == []
    client.now += 1.9
    client.send("10.0.0.1", payload=b"y")
    assert client.asked() == []
    client.now += 0.1
    client.send("10.0.0.1", payload=b"z")
    assert client.asked() == [uuid(1)]


def test_failures_are_told_and_only_offline_ends_the_request() -> None:
    """spec/tunnel.md §7: answers."""
    client = Client(cidr(1, "10.0.0.0/8"))
    for reason, asks_soon in (("forbidden", 0), ("version_mismatch", 0), ("unknown", 0), ("offline", 1)):
        client.now += 10
        client.send("10.0.0.1")
        client.events()
        client.tell(c.AuthorizationCreationFailed(uuid(1), c.FailReason(reason)))
        assert client.events(ResourceOffline) == [ResourceOffline(uuid(1), reason)]
        client.send("10.0.0.1")
        assert client.asked() == []
        client.now += REFUSED_INTERVAL
        client.send("10.0.0.1")
        assert len(client.asked()) == asks_soon, reason


@pytest.mark.parametrize(
    "message",
    [
        c.Obsolete("x"),
        c.ClientIceCandidates(uuid(1), ("candidate:1 1 udp 1 1.2.3.4 5 typ host",)),
        c.ClientDeviceAccessDenied(None, None, c.FailReason.OFFLINE),
        c.ResourceFiltersUpdated(uuid(1), ()),
        c.RejectAccess(uuid(1), uuid(2)),
        c.GatewayIceCandidates(uuid(1), ("candidate:1 1 udp 1 1.2.3.4 5 typ host", "rubbish", "")),
        c.InvalidateGatewayIceCandidates(uuid(1), ("rubbish",)),
        c.AuthorizationCreationFailed(uuid(77), c.FailReason.OFFLINE),
        c.RelaysPresence((uuid(3),), ()),
    ],
)
def test_messages_about_strangers_change_nothing(message: Any) -> None:
    client = Client(cidr(1, "10.0.0.0/8"))
    client.tell(message)
    assert client.events(ConnectionUp) == []
    assert client.state.node.peers == []


# candidates while the portal is away


@pytest.mark.shows("tunnel", 35)
def test_candidates_wait_for_the_portal_and_cancel_out() -> None:
    """spec/tunnel.md §23 item 35."""
    client = Client()
    client.state.handle_portal_disconnected(client.now)
    line = "candidate:1 1 udp {} 10.0.0.{} 5 typ host"
    keep, gone, older = line.format(100, 1), line.format(300, 2), line.format(200, 3)
    events = client.state.node._events
    events.extend(node_events.CandidateAdded(uuid(4), text) for text in (keep, gone, older))
    events.append(node_events.CandidateRemoved(uuid(4), gone))
    events.append(node_events.CandidateRemoved(uuid(4), line.format(1, 9)))
    client.state.handle_timeout(client.now)
    assert client.events() == []
    client.state.handle_portal_connected(client.now)
    assert [e.message for e in client.events(SendToPortal)] == [
        c.SetSnownetCapabilities(True),
        c.WithdrawGatewayIceCandidates(uuid(4), (line.format(1, 9),)),
        c.NewGatewayIceCandidates(uuid(4), (older, keep)),
    ]


# with a gateway


def connected(*resources: Resource, **scenario: Any) -> System:
    system = System(1, Scenario(**scenario))
    if resources:
        system.portal.resources = list(resources)
        system.portal.to(system.client_id, system.portal.init(system.client_id))
        system.world.run_for(0.1)
    system.ask(b"hello")
    assert system.world.run_until(lambda: is_up(system.client), 2.0)
    system.world.run_for(1.0)
    return system


def is_up(peer: Peer) -> bool:
    return any(isinstance(e, ConnectionUp) for e in peer.events)


def requests_of(system: System, since: float) -> list[float]:
    return [round(t - since, 3) for t, who, what in system.portal.log if t >= since and what == "request_authorization"]


def from_gateway(system: System, packet: Packet) -> DropReason | None:
    """A packet comes out of the tunnel at the client, whatever the gateway thinks of it."""
    before = len(system.client.errors)
    sent = system.gateway.state.node.encapsulate(system.client_id, packet, 0, system.world.now)
    system.net.send(system.gateway.host, 52625, sent.remote, sent.payload)
    system.world.run_for(0.05)
    errors: list[Any] = system.client.errors[before:]
    return errors[0].reason if errors else None


@pytest.mark.shows("tunnel", 26)
def test_packets_of_one_resource_go_out_in_order_after_authorization() -> None:
    """spec/tunnel.md §23 item 26: at most 128 wait, the oldest are lost."""
    system = System(3)
    for n in range(200):
        system.ask(b"%03d" % n)
    system.world.run_for(2.0)
    assert system.answers == [b"%03d" % n for n in range(72, 200)]


@pytest.mark.shows("tunnel", 25)
def test_a_retransmitted_syn_is_sent_once() -> None:
    """spec/tunnel.md §23 item 25."""
    system = System(3)
    syn = build_tcp(system.client_ip, SERVER, 1000, 80, flags=2, seq=5, payload=b"old")
    again = build_tcp(system.client_ip, SERVER, 1000, 80, flags=2, seq=5, payload=b"new")
    for packet in (syn, again):
        system.client.send(packet)
    system.world.run_for(2.0)
    assert [p.payload for p in system.gateway.packets] == [b"new"]


@pytest.mark.shows("tunnel", 27)
def test_preferred_gateways() -> None:
    """spec/tunnel.md §23 item 27."""
    other = cidr(2, "192.0.2.0/24")
    system = connected(RESOURCE, other)
    system.client.events.clear()
    system.client.send(build_udp(system.client_ip, packed("192.0.2.1"), 1, 2, b""))
    assert [e.message for e in system.client.events if isinstance(e, SendToPortal)] == [
        c.RequestAuthorization(other.id, (system.gateway_id,))
    ]


def test_a_gateway_may_only_send_from_what_it_serves() -> None:
    """spec/tunnel.md §6.2 step 4."""
    system = connected()
    own = system.client_ip
    assert from_gateway(system, build_udp(packed("10.0.0.9"), own, 1, 2, b"")) is None
    assert from_gateway(system, build_udp(system.ip_of(system.gateway_id), own, 1, 2, b"")) is None
    assert from_gateway(system, build_udp(packed("10.0.1.9"), own, 1, 2, b"")) is DropReason.NOT_ALLOWED
    assert from_gateway(system, build_udp(packed("10.0.0.9"), packed("9.9.9.9"), 1, 2, b"")) is DropReason.NOT_ALLOWED


def test_a_gateways_own_address_is_reached_without_filter() -> None:
    """spec/tunnel.md §6.1 step 8."""
    system = connected()
    assert system.client.state.handle_tun_input(
        build_udp(system.client_ip, system.ip_of(system.gateway_id), 1, 53535, b"query"), system.world.now
    ) is None  # fmt: skip
    system.client.drain()
    system.world.run_for(0.1)
    assert [p.payload for p in system.gateway.packets][-1] == b"query"


def test_ecn_of_the_path_reaches_the_inner_packet() -> None:
    """spec/tunnel.md §2.4."""
    system = connected()
    for inner, outer, expected in ((0, 3, 0), (2, 3, 3), (1, 3, 3), (2, 1, 2), (3, 0, 3)):
        packet = build_udp(packed("10.0.0.9"), system.client_ip, 1, 2, b"")
        packet.set_ecn(inner)
        sent = system.gateway.state.node.encapsulate(system.client_id, packet, packet.ecn, system.world.now)
        assert sent.ecn == inner
        system.net.send(system.gateway.host, 52625, sent.remote, sent.payload, outer)
        system.world.run_for(0.05)
        assert system.client.packets[-1].ecn == expected
        assert verify_checksums(system.client.packets[-1]) == ()


@pytest.mark.shows("tunnel", 9)
def test_control_packets_never_reach_the_device() -> None:
    """spec/tunnel.md §23 item 9."""
    system = connected()
    count = len(system.client.packets)
    for event_type in (0, 1, 7, 255):
        assert from_gateway(system, build_control(event_type, b"{}")) is DropReason.BAD_CONTROL
    assert len(system.client.packets) == count
    assert system.client.state.node.peers == [system.gateway_id]


def test_goodbye_forgets_the_gateway_and_the_next_packet_asks_again() -> None:
    """spec/tunnel.md §3: goodbye."""
    system = connected()
    assert from_gateway(system, build_control(2)) is None
    assert system.client.state.node.peers == []
    assert [e.reason for e in system.client.events if isinstance(e, ConnectionDown)] == ["the peer said goodbye"]
    since = system.world.now
    system.ask(b"again")
    assert requests_of(system, since) == []  # on its way
    assert system.world.run_until(lambda: system.answers[-1] == b"again", 2.0)
    assert requests_of(system, since) == [0.005]


def test_removing_the_last_resource_says_goodbye() -> None:
    """spec/tunnel.md §3: goodbye of a client; §4 remove."""
    system = connected()
    system.portal.to(system.client_id, c.ResourceDeleted(RESOURCE.id))
    system.world.run_for(0.5)
    assert system.client.state.node.peers == []
    assert system.gateway.state.node.peers == []
    assert [e.reason for e in system.gateway.events if isinstance(e, ConnectionDown)] == ["the client said goodbye"]


def test_switching_the_internet_resource_off_says_goodbye() -> None:
    """spec/tunnel.md §3 (goodbye when deactivated), §4 (switch)."""
    system = System(1)
    system.portal.resources = [InternetResource(uuid(5), sites=(SITE,))]
    system.portal.to(system.client_id, system.portal.init(system.client_id))
    system.client.state.set_internet_resource(True, system.world.now)
    system.world.run_for(0.1)
    system.client.send(build_udp(system.client_ip, packed("1.1.1.1"), 1, 2, b"out"))
    system.world.run_for(1.0)
    assert [p.payload for p in system.gateway.packets] == [b"out"]
    system.client.state.set_internet_resource(False, system.world.now)
    system.client.drain()
    system.world.run_for(0.1)
    assert system.client.state.node.peers == []
    assert system.gateway.state.node.peers == []


def test_a_gateway_that_serves_another_resource_stays() -> None:
    other = cidr(2, "10.0.0.128/25")
    system = connected(RESOURCE, other)
    system.client.send(build_udp(system.client_ip, packed("10.0.0.200"), 1, 7, b""))
    system.world.run_for(0.5)
    system.portal.to(system.client_id, c.ResourceDeleted(other.id))
    system.world.run_for(0.5)
    assert system.client.state.node.peers == [system.gateway_id]


def test_shutdown_says_goodbye_to_all() -> None:
    system = connected()
    system.client.state.shutdown(system.world.now)
    system.client.drain()
    system.world.run_for(0.1)
    assert system.gateway.state.node.peers == []


def test_a_failed_connection_is_asked_for_anew() -> None:
    system = connected()
    system.gateway.is_dead = True
    since = system.world.now
    for _ in range(60):
        system.ask(b"?")
        system.world.run_for(0.5)
        if system.client.state.node.peers == []:
            break
    assert 1.0 < system.world.now - since < 4.0  # silence, a question to the portal, its answer
    assert [e.reason for e in system.client.events if isinstance(e, ConnectionDown)] != []
    system.world.run_for(REFUSED_INTERVAL)
    system.portal.log.clear()
    system.ask(b"?")
    system.world.run_for(0.1)
    assert [what for _, who, what in system.portal.log if who == "from client"] == ["request_authorization"]


# a gateway that refuses


def prohibited(system: System, source: bytes | None = None) -> Packet:
    answer = build_icmp_prohibited(build_udp(system.client_ip, SERVER, 7000, 7, b"x"))
    if source is not None:
        answer.set_src(source)
    return answer


def test_a_refusal_by_the_gateway_asks_the_portal_at_most_every_two_seconds() -> None:
    """docs/deviations.md: a client asks again after ICMP "administratively prohibited"."""
    system = connected()
    since = system.world.now
    for _ in range(50):
        assert from_gateway(system, prohibited(system)) is None
        system.world.run_for(0.05)
    times = requests_of(system, since)
    assert len(times) == 3
    assert all(b - a >= 2.0 for a, b in pairwise(times))
    assert [p.icmp_code for p in system.client.packets if p.is_icmp_error] == [13] * 50


def test_a_refusal_for_ipv6_counts_too() -> None:
    network = cidr(6, "2001:db8::/64")
    system = System(1)
    system.portal.resources = [network]
    system.portal.to(system.client_id, system.portal.init(system.client_id))
    system.world.run_for(0.1)
    own = system.ip_of(system.client_id, 6)
    packet = build_udp(own, packed("2001:db8::1"), 1, 2, b"x")
    system.client.send(packet)
    system.world.run_for(1.0)
    since = system.world.now
    assert from_gateway(system, build_icmp_prohibited(packet)) is None
    assert len(requests_of(system, since)) == 1


def test_other_errors_and_those_of_routers_ask_for_nothing() -> None:
    system = connected()
    since = system.world.now
    packet = build_udp(system.client_ip, SERVER, 7000, 7, b"x")
    quote = bytes(4) + packet.data[:28]
    assert from_gateway(system, build_icmp(SERVER, system.client_ip, 3, 0, quote)) is None
    assert from_gateway(system, build_icmp(SERVER, system.client_ip, 11, 0, quote)) is None
    assert from_gateway(system, build_icmp(packed("10.0.0.1"), system.client_ip, 3, 13, quote)) is None
    assert from_gateway(system, build_icmp(SERVER, system.client_ip, 3, 13, bytes(12))) is None  # quotes nothing
    elsewhere = build_udp(system.client_ip, packed("172.16.0.1"), 7000, 7, b"x")
    error = build_icmp(packed("10.0.0.1"), system.client_ip, 3, 13, bytes(4) + elsewhere.data[:28])
    assert from_gateway(system, error) is None
    assert requests_of(system, since) == []


def test_a_refusal_interrupts_nothing() -> None:
    """A firewall behind the gateway may say the same: the access stays until the portal has answered."""
    system = connected()
    system.portal.is_up = False
    from_gateway(system, prohibited(system))
    system.ask(b"still here")
    assert system.world.run_until(lambda: system.answers[-1] == b"still here", 0.2)


def test_a_revoked_and_granted_client_is_served_again() -> None:
    other = cidr(2, "192.0.2.0/24")
    system = connected(RESOURCE, other)
    system.client.send(build_udp(system.client_ip, packed("192.0.2.1"), 1, 7, b""))
    system.world.run_for(0.5)
    system.portal.to(system.gateway_id, g.RejectAccess(system.client_id, RESOURCE.id))
    system.world.run_for(0.5)
    system.ask(b"refused")
    system.world.run_for(0.5)
    assert [p.icmp_code for p in system.client.packets if p.is_icmp_error] == [13]
    system.ask(b"served")
    assert system.world.run_until(lambda: system.answers[-1] == b"served", 0.5)
