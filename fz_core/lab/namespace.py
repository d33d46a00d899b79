"""A network namespace: its sysctls, commands, sockets, and its own /etc/hosts and /etc/resolv.conf.

Not here: who is connected to whom (`topology.py`).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fz_core.lab.errors import LabError
from fz_core.lab.process import Process

CLONE_NEWNET = 0x40000000
RUN_FOLDER = Path("/run/netns")
ETC_FOLDER = Path("/etc/netns")
COMMAND_TIMEOUT = 60.0
_LOCK = threading.Lock()
_libc = ctypes.CDLL(None, use_errno=True)

# Loose enough for policy routing, and no waiting for duplicate address detection.
SYSCTLS = {
    "ipv4.conf.all.rp_filter": 0,
    "ipv4.conf.default.rp_filter": 0,
    "ipv4.conf.all.src_valid_mark": 1,
    "ipv6.conf.all.disable_ipv6": 0,
    "ipv6.conf.default.disable_ipv6": 0,
    "ipv6.conf.all.accept_dad": 0,
    "ipv6.conf.default.accept_dad": 0,
    "ipv6.conf.all.accept_ra": 0,
    "ipv6.conf.default.accept_ra": 0,
}


class Namespace:
    """Exists from `create` to `delete`."""

    def __init__(self, name: str, logs: Path) -> None:
        self.name = name
        self._logs = logs
        self._etc = ETC_FOLDER / name
        self._processes: list[Process] = []

    def create(self) -> None:
        """Make the namespace, with loopback up and empty name service files."""
        host_command("ip", "netns", "add", self.name)
        for key, value in SYSCTLS.items():
            self.sysctl(key, value)
        self.ip("link set lo up")
        self._etc.mkdir(parents=True)
        self.write_hosts({})
        self.write_resolv_conf([])

    def delete(self) -> None:
        """End every process in here, then remove the namespace and its files. Harmless when repeated."""
        for process in self._processes:
            process.terminate()
        kill_inside(self.name)
        if (RUN_FOLDER / self.name).exists():
            host_command("ip", "netns", "delete", self.name)
        shutil.rmtree(self._etc, ignore_errors=True)

    # set-up

    def ip(self, *lines: str) -> None:
        """Run lines of `ip` in one batch."""
        host_command("ip", "-n", self.name, "-batch", "-", stdin="\n".join(lines) + "\n")

    def nft(self, ruleset: str) -> None:
        """Load nftables rules."""
        self.run("nft", "-f", "-", stdin=ruleset)

    def sysctl(self, key: str, value: int) -> None:
        """Set `net.<key>`; the name as in `ipv4.ip_forward`."""
        with self.entered():
            path = Path("/proc/sys/net", *key.split("."))
            try:
                path.write_text(str(value))
            except FileNotFoundError:
                if not key.startswith("ipv6."):  # a kernel without IPv6 has none of them
                    raise

    def write_hosts(self, names: Mapping[str, Iterable[str]]) -> None:
        """Set /etc/hosts, as seen by programs started from now on."""
        lines = ["127.0.0.1 localhost", "::1 localhost"]
        lines += [f"{address} {name}" for name, addresses in names.items() for address in addresses]
        self._write_etc("hosts", lines)

    def write_resolv_conf(self, servers: Iterable[str], *options: str) -> None:
        """Set /etc/resolv.conf; a running program sees the change, since the file keeps its inode."""
        self._write_etc("resolv.conf", ["# lab", *(f"nameserver {s}" for s in servers), *options])

    def _write_etc(self, name: str, lines: list[str]) -> None:
        (self._etc / name).write_text("\n".join(lines) + "\n")

    # use

    def run(
        self,
        *command: str,
        check: bool = True,
        timeout: float = COMMAND_TIMEOUT,
        stdin: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. LabError with its output where it fails, unless `check` is False."""
        return host_command(
            "ip", "netns", "exec", self.name, *command, check=check, timeout=timeout, stdin=stdin, env=env
        )

    def spawn(self, *command: str, env: Mapping[str, str] | None = None, log: str | Path | None = None) -> Process:
        """Start a program that ends with the lab; both its outputs go to `log`. `env` adds to our own."""
        number = len(self._processes)
        path = Path(log) if log else self._logs / f"{self.name}-{number}-{Path(command[0]).name}.log"
        process = Process(("ip", "netns", "exec", self.name, *command), env or {}, path)
        self._processes.append(process)
        return process

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_DGRAM) -> socket.socket:
        """A socket of this namespace, usable from ours."""
        with self.entered():
            return socket.socket(family, kind)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Move this thread into the namespace. Sockets and devices opened meanwhile stay there."""
        with _LOCK, open("/proc/thread-self/ns/net", "rb") as ours, open(RUN_FOLDER / self.name, "rb") as theirs:
            _setns(theirs.fileno())
            try:
                yield
            finally:
                _setns(ours.fileno())


def host_command(
    *command: str,
    check: bool = True,
    timeout: float = COMMAND_TIMEOUT,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command outside any namespace of the lab."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **(env or {})},
            **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}),  # type: ignore[call-overload]
        )
    except FileNotFoundError:
        raise LabError(f"program {command[0]} is missing: run 'make system-packages'") from None
    except subprocess.TimeoutExpired:
        raise LabError(f"'{' '.join(command)}' did not end within {timeout} s") from None
    if check and done.returncode:
        raise LabError(f"'{' '.join(command)}' ended with {done.returncode}: {done.stderr or done.stdout}")
    result: subprocess.CompletedProcess[str] = done
    return result


def kill_inside(name: str) -> None:
    """Kill what still runs in a namespace, by process id: children that outlived their parents."""
    listed = host_command("ip", "netns", "pids", name, check=False).stdout.split()
    for pid in (int(p) for p in listed):
        if pid != os.getpid():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def _setns(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise LabError(f"cannot enter a network namespace ({os.strerror(number)}): run as root")
