"""A client whose network changes under it: spec/io.md §14 items 10, 13, 23, 24, 30 and 47."""

from __future__ import annotations

import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path

import pytest
import trio

from fz_core.crypto import PrivateKey
from fz_core.driver import clock
from fz_core.driver.names.client_names import ClientNames
from fz_core.driver.roaming import Change, RouteWatch, follow_routes
from fz_core.lab import Host, Lab, LabError
from fz_core.lab.names import start_names
from fz_core.lab.processes import run
from fz_core.lab.system import System
from fz_core.linux import RouteCache, SocketFactory, TunDevice, UdpSocket, make_dns_control
from fz_core.linux.netlink import Interface
from fz_core.packet import Address
from fz_core.tunnel import ClientTunnel
from tests.netns.scenarios import eventually
from tests.readiness import readable

pytestmark = [pytest.mark.root, pytest.mark.peer("ip", "nft", "curl", "ss")]

PORTAL4, PORTAL6 = "203.0.113.10", "203:0:113::10"
TARGETS = (socket.inet_pton(socket.AF_INET, PORTAL4), socket.inet_pton(socket.AF_INET6, PORTAL6))
DOWNLOAD = 30_000_000


class Watched:
    """A laptop at home, its watch over routes, and what that reported."""

    def __init__(self, laptop: Host) -> None:
        self.laptop = laptop
        self.routes = RouteCache()
        self.watch = RouteWatch(self.routes, lambda: TARGETS)
        self.changes: list[Change] = []

    async def judged_after(self, act: Callable[[], object]) -> list[Change]:
        """What was reported so far, once the kernel's news of an act were judged, and nothing more came."""
        before = self.routes.lookups
        act()
        with trio.fail_after(10):
            while self.routes.lookups == before:
                await trio.sleep(0.01)
            while self.routes.lookups != before:
                before = self.routes.lookups
                await trio.sleep(0.5)
        return self.changes


@pytest.fixture
def system() -> Iterator[System]:
    """One client, whose requests are answered."""
    with Lab() as lab:
        system = System(lab)
        system.start()
        eventually(system, 20.0)
        yield system


@pytest.fixture
async def watched(laptop: Host, nursery: trio.Nursery) -> Watched:
    watched = Watched(laptop)
    nursery.start_soon(follow_routes, watched.watch, watched.changes.append)
    await trio.testing.wait_all_tasks_blocked()
    return watched


@pytest.mark.shows("io", 47)
async def test_the_link_in_use_counts_and_another_does_not(watched: Watched) -> None:
    laptop = watched.laptop

    def second_link() -> None:
        laptop.ip("link", "add", "wlan0", "type", "veth", "peer", "name", "far0")
        laptop.ip("link", "set", "far0", "up")
        laptop.ip("addr", "add", "10.9.9.2/24", "dev", "wlan0")
        laptop.ip("addr", "add", "fd99::2/64", "dev", "wlan0", "nodad")
        laptop.ip("link", "set", "wlan0", "up")
        laptop.ip("route", "add", "203.0.113.0/24", "via", "10.9.9.1", "metric", "600")
        laptop.ip("route", "add", "203:0:113::/64", "via", "fd99::1", "metric", "6000")

    def switch() -> None:
        laptop.ip("route", "del", "203.0.113.0/24", "via", "172.30.0.254")
        laptop.ip("route", "del", "203:0:113::/64", "via", "172:30::254")

    assert await watched.judged_after(second_link) == []
    assert await watched.judged_after(lambda: laptop.ip("addr", "add", "10.9.9.3/24", "dev", "wlan0")) == []
    assert await watched.judged_after(switch) == [Change.MOVED]
    assert await watched.judged_after(lambda: laptop.ip("addr", "flush", "dev", "eth0")) == [Change.MOVED]
    assert await watched.judged_after(lambda: laptop.ip("link", "del", "wlan0")) == [Change.MOVED]


async def test_a_network_that_goes_is_waited_for(watched: Watched) -> None:
    laptop = watched.laptop

    def come_back() -> None:
        laptop.ip("addr", "add", "172.30.0.100/24", "dev", "eth0")
        laptop.ip("addr", "add", "172:30::100/64", "dev", "eth0", "nodad")
        laptop.ip("route", "replace", "203.0.113.0/24", "via", "172.30.0.254")
        laptop.ip("route", "replace", "203:0:113::/64", "via", "172:30::254")

    assert await watched.judged_after(lambda: laptop.ip("addr", "flush", "dev", "eth0")) == []
    assert await watched.judged_after(come_back) == [Change.BACK]


