"""Addresses, routes and rules in a namespace (spec/io.md 7 and 14, items 13, 41 to 44)."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Any

import pytest
import trio

from fz_core.lab import Host
from fz_core.linux import HostError, NetworkMonitor, TunDevice, set_mark
from fz_core.linux.netlink import Interface
from tests.readiness import readable

pytestmark = pytest.mark.root

NAME = "tun-firezone"
V4, V6 = IPv4Address("100.64.0.7"), IPv6Address("fd00:2021:1111::7")
USER, LINK_SCOPE, INTERNET = 0x2021FD00, 0x2021FD01, 0x2021FD02
MARK = 0xFD002021
DEFAULTS = (ip_network("0.0.0.0/0"), ip_network("::/0"))


@pytest.fixture
def interface(laptop: Host) -> Iterator[Interface]:
    with TunDevice.open(NAME):
        yield Interface(NAME)


@pytest.mark.shows("io", 41)
def test_addresses_mtu_and_rules(laptop: Host, interface: Interface) -> None:
    for _ in range(2):  # repeating changes nothing
        assert interface.set_addresses(V4, V6) == (4, 6)
        (link,) = show(laptop, "-d", "addr", "show", "dev", NAME)
        assert link["mtu"] == 1280
        assert link["txqlen"] == 10000
        assert "UP" in link["flags"]
        assert [(a["local"], a["prefixlen"]) for a in link["addr_info"]] == [(str(V4), 32), (str(V6), 128)]
        for family in ("-4", "-6"):
            rules = [r for r in show(laptop, family, "rule") if r["priority"] in (100, 200, 300)]
            assert [(r["priority"], int(r["table"]), int(r["fwmark"], 16), "not" in r) for r in rules] == [
                (100, USER, MARK, True),
                (200, LINK_SCOPE, MARK, True),
                (300, INTERNET, MARK, True),
            ]
    assert interface.warnings == []


def test_addresses_are_replaced(laptop: Host, interface: Interface) -> None:
    interface.set_addresses(V4, V6)
    interface.set_addresses(IPv4Address("100.64.0.8"), IPv6Address("fd00:2021:1111::8"))
    (link,) = show(laptop, "addr", "show", "dev", NAME)
    assert [a["local"] for a in link["addr_info"]] == ["100.64.0.8", "fd00:2021:1111::8"]


def test_an_address_can_be_bound_at_once(laptop: Host, interface: Interface) -> None:
    """No duplicate address detection: the gateway's DNS listener is bound next."""
    interface.set_addresses(V4, V6)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.bind((str(V6), 53535))


@pytest.mark.shows("io", 42)
def test_without_ipv6_the_tunnel_is_ipv4_only(laptop: Host, interface: Interface) -> None:
    laptop.sysctl(f"net.ipv6.conf.{NAME}.disable_ipv6=1")
    assert interface.set_addresses(V4, V6) == (4,)
    interface.set_routes([ip_network("10.0.0.0/8"), ip_network("fd00::/16")])
    assert destinations(laptop, "-4", USER) == {"10.0.0.0/8"}
    assert destinations(laptop, "-6", USER) == set()
    assert not [r for r in show(laptop, "-6", "rule") if r["priority"] == 100]


def test_routes_become_the_wanted_ones(laptop: Host, interface: Interface) -> None:
    interface.set_addresses(V4, V6)
    interface.set_routes([ip_network("10.0.0.0/8"), ip_network("fd00:5::/64"), *DEFAULTS])
    assert destinations(laptop, "-4", USER) == {"10.0.0.0/8"}
    assert destinations(laptop, "-6", USER) == {"fd00:5::/64"}
    assert destinations(laptop, "-4", INTERNET) == destinations(laptop, "-6", INTERNET) == {"default"}
    laptop.run("ip", "route", "del", "10.0.0.0/8", "table", str(USER))
    interface.set_routes([ip_network("10.0.0.0/8"), ip_network("10.9.0.0/16")])
    assert destinations(laptop, "-4", USER) == {"10.0.0.0/8", "10.9.0.0/16"}
    assert destinations(laptop, "-6", USER) == set()
    assert destinations(laptop, "-4", INTERNET) == set()
    assert interface.warnings == []


@pytest.mark.shows("io", 44)
def test_leftover_routes_are_flushed(laptop: Host, interface: Interface) -> None:
    for table in (USER, LINK_SCOPE, INTERNET):
        laptop.run("ip", "route", "add", "10.7.0.0/16", "dev", "eth0", "table", str(table))
        laptop.run("ip", "-6", "route", "add", "fd07::/64", "dev", "eth0", "table", str(table))
    interface.flush_tables()
    for table in (USER, LINK_SCOPE, INTERNET):
        assert destinations(laptop, "-4", table) == destinations(laptop, "-6", table) == set()
    assert destinations(laptop, "-4", 254)


