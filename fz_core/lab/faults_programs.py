"""Faults of programs: relays, gateways, clients and portals that die, are slow, or exist twice (see `faults`)."""

from __future__ import annotations

import sys
import time

from fz_core.lab.faults_bench import SERVER, SERVER6, Bench, Outcome, Run, Settings, bench, laid_out
from fz_core.lab.outage import Prober, first_byte
from fz_core.lab.processes import LabError, Process
from fz_core.lab.system import PORTAL_PORT, Programs, Shape

IDLE = 90.0
PORTAL_AWAY = 60.0
SLOW_PORT = PORTAL_PORT + 1
FIGHT = 20.0


def relay_dies_unused(programs: Programs, settings: Settings) -> Outcome:
    """Under a direct connection nobody notices."""
    with bench(programs, settings) as b:
        struck_at = b.strike()
        b.system.relays[0].kill()
        return b.outcome(struck_at, watch=15.0)


def relay_dies(vanish: bool) -> Run:
    """The relay that carries everything dies, and the portal says so; or its machine vanishes and nobody does.

    There is another relay.
    """

    def scenario(programs: Programs, settings: Settings) -> Outcome:
        with bench(programs, settings, Shape(relays=2), path="relayed") as b:
            b.strike()
            number = b.busiest_relay()
            struck_at = time.monotonic()
            if vanish:
                b.system.relay_hosts[number].unplug()
            else:
                b.system.relays[number].kill()
            return b.outcome(struck_at)

    return scenario


def gateway_restarts(kill: bool) -> Run:
    """The gateway stops, or is killed, and starts at once."""

    def scenario(programs: Programs, settings: Settings) -> Outcome:
        with bench(programs, settings) as b:
            struck_at = b.strike()
            end(b.gateway.process, kill)
            b.system.relaunch(b.gateway)
            return b.outcome(struck_at)

    return scenario


def client_restarts(kill: bool) -> Run:
    """From the start of the new process to its first answer."""

    def scenario(programs: Programs, settings: Settings) -> Outcome:
        with bench(programs, settings) as b:
            b.strike()
            end(b.client.process, kill)
            b.system.relaunch(b.client)
            started_at = b.client.process.started_at
            seconds = b.answer_after(started_at)
            b.outcome(started_at + seconds)  # and it stays
            return Outcome(seconds)

    return scenario


def end(process: Process, kill: bool) -> None:
    """How a program goes."""
    if kill:
        process.kill()
    else:
        process.stop()


def idle(programs: Programs, settings: Settings) -> Outcome:
    """Nothing inside the tunnel for a while, then the first byte."""
    with bench(programs, settings) as b:
        b.prober.stop()
        time.sleep(IDLE / settings.hurry + settings.offset)
        return Outcome(first_byte(b.client.host, SERVER))


def late_answer(programs: Programs, settings: Settings) -> Outcome:
    """The portal's answer reaches the client 1 s late, the gateway's candidates before it; to the first answer."""
    with laid_out(programs, settings, Shape()) as system:
        portal = f"{system.portal_host.ipv4}:{PORTAL_PORT}"
        proxy = ["fz_core.lab.outage_proxy", "--listen", str(SLOW_PORT), "--portal", portal, "--delay", "1"]
        system.portal_host.spawn("proxy", [sys.executable, "-m", *proxy]).wait_for_line("^serving")
        url = f"ws://{system.portal_host.ipv4}:{SLOW_PORT}"
        system.add_client("client", 30, env={"FIREZONE_API_URL": url})
        time.sleep(1.0)  # relays and resources have come
        return connect(Bench(system, settings))


def connect(b: Bench, within: float = 60.0) -> Outcome:
    """From the first question to the first answer."""
    began_at = b.strike()
    with b.prober:
        return Outcome(b.answer_after(began_at, within))


def portal_away(programs: Programs, settings: Settings) -> Outcome:
    """What an established connection notices of a minute without portal; something new must work afterwards."""
    with bench(programs, settings) as b:
        struck_at = b.strike()
        b.system.portal.kill()
        time.sleep(PORTAL_AWAY / settings.hurry)
        b.system.restart_portal()
        back_at = time.monotonic()
        while True:  # another resource needs the portal's word
            try:
                first_byte(b.client.host, SERVER6, 1.0)
                break
            except LabError:
                if time.monotonic() > back_at + 60.0:
                    raise LabError("no new flow within 60 s of the portal's return") from None
        new = time.monotonic() - back_at
        return Outcome(b.prober.settle(struck_at), f"a new flow {new:.1f} s after its return")


def same_id(programs: Programs, settings: Settings) -> Outcome:
    """Another machine comes with the same identity; when the first one stops, the second one works."""
    with bench(programs, settings) as b:
        b.strike()
        second = b.system.add_client("client2", 32, env={"FIREZONE_ID": b.client.env["FIREZONE_ID"]})
        with Prober(second.host, SERVER) as other:
            began_at = time.monotonic()
            time.sleep(FIGHT / settings.hurry)
            shares = [p.share(began_at, time.monotonic() - 0.3) for p in (b.prober, other)]
            stopped_at = time.monotonic()
            if b.client.process.is_running:
                b.client.process.stop()
            seconds = other.wait_for_answer(60.0, stopped_at) - stopped_at
            other.settle(stopped_at + seconds)
        return Outcome(seconds, f"while both ran {shares[0]:.0%} and {shares[1]:.0%} of probes were answered")


PROGRAMS: dict[str, Run] = {
    "relay dies under a direct connection": relay_dies_unused,
    "relay dies under a relayed connection": relay_dies(vanish=False),
    "relay's machine vanishes": relay_dies(vanish=True),
    "gateway SIGTERM": gateway_restarts(False),
    "gateway SIGKILL": gateway_restarts(True),
    "client SIGTERM": client_restarts(False),
    "client SIGKILL": client_restarts(True),
    "idle 90 s": idle,
    "portal's answer 1 s late": late_answer,
    "portal away 60 s": portal_away,
    "two clients, one id": same_id,
}