async def test_our_own_device_does_not_count(watched: Watched) -> None:
    v4, v6 = IPv4Address("100.64.0.7"), IPv6Address("fd00:2021:1111::7")
    with TunDevice.open("tun-firezone") as tun:
        interface = Interface(tun.name)

        def configure() -> None:
            interface.set_addresses(v4, v6)
            interface.set_routes([ip_network("0.0.0.0/0"), ip_network("::/0"), ip_network("203.0.113.0/24")])
            interface.sync_link_scope_routes()

        assert await watched.judged_after(configure) == []
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unmarked:
            unmarked.connect((PORTAL4, 9))
            assert unmarked.getsockname()[0] == str(v4)
    assert await watched.judged_after(lambda: watched.laptop.ip("addr", "add", "10.1.1.1/32", "dev", "lo")) == []


@pytest.mark.shows("io", 23)
async def test_temporary_ipv6_addresses_come_and_go_unnoticed(watched: Watched) -> None:
    laptop = watched.laptop
    stable = "172:30::100"

    def temporary() -> list[str]:
        shown = laptop.run("ip", "-6", "-o", "addr", "show", "dev", "eth0", "temporary").stdout
        return re.findall(r"inet6 (\S+)/64", shown)

    def source() -> str:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.connect((PORTAL6, 9))
            return str(sock.getsockname()[0])

    def begin() -> None:
        laptop.sysctl("net.ipv6.conf.eth0.use_tempaddr=2")
        laptop.ip("addr", "change", f"{stable}/64", "dev", "eth0", "mngtmpaddr", "nodad")

    def rotate() -> None:
        for ip in temporary():
            laptop.ip("addr", "del", f"{ip}/64", "dev", "eth0")

    assert await watched.judged_after(begin) == []
    (first,) = temporary()
    assert source() == first  # what anybody else would send from
    with UdpSocket.bind(socket.AF_INET6) as udp:
        assert leaves_from(laptop, udp) == stable
        assert await watched.judged_after(rotate) == []
        assert first not in temporary()
        assert leaves_from(laptop, udp) == stable


@pytest.mark.shows("io", 13, 24, 47)
def test_a_download_survives_sighup_and_another_network(system: System) -> None:
    """Sockets keep their ports and marks; each occasion is one reset."""
    client, cafe = system.clients[0], system.lab.router("cafe", 40)
    assert_marked(client.host, client.process.pid)
    download = client.host.spawn(
        "download",
        ["curl", "-sS", "--limit-rate", "3M", "--max-time", "60", "-o", str(system.lab.folder / "file"),
         "-w", "got %{size_download}", f"http://10.20.0.80/bytes?num={DOWNLOAD}"],
    )  # fmt: skip
    time.sleep(1.0)
    client.process.send_signal(signal.SIGHUP)
    client.process.wait_for_line("Resetting session reason=SIGHUP")
    eventually(system, 10.0)
    assert_marked(client.host, client.process.pid)
    time.sleep(1.0)
    client.host.unplug()
    time.sleep(2.0)
    cafe.attach(client.host)
    client.process.wait_for_line('Resetting session reason="a source address changed"')
    eventually(system, 10.0)
    download.wait_for_line(f"got {DOWNLOAD}", 60.0)
    assert client.process.output.count("Resetting session") == 2
    assert client.process.output.count("ConnectionUp") == 3
    assert_marked(client.host, client.process.pid)
    assert system.warnings() == []


def test_a_signal_with_the_change_is_still_one_reset(system: System) -> None:
    client, cafe = system.clients[0], system.lab.router("cafe", 40)
    client.host.unplug()
    time.sleep(1.0)
    cafe.attach(client.host)
    client.process.send_signal(signal.SIGHUP)
    eventually(system, 10.0)
    time.sleep(2.0)
    assert client.process.output.count("Resetting session") == 1


