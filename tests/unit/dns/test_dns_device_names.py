"""Names of dynamic device pools."""

from __future__ import annotations

from ipaddress import ip_address

import dns.message
import dns.rcode
import pytest

from fz_core.dns import PENDING, DeviceNames, ProxyNames, Query, ResourceStub

V4, V6 = ip_address("100.64.0.5").packed, ip_address("fd00:2021:1111::5").packed
NAME = "laptop.devices.example"


@pytest.mark.shows("tunnel", 48)
def test_an_unmatched_name_passes() -> None:
    assert make_pools().handle_query(make_query("example.com"), 1, 0.0) is None
    chaos = parse(dns.message.make_query(NAME, "A", rdclass="CH").to_wire())
    assert make_pools().handle_query(chaos, 1, 0.0) is None


@pytest.mark.shows("tunnel", 48)
def test_other_types_are_empty() -> None:
    pools = make_pools()
    assert read(pools.handle_query(make_query(NAME, "TXT"), 1, 0.0)) == ("NOERROR", [])
    assert pools.poll_request() is None


@pytest.mark.shows("tunnel", 48)
def test_one_request_two_answers_then_memory() -> None:
    pools = make_pools()
    assert pools.handle_query(make_query(NAME, "A"), "a", 0.0) is PENDING
    assert pools.handle_query(make_query(NAME.upper(), "AAAA"), "b", 1.0) is PENDING
    assert pools.poll_request() == ("p1", NAME)
    assert pools.poll_request() is None
    pools.resolved("p1", NAME, V4, V6, 2.0)
    assert replies(pools) == {"a": ("NOERROR", ["100.64.0.5"]), "b": ("NOERROR", ["fd00:2021:1111::5"])}
    assert pools.poll_timeout() is None
    answer = pools.handle_query(make_query(NAME, "A", message_id=9), "c", 3.0)
    assert read(answer) == ("NOERROR", ["100.64.0.5"])
    assert isinstance(answer, bytes)
    assert dns.message.from_wire(answer).answer[0].ttl == 1
    assert pools.poll_request() is None


@pytest.mark.shows("tunnel", 48)
@pytest.mark.parametrize(("is_missing", "rcode"), [(True, "NXDOMAIN"), (False, "SERVFAIL")])
def test_failures_are_not_remembered(is_missing: bool, rcode: str) -> None:
    pools = make_pools()
    pools.handle_query(make_query(NAME), "a", 0.0)
    pools.poll_request()
    pools.failed("p1", NAME, is_missing, 1.0)
    assert replies(pools) == {"a": (rcode, [])}
    assert pools.handle_query(make_query(NAME), "a", 2.0) is PENDING
    assert pools.poll_request() == ("p1", NAME)


@pytest.mark.shows("tunnel", 48)
def test_the_portal_has_five_seconds() -> None:
    pools = make_pools()
    pools.handle_query(make_query(NAME), "a", 10.0)
    assert pools.poll_timeout() == 15.0
    pools.handle_timeout(14.9)
    assert pools.poll_reply() is None
    pools.handle_timeout(15.0)
    assert replies(pools) == {"a": ("SERVFAIL", [])}
    pools.resolved("p1", NAME, V4, V6, 16.0)
    assert pools.poll_reply() is None
    assert pools.handle_query(make_query(NAME), "a", 17.0) is PENDING


@pytest.mark.shows("tunnel", 48)
def test_a_removed_pool_is_forgotten() -> None:
    pools = make_pools()
    pools.handle_query(make_query("known.devices.example"), "known", 0.0)
    pools.resolved("p1", "known.devices.example", V4, V6, 0.0)
    replies(pools)
    pools.handle_query(make_query(NAME), "a", 0.0)
    pools.remove_pool("p1")
    assert replies(pools) == {"a": ("SERVFAIL", [])}
    assert pools.poll_request() is None
    assert pools.handle_query(make_query("known.devices.example"), "b", 1.0) is None
    pools.add_pool("p1", "*.devices.example")
    assert pools.handle_query(make_query("known.devices.example"), "b", 1.0) is PENDING


