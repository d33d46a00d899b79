"""DNS resources from the query to the answer of the server behind the gateway, in virtual time."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import dns.message
import dns.rrset
import pytest

from fz_core.packet import DropReason, IcmpErrorKind, build_icmp, build_udp, verify_checksums
from fz_core.portal import client as c
from fz_core.portal.types import CidrResource, DynamicDevicePool, Filter
from fz_core.tunnel.events import DnsRecordsChanged, ForwardQuery, SendToPortal, TunConfigChanged
from tests.sim.names import SENTINEL, SITE, TCP, UDP, UPSTREAM, Names, named, uuid

ICMP = 1
SENTINEL6 = "fd00:2021:1111:8000:100:100:111:0"
WIKI = {"wiki.corp.example": ("10.0.0.80", "10.0.0.81", "fd20::80")}


def kinds(packets: list) -> list:
    """What ICMP errors say, and the protocols of other packets."""
    found = []
    for packet in packets:
        assert verify_checksums(packet) == ()
        error = packet.icmp_error() if packet.is_icmp_error else None
        found.append(error.kind if error is not None and not isinstance(error, DropReason) else packet.protocol)
    return found


@pytest.mark.shows("tunnel", 41)
def test_the_first_query_assigns_addresses_and_later_ones_repeat_them() -> None:
    names = Names(named(1, "*.corp.example"), zone=WIKI)
    first = names.addresses("wiki.corp.example")
    assert first == [f"100.96.0.{n}" for n in range(1, 5)]
    assert names.addresses("WIKI.corp.example", "AAAA") == [
        f"fd00:2021:1111:8000::{n}" if n else "fd00:2021:1111:8000::" for n in range(4)
    ]
    assert names.addresses("wiki.corp.example") == first
    tables = [e for e in names.client.events if isinstance(e, DnsRecordsChanged)]
    assert len(tables) == 1
    assert tables[0].records[0].name == "wiki.corp.example"
    assert names.asked() == []


@pytest.mark.shows("tunnel", 26, 61, 81)
@pytest.mark.parametrize("protocol", [UDP, TCP, ICMP])
@pytest.mark.parametrize("rdtype", ["A", "AAAA"])
def test_a_name_is_reached_over_both_families(protocol: int, rdtype: str) -> None:
    names = Names(named(1, "*.corp.example"), zone=WIKI)
    proxy = names.addresses("wiki.corp.example", rdtype)[0]
    replies = names.talk(proxy, protocol=protocol)
    assert len(replies) == 1
    reply = replies[0]
    assert reply.src == ip_address(proxy).packed
    assert reply.dst == names.own(4 if rdtype == "A" else 6)
    assert verify_checksums(reply) == ()
    assert str(ip_address(names.seen[0].dst)) in WIKI["wiki.corp.example"]
    assert names.asked() == [uuid(1)]


def test_many_packets_sent_at_once_arrive_in_order_once() -> None:
    names = Names(named(1, "*.corp.example"), zone=WIKI)
    proxy = ip_address(names.addresses("wiki.corp.example")[0]).packed
    for number in range(20):
        names.client.send(build_udp(names.own(), proxy, 7000, 80, bytes([number])))
    names.world.run_for(3.0)
    assert [p.payload for p in names.seen] == [bytes([n]) for n in range(20)]
    assert [p.payload for p in names.client.packets if p.src_port == 80] == [bytes([n]) for n in range(20)]


@pytest.mark.parametrize(("zone", "family"), [(("10.0.0.80",), 4), (("fd20::80",), 16)])
@pytest.mark.parametrize("rdtype", ["A", "AAAA"])
@pytest.mark.parametrize("protocol", [UDP, TCP, ICMP])
def test_a_name_of_one_family_is_reached_through_both(
    zone: tuple[str, ...], family: int, rdtype: str, protocol: int
) -> None:
    """docs/deviations.md: translation between the families."""
    names = Names(named(1, "*.corp.example"), zone={"wiki.corp.example": zone})
    proxy = names.addresses("wiki.corp.example", rdtype)[0]
    replies = names.talk(proxy, protocol=protocol)
    assert len(replies) == 1
    assert replies[0].src == ip_address(proxy).packed
    assert verify_checksums(replies[0]) == ()
    assert len(names.seen[0].dst) == family
    assert names.seen[0].src == names.own(4 if family == 4 else 6)
    assert verify_checksums(names.seen[0]) == ()


@pytest.mark.shows("tunnel", 86)
def test_without_translation_the_missing_family_is_unreachable() -> None:
    names = Names(named(1, "*.corp.example"), zone={"wiki.corp.example": ("10.0.0.80",)})
    names.gateway.state._mix_families = False
    v4, v6 = names.addresses("wiki.corp.example"), names.addresses("wiki.corp.example", "AAAA")
    for proxy in v4:
        assert kinds(names.talk(proxy, src_port=7001)) == [UDP]
    for proxy in v6:
        assert kinds(names.talk(proxy, src_port=7002)) == [
            IcmpErrorKind.OTHER_UNREACHABLE if False else IcmpErrorKind.UNREACHABLE
        ]


@pytest.mark.parametrize("zone", [{}, {"wiki.corp.example": ()}])
def test_a_name_that_does_not_exist_is_unreachable(zone: dict) -> None:
    names = Names(named(1, "*.corp.example"), zone=zone)
    proxy = names.addresses("wiki.corp.example")[0]
    assert kinds(names.talk(proxy)) == [IcmpErrorKind.UNREACHABLE]


@pytest.mark.shows("tunnel", 61)
def test_a_failed_name_waits_for_the_next_query() -> None:
    """A look-up that takes too long: packets are lost, later ones refused, until somebody asks again."""
    names = Names(named(1, "*.corp.example"), zone={"wiki.corp.example": None})
    proxy = names.addresses("wiki.corp.example")[0]
    assert names.talk(proxy) == []
    assert kinds(names.talk(proxy)) == [IcmpErrorKind.PROHIBITED]
    names.gateway.zone["wiki.corp.example"] = ("10.0.0.80",)
    assert kinds(names.talk(proxy)) == [IcmpErrorKind.PROHIBITED]
    names.addresses("wiki.corp.example")
    assert kinds(names.talk(proxy)) == [UDP]


@pytest.mark.shows("tunnel", 62, 84)
def test_a_name_that_moves_takes_new_flows_along_and_leaves_old_ones() -> None:
    names = Names(named(1, "*.corp.example"), zone={"wiki.corp.example": ("10.0.0.80",)})
    proxy = names.addresses("wiki.corp.example")[0]
    names.talk(proxy, src_port=7001)
    names.gateway.zone["wiki.corp.example"] = ("10.0.0.99",)
    names.world.run_for(2.0)
    names.addresses("wiki.corp.example")
    assert kinds(names.talk(proxy, src_port=7001, wait=0.1)) == [UDP]
    assert kinds(names.talk(proxy, src_port=7002)) == [UDP]
    assert [str(ip_address(p.dst)) for p in names.seen] == ["10.0.0.80", "10.0.0.80", "10.0.0.99"]


@pytest.mark.shows("tunnel", 85)
def test_a_restarted_client_numbers_its_names_anew() -> None:
    names = Names(
        named(1, "*.corp.example"), zone={"one.corp.example": ("10.0.0.81",), "two.corp.example": ("10.0.0.82",)}
    )
    names.talk(names.addresses("one.corp.example")[0])
    names.start("client", names.client)
    names.world.run_for(0.5)
    names.set_resources(*names.portal.resources)
    proxy = names.addresses("two.corp.example")[0]
    assert proxy == "100.96.0.1"
    assert kinds(names.talk(proxy)) == [UDP]
    assert [str(ip_address(p.dst)) for p in names.seen] == ["10.0.0.81", "10.0.0.82"]


@pytest.mark.shows("tunnel", 15, 87)
def test_two_resources_of_one_name_allow_what_either_allows() -> None:
    wide, exact = (
        named(1, "*.corp.example", Filter("udp", 80, 80)),
        named(2, "wiki.corp.example", Filter("tcp", 443, 443)),
    )
    names = Names(wide, exact, zone=WIKI)
    proxy = names.addresses("wiki.corp.example")[0]
    assert kinds(names.talk(proxy, port=80)) == [UDP]
    assert kinds(names.talk(proxy, port=443, protocol=TCP)) == [TCP]
    assert kinds(names.talk(proxy, port=81)) == [IcmpErrorKind.PROHIBITED]
    assert names.asked() == [uuid(1), uuid(2)]


@pytest.mark.shows("tunnel", 43)
def test_each_family_goes_to_the_resource_that_has_it() -> None:
    names = Names(
        named(1, "*.corp.example", ip_stack="ipv4_only"), named(2, "wiki.corp.example", ip_stack="ipv6_only"), zone=WIKI
    )
    v4, v6 = names.addresses("wiki.corp.example")[0], names.addresses("wiki.corp.example", "AAAA")[0]
    assert kinds(names.talk(v4)) == [UDP]
    assert kinds(names.talk(v6)) == [UDP]
    assert names.asked() == [uuid(1), uuid(2)]


@pytest.mark.shows("tunnel", 42)
def test_narrowing_the_stack_shows_with_the_next_query() -> None:
    names = Names(named(1, "*.corp.example"), zone=WIKI)
    assert len(names.addresses("wiki.corp.example", "AAAA")) == 4
    names.set_resources(named(1, "*.corp.example", ip_stack="ipv4_only"))
    assert names.addresses("wiki.corp.example", "AAAA") == []
    assert len(names.addresses("wiki.corp.example")) == 4


@pytest.mark.shows("tunnel", 46)
def test_reverse_look_ups_of_proxies() -> None:
    names = Names(named(1, "*.corp.example"), zone=WIKI)
    names.addresses("wiki.corp.example")
    assert names.addresses("1.0.96.100.in-addr.arpa", "PTR") == ["wiki.corp.example."]


@pytest.mark.shows("tunnel", 45)
def test_the_canary_and_https() -> None:
    names = Names(named(1, "*.corp.example"), zone=WIKI)
    answer = names.query("use-application-dns.net")
    assert answer is not None
    assert answer.rcode() == 3
    assert names.addresses("wiki.corp.example", "HTTPS") == []


@pytest.mark.shows("tunnel", 63)
def test_an_unanswered_announcement_is_repeated_by_traffic_after_two_seconds() -> None:
    names = Names(named(1, "*.corp.example"), zone={**WIKI, "other.corp.example": ("10.0.0.80",)})
    proxy = names.addresses("wiki.corp.example")[0]
    names.talk(proxy)
    announced: list[float] = []
    resolve = names.gateway.state._resolve_for

    def silent(*args: object) -> None:
        announced.append(names.world.now)

    names.gateway.state._resolve_for = silent
    names.world.run_for(2.0)
    names.addresses("other.corp.example")
    other = names.addresses("other.corp.example")[0]
    assert len(announced) == 1
    for _ in range(3):
        names.talk(other, wait=0.5)
    assert len(announced) == 1
    names.talk(other, wait=0.7)
    names.talk(other, wait=0.1)
    assert len(announced) == 2
    names.gateway.state._resolve_for = resolve
    names.world.run_for(2.1)
    assert kinds(names.talk(other))[-1:] == [UDP]


@pytest.mark.shows("tunnel", 89)
@pytest.mark.parametrize(("icmp_type", "code"), [(3, 0), (3, 1), (3, 3), (3, 4), (11, 0)])
def test_errors_of_the_resource_quote_what_the_client_sent(icmp_type: int, code: int) -> None:
    names = Names(named(1, "*.corp.example"), zone={"wiki.corp.example": ("10.0.0.80",)})
    proxy = names.addresses("wiki.corp.example")[0]
    names.talk(proxy, src_port=7001)
    arrived = names.seen[-1]
    error = build_icmp(
        ip_address("10.0.0.80").packed, arrived.src, icmp_type, code, bytes([0, 0, 4, 176]) + arrived.data[:28]
    )
    before = len(names.client.packets)
    names.gateway.send(error)
    names.world.run_for(0.1)
    received = names.client.packets[before:]
    assert len(received) == 1
    told = received[0].icmp_error()
    assert not isinstance(told, DropReason)
    assert told is not None
    assert (told.icmp_type, told.icmp_code) == (icmp_type, code)
    assert (told.dst, told.src, told.src_port) == (ip_address(proxy).packed, names.own(), 7001)
    assert received[0].src == ip_address(proxy).packed


def test_forwarded_queries_and_their_end() -> None:
    """What is no resource's goes to the upstream; its failure is SERVFAIL."""
    names = Names(named(1, "*.corp.example"), zone=WIKI)
    answers: list[bytes | None] = []
    names.client.upstream = lambda query: answers[-1]
    question = dns.message.make_query("example.org", "A", use_edns=False)
    reply = dns.message.make_response(question)
    reply.answer.append(dns.rrset.from_text("example.org.", 300, "IN", "A", "192.0.2.1"))

    def upstream(query: object) -> bytes:
        payload: bytes = query.payload  # type: ignore[attr-defined]
        return payload[:2] + reply.to_wire()[2:]

    names.client.upstream = upstream
    assert names.addresses("example.org") == ["192.0.2.1"]
    names.client.upstream = lambda query: None
    assert names.addresses("example.org") == ["192.0.2.1"]  # from the cache
    answer = names.query("example.net")
    assert answer is not None
    assert answer.rcode() == 2


