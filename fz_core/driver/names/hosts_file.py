"""The hosts file, read in a thread and again when it changed.

    hosts = HostsFile(Path("/etc/hosts"))
    packed_ips = await hosts.lookup("db.example")

Lines as in hosts(5). A file that cannot be read has no names.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import trio

from fz_core.driver import clock

LOOK_INTERVAL = 1.0
MAX_BYTES = 16 * 1024 * 1024
Stamp = tuple[int, int, int] | None
Table = dict[str, tuple[bytes, ...]]


class HostsFile:
    """Names of one hosts file. Looks at the file's time of change at most once per `look_interval` seconds."""

    def __init__(self, path: Path, look_interval: float = LOOK_INTERVAL, now: Callable[[], float] = clock.now) -> None:
        self._path, self._look_interval, self._now = path, look_interval, now
        self._look_at = float("-inf")
        self._stamp: Stamp = None
        self._table: Table = {}

    async def lookup(self, name: str) -> tuple[bytes, ...]:
        """Packed IPs of both families, in the file's order."""
        now = self._now()
        if now >= self._look_at:
            self._look_at = now + self._look_interval
            found = await trio.to_thread.run_sync(_read_changed, self._path, self._stamp)
            if found is not None:
                self._stamp, self._table = found
        return self._table.get(name.lower().rstrip("."), ())


def _read_changed(path: Path, known: Stamp) -> tuple[Stamp, Table] | None:
    """The file's stamp and names; None if it is the one we know."""
    stamp: Stamp = None
    text = ""
    with suppress(OSError):
        info = path.stat()
        stamp = (info.st_mtime_ns, info.st_ino, info.st_size)
        if stamp == known:
            return None
        with path.open("rb") as file:
            text = file.read(MAX_BYTES).decode(errors="replace")
    return stamp, parse_hosts(text)


def parse_hosts(text: str) -> Table:
    """Names in lower case; lines without a valid address are skipped."""
    table: dict[str, list[bytes]] = {}
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if len(words) < 2:
            continue
        try:
            ip = ipaddress.ip_address(words[0].partition("%")[0]).packed
        except ValueError:
            continue
        for name in words[1:]:
            ips = table.setdefault(name.lower().rstrip("."), [])
            if ip not in ips:
                ips.append(ip)
    return {name: tuple(ips) for name, ips in table.items()}
