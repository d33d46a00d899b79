"""The client and a real systemd-resolved, on a D-Bus of their own and without systemd: spec/io.md §9, §14 item 46.

The package is unpacked by `make test`, not installed: that would take over the machine's resolv.conf.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fz_core.lab import Host, Lab, LabError
from fz_core.lab.names import dig, start_names
from fz_core.lab.system import Member, System

pytestmark = [pytest.mark.root, pytest.mark.peer("nft", "curl", "ip", "unbound", "dig", "dbus-daemon")]

UNPACKED = Path(sys.prefix) / "systemd-resolved"
DAEMON = "lib/systemd/systemd-resolved"
BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:abstract=bus</listen><auth>EXTERNAL</auth>
<policy context="default"><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/><allow user="*"/>
</policy></busconfig>"""
MAKE_RUN = "mount -t tmpfs none /run && install -d -o 61993 -g 61993 /run/systemd/resolve"
DEVICE = "tun-firezone"


@pytest.mark.shows("io", 46)
@pytest.mark.parametrize(("search_domain", "domain"), [(None, "~."), ("corp.example", "corp.example")])
def test_a_link_of_systemd_resolved(search_domain: str | None, domain: str) -> None:
    with client_beside_resolved(search_domain) as (resolved, system):
        client = system.clients[0]
        until(lambda: resolved.ask("domain", DEVICE) == domain)
        until(lambda: resolved.ask("llmnr", DEVICE) == "yes")
        assert is_one_sentinel(resolved.servers(DEVICE))
        until(lambda: answer(client.host, resolved) == "192.0.2.1")
        resolved.set_servers("eth0", "203.0.113.54")
        until(lambda: answer(client.host, resolved) == "192.0.2.2")
        # one for each upstream: its own servers, read back twice by now, are none
        assert is_one_sentinel(resolved.servers(DEVICE))
        assert client.process.stop() == 0
        assert not resolved.has(DEVICE)
        assert resolved.servers("eth0") == ["203.0.113.54"]


class Resolved:
    """systemd-resolved on a host, and what it says."""

    def __init__(self, host: Host, folder: Path) -> None:
        self._host = host
        self.environment = {
            "PATH": f"{folder / 'usr/bin'}:{os.environ['PATH']}",
            "DBUS_SYSTEM_BUS_ADDRESS": "unix:abstract=bus",  # of the host's network namespace
        }
        config = host.lab.folder / "bus.conf"
        config.write_text(BUS)
        host.write_etc("passwd", Path("/etc/passwd").read_text() + "systemd-resolve:x:61993:61993::/:/bin/false\n")
        host.write_etc("group", Path("/etc/group").read_text() + "systemd-resolve:x:61993:\n")
        host.write_etc("resolv.conf", "")
        bus = ["dbus-daemon", "--config-file", str(config), "--nofork", "--nopidfile", "--print-address"]
        host.spawn("bus", bus).wait_for_line("^unix:")
        host.spawn("resolved", ["sh", "-c", f'{MAKE_RUN} && exec "$0"', str(folder / DAEMON)], self.environment)
        until(self.is_up)

    def servers(self, device: str) -> list[str]:
        return self.ask("dns", device).split()

    def set_servers(self, device: str, *servers: str) -> None:
        assert self._run("dns", device, *servers).returncode == 0

    def ask(self, what: str, device: str) -> str:
        """What one of `resolvectl`'s lines says after `Link 2 (eth0):`."""
        return self._run(what, device).stdout.partition("):")[2].strip()

    def is_up(self) -> bool:
        return self._run("status").returncode == 0

    def has(self, device: str) -> bool:
        return f"({device})" in self._run("status").stdout

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return self._host.run("env", *variables, "resolvectl", "--no-pager", *arguments, check=False)


@contextmanager
def client_beside_resolved(search_domain: str | None) -> Iterator[tuple[Resolved, System]]:
    folder = UNPACKED if (UNPACKED / DAEMON).exists() else Path("/")
    if not (folder / DAEMON).exists() or shutil.which(str(folder / "usr/bin/resolvectl")) is None:
        pytest.skip("needs systemd-resolved: run 'make test'")
    with Lab() as lab:
        system = System(lab)
        system.search_domain = search_domain
        system.start()
        for last, address in ((53, "192.0.2.1"), (54, "192.0.2.2")):
            start_names(lab.public_host(f"names{last}", last), {"public.example": [f"www 60 A {address}"]})
        client = system.clients[0]
        client.process.stop()
        resolved = Resolved(client.host, folder)
        resolved.set_servers("eth0", "203.0.113.53")
        let_resolved_have_the_names(client, resolved)
        system.relaunch(client)
        system.wait_until_up(client)
        until(lambda: bool(resolved.servers(DEVICE)))
        yield resolved, system


def let_resolved_have_the_names(client: Member, resolved: Resolved) -> None:
    client.command = tuple("systemd-resolved" if word == "disabled" else word for word in client.command)
    client.env = {**client.env, **resolved.environment}


def is_one_sentinel(servers: list[str]) -> bool:
    return len(servers) == 1 and servers[0].startswith("100.100.111.")


def answer(host: Host, resolved: Resolved) -> str | None:
    """What the client's own server, wherever that is by now, says."""
    try:
        found = dig(host, "www.public.example", "A", server=resolved.servers(DEVICE)[0], timeout=1)
    except LabError:
        return None
    return found.records[0] if found.records else None


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
