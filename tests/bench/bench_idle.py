"""What programs cost while nothing happens: a gateway with ten clients, and a client with ten peers.

    python -m tests.bench.bench_idle [--seconds 60] [--settle 45] [--peers FOLDER] [--mode ice|iceless|both]

Ten clients use one gateway; the first one also reaches the nine others, through a device pool. Each pair carries a
ping, then nothing is sent for `settle` seconds, then gateway, first client, and one of the others, which has two
peers, are watched for `seconds`. At the end the system calls of the first two are recorded for half as long: what a
thread did between two waits is a wake-up, and is counted as `received`, else `sent`, else `files` (it looked at one,
or had another thread do so), else `nothing`, which is a timer that fired for nothing. With --peers all clients and
the gateway are the official ones of that folder, measured after ours. Needs root. JSON on stdout, progress on stderr.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fz_core.lab import Lab, LabError
from fz_core.lab.policy import static_pool
from fz_core.lab.processes import Process
from fz_core.lab.system import PORTAL_PORT, Member, Programs, Shape, System

CLIENTS = 10
SERVER = "10.20.0.80"
WAITS = ("epoll_wait", "epoll_pwait", "epoll_pwait2", "poll", "ppoll", "futex", "clock_nanosleep")
LOOK = re.compile(r"epoll_p?wait.*, 0(?:, NULL, \d+)?\) += |FUTEX_WAKE")  # returns at once
READS = ("recvmmsg", "recvmsg", "recvfrom", "readv", "read")
WRITES = ("sendmsg", "sendmmsg", "sendto", "writev", "write")
FILES = ("openat", "newfstatat", "statx", "clone3", "clone", "exit", "inotify_add_watch")
LEAST = 9  # bytes: eight are a timer's or an event's count, one tells that a thread is ready
CALL = re.compile(r"^(\d+) +(?:<\.\.\. (\w+) resumed>|(\w+)\()(.*)$")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def voluntary_switches(pid: int) -> int:
    """How often its threads went to sleep, which is how often they were woken."""
    found = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        match = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", status.read_text(), re.MULTILINE)
        found += int(match[1]) if match else 0
    return found


def cpu_seconds(pid: int) -> float:
    """Time of its threads on a processor, to the nanosecond."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def datagrams(member: Member) -> Counter[str]:
    """UDP of its machine so far, in and out; nobody else there sends any."""
    rows = [line.split() for line in member.host.run("cat", "/proc/net/snmp").stdout.splitlines()]
    names, values = (row for row in rows if row[0] == "Udp:")
    found = Counter({"in": int(values[names.index("InDatagrams")]), "out": int(values[names.index("OutDatagrams")])})
    for line in member.host.run("cat", "/proc/net/snmp6").stdout.splitlines():
        name, value = line.split()
        if name in ("Udp6InDatagrams", "Udp6OutDatagrams"):
            found["in" if "In" in name else "out"] += int(value)
    return found


def portal_segments(member: Member) -> Counter[str]:
    """Segments with data to and from the portal: about one per message."""
    shown = member.host.run("ss", "-tinH", "dport", "=", f":{PORTAL_PORT}").stdout
    return Counter({way: sum(map(int, re.findall(rf"data_segs_{way}:(\d+)", shown))) for way in ("in", "out")})


class Meter:
    """What a program used between two looks."""

    def __init__(self, member: Member) -> None:
        self.member, self.pid = member, member.process.pid
        self.began_at = time.monotonic()
        self.before = self._look()

    def _look(self) -> dict[str, float]:
        counts = {f"udp_{way}": n for way, n in datagrams(self.member).items()}
        counts |= {f"portal_{way}": n for way, n in portal_segments(self.member).items()}
        return {"cpu": cpu_seconds(self.pid), "wakeups": voluntary_switches(self.pid), **counts}

    def read(self) -> dict[str, float]:
        seconds = time.monotonic() - self.began_at
        used = {name: after - self.before.get(name, 0) for name, after in self._look().items()}
        answer = {
            "cpu_percent": round(used.pop("cpu") / seconds * 100, 3),
            "wakeups_per_s": round(used.pop("wakeups") / seconds, 2),
        }
        answer |= {f"{name}_per_min": round(count / seconds * 60, 1) for name, count in sorted(used.items())}
        return answer | {"rss_mib": round(self.member.process.memory_kib() / 1024)}