@pytest.mark.shows("tunnel", 40)
def test_portal_texts_with_bad_patterns_do_no_harm() -> None:
    names = Names(named(1, "***.example"), named(2, "*.corp.example"), zone=WIKI)
    assert len(names.addresses("wiki.corp.example")) == 4
    names.client.tell(c.ResourceDeleted(uuid(2)))
    assert names.query("wiki.corp.example") is None  # forwarded, and nobody answers


@pytest.mark.shows("tunnel", 47)
@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize(("sentinel", "family"), [(SENTINEL, 4), (SENTINEL6, 6)])
def test_services_and_texts_are_asked_in_the_site(connected: bool, sentinel: str, family: int) -> None:
    """The query waits for the authorization, then goes to the gateway's own name server."""
    names = Names(named(1, "**.corp.example"), zone=WIKI)
    names.client.state.set_system_resolvers([ip_address("2001:db8::53").packed], names.world.now)
    if family == 6:  # a sentinel has the family of its server
        names.set_upstreams(ip_address("2001:db8::53"))
    if connected:
        names.talk(names.addresses("wiki.corp.example", sentinel=sentinel)[0])
    asked: list[ForwardQuery] = []

    def upstream(query: ForwardQuery) -> bytes:
        asked.append(query)
        reply = dns.message.make_response(dns.message.from_wire(query.payload))
        reply.answer.append(dns.rrset.from_text(reply.question[0].name, 60, "IN", "SRV", "1 2 5060 wiki.corp.example."))
        return reply.to_wire()

    names.client.upstream = upstream
    found = names.addresses("_sip._tcp.corp.example", "SRV", sentinel=sentinel, wait=1.0)
    assert found == ["1 2 5060 wiki.corp.example."]
    assert [(q.server, q.port, q.via_tunnel, q.tcp) for q in asked] == [
        (names.ip_of(names.gateway_id, family), 53535, True, False)
    ]
    assert names.asked() == [uuid(1)]