@pytest.mark.shows("io", 9)
@pytest.mark.peer("cc")
def test_ten_minutes_of_sleep_are_one_reset() -> None:
    """The client's CLOCK_BOOTTIME jumps as it does in a suspend, and its other clocks do not."""
    with Lab() as lab:
        asleep, library = lab.folder / "asleep", lab.folder / "sleep.so"
        source = lab.folder / "sleep.c"
        source.write_text(SLEEP)
        run(["cc", "-shared", "-fPIC", f'-DASLEEP="{asleep}"', "-o", str(library), str(source), "-ldl"])
        system = System(lab)
        system.start_portal()
        system.start_relay(0)
        system.add_gateway("gateway", 31)
        client = system.add_client("client", 30, env={"LD_PRELOAD": str(library)})
        eventually(system, 20.0)
        asleep.touch()
        client.host.run("ping", "-c", "1", "-W", "1", "10.20.0.80", check=False)  # something wakes the loop
        client.process.wait_for_line('Resetting session reason="the machine slept for 600 s"')
        eventually(system, 10.0)
        assert client.process.output.count("Resetting session") == 1
        assert client.process.is_running


@pytest.mark.shows("io", 10)
def test_without_its_device_a_program_ends_with_an_error() -> None:
    with Lab() as lab:
        system = System(lab)
        system.start()
        for member in (system.gateways[0], system.clients[0]):
            member.host.ip("link", "del", "tun-firezone")
            assert member.process.wait(10) == 1
            assert "was the device deleted" in member.process.tail()
        assert " ERROR " in system.gateways[0].process.tail(2)


@pytest.mark.shows("io", 30)
@pytest.mark.peer("unbound")
async def test_the_portals_name_is_never_asked_of_our_own_servers(nursery: trio.Nursery) -> None:
    """While the host is pointed at a sentinel, and whatever was under way before."""
    with Lab() as lab:
        names = start_names(lab.public_host("names", 11), {"portal.example": ["@ 60 A 203.0.113.10"]})
        laptop = lab.host("laptop", lab.router("home", 30))
        etc = Path(lab.folder / "etc")
        etc.mkdir()
        resolv_conf = etc / "resolv.conf"
        resolv_conf.write_text("".join(f"nameserver {ip}\n" for ip in names.addresses))
        control = make_dns_control("etc-resolv-conf", etc)
        state = ClientTunnel(PrivateKey(bytes(32)), clock.now(), clock.unix_epoch(), bytes)
        with laptop.entered():
            sockets = SocketFactory()
            client = ClientNames(state, control, lambda command: command(clock.now()), sockets)
            await client.repair()
            for sentinel in ("100.100.111.1", "100.100.111.2"):
                control.activate("tun-firezone", [sentinel], None)
                assert sentinel in resolv_conf.read_text()
                await client.repair()
                control.activate("tun-firezone", [sentinel], None)
                await client._follow()
                assert await client.resolve_portal("portal.example") == (PORTAL4,)
                client.reset()
        assert len(sockets.routes) == 2  # no socket but those towards the two
        assert len(names.queries()) == 2 * 2 * 2  # twice, of two addresses, both types


SLEEP = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_BOOTTIME && access(ASLEEP, F_OK) == 0) now->tv_sec += 600;
    return result;
}
"""


def leaves_from(laptop: Host, udp: UdpSocket) -> str:
    """The source address of a datagram to a neighbour."""
    router = next(n for n in laptop.lab.namespaces if n.name == "home")
    with router.socket(socket.AF_INET6) as sink:
        sink.bind(("::", 7000))
        udp.send_batch(b"x", 1, Address.parse("[172:30::254]:7000"))
        assert readable(sink)
        return str(sink.recvfrom(10)[1][0])


def assert_marked(host: Host, pid: int) -> None:
    """All sockets of a process towards the network carry the mark, and both data sockets their port."""
    for _ in range(100):  # between two sockets there may be none
        shown = host.run("ss", "-Hanuptoe").stdout.splitlines()
        ours = [line for line in shown if f"pid={pid}," in line]
        ports = [line for line in ours if line.startswith("udp") and ":52625 " in line]
        if len(ports) == 2 and any(line.startswith("tcp") for line in ours):
            break
        time.sleep(0.05)
    else:
        raise LabError(f"not all sockets are there: {ours}")
    unmarked = [line for line in ours if "fwmark:0xfd002021" not in line]
    assert unmarked == []