@pytest.mark.shows("io", 43)
def test_lan_beats_the_internet_resource_and_a_resource_beats_the_lan(laptop: Host, interface: Interface) -> None:
    interface.set_addresses(V4, V6)
    interface.set_routes(DEFAULTS)
    assert device_towards("172.30.0.254") == device_towards("172:30::254") == NAME
    interface.sync_link_scope_routes()
    assert device_towards("172.30.0.254") == device_towards("172:30::254") == "eth0"
    assert device_towards("203.0.113.10") == NAME
    interface.set_routes([*DEFAULTS, ip_network("172.30.0.0/24"), ip_network("172:30::/64")])
    assert device_towards("172.30.0.254") == device_towards("172:30::254") == NAME
    assert interface.warnings == []


@pytest.mark.shows("io", 13)
def test_marked_sockets_stay_out_of_the_tunnel(laptop: Host, interface: Interface) -> None:
    interface.set_addresses(V4, V6)
    interface.set_routes(DEFAULTS)
    for remote in ("203.0.113.10", "203:0:113::10"):
        assert device_towards(remote) == NAME
        assert device_towards(remote, marked=True) == "eth0"


def test_link_scope_copy_follows_the_lan(laptop: Host, interface: Interface) -> None:
    interface.set_addresses(V4, V6)
    interface.sync_link_scope_routes()
    assert destinations(laptop, "-4", LINK_SCOPE) == {"172.30.0.0/24"}
    assert destinations(laptop, "-6", LINK_SCOPE) == {"172:30::/64"}
    laptop.run("ip", "addr", "add", "10.3.0.2/24", "dev", "eth0")
    laptop.run("ip", "addr", "del", "172.30.0.100/24", "dev", "eth0")
    interface.sync_link_scope_routes()
    assert destinations(laptop, "-4", LINK_SCOPE) == {"10.3.0.0/24"}


def test_monitor_tells_changes_and_then_is_silent(laptop: Host) -> None:
    monitor = NetworkMonitor()
    try:
        assert not monitor.drain()
        laptop.run("ip", "addr", "add", "10.3.0.2/24", "dev", "eth0")
        assert readable(monitor)
        assert monitor.drain()
        assert not monitor.drain()
    finally:
        monitor.close()


def test_monitor_survives_more_changes_than_its_buffer_holds(laptop: Host) -> None:
    monitor = NetworkMonitor()
    try:
        batch = laptop.lab.folder / "routes"
        batch.write_text("".join(f"route add 10.{n // 250}.{n % 250}.0/24 dev eth0\n" for n in range(5000)))
        laptop.run("ip", "-batch", str(batch))
        assert monitor.drain()
        assert not monitor.drain()
    finally:
        monitor.close()


@pytest.mark.shows("io", 44)
async def test_works_inside_trio_and_in_its_threads(laptop: Host, interface: Interface) -> None:
    """Worker threads start in the namespace of the thread that starts them."""
    interface.set_addresses(V4, V6)
    async with trio.open_nursery() as nursery:
        for n in range(4):
            nursery.start_soon(trio.to_thread.run_sync, interface.set_routes, [ip_network(f"10.{n}.0.0/16")])
            nursery.start_soon(trio.to_thread.run_sync, interface.sync_link_scope_routes)
    interface.set_routes([ip_network("10.99.0.0/16")])
    assert destinations(laptop, "-4", USER) == {"10.99.0.0/16"}


def test_a_missing_device_is_one_clear_line(laptop: Host) -> None:
    with pytest.raises(HostError, match="nowhere is gone"):
        Interface("nowhere").set_addresses(V4, V6)


def show(host: Host, *arguments: str) -> Any:
    return json.loads(host.run("ip", "-j", *arguments).stdout or "[]")


def destinations(host: Host, family: str, table: int) -> set[str]:
    shown = host.run("ip", "-j", family, "route", "show", "table", str(table), check=False)
    if "FIB table does not exist" in shown.stderr:
        return set()
    return {r["dst"] for r in json.loads(shown.stdout)}


def device_towards(remote: str, *, marked: bool = False) -> str:
    """By the source address the kernel picks for a connected UDP socket."""
    family = socket.AF_INET6 if ":" in remote else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        if marked:
            set_mark(sock)
        sock.connect((remote, 9))
        return NAME if sock.getsockname()[0] in (str(V4), str(V6)) else "eth0"