@pytest.mark.shows("tunnel", 48, 49)
def test_names_of_a_dynamic_pool_come_from_the_portal_and_before_resources() -> None:
    pool = DynamicDevicePool(uuid(9), "devices", "*.corp.example")
    names = Names(named(1, "*.corp.example"), pool, zone=WIKI)
    assert names.query("laptop.corp.example") is None
    assert names.query("laptop.corp.example", "AAAA") is None
    sent = [e.message for e in names.client.events if isinstance(e, SendToPortal)]
    assert sent.count(c.ResolveDevicePoolDomain(uuid(9), "laptop.corp.example")) == 1
    before = len(names.client.packets)
    ips = ip_address("100.64.0.7"), ip_address("fd00:2021:1111::7")
    names.client.tell(c.DevicePoolDomainResolved(uuid(9), "laptop.corp.example", *ips))
    assert len([p for p in names.client.packets[before:] if p.src_port == 53]) == 2
    assert names.addresses("laptop.corp.example") == ["100.64.0.7"]
    assert names.addresses("laptop.corp.example", "TXT") == []


@pytest.mark.shows("tunnel", 52)
def test_the_ends_of_forwarded_queries() -> None:
    """A local time-out is passed over in silence, one of the tunnel is SERVFAIL; after a reset nothing comes."""
    names = Names(named(1, "*.corp.example"), zone=WIKI)
    names.query("one.example.org")
    forwarded = [e for e in names.client.events if isinstance(e, ForwardQuery)]
    assert [q.via_tunnel for q in forwarded] == [False]
    before = len(names.client.packets)
    names.client.state.handle_dns_result(forwarded[0].token, None, names.world.now, timed_out=True)
    names.client.drain()
    assert names.client.packets[before:] == []
    names.set_resources(CidrResource(uuid(2), ip_network("192.0.2.0/24"), "net", (), (SITE,)))
    for name in ("two.example.org", "three.example.org", "four.example.org"):
        names.query(name)
    two, three, four = [e for e in names.client.events if isinstance(e, ForwardQuery)][1:]
    assert [(q.via_tunnel, q.server) for q in (two, three)] == [(True, UPSTREAM.packed)] * 2
    names.client.state.handle_dns_result(two.token, None, names.world.now, timed_out=True)
    names.client.drain()
    answers = [dns.message.from_wire(p.payload) for p in names.client.packets[before:] if p.src_port == 53]
    assert [(a.question[0].name.to_text(), a.rcode()) for a in answers] == [("two.example.org.", 2)]
    names.client.state._dns.reset()
    for query in (three, four):
        names.client.state.handle_dns_result(query.token, query.payload, names.world.now)
    names.client.drain()
    assert len(names.client.packets[before:]) == 1
    assert names.client.state._dns.poll_timeout() is None


