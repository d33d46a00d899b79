"""Faults at random, one upon another, while traffic flows; then everything is mended, and everybody must be back.

    python -m tests.interop.chaos [--peers FOLDER] [--mix TEXT] [--seed N] [--rounds N] [--iceless] [--within SECONDS]

FOLDER holds the official programs of one version, and then --mix says who plays which part: "ours", "their client",
"their gateway", "their relay". There are two clients (of "their client", the second is ours), two relays, one gateway.
Each round has one to six of: address changes, NAT restarts, filters, blackouts, SIGHUP, programs killed and started
again, the portal too, access taken and given back. What happens follows from the seed, what becomes of it also from
how fast the machine is.
Exit status: 0, 1 if a client of ours was not back in time or a program of ours left a traceback, 2 usage error.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fz_core.lab import Lab, LabError
from fz_core.lab.system import Member, Programs, Shape, System
from tests.netns.scenarios import eventually

MIXES = ("ours", "their client", "their gateway", "their relay")
PAUSES = (0.0, 0.1, 0.5, 1.0, 2.0)
WAITS = (1.0, 3.0, 8.0)
PUBLIC_ADDRESSES = range(40, 100)
DOWNLOAD = "http://10.20.0.80/bytes?num=20000000"


class Chaos:
    """What may happen to a system; each act returns whom it hit."""

    def __init__(self, system: System, seed: int) -> None:
        self.system, self.chance = system, random.Random(seed)
        self._addresses = iter(PUBLIC_ADDRESSES)
        self._cut: list[Member] = []
        self._is_blocked = False
        self._dead_relays: set[int] = set()
        self.acts: list[Callable[[], str]] = [
            self.hang_up, self.change_public_address, self.remap_ports, self.block, self.unblock, self.cut, self.join,
            self.change_local_address, self.kill_relay, self.raise_relays, self.restart_gateway, self.restart_client,
            self.restart_portal, self.revoke, self.grant, self.wait, self.wait, self.wait,
        ]  # fmt: skip

    def round(self) -> str:
        """Some of it, shortly after each other."""
        done = []
        for _ in range(self.chance.randrange(1, 7)):
            act = self.chance.choice(self.acts)
            done.append(f"{act.__name__.replace('_', ' ')} {act()}".rstrip())
            time.sleep(self.chance.choice(PAUSES))
        return ", ".join(done)

    def mend(self) -> None:
        """Everything is as it should be."""
        self.join()
        self.unblock()
        self.raise_relays()
        self.grant()

    @property
    def _members(self) -> list[Member]:
        return [*self.system.clients, *self.system.gateways]

    def _anybody(self) -> Member:
        return self.chance.choice(self._members)

    def _client(self) -> Member:
        return self.chance.choice(self.system.clients)

    def hang_up(self) -> str:
        client = self._client()
        client.process.send_signal(signal.SIGHUP)
        return client.name

    def change_public_address(self) -> str:
        member, number = self._anybody(), next(self._addresses, None)
        if number is None:
            return "(none left)"
        member.router.change_public_address(number)
        return member.name

    def remap_ports(self) -> str:
        member = self._anybody()
        member.router.remap_ports(self.chance.randrange(10_000, 60_000, 5_000))
        member.router.forget_connections()
        return member.name

    def block(self) -> str:
        if not self._is_blocked:
            self.system.block_direct()
            self._is_blocked = True
        return ""

    def unblock(self) -> str:
        if self._is_blocked:
            for member in self._members:
                member.router.unblock_udp()
            self._is_blocked = False
        return ""

    def cut(self) -> str:
        member = self._anybody()
        if member not in self._cut:
            member.router.cut()
            self._cut.append(member)
        return member.name

    def join(self) -> str:
        for member in self._cut:
            member.router.mend()
        self._cut.clear()
        return ""

    def change_local_address(self) -> str:
        client = self._client()
        client.router.give_address(client.host, self.chance.randrange(110, 240))
        client.process.send_signal(signal.SIGHUP)
        return client.name

    def kill_relay(self) -> str:
        number = self.chance.randrange(len(self.system.relays))
        self.system.relays[number].kill()
        self._dead_relays.add(number)
        return str(number)

    def raise_relays(self) -> str:
        for number in self._dead_relays:
            self.system.restart_relay(number)
        self._dead_relays.clear()
        return ""

    def restart_gateway(self) -> str:
        return self._restart(self.system.gateways[0])

    def restart_client(self) -> str:
        return self._restart(self._client())

    def _restart(self, member: Member) -> str:
        if self.chance.random() < 0.5:
            member.process.kill()
        else:
            member.process.stop()
        self.system.relaunch(member)
        return member.name

    def restart_portal(self) -> str:
        self.system.restart_portal()
        return ""

    def revoke(self) -> str:
        self.system.allowed = {"net6"}
        self.system.reload_policy()
        return ""

    def grant(self) -> str:
        self.system.allowed = {"net", "net6"}
        self.system.reload_policy()
        return ""

    def wait(self) -> str:
        seconds = self.chance.choice(WAITS)
        time.sleep(seconds)
        return f"{seconds:.0f} s"


def run(system: System, options: argparse.Namespace) -> int:
    """How many of our clients were not back in time, or left a traceback."""
    stopping = threading.Event()
    loads = [threading.Thread(target=download, args=(system, n, stopping)) for n in range(len(system.clients))]
    chaos, bad, worst = Chaos(system, options.seed), 0, 0.0
    for load in loads:
        load.start()
    try:
        for number in range(options.rounds):
            done = chaos.round()
            chaos.mend()
            mended_at, told = time.monotonic(), []
            for client, member in enumerate(system.clients):
                try:
                    eventually(system, options.within, client=client)
                except LabError as error:
                    bad += is_ours(member)
                    told.append(f"{member.name} is NOT BACK ({str(error).splitlines()[0]})")
                    print("\n".join(f"  {line}" for line in member.process.output.splitlines()[-20:]), flush=True)
                    continue
                worst = max(worst, time.monotonic() - mended_at)
                told.append(f"{member.name} {time.monotonic() - mended_at:.1f} s")
            print(f"round {number}: {done}: {', '.join(told)}", flush=True)
    finally:
        stopping.set()
        for load in loads:
            load.join(30.0)
    for member in (*system.gateways, *system.clients):
        traced = [log for log in member.logs if "Traceback" in log.read_text(errors="replace")]
        bad += len(traced) if is_ours(member) else 0
        for log in traced:
            print(f"{member.name} left a traceback:\n{log.read_text(errors='replace')[-3000:]}")
    print(f"{options.rounds} rounds, back after at most {worst:.1f} s, {bad} bad")
    return 1 if bad else 0


def is_ours(member: Member) -> bool:
    return "-m" in member.command


def download(system: System, client: int, stopping: threading.Event) -> None:
    """Somebody uses it all the time."""
    command = ("curl", "-s", "--limit-rate", "3M", "--max-time", "8", "-o", "/dev/null", DOWNLOAD)
    while not stopping.wait(0.2):
        system.clients[client].host.run(*command, check=False, timeout=20)


def programs(mix: str, folder: Path | None) -> Programs:
    """LabError where the mix needs official programs and there are none."""
    if mix == "ours":
        return Programs()
    part, name = {
        "their client": ("client", "firezone-headless-client"),
        "their gateway": ("gateway", "firezone-gateway"),
        "their relay": ("relay", "firezone-relay"),
    }[mix]
    if folder is None or not (folder / name).exists():
        raise LabError(f"{mix} needs {name}: give its folder with --peers")
    return Programs(**{part: (str(folder / name),)})  # type: ignore[arg-type]


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", type=Path, help="folder with the official programs of one version")
    parser.add_argument("--mix", choices=MIXES, default="ours", help="who is theirs (nobody)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--iceless", action="store_true", help="the portal allows connections without ICE")
    parser.add_argument("--within", type=float, default=45.0, help="seconds in which everybody must be back (45)")
    options = parser.parse_args()
    try:
        chosen = programs(options.mix, options.peers)
    except LabError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the lab is taken down
    with Lab() as lab:
        system = System(lab, chosen, Shape(relays=2, iceless=options.iceless))
        system.start()
        system.add_client("client2", 32, program=Programs().client)
        for client in (0, 1):
            eventually(system, 20.0, client=client)
        return run(system, options)


if __name__ == "__main__":
    sys.exit(main())
