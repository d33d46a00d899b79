"""Filters and routes: spec/tunnel.md §5, test list items 10 to 18."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from fz_core.portal.types import Filter
from fz_core.tunnel.filters import FilterSet
from fz_core.tunnel.ranges import (
    INTERNET_REJECTED_RANGE,
    PEER_RANGE,
    PROXY_RANGE,
    SENTINEL_RANGE,
    RangeSet,
    is_multicast,
)
from fz_core.tunnel.routing import Route, RoutingTable

TCP, UDP, ICMP, ICMPV6, GRE = 6, 17, 1, 58, 47


def packed(text: str) -> bytes:
    return ip_address(text).packed


def tcp(start: int, end: int | None = None) -> Filter:
    return Filter("tcp", start, start if end is None else end)


def udp(start: int, end: int | None = None) -> Filter:
    return Filter("udp", start, start if end is None else end)


ICMP_FILTER = Filter("icmp")


@pytest.mark.shows("tunnel", 10)
@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP, ICMPV6, GRE])
def test_an_empty_filter_list_allows_everything(protocol: int) -> None:
    assert FilterSet(()).allows(protocol, 12345)
    assert FilterSet(()).allows(protocol, -1)


def test_a_range_is_of_one_protocol_and_inclusive() -> None:
    filters = FilterSet([tcp(80, 90)])
    assert [port for port in (79, 80, 85, 90, 91) if filters.allows(TCP, port)] == [80, 85, 90]
    assert not filters.allows(UDP, 85)
    assert FilterSet([udp(53)]).allows(UDP, 53)
    assert not FilterSet([udp(53)]).allows(TCP, 53)


@pytest.mark.shows("tunnel", 11)
def test_icmp_allows_every_type_of_both_families_and_nothing_else() -> None:
    filters = FilterSet([ICMP_FILTER])
    assert filters.allows(ICMP, 77)
    assert filters.allows(ICMPV6, -1)
    assert not filters.allows(TCP, 80)
    assert not FilterSet([tcp(80)]).allows(ICMP, -1)


def test_other_protocols_need_the_empty_list() -> None:
    assert not FilterSet([tcp(0, 65535), udp(0, 65535), ICMP_FILTER]).allows(GRE, -1)


def table(*routes: tuple[str, str, list[Filter]]) -> RoutingTable:
    built = RoutingTable()
    for network, resource, filters in routes:
        built.add(Route(ip_network(network), resource, FilterSet(filters)))
    return built


def chosen(routes: RoutingTable, ip: str, protocol: int, port: int) -> tuple[str, bool] | None:
    verdict = routes.lookup(packed(ip), protocol, port)
    return None if verdict is None else (verdict.route.resource_id, verdict.allowed)


@pytest.mark.shows("tunnel", 12)
def test_the_longer_prefix_wins_and_strangers_have_no_route() -> None:
    routes = table(("10.0.0.0/8", "wide", []), ("10.1.0.0/16", "narrow", []))
    assert chosen(routes, "10.1.2.3", TCP, 80) == ("narrow", True)
    assert chosen(routes, "10.2.2.3", TCP, 80) == ("wide", True)
    assert chosen(routes, "11.0.0.1", TCP, 80) is None


@pytest.mark.shows("tunnel", 13)
def test_of_equal_networks_the_allowing_one_wins_else_the_higher_id() -> None:
    routes = table(("10.0.0.0/24", "a", [tcp(443)]), ("10.0.0.0/24", "b", [tcp(80)]))
    assert chosen(routes, "10.0.0.1", TCP, 443) == ("a", True)
    assert chosen(routes, "10.0.0.1", TCP, 80) == ("b", True)
    assert chosen(routes, "10.0.0.1", TCP, 22) == ("b", False)


@pytest.mark.shows("tunnel", 14)
def test_an_allowing_wide_network_beats_a_denying_narrow_one() -> None:
    routes = table(("10.0.0.0/8", "wide", [ICMP_FILTER]), ("10.1.0.0/16", "narrow", [udp(80)]))
    assert chosen(routes, "10.1.0.1", ICMP, 7) == ("wide", True)
    assert chosen(routes, "10.1.0.1", UDP, 80) == ("narrow", True)
    assert chosen(routes, "10.1.0.1", UDP, 81) == ("narrow", False)


def test_families_do_not_mix() -> None:
    routes = table(("::/0", "six", []), ("0.0.0.0/0", "four", []))
    assert chosen(routes, "1.2.3.4", UDP, 1) == ("four", True)
    assert chosen(routes, "2001:db8::1", UDP, 1) == ("six", True)


@pytest.mark.shows("tunnel", 16)
def test_cached_answers_disappear_with_any_change() -> None:
    routes = table(("10.0.0.0/8", "wide", []))
    assert chosen(routes, "10.1.0.1", TCP, 80) == ("wide", True)
    assert chosen(routes, "11.0.0.1", TCP, 80) is None
    routes.add(Route(ip_network("11.0.0.0/8"), "new", FilterSet(())))
    assert chosen(routes, "11.0.0.1", TCP, 80) == ("new", True)
    routes.add(Route(ip_network("10.1.0.0/16"), "narrow", FilterSet(())))
    assert chosen(routes, "10.1.0.1", TCP, 80) == ("narrow", True)
    routes.remove_resource("narrow")
    assert chosen(routes, "10.1.0.1", TCP, 80) == ("wide", True)
    for resource_id in ("wide", "new"):
        routes.remove_resource(resource_id)
    assert chosen(routes, "10.1.0.1", TCP, 80) is None
    assert routes.networks() == set()


def test_the_cache_is_bounded() -> None:
    routes = table(("0.0.0.0/0", "all", []))
    for number in range(5000):
        routes.lookup(number.to_bytes(4, "big"), TCP, 80)
    assert len(routes._cache) == 1024


def test_replacing_a_route_changes_its_filter() -> None:
    routes = table(("10.0.0.0/8", "a", [tcp(80)]))
    routes.add(Route(ip_network("10.0.0.0/8"), "a", FilterSet([tcp(81)])))
    assert chosen(routes, "10.0.0.1", TCP, 80) == ("a", False)
    assert chosen(routes, "10.0.0.1", TCP, 81) == ("a", True)
    assert routes.networks() == {ip_network("10.0.0.0/8")}


@pytest.mark.parametrize(
    ("ranges", "inside", "outside"),
    [
        (
            PEER_RANGE,
            ["100.64.0.0", "100.95.255.255", "fd00:2021:1111::1f:ffff"],
            ["100.96.0.0", "fd00:2021:1111::20:0"],
        ),
        (PROXY_RANGE, ["100.96.0.1", "100.127.255.255", "fd00:2021:1111:8000::"], ["100.95.0.1", "fd00:2021:1111::1"]),
        (SENTINEL_RANGE, ["100.100.111.7", "fd00:2021:1111:8000:100:100:111:9"], ["100.100.112.1"]),
        (
            INTERNET_REJECTED_RANGE,
            ["10.1.1.1", "172.31.0.1", "192.168.3.4", "127.0.0.1", "169.254.1.1", "100.127.0.1", "239.1.1.1",
             "255.255.255.255", "::1", "::ffff:1.2.3.4", "fd12::1", "fe80::1", "ff02::1"],
            ["1.1.1.1", "172.32.0.1", "11.0.0.1", "2606:4700::1"],
        ),
    ],
)  # fmt: skip
def test_the_address_plan(ranges: RangeSet, inside: list[str], outside: list[str]) -> None:
    assert all(packed(ip) in ranges for ip in inside)
    assert not any(packed(ip) in ranges for ip in outside)


def test_multicast() -> None:
    assert [ip for ip in ("224.0.0.1", "239.255.255.255", "ff02::1", "223.1.1.1", "240.0.0.1", "fe80::1")
            if is_multicast(packed(ip))] == ["224.0.0.1", "239.255.255.255", "ff02::1"]  # fmt: skip
