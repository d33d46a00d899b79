"""What a portal's outage costs: an established flow, memory and processor time of both ends and the relay.

    python -m tests.bench.bench_portal_outage [--seconds 60]      # 600 for the figures of docs/performance.md

A client pings a server behind a gateway ten times a second, first with the portal there, then without it, then with
it back. Needs root. JSON on stdout, progress on stderr.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from fz_core.lab import Lab
from fz_core.lab.processes import Process
from fz_core.lab.system import Shape, System

SERVER = "10.20.0.80"
PINGS_PER_SECOND = 10
JOINED = "Connected to portal"
SUMMARY = re.compile(r"(\d+) packets transmitted, (\d+) received")
LONGEST = re.compile(r"= [\d.]+/[\d.]+/([\d.]+)/")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Meter:
    """What a program used between two looks."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.cpu, self.lines, self.switches = process.cpu_seconds(), self._lines(), self._switches()

    def _lines(self) -> int:
        return self._process.output.count("\n")

    def _switches(self) -> int:
        """How often it went to sleep, which is how often it was woken."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.MULTILINE)
        return int(found[1]) if found else 0

    def read(self, seconds: float) -> dict[str, float]:
        return {
            "cpu_percent": round((self._process.cpu_seconds() - self.cpu) / seconds * 100, 2),
            "wakeups_per_s": round((self._switches() - self.switches) / seconds, 1),
            "log_lines": self._lines() - self.lines,
            "rss_kib": self._process.memory_kib(),
        }


def phase(system: System, seconds: float) -> dict[str, Any]:
    """Ping for so long and say what came of it."""
    programs = {"client": system.clients[0].process, "gateway": system.gateways[0].process, "relay": system.relays[0]}
    before = {name: Meter(process) for name, process in programs.items()}
    began = time.monotonic()
    count = int(seconds * PINGS_PER_SECOND)
    ping = system.clients[0].host.run(
        "ping", "-q", "-i", str(1 / PINGS_PER_SECOND), "-c", str(count), "-W", "2", SERVER,
        check=False, timeout=seconds * 1.5 + 30,
    )  # fmt: skip
    elapsed = time.monotonic() - began
    summary, longest = SUMMARY.search(ping.stdout), LONGEST.search(ping.stdout)
    result: dict[str, Any] = {name: meter.read(elapsed) for name, meter in before.items()}
    if summary is not None:
        result["pings"] = {"sent": int(summary[1]), "lost": int(summary[1]) - int(summary[2])}
    if longest is not None:
        result["longest_ms"] = float(longest[1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the portal is away")
    parser.add_argument("--around", type=float, default=20.0, help="how long to measure before and after")
    options = parser.parse_args()
    with Lab() as lab:
        system = System(lab, shape=Shape())
        system.start()
        system.fetch(0.001, timeout=20)
        time.sleep(5)
        note("with the portal")
        result = {"before": phase(system, options.around)}
        system.portal.kill()
        note("without")
        result["without_portal"] = phase(system, options.seconds)
        ends = (system.clients[0].process, system.gateways[0].process)
        joined = [process.output.count(JOINED) for process in ends]
        system.portal = system._spawn_portal()
        system._wait_until_portal_serves()
        back_at = time.monotonic()
        note("with it again")
        while any(p.output.count(JOINED) <= n for p, n in zip(ends, joined, strict=True)):
            if time.monotonic() > back_at + 180:
                break
            time.sleep(0.2)
        result["rejoined_within_s"] = round(time.monotonic() - back_at, 1)
        result["after"] = phase(system, options.around)
        system.fetch(0.001, timeout=20)
        result["warnings"] = system.warnings()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
