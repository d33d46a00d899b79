"""The demo: a private web page, by its name, through client, relay and gateway, in network namespaces.

python -m fz_core.lab.demo [--megabytes 100]
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from types import FrameType

from fz_core.lab.names import dig
from fz_core.lab.policy import dns
from fz_core.lab.processes import LabError
from fz_core.lab.system import Fetch, System
from fz_core.lab.topology import Lab

NAME = "wiki.corp.example"
MAP = """
  portal 203.0.113.10        relay 203.0.113.101
        \\                        /
         ------- internet -------
        /                        \\
  router 203.0.113.30        router 203.0.113.31        (both translate addresses)
        |                        |
  client 172.30.0.100        gateway 172.31.0.100
                                 |
                             wiki.corp.example 10.20.0.80    (only the gateway knows and reaches it)
"""


def say(text: str) -> None:
    """One line now, also into a pipe."""
    print(text, flush=True)


def main() -> None:
    """Run it; exit status 1 with one line if anything fails."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--megabytes", type=float, default=100, help="size of the file to fetch")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run(options.megabytes)
    except LabError as error:
        say(f"demo failed: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted; everything was removed")
        sys.exit(130)


def run(megabytes: float) -> None:
    """Build the system, fetch over both kinds of path, report."""
    started_at = time.monotonic()
    with Lab() as lab:
        system = System(lab)
        say("Starting a portal, a relay, a gateway and a client, each in a network namespace of its own:")
        say(MAP)
        system.resources, system.allowed = {"wiki": dns("*.corp.example")}, {"wiki"}
        system.start_portal()
        system.start_relay(0)
        system.add_gateway("gateway", 31, zones={"corp.example": ["wiki 60 A 10.20.0.80", "wiki 60 AAAA fd20::80"]})
        system.add_client("client", 30, dns_control="etc-resolv-conf")
        for name, process in (
            ("portal", system.portal),
            ("relay", system.relays[0]),
            ("gateway", system.gateways[0].process),
            ("client", system.clients[0].process),
        ):
            say(f"  {name:<8} process {process.pid}")
        say(f"  ready after {time.monotonic() - started_at:.1f} s\n")
        proxies = dig(system.clients[0].host, NAME).records
        say(f"On the client {NAME} resolves to {proxies[0]}, an address that only the tunnel understands.")
        say(f"curl on the client fetches {megabytes:g} MB from http://{NAME}/ ...")
        direct = fetch(system, "direct", megabytes)
        say("Blocking UDP between the two routers, except to the relay, and restarting the client ...")
        system.block_direct()
        system.restart(system.clients[0])
        relayed = fetch(system, "relayed", megabytes)
        warnings = system.warnings()
    say("\n  path      first byte   throughput   checksum")
    for path, result in (("direct", direct), ("relayed", relayed)):
        say(f"  {path:<8}  {result.first_byte_s:8.3f} s  {result.mbit_s:6.0f} Mbit/s  SHA-256 verified")
    for line in warnings:
        say(f"  warning: {line}")
    say(f"\nEverything was removed. {time.monotonic() - started_at:.1f} s in all.")


def fetch(system: System, expected_path: str, megabytes: float) -> Fetch:
    """One download, which must have taken the expected path."""
    result = system.fetch(megabytes, name=NAME)
    path = system.path_of()
    if path != expected_path:
        raise LabError(f"the data took the path {path!r} instead of {expected_path!r}")
    say(
        f"  {path}: {result.bytes / 1e6:.0f} MB in {result.total_s:.2f} s, first byte after {result.first_byte_s:.3f} s"
    )
    return result


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
