"""Faults of cables: packets late, lost, overtaken, doubled (see `faults`)."""

from __future__ import annotations

import time

from fz_core.lab.faults_bench import SERVER, Bench, Outcome, Run, Settings, bench, laid_out
from fz_core.lab.processes import LabError
from fz_core.lab.system import Programs, Shape, System

MEGABYTES = 5.0
STEADY_RUN = 20.0


def bad_cable(
    system: System, settings: Settings, *, ms: float = 0, loss: float = 0, reorder: float = 0, duplicate: float = 0
) -> None:
    """Both directions of the client's way to the internet, each with half of the delay and all of the rest."""
    router = system.clients[0].router
    for number, device in enumerate(("internet", "lan")):
        seed = settings.seed * 2 + number
        router.delay(device, ms / 2, loss, reorder=reorder, duplicate=duplicate, seed=seed)


def connect_with_loss(programs: Programs, settings: Settings) -> Outcome:
    """Every fifth packet is lost, both ways; from the first question to the first answer."""
    with laid_out(programs, settings, Shape()) as system:
        system.add_client("client", 30)
        time.sleep(1.0)  # relays and resources have come
        bad_cable(system, settings, loss=20)
        b = Bench(system, settings)
        began_at = b.strike()
        with b.prober:
            return Outcome(b.answer_after(began_at))


def bulk_with_loss(programs: Programs, settings: Settings) -> Outcome:
    """5 MB over a round trip of 40 ms, 2 % lost both ways."""
    with bench(programs, settings) as b:
        b.prober.stop()
        bad_cable(b.system, settings, ms=40, loss=2)
        time.sleep(settings.offset)
        fetched = b.system.fetch(MEGABYTES, timeout=60.0)
        return Outcome(fetched.total_s, f"{fetched.mbit_s:.0f} Mbit/s")


def rough(programs: Programs, settings: Settings) -> Outcome:
    """10 % lost, 100 ms, 10 % overtaken: time to connect; then how much of what is sent comes."""
    with laid_out(programs, settings, Shape()) as system:
        system.add_client("client", 30)
        time.sleep(1.0)
        bad_cable(system, settings, ms=100, loss=10, reorder=10)
        b = Bench(system, settings)
        began_at = b.strike()
        with b.prober:
            seconds = b.answer_after(began_at)
            time.sleep(STEADY_RUN / settings.hurry)
            now = time.monotonic()
            share = b.prober.share(began_at + seconds, now - 0.5)
            longest = b.prober.outage(began_at + seconds, now)
        if share < 0.6:  # 0.9 * 0.9 are expected
            raise LabError(f"only {share:.0%} of probes were answered")
        return Outcome(seconds, f"then {share:.0%} of probes answered, longest gap {longest:.2f} s")


def duplicates(programs: Programs, settings: Settings) -> Outcome:
    """Every packet twice, both ways: nobody inside the tunnel sees one twice, nothing stops."""
    with bench(programs, settings) as b:
        struck_at = b.strike()
        bad_cable(b.system, settings, duplicate=100)
        outcome = b.outcome(struck_at, watch=8.0)
        b.system.fetch(MEGABYTES)
        if b.prober.repeated:
            raise LabError(f"{b.prober.repeated} answers came twice through the tunnel to {SERVER}")
        return outcome


LINKS: dict[str, Run] = {
    "connecting with 20 % loss": connect_with_loss,
    "5 MB, 40 ms, 2 % loss": bulk_with_loss,
    "10 % loss, 100 ms, reordering": rough,
    "every packet twice": duplicates,
}
