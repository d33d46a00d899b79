"""Faults of networks: roaming, address changes, NAT, firewalls, blackouts (see `faults`)."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from fz_core.lab.faults_bench import SERVER, Bench, Outcome, Run, Settings, bench
from fz_core.lab.outage import first_byte
from fz_core.lab.processes import LabError
from fz_core.lab.system import Programs, Shape, file_digest
from fz_core.lab.webserver import document_digest

AWAY = 2.0  # seconds without network while roaming
REBOOT = 3.0
BLACKOUT = 30.0
NAT_FORGETS = 30  # seconds: more than the 25 between keep-alives
DOWNLOAD, RATE = 3_000_000, "300k"


def struck(
    fault: Callable[[Bench], object], *, shape: Shape | None = None, path: str = "direct", less: float = 0.0,
    watch: float = 5.0,
) -> Run:  # fmt: skip
    """A scenario: something happens while probes go through; `less` seconds without network are part of it."""

    def scenario(programs: Programs, settings: Settings) -> Outcome:
        with bench(programs, settings, shape, path=path) as b:
            struck_at = b.strike()
            fault(b)
            return b.outcome(struck_at, watch=watch + less, less=less)

    return scenario


def move(b: Bench) -> None:
    """The client's machine leaves its network and comes up in another one, behind another router; it is told."""
    other = b.system.lab.router("other-router", 34, nat=b.system.shape.client_nat)
    b.client.host.unplug()
    time.sleep(AWAY)
    other.attach(b.client.host)
    b.client.process.send_signal(signal.SIGHUP)


def roam(programs: Programs, settings: Settings) -> Outcome:
    """All of it counts, also the two seconds without network."""
    with bench(programs, settings) as b:
        struck_at = b.strike()
        move(b)
        return b.outcome(struck_at, watch=AWAY + 5.0)


def download_and_roam(programs: Programs, settings: Settings) -> Outcome:
    """One TCP connection lives through it; its longest standstill."""
    with bench(programs, settings) as b:
        path = b.system.lab.folder / "download"
        url = f"http://{SERVER}/bytes?num={DOWNLOAD}"
        limits = ["--limit-rate", RATE, "--max-time", "90"]
        b.client.host.sysctl("net.ipv4.tcp_rmem=4096 65536 131072")  # or curl finds it all waiting for it, and is done
        curl = b.client.host.spawn("download", ["curl", "-sS", *limits, "-o", str(path), url])
        time.sleep(1.0)
        b.strike()
        if not path.exists() or not curl.is_running:
            raise LabError(f"the download did not last: {curl.tail()}")
        move(b)
        longest, size, grew_at = 0.0, 0, time.monotonic() - AWAY
        while curl.is_running:
            now = time.monotonic()
            if path.stat().st_size > size:
                longest, size, grew_at = max(longest, now - grew_at), path.stat().st_size, now
            time.sleep(0.02)
        if curl.wait() != 0 or file_digest(path) != document_digest(DOWNLOAD):
            raise LabError(f"the download is damaged: curl ended with {curl.wait()}: {curl.tail()}")
        return Outcome(longest, "checksum right")


def hang_up(b: Bench) -> None:
    b.client.process.send_signal(signal.SIGHUP)


def new_public_address(b: Bench) -> None:
    b.client.router.change_public_address(33)


def firewall(b: Bench) -> None:
    b.system.block_direct()


def one_way(way: str) -> Callable[[Bench], None]:
    """The client's router drops UDP in one direction only, but for relays."""
    return lambda b: b.client.router.block_udp(*b.system.relay_addresses(), way=way)


def reboot(b: Bench) -> None:
    """Nothing passes for a while, then everything has other source ports."""
    b.client.router.cut()
    time.sleep(REBOOT)
    b.client.router.remap_ports(20_000)
    b.client.router.mend()


def new_local_address(b: Bench) -> None:
    b.client.router.give_address(b.client.host, 150)


def only_ipv6(b: Bench) -> None:
    """The client's machine moves to a network without IPv4, and is told."""
    other = b.system.lab.router("other-router", 34, nat=b.system.shape.client_nat, families=(6,))
    b.client.host.unplug()
    other.attach(b.client.host)
    b.client.process.send_signal(signal.SIGHUP)


def blackout(programs: Programs, settings: Settings) -> Outcome:
    """What passes after the network is back until answers come."""
    with bench(programs, settings) as b:
        struck_at = b.strike()
        b.client.router.cut()
        dark = BLACKOUT / settings.hurry
        time.sleep(dark)
        b.client.router.mend()
        return b.outcome(struck_at, watch=dark + 5.0, within=dark + 90.0, less=time.monotonic() - struck_at)


def short_nat(programs: Programs, settings: Settings) -> Outcome:
    """NAT forgets after 30 s, whatever the hurry; silence inside for 60 s; then the first byte."""
    with bench(programs, settings) as b:
        b.prober.stop()
        for member in (b.client, b.gateway):
            member.router.shorten_nat(NAT_FORGETS)
            member.router.forget_connections()
        first_byte(b.client.host, SERVER)
        time.sleep(max(NAT_FORGETS + 10, 60 / settings.hurry) + settings.offset)
        return Outcome(first_byte(b.client.host, SERVER))


IPV4_GATEWAY = Shape(client_families=(4,), gateway_families=(4,), named_portal=True)

PATHS: dict[str, Run] = {
    "roam": roam,
    "download through a roam": download_and_roam,
    "SIGHUP": struck(hang_up),
    "public address changes": struck(new_public_address, watch=8.0),
    "direct path filtered": struck(firewall, watch=8.0),
    "filtered towards the client": struck(one_way("in"), watch=8.0),
    "filtered from the client": struck(one_way("out"), watch=8.0),
    "router reboots": struck(reboot, less=REBOOT, watch=8.0),
    "local address changes": struck(new_local_address, watch=8.0),
    "switch to IPv6 only": struck(only_ipv6, shape=IPV4_GATEWAY, watch=8.0),
    "blackout 30 s": blackout,
    "NAT forgets after 30 s": short_nat,
}
