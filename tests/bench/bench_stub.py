"""Answers per second of the client's name server for names of resources, beside unbound in the same run.

    python -m tests.bench.bench_stub [--seconds 5] [--peers FOLDER]

Both serve one machine of a lab from one process; the load comes from the machine itself. `offered 5000` spreads
5,000 queries a second evenly. With FOLDER, a folder of official programs, their client is measured too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from fz_core.lab import Host, Lab
from fz_core.lab.names import start_names
from fz_core.lab.policy import dns
from fz_core.lab.system import Programs, System
from tests.bench.dns_load import SUFFIX

SENTINEL = "100.100.111.1"
LOADS = {"window of 64": ["--window", "64"], "offered 5000": ["--rate", "5000"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--peers", type=Path)
    options = parser.parse_args()
    if shutil.which("unbound") is None:
        sys.exit("bench_stub needs unbound: run 'make system-packages'")
    results = {"unbound": unbound(options.seconds), "ours": client(Programs(), options.seconds)}
    if options.peers is not None:
        official = (str(options.peers / "firezone-headless-client"),)
        results["official client"] = client(Programs(client=official), options.seconds)
    print(json.dumps({"names": 100, "results": results}, indent=2))


def unbound(seconds: float) -> dict[str, Any]:
    with Lab() as lab:
        host = lab.public_host("names", 53)
        start_names(host, {SUFFIX: [f"host{n} 60 A 192.0.2.{n % 250 + 1}" for n in range(100)]})
        assert host.ipv4 is not None
        return measure(host, host.ipv4, seconds)


def client(programs: Programs, seconds: float) -> dict[str, Any]:
    with Lab() as lab:
        system = System(lab, programs)
        system.resources, system.allowed = {"corp": dns(f"*.{SUFFIX}")}, {"corp"}
        system.start_portal()
        system.start_relay(0)
        member = system.add_client("client", 30, dns_control="etc-resolv-conf")
        return measure(member.host, SENTINEL, seconds)


def measure(host: Host, server: str, seconds: float) -> dict[str, Any]:
    results = {}
    for title, load in LOADS.items():
        command = (sys.executable, "-m", "tests.bench.dns_load", server, "--seconds", str(seconds), *load)
        results[title] = json.loads(host.run(*command, timeout=seconds + 60).stdout)
    return results


if __name__ == "__main__":
    main()