@pytest.mark.shows("tunnel", 50)
def test_a_reply_that_is_none_is_servfail_and_counted() -> None:
    names = Names(named(1, "*.corp.example"), zone=WIKI)
    for reply in (b"", b"\xff" * 600, dns.message.make_response(dns.message.make_query("else.org", "A")).to_wire()):
        names.client.upstream = lambda query, reply=reply: reply
        answer = names.query("one.example.org")
        assert answer is not None
        assert answer.rcode() == 2
    assert names.client.state.drops[DropReason.MALFORMED_DNS] == 3


@pytest.mark.shows("tunnel", 44)
def test_names_of_an_earlier_session_keep_their_addresses() -> None:
    names = Names(named(1, "*.corp.example"), named(2, "*.other.example"), zone=WIKI)
    first = names.addresses("wiki.corp.example")
    second = names.addresses("a.other.example")
    records = names.client.state.dns_records
    names.start("client", names.client)
    names.client.state.restore_dns_records(records)
    names.world.run_for(0.5)
    names.set_resources(named(1, "*.corp.example"), named(2, "*.new.example"))
    assert kinds(names.talk(first[0])) == [UDP]
    assert names.talk(second[0]) == []  # its resource has another pattern now
    assert names.addresses("wiki.corp.example") == first
    assert names.addresses("b.new.example")[0] == "100.96.0.9"