def record(lab: Lab, members: dict[str, Member], seconds: float) -> dict[str, dict[str, int]]:
    """Wake-ups by what came of them."""
    traced: dict[str, tuple[Process, Path]] = {}
    for name, member in members.items():
        path = lab.folder / f"{name}.strace"
        command = ["strace", "-f", "-qq", "-s", "0", "-o", str(path), "-p", str(member.process.pid)]
        traced[name] = member.host.spawn(f"strace-{name}", command), path
    time.sleep(seconds)
    found = {}
    for name, (process, path) in traced.items():
        process.send_signal(signal.SIGINT)  # so that it lets go of the program
        process.wait()
        found[name] = dict(sorted(sort_wakeups(path.read_text()).items()))
    return found


def sort_wakeups(trace: str) -> Counter[str]:
    """What threads did between two waits; what they did before the first is not known."""
    found: Counter[str] = Counter()
    did: dict[str, set[str]] = {}
    for line in trace.splitlines():
        match = CALL.match(line)
        if match is None:
            continue
        thread, call, rest = match[1], match[2] or match[3], match[4]
        result = re.search(r"= (-?\d+)", rest.rpartition(")")[2])
        count = int(result[1]) if result else 0
        if call in WAITS and not LOOK.search(line):
            if match[2] is None and thread in did:
                done = did.pop(thread)
                found[next((kind for kind in ("received", "sent", "files") if kind in done), "nothing")] += 1
            if not re.search("<unfinished|<detached|EAGAIN", line):
                did[thread] = {"files"} if call == "futex" else set()
        elif thread in did:
            did[thread] |= kinds_of(call, rest, count)
    return found


def kinds_of(call: str, rest: str, count: int) -> set[str]:
    """What a system call shows about why its thread runs."""
    if call in FILES or call == "futex":
        return {"files"}
    if "ECONNREFUSED" in rest:
        return {"received"}
    if call not in (*READS, *WRITES) or count <= 0:
        return set()
    is_message = call.endswith("msg")
    if is_message or count >= LEAST:
        return {"received" if call in READS else "sent"}
    return {"files"} if count == 1 else set()


def until_pinged(member: Member, target: str) -> None:
    """One answer."""
    deadline = time.monotonic() + 30.0
    while member.host.run("ping", "-c1", "-W2", target, check=False).returncode != 0:
        if time.monotonic() > deadline:
            raise LabError(f"{member.name} gets no answer from {target}")


def address_of(member: Member) -> str:
    """Inside the tunnel."""
    shown = member.host.run("ip", "-4", "-o", "addr", "show", "tun-firezone").stdout
    found = re.search(r"inet (\S+?)/", shown)
    if found is None:
        raise LabError(f"{member.name} has no address: {shown}")
    return found[1]


def measure(programs: Programs, seconds: float, settle: float) -> dict[str, Any]:
    """Everything about these programs."""
    with Lab() as lab:
        system = System(lab, programs, Shape(resolvers=True))
        others = [f"device{number}" for number in range(1, CLIENTS)]
        system.resources["devices"] = static_pool(*others)
        system.allowed_to = {"tester": {"devices"}}
        for name in others:
            system.add_account(name)
        system.start()
        for number, name in enumerate(others):
            system.add_client(name, 40 + number, account=name)
        for client in system.clients:
            until_pinged(client, SERVER)
        for client in system.clients[1:]:
            until_pinged(system.clients[0], address_of(client))
        note(f"{CLIENTS} clients, {CLIENTS} peers, settling for {settle:.0f} s")
        time.sleep(settle)
        watched = {"gateway": system.gateways[0], "client": system.clients[0], "other client": system.clients[1]}
        meters = {name: Meter(member) for name, member in watched.items()}
        time.sleep(seconds)
        result: dict[str, Any] = {name: meter.read() for name, meter in meters.items()}
        busy = {name: watched[name] for name in ("gateway", "client")}
        for name, counts in record(lab, busy, seconds / 2).items():
            result[name][f"wakeups_in_{seconds / 2:.0f}_s"] = counts
        result["iceless"] = sorted(system.modes())
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--settle", type=float, default=45.0, help="idle before that: paths are looked for no longer")
    parser.add_argument("--mode", choices=("ice", "iceless", "both"), default="both")
    parser.add_argument("--peers", type=Path, help="folder with the official programs")
    options = parser.parse_args()
    names = ["ours"] + ["official"] * (options.peers is not None)
    report = {}
    for iceless in (False, True):
        if options.mode not in ("both", "iceless" if iceless else "ice"):
            continue
        for name in names:
            programs = Programs(iceless=iceless)
            if name == "official":
                gateway, client = (str(options.peers / f"firezone-{n}") for n in ("gateway", "headless-client"))
                programs = Programs(gateway=(gateway,), client=(client,), iceless=iceless)
            title = name + ", without ICE" * iceless
            note(title)
            report[title] = measure(programs, options.seconds, options.settle)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