def test_a_replaced_pattern_forgets_and_the_same_one_does_not() -> None:
    pools = make_pools()
    pools.handle_query(make_query(NAME), "a", 0.0)
    pools.resolved("p1", NAME, V4, V6, 0.0)
    pools.add_pool("p1", "*.devices.example")
    assert isinstance(pools.handle_query(make_query(NAME), "a", 1.0), bytes)
    assert pools.add_pool("p1", "**.devices.example")
    assert pools.handle_query(make_query(NAME), "a", 1.0) is PENDING
    assert not pools.add_pool("p1", "a**")
    assert pools.handle_query(make_query(NAME), "a", 1.0) is None


@pytest.mark.shows("tunnel", 49)
def test_a_pool_is_asked_whatever_the_resources_say() -> None:
    names = ProxyNames()
    names.add_resource("r1", NAME, "dual")
    assert ResourceStub(names).resolve(make_query(NAME), lambda name: False) is not None
    assert make_pools().handle_query(make_query(NAME), "a", 0.0) is PENDING


def test_the_first_pool_by_id_wins() -> None:
    pools = DeviceNames()
    pools.add_pool("p2", NAME)
    pools.add_pool("p1", "**")
    pools.handle_query(make_query(NAME), "a", 0.0)
    assert pools.poll_request() == ("p1", NAME)


def test_who_repeats_a_question_gets_one_answer_and_two_askers_two() -> None:
    pools = make_pools()
    for token in ("a", "a", "b"):
        assert pools.handle_query(make_query(NAME), token, 0.0) is PENDING
    pools.resolved("p1", NAME, V4, None, 0.0)
    assert [pools.poll_reply() and True for _ in range(3)] == [True, True, None]


def test_answers_expire() -> None:
    pools = make_pools()
    pools.handle_query(make_query(NAME), "a", 0.0)
    pools.resolved("p1", NAME, V4, V6, 0.0)
    assert isinstance(pools.handle_query(make_query(NAME), "a", 299.9), bytes)
    assert pools.handle_query(make_query(NAME), "a", 300.0) is PENDING


def test_an_answer_nobody_asked_for_is_ignored() -> None:
    pools = make_pools()
    pools.resolved("p1", NAME, V4, V6, 0.0)
    pools.failed("p2", NAME, True, 0.0)
    assert pools.poll_reply() is None
    assert pools.handle_query(make_query(NAME), "a", 0.0) is PENDING


def test_lookups_and_waiters_are_bounded() -> None:
    pools = make_pools()
    waiting = [pools.handle_query(make_query(f"{n}.devices.example"), n, 0.0) is PENDING for n in range(300)]
    assert waiting == [True] * 256 + [False] * 44
    waiting = [pools.handle_query(make_query("0.devices.example"), f"x{n}", 0.0) is PENDING for n in range(20)]
    assert waiting == [True] * 15 + [False] * 5
    pools.handle_timeout(5.0)
    assert pools.poll_timeout() is None


def make_pools() -> DeviceNames:
    pools = DeviceNames()
    assert pools.add_pool("p1", "*.devices.example")
    return pools


def make_query(name: str, rdtype: str = "A", message_id: int = 1) -> Query:
    return parse(dns.message.make_query(name, rdtype, id=message_id).to_wire())


def parse(wire: bytes) -> Query:
    query = Query.parse_untrusted(wire)
    assert query is not None
    return query


def replies(pools: DeviceNames) -> dict[object, tuple[str, list[str]]]:
    found = {}
    while (answered := pools.poll_reply()) is not None:
        token, reply = answered
        assert token not in found
        found[token] = read(reply)
    return found


def read(reply: object) -> tuple[str, list[str]]:
    assert isinstance(reply, bytes)
    message = dns.message.from_wire(reply)
    texts = [rdata.to_text() for rrset in message.answer for rdata in rrset]
    return dns.rcode.to_text(message.rcode()), texts