@pytest.mark.shows("tunnel", 36, 37)
def test_servers_of_the_portal_come_before_those_of_the_host() -> None:
    names = Names(named(1, "*.corp.example"), zone=WIKI)
    names.client.state.set_system_resolvers(
        [ip_address(ip).packed for ip in ("198.51.100.1", "100.100.111.1", "198.51.100.1")], names.world.now
    )
    names.client.drain()
    configs = [e for e in names.client.events if isinstance(e, TunConfigChanged)]
    assert configs[-1].sentinels == ((SENTINEL, "192.0.2.53"),)
    names.set_upstreams()
    assert names.client.events[-1].sentinels == (("100.100.111.2", "198.51.100.1"),)
    # traffic to the sentinel of before goes nowhere
    names.client.state.drops.clear()
    assert names.query("wiki.corp.example") is None
    assert names.client.state.drops[DropReason.UNMAPPED_SENTINEL] == 1


def test_a_gateway_that_lost_a_name_is_told_again() -> None:
    """It refuses packets to proxies it does not know; no query is needed to bring them back."""
    names = Names(named(1, "*.corp.example"), zone=WIKI)
    proxy = names.addresses("wiki.corp.example")[0]
    assert kinds(names.talk(proxy)) == [UDP]
    names.gateway.state._clients[names.client_id]._proxies.clear()
    names.world.run_for(5.0)
    assert kinds(names.talk(proxy)) == [IcmpErrorKind.PROHIBITED]
    assert kinds(names.talk(proxy)) == [UDP]
