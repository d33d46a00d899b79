"""A system with something running through it, about to be disturbed: what every scenario of the fault lab stands on.

with bench(programs, settings) as b:      # client, gateway, relays, portal; probes are answered
    struck_at = b.strike()                # waits for the seed's moment
    b.client.router.forget_connections()  # what goes wrong
    return b.outcome(struck_at)           # until probes are answered steadily again
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fz_core.lab.outage import Prober
from fz_core.lab.processes import LabError
from fz_core.lab.servers import start_echo
from fz_core.lab.system import Member, Programs, Shape, System
from fz_core.lab.topology import Lab

SERVER, SERVER6 = "10.20.0.80", "fd20::80"
SETTLED = 3.0  # seconds after the first answer in which a connection finds its best path
MOMENTS = 3.0  # the fault comes up to this much later: anywhere in the periods of keep-alives and checks
CARRIES = 5_000  # bytes per second: more than a relay sends that carries no probes
NOTED = 0.15  # seconds: shorter gaps are a busy machine's


@dataclass(frozen=True, slots=True)
class Settings:
    """How a scenario is run. `hurry` divides long waits; `logs` keeps every program's output in a folder."""

    seed: int = 0
    iceless: bool = False
    hurry: float = 1.0
    logs: Path | None = None
    log_filter: str = "info"

    @property
    def offset(self) -> float:
        """Seconds by which this seed's fault comes later."""
        return random.Random(self.seed).uniform(0.0, MOMENTS)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured, in seconds, and what else is worth knowing."""

    seconds: float
    note: str = ""


Run = Callable[[Programs, Settings], Outcome]


class Bench:
    """A running system with a prober on its first client."""

    def __init__(self, system: System, settings: Settings) -> None:
        self.system, self.settings = system, settings
        self.prober = Prober(self.client.host, SERVER)

    @property
    def client(self) -> Member:
        """The first one."""
        return self.system.clients[0]

    @property
    def gateway(self) -> Member:
        """The only one."""
        return self.system.gateways[0]

    def strike(self) -> float:
        """Wait for the moment the seed says; this instant."""
        time.sleep(self.settings.offset)
        return time.monotonic()

    def outcome(self, since: float, *, watch: float = 5.0, within: float = 90.0, less: float = 0.0) -> Outcome:
        """The outage since an instant; `less` seconds of it are not the programs' fault."""
        seconds = self.prober.settle(since, watch, within)
        gaps = self.prober.gaps(since, time.monotonic(), NOTED)
        note = f"gaps {', '.join(f'{gap:.2f}' for gap in gaps)} s" if len(gaps) > 1 else ""
        return Outcome(max(0.0, seconds - less), note)

    def answer_after(self, since: float, within: float = 60.0) -> float:
        """Seconds from an instant to the first answer to what was asked after it."""
        return self.prober.wait_for_answer(within, since) - since

    def relayed(self) -> list[int]:
        """Bytes each relay has sent within a second."""
        before = self.system.relay_bytes()
        time.sleep(1.0)
        return [b - a for a, b in zip(before, self.system.relay_bytes(), strict=True)]

    def busiest_relay(self) -> int:
        """The one that carries the probes just now."""
        sent = self.relayed()
        return sent.index(max(sent))

    def expect(self, path: str) -> None:
        """LabError unless the probes take this path, "direct" or "relayed"."""
        deadline = time.monotonic() + 10.0
        while ("relayed" if max(self.relayed()) > CARRIES else "direct") != path:
            if time.monotonic() > deadline:
                raise LabError(f"the connection is not {path}")


@contextmanager
def laid_out(programs: Programs, settings: Settings, shape: Shape) -> Iterator[System]:
    """A lab with portal, relays, gateway and an echo server behind it, but no client yet."""
    with Lab() as lab:
        system = System(lab, programs, replace(shape, iceless=settings.iceless, resolvers=True))
        system.log_filter = settings.log_filter
        try:
            system.start_portal()
            for number in range(system.shape.relays):
                system.start_relay(number)
            gateway = system.add_gateway("gateway", 31)
            assert gateway.server is not None
            start_echo(gateway.server)
            yield system
        finally:
            if settings.logs is not None:
                settings.logs.mkdir(parents=True, exist_ok=True)
                for log in lab.folder.glob("*.log"):
                    shutil.copy(log, settings.logs)


@contextmanager
def bench(
    programs: Programs, settings: Settings, shape: Shape | None = None, *, path: str = "direct"
) -> Iterator[Bench]:
    """A connected client on this path, with probes answered; `relayed` puts firewalls on both sides."""
    with laid_out(programs, settings, shape or Shape()) as system:
        if path == "relayed":
            system.gateways[0].router.block_udp(*system.relay_addresses())
        system.add_client("client", 30)
        if path == "relayed":
            system.clients[0].router.block_udp(*system.relay_addresses())
        built = Bench(system, settings)
        with built.prober:
            built.prober.wait_for_answer(30.0)
            time.sleep(SETTLED)
            built.expect(path)
            yield built
