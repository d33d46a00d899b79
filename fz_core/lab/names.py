"""Name servers of a lab: unbound, resolver and authority at once, and `dig` to ask them.

    names = start_names(host, {"example.com": ["app 60 A 10.20.0.80", "www 60 CNAME app"]})
    names.set_zone("example.com", ["app 60 A 10.20.0.81"])
    dig(laptop, "app.example.com", server=names.addresses[0]).records

Records are lines of a zone file, relative to their zone. Names in no zone do not exist (NXDOMAIN).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fz_core.lab.processes import LabError, run
from fz_core.lab.topology import Host

Zones = Mapping[str, Sequence[str]]
NEGATIVE_TTL = 5
_serials = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Answer:
    """What `dig` saw: the response code in capitals, the data of all answer records, and the least TTL."""

    status: str
    records: tuple[str, ...]
    ttl: int | None = None


class NameServer:
    """One unbound on a machine; it is ended with the lab. Its `process` may be stopped or paused by a signal."""

    def __init__(self, host: Host, zones: Zones) -> None:
        self.host = host
        self._name = f"{host.name}-names"
        self._folder = host.lab.folder
        for zone, records in zones.items():
            self._write_zone(zone, records)
        self._config = self._folder / f"{self._name}.conf"
        self._config.write_text(self._settings(zones))
        self.process = host.spawn(self._name, ["unbound", "-d", "-c", str(self._config)])
        self.process.wait_for_line("start of service")

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others reach it."""
        return tuple(ip for ip in (self.host.ipv4, self.host.ipv6) if ip is not None)

    def set_zone(self, zone: str, records: Sequence[str]) -> None:
        """Replace all records of a zone it has; nothing older is answered from its cache."""
        self._write_zone(zone, records)
        for command in ("auth_zone_reload", "flush_zone"):
            run(["unbound-control", "-c", str(self._config), command, zone])

    def queries(self) -> list[tuple[str, str]]:
        """Names, without the final dot, and types it was asked so far."""
        found = re.findall(r" info: \S+ (\S+) (\S+) IN$", self.process.output, re.MULTILINE)
        return [(name.removesuffix("."), kind) for name, kind in found]

    def _zone_file(self, zone: str) -> Path:
        return self._folder / f"{self._name}-{zone}.zone"

    def _write_zone(self, zone: str, records: Sequence[str]) -> None:
        soa = f"@ 60 SOA ns hostmaster {next(_serials)} 3600 600 86400 {NEGATIVE_TTL}"
        lines = [f"$ORIGIN {zone}.", "$TTL 60", soa, "@ 60 NS ns", *records]
        self._zone_file(zone).write_text("\n".join(lines) + "\n")

    def _settings(self, zones: Zones) -> str:
        known = "\n".join(f'local-zone: "{zone}." transparent' for zone in zones)
        files = "\n".join(
            f'auth-zone:\nname: "{zone}."\nzonefile: "{self._zone_file(zone)}"\n'
            "for-downstream: no\nfor-upstream: yes\nfallback-enabled: no"
            for zone in zones
        )
        return f"""server:
            directory: "{self._folder}"
            username: ""
            chroot: ""
            pidfile: ""
            use-syslog: no
            logfile: ""
            log-queries: yes
            interface: 0.0.0.0
            interface: ::0
            interface-automatic: yes
            access-control: 0.0.0.0/0 allow
            access-control: ::0/0 allow
            module-config: "iterator"
            unblock-lan-zones: yes
            local-zone: "." static
            {known}
            remote-control:
            control-enable: yes
            control-interface: "{self._folder / (self._name + ".ctl")}"
            control-use-cert: no
            {files}
            """


def start_names(host: Host, zones: Zones) -> NameServer:
    """Serve zones on port 53 of a machine, over UDP and TCP, IPv4 and IPv6."""
    return NameServer(host, zones)


def dig(
    host: Host, name: str, kind: str = "A", *, server: str | None = None, tcp: bool = False, timeout: int = 5
) -> Answer:
    """Ask from a machine; without `server` whatever its resolv.conf says. LabError when nobody answers."""
    at = [] if server is None else [f"@{server}"]
    options = ["+noall", "+comments", "+answer", "+tries=1", f"+time={timeout}", "+tcp" if tcp else "+notcp"]
    result = host.run("dig", *at, *options, name, kind, check=False, timeout=timeout + 10)
    status = re.search(r"status: (\w+)", result.stdout)
    if status is None:
        raise LabError(f"dig {name} {kind} on {host.name}: {(result.stdout or result.stderr).strip()}")
    rows = [line.split(None, 4) for line in result.stdout.splitlines() if line and not line.startswith(";")]
    return Answer(status[1], tuple(row[4] for row in rows), min((int(row[1]) for row in rows), default=None))
