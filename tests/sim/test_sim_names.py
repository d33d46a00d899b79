"""DNS resources from the query to the answer of the server behind the gateway, in virtual time."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from fz_core.packet import DropReason, IcmpErrorKind, build_icmp, build_udp, verify_checksums
from fz_core.portal import client as c
from fz_core.portal.types import Filter
from fz_core.tunnel.events import DnsRecordsChanged
from tests.sim.names import TCP, UDP, Names, named, uuid

ICMP = 1
WIKI = {"wiki.corp.example": ("10.0.0.80", "10.0.0.81", "fd20::80")}


def kinds(packets: list) -> list:
    """What ICMP errors say, and the protocols of other packets."""
    found = []
    for packet in packets:
        assert verify_checksums(packet) == ()
        error = packet.icmp_error() if packet.is_icmp_error else None
        found.append(error.kind if error is not None and not isinstance(error, DropReason) else packet.protocol)
    return found


@pytest.mark.shows(41)
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


@pytest.mark.shows(26, 61, 81)
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


@pytest.mark.shows(86)
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


@pytest.mark.shows(61)
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


@pytest.mark.shows(62, 84)
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


@pytest.mark.shows(85)
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


@pytest.mark.shows(15, 87)
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


@pytest.mark.shows(43)
def test_each_family_goes_to_the_resource_that_has_it() -> None:
    names = Names(
        named(1, "*.corp.example", ip_stack="ipv4_only"), named(2, "wiki.corp.example", ip_stack="ipv6_only"), zone=WIKI
    )
    v4, v6 = names.addresses("wiki.corp.example")[0], names.addresses("wiki.corp.example", "AAAA")[0]
    assert kinds(names.talk(v4)) == [UDP]
    assert kinds(names.talk(v6)) == [UDP]
    assert names.asked() == [uuid(1), uuid(2)]


@pytest.mark.shows(42)
def test_narrowing_the_stack_shows_with_the_next_query() -> None:
    names = Names(named(1, "*.corp.example"), zone=WIKI)
    assert len(names.addresses("wiki.corp.example", "AAAA")) == 4
    names.set_resources(named(1, "*.corp.example", ip_stack="ipv4_only"))
    assert names.addresses("wiki.corp.example", "AAAA") == []
    assert len(names.addresses("wiki.corp.example")) == 4


@pytest.mark.shows(46)
def test_reverse_look_ups_of_proxies() -> None:
    names = Names(named(1, "*.corp.example"), zone=WIKI)
    names.addresses("wiki.corp.example")
    assert names.addresses("1.0.96.100.in-addr.arpa", "PTR") == ["wiki.corp.example."]


@pytest.mark.shows(45)
def test_the_canary_and_https() -> None:
    names = Names(named(1, "*.corp.example"), zone=WIKI)
    answer = names.query("use-application-dns.net")
    assert answer is not None
    assert answer.rcode() == 3
    assert names.addresses("wiki.corp.example", "HTTPS") == []


@pytest.mark.shows(63)
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


@pytest.mark.shows(89)
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
    import dns.message
    import dns.rrset

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


@pytest.mark.shows(40)
def test_portal_texts_with_bad_patterns_do_no_harm() -> None:
    names = Names(named(1, "***.example"), named(2, "*.corp.example"), zone=WIKI)
    assert len(names.addresses("wiki.corp.example")) == 4
    names.client.tell(c.ResourceDeleted(uuid(2)))
    assert names.query("wiki.corp.example") is None  # forwarded, and nobody answers
