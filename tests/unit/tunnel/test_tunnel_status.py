"""Sites, the list of resources as people see it, and values told only when they change."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from fz_core.portal.types import CidrResource, DnsResource, InternetResource, Site, StaticDevicePool
from fz_core.tunnel.latest import Latest
from fz_core.tunnel.status import OFFLINE_TIME, ResourceStatus, Sites, resource_views

ONE, TWO = Site("site-1", "one"), Site("site-2", "two")
ONLINE, OFFLINE, UNKNOWN = ResourceStatus.ONLINE, ResourceStatus.OFFLINE, ResourceStatus.UNKNOWN


def named(number: int, name: str, *sites: Site) -> DnsResource:
    return DnsResource(f"id-{number}", "*.example", name, (), sites or (ONE,))


@pytest.mark.shows("tunnel", 29)
def test_only_the_last_of_several_values_is_told_and_only_if_it_is_news() -> None:
    latest: Latest[str] = Latest()
    assert latest.take("a") == "a"
    assert latest.take("a") is None  # A to B to C to B to A between two looks
    assert latest.take("b") == "b"
    assert latest.take(None) is None
    assert latest.take("b") is None
    assert latest.take("a") == "a"


@pytest.mark.shows("tunnel", 30)
def test_a_connected_gateway_makes_its_site_online_and_no_other() -> None:
    sites = Sites()
    sites.assign("g", ONE.id)
    assert sites.status_of([ONE.id]) is UNKNOWN
    sites.handle_connected("g")
    assert [sites.status_of(s) for s in ([ONE.id], [TWO.id], [TWO.id, ONE.id])] == [ONLINE, UNKNOWN, ONLINE]
    sites.handle_gone("g")
    assert sites.status_of([ONE.id]) is UNKNOWN


def test_a_second_gateway_keeps_the_site_online() -> None:
    sites = Sites()
    for gateway in ("g", "h"):
        sites.assign(gateway, ONE.id)
        sites.handle_connected(gateway)
    sites.handle_gone("g")
    assert sites.status_of([ONE.id]) is ONLINE


@pytest.mark.shows("tunnel", 31)
def test_a_resource_is_offline_only_if_all_its_sites_are() -> None:
    sites = Sites()
    sites.handle_offline([ONE.id], 0.0)
    assert sites.status_of([ONE.id]) is OFFLINE
    assert sites.status_of([ONE.id, TWO.id]) is UNKNOWN
    assert sites.status_of([]) is UNKNOWN
    sites.handle_offline([TWO.id], 0.0)
    assert sites.status_of([ONE.id, TWO.id]) is OFFLINE


@pytest.mark.shows("tunnel", 32)
def test_offline_ends_after_300_seconds() -> None:
    sites = Sites()
    sites.handle_offline([ONE.id], 10.0)
    assert sites.poll_timeout() == 10.0 + OFFLINE_TIME == 310.0
    sites.handle_timeout(309.9)
    assert sites.status_of([ONE.id]) is OFFLINE
    sites.handle_timeout(310.0)
    assert sites.status_of([ONE.id]) is UNKNOWN
    assert sites.poll_timeout() is None


def test_a_connection_ends_offline_at_once() -> None:
    sites = Sites()
    sites.handle_offline([ONE.id], 0.0)
    sites.assign("g", ONE.id)
    sites.handle_connected("g")
    assert sites.status_of([ONE.id]) is ONLINE
    assert sites.poll_timeout() is None


@pytest.mark.shows("tunnel", 33)
def test_the_order_of_the_list() -> None:
    resources = [
        named(1, "😀"), named(2, "b"), named(3, "B"), named(4, "9"), named(5, "*.x"),
        named(7, "same"), named(6, "same"),
        InternetResource("id-8", "zzz", (ONE,)),
        CidrResource("id-9", ip_network("10.0.0.0/8"), "C", (), (ONE,)),
        StaticDevicePool("id-10", "pool"),
    ]  # fmt: skip
    views = resource_views(resources, Sites())
    assert [(v.name, v.id) for v in views] == [
        ("zzz", "id-8"), ("*.x", "id-5"), ("9", "id-4"), ("B", "id-3"), ("C", "id-9"), ("b", "id-2"),
        ("same", "id-6"), ("same", "id-7"), ("😀", "id-1"),
    ]  # fmt: skip
    assert [v.type for v in views][:2] == ["internet", "dns"]


@pytest.mark.shows("tunnel", 34)
def test_renaming_a_site_changes_nothing_but_the_name() -> None:
    sites = Sites()
    sites.assign("g", ONE.id)
    sites.handle_connected("g")
    before = resource_views([named(1, "a")], sites)
    after = resource_views([named(1, "a", Site(ONE.id, "renamed"))], sites)
    assert [v.status for v in before] == [v.status for v in after] == [ONLINE]
