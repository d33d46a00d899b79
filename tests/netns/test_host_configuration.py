"""What our programs do to their host, and what they can do without: spec/io.md §12, §14 items 41 to 44 and 48."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fz_core.lab import Host, Lab
from fz_core.lab.policy import INTERNET
from fz_core.lab.servers import start_echo
from fz_core.lab.system import Programs, Shape, System
from tests.netns.confined import SETPRIV
from tests.netns.scenarios import eventually

pytestmark = [pytest.mark.root, pytest.mark.peer("nft", "curl", "ip")]

USER, LINK_SCOPE, EVERYTHING = "539098368", "539098369", "539098370"
PRIORITIES = (100, 200, 300)
CONFINED = Path(__file__).with_name("confined.py")
NET_ADMIN = 1 << 12


@contextmanager
def system_of(
    programs: Programs | None = None, shape: Shape | None = None, *, internet: bool = False
) -> Iterator[System]:
    with Lab() as lab:
        system = System(lab, programs, shape)
        if internet:
            system.resources["everything"] = INTERNET
            system.allowed.add("everything")
        system.start_portal()
        system.start_relay(0)
        system.add_gateway("gateway", 31)
        system.add_client("client", 30, internet=internet)
        yield system


@pytest.mark.shows("io", 42)
def test_a_host_without_ipv6_has_an_ipv4_tunnel() -> None:
    with system_of(shape=Shape(client_families=(4,))) as system:
        client = system.clients[0]
        client.process.stop()
        for priority in PRIORITIES:
            client.host.ip("-6", "rule", "del", "priority", str(priority))
        client.host.sysctl("net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
        system.relaunch(client)
        system.wait_until_up(client)
        eventually(system, 20.0)
        (device,) = shown(client.host, "addr", "show", "dev", "tun-firezone")
        assert [address["family"] for address in device["addr_info"]] == ["inet"]
        assert {rule["priority"] for rule in shown(client.host, "-4", "rule")} >= set(PRIORITIES)
        assert not {rule["priority"] for rule in shown(client.host, "-6", "rule")} & set(PRIORITIES)
        assert [routes(client.host, "-6", table) for table in (USER, LINK_SCOPE, EVERYTHING)] == [set()] * 3
        assert client.process.is_running
        assert " ERROR " not in client.process.output
        assert client.process.stop() == 0


@pytest.mark.shows("io", 43)
@pytest.mark.peer("ping")
def test_the_lan_stays_reachable_beside_the_internet_resource_and_so_does_a_new_one() -> None:
    """IPv6 too: the official client hides that LAN (docs/deviations.md)."""
    with system_of(internet=True) as system:
        host = system.clients[0].host
        until(lambda: routes(host, "-4", EVERYTHING) == routes(host, "-6", EVERYTHING) == {"default"})
        until(lambda: "172.30.0.0/24" in routes(host, "-4", LINK_SCOPE))
        for router in ("172.30.0.254", "172:30::254"):
            host.run("ping", "-c1", "-W2", router)
        took = []
        for number in range(3):  # a busy machine may be late once
            started_at = time.monotonic()
            host.ip("addr", "add", f"10.3.{number}.2/24", "dev", "eth0")
            until(lambda lan=f"10.3.{number}.0/24": lan in routes(host, "-4", LINK_SCOPE))  # type: ignore[misc]
            took.append(time.monotonic() - started_at)
        assert min(took) < 1.0, took


@pytest.mark.shows("io", 44)
def test_what_a_killed_client_left_behind_is_gone_after_the_next_start() -> None:
    with system_of() as system:
        client = system.clients[0]
        client.process.kill()
        for table in (USER, LINK_SCOPE, EVERYTHING):
            for family, network in (("-4", "10.7.0.0/16"), ("-6", "fd07::/64")):
                client.host.ip(family, "route", "add", network, "dev", "eth0", "table", table)
        system.relaunch(client)
        system.wait_until_up(client)
        left = [routes(client.host, family, t) for family in ("-4", "-6") for t in (USER, LINK_SCOPE, EVERYTHING)]
        assert not {"10.7.0.0/16", "fd07::/64"} & set().union(*left)
        eventually(system, 20.0)


@pytest.mark.shows("io", 48)
@pytest.mark.peer("setpriv", "systemd-analyze")
def test_a_gateway_as_confined_as_the_official_unit_works_and_starts_again() -> None:
    """Without systemd; `confined.py` says what that means. Masquerading is the administrator's (docs/gateway.md)."""
    confined = (*SETPRIV, sys.executable, str(CONFINED))
    with system_of(Programs(gateway=(*confined, *Programs().gateway))) as system:
        gateway = system.gateways[0]
        assert gateway.server is not None
        echo = start_echo(gateway.server)
        for run in range(2):
            if run:
                rules = gateway.host.run("nft", "list", "ruleset").stdout
                system.restart(gateway)
                assert gateway.host.run("nft", "list", "ruleset").stdout == rules
            for family in (4, 6):
                eventually(system, 30.0, family=family)
            assert confinement(gateway.process.pid) == (NET_ADMIN, NET_ADMIN, 1, 2)
            assert " ERROR " not in gateway.process.output
            assert "Traceback" not in gateway.process.output
        for server, source in (("10.20.0.80", "10.20.0.1"), ("fd20::80", "fd20::1")):
            call(system.clients[0].host, server)
            echo.wait_for_line(re.escape(source))
        assert "100.64." not in echo.output
        assert gateway.process.stop() == 0


def confinement(pid: int) -> tuple[int, int, int, int]:
    """Effective and possible capabilities, no new privileges, mode of the system call filter."""
    status = dict(re.findall(r"^(\w+):\s+(\S+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
    capabilities = [int(status[name], 16) for name in ("CapEff", "CapBnd")]
    return capabilities[0], capabilities[1], int(status["NoNewPrivs"]), int(status["Seccomp"])


def call(host: Host, server: str) -> None:
    """Say something to the echo server."""
    script = (
        "import socket, sys\n"
        "with socket.create_connection((sys.argv[1], 7), 5) as sock:\n"
        "    sock.sendall(b'hello')\n"
        "    assert sock.recv(5)"
    )
    host.run(sys.executable, "-c", script, server)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def shown(host: Host, *arguments: str) -> list[dict]:  # type: ignore[type-arg]
    return list(json.loads(host.run("ip", "-j", *arguments).stdout or "[]"))


def routes(host: Host, family: str, table: str) -> set[str]:
    result = host.run("ip", "-j", family, "route", "show", "table", table, check=False)
    return {route["dst"] for route in json.loads(result.stdout or "[]")}
