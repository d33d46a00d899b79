"""What a whole system must do, whichever programs play its parts. Each scenario builds its own lab.

A scenario returns a note for people (or nothing) and raises on failure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fz_core.lab import Lab, LabError
from fz_core.lab.system import Programs, Shape, System

Scenario = Callable[[Programs], str]
MEGABYTES = 5
BEST_PATH_WITHIN = 2.0


@contextmanager
def running(programs: Programs, shape: Shape | None = None) -> Iterator[System]:
    """A started system in a lab of its own."""
    with Lab() as lab:
        system = System(lab, programs, shape)
        system.start()
        yield system


def eventually(system: System, seconds: float, *, family: int = 4, client: int = 0) -> float:
    """Fetch a little until it works; how long that took."""
    started_at = time.monotonic()
    while True:
        try:
            system.fetch(0.001, timeout=5.0, family=family, client=client)
            return time.monotonic() - started_at
        except LabError as error:
            if time.monotonic() - started_at > seconds:
                raise LabError(f"nothing came within {seconds:.0f} s: {error}") from None
            time.sleep(0.1)


def ours_took(system: System, expected: str) -> None:
    """Check the path where our client says which one it took, and that the portal chose the mode it should."""
    path = system.path_of()
    if path not in (expected, "unknown"):
        raise LabError(f"the data took the path {path!r} instead of {expected!r}")
    if system.modes() - {system.iceless}:
        raise LabError(f"the portal ordered connections {'with' if system.iceless else 'without'} ICE")


def find_path(system: System, expected: str) -> None:
    """Without ICE data flows before the best path is known: wait for it where our client tells, for a moment."""
    deadline = time.monotonic() + BEST_PATH_WITHIN
    while system.iceless and system.path_of() not in (expected, "unknown") and time.monotonic() < deadline:
        time.sleep(0.05)


def download(shape: Shape, path: str, *, family: int = 4, block: bool = False) -> Scenario:
    """A scenario: connect, fetch a file, look at the path."""

    def scenario(programs: Programs) -> str:
        with running(programs, shape) as system:
            if block:
                system.block_direct()
            first = eventually(system, 20.0, family=family)
            find_path(system, path)
            result = system.fetch(MEGABYTES, family=family)
            ours_took(system, path)
            complain(system)
            return f"first byte {first * 1000:.0f} ms, {result.mbit_s:.0f} Mbit/s"

    return scenario


def complain(system: System) -> None:
    """A healthy run has no warnings."""
    warnings = system.warnings()
    if warnings:
        raise LabError(f"{len(warnings)} warnings, the first: {warnings[0]}")


def two_clients(programs: Programs) -> str:
    """Two clients use one gateway at once."""
    with running(programs) as system:
        system.add_client("client2", 32)
        for client in (0, 1):
            eventually(system, 20.0, client=client)
            system.fetch(MEGABYTES, client=client)
        complain(system)
    return ""


def gateway_restart(programs: Programs) -> str:
    """The gateway stops and starts; traffic resumes by itself."""
    with running(programs) as system:
        eventually(system, 20.0)
        started_at = time.monotonic()
        system.restart(system.gateways[0])
        eventually(system, 30.0)
        return f"back after {time.monotonic() - started_at:.1f} s"


def client_restart(programs: Programs) -> str:
    """The client stops and starts with a new key; the gateway takes it back."""
    with running(programs) as system:
        eventually(system, 20.0)
        system.restart(system.clients[0])
        took = eventually(system, 20.0)
        system.restart(system.clients[0], kill=True)
        again = eventually(system, 20.0)
        return f"first byte {took * 1000:.0f} ms after a stop, {again * 1000:.0f} ms after a kill"


def revocation(programs: Programs) -> str:
    """Access is taken away during a transfer: it ends; given again, it works again."""
    with running(programs) as system:
        eventually(system, 20.0)
        host = system.clients[0].host
        transfer = host.spawn(
            "transfer", ["curl", "-sS", "--limit-rate", "1M", "--max-time", "30", "-o", "/dev/null",
                         "http://10.20.0.80/bytes?num=100000000"]
        )  # fmt: skip
        time.sleep(1.0)
        if not transfer.is_running:
            raise LabError(f"the transfer did not last: {transfer.tail()}")
        system.allowed = {"net6"}
        system.reload_policy()
        time.sleep(1.0)
        probe = host.run(
            "curl", "-sS", "--max-time", "2", "-o", "/dev/null", "http://10.20.0.80/bytes?num=1", check=False
        )
        if probe.returncode == 0:
            raise LabError("the web server can still be reached after revocation")
        transfer.kill()
        system.allowed = {"net", "net6"}
        system.reload_policy()
        took = eventually(system, 20.0)
        return f"again after {took * 1000:.0f} ms"


def portal_away(programs: Programs) -> str:
    """Without the portal an established tunnel goes on; with it back, everything goes on."""
    with running(programs) as system:
        eventually(system, 20.0)
        system.portal.kill()
        time.sleep(2.0)
        system.fetch(MEGABYTES)
        system.restart_portal()
        time.sleep(3.0)
        system.fetch(MEGABYTES)
        return ""


SCENARIOS: dict[str, Scenario] = {
    "direct": download(Shape(), "direct"),
    "direct, IPv6 resource": download(Shape(), "direct", family=6),
    "relayed": download(Shape(), "relayed", block=True),
    "both NATs symmetric": download(Shape(client_nat="symmetric", gateway_nat="symmetric"), "relayed"),
    "IPv4 only": download(Shape(client_families=(4,), gateway_families=(4,), relay_families=(4,)), "direct"),
    "IPv6-only underlay": download(Shape(client_families=(6,), gateway_families=(6,), relay_families=(6,)), "direct"),
    "client IPv4, gateway IPv6": download(Shape(client_families=(4,), gateway_families=(6,)), "relayed"),
    "20 ms to everybody": download(Shape(delay_ms=20), "direct"),
    "two clients": two_clients,
    "gateway restart": gateway_restart,
    "client restart": client_restart,
    "revocation during a transfer": revocation,
    "portal away": portal_away,
}
