"""What a program costs while it works, as its kernel counts it: nothing is asked of the program itself.

Bytes stand for packets: a super packet counts once in the kernel's own numbers.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TUN, UNDERLAY = "tun-firezone:", "eth0:"
MAX_INNER, MAX_OUTER = 1280, 1340  # one full packet of the tunnel, and its datagram with IPv4 and UDP header


@dataclass(frozen=True, slots=True)
class Sample:
    """Counters of one process and of its network namespace."""

    at: float
    cpu_s: dict[str, float]
    wakeups: int
    reads: int
    writes: int
    tun_bytes: tuple[int, int]
    underlay_bytes: tuple[int, int]
    datagrams: tuple[int, int]

    @classmethod
    def of(cls, pid: int) -> Sample:
        """Now."""
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        calls = _numbers(Path(f"/proc/{pid}/io").read_text())
        tun, underlay = _device(pid, TUN), _device(pid, UNDERLAY)
        udp, udp6 = _ipv4(pid, "snmp", "Udp:"), _numbers(Path(f"/proc/{pid}/net/snmp6").read_text())
        return cls(
            time.monotonic(),
            {f"{(thread / 'comm').read_text().strip()} {thread.name}": _cpu_seconds(thread) for thread in threads},
            sum(_numbers((thread / "status").read_text())["voluntary_ctxt_switches"] for thread in threads),
            calls["syscr"],
            calls["syscw"],
            (tun[0][0], tun[1][0]),
            (underlay[0][0], underlay[1][0]),
            (udp["InDatagrams"] + udp6["Udp6InDatagrams"], udp["OutDatagrams"] + udp6["Udp6OutDatagrams"]),
        )

    def since(self, earlier: Sample) -> dict[str, Any]:
        """Per second, per call, and by thread."""
        seconds = self.at - earlier.at
        (tun_in, tun_out), (under_in, under_out), (datagrams_in, datagrams_out) = (
            (now[0] - then[0], now[1] - then[1])
            for now, then in (
                (self.tun_bytes, earlier.tun_bytes),
                (self.underlay_bytes, earlier.underlay_bytes),
                (self.datagrams, earlier.datagrams),
            )
        )
        return {
            "cpu_s_by_thread": {name: round(s - earlier.cpu_s.get(name, 0.0), 2) for name, s in self.cpu_s.items()},
            "wakeups_per_s": round((self.wakeups - earlier.wakeups) / seconds),
            "full_packets_per_call": {
                # the kernel sends what the program reads
                "tun_read": _ratio(tun_out / MAX_INNER, self.reads - earlier.reads),
                "tun_write": _ratio(tun_in / MAX_INNER, self.writes - earlier.writes),
                "udp_receive": _ratio(under_in / MAX_OUTER, datagrams_in),
                "udp_send": _ratio(under_out / MAX_OUTER, datagrams_out),
            },
        }


def drops(pid: int) -> dict[str, int]:
    """Counted so far on the UDP sockets of its network namespace and on its TUN device."""
    sockets = [
        int(line.split()[-1])
        for family in ("udp", "udp6")
        for line in Path(f"/proc/{pid}/net/{family}").read_text().splitlines()[1:]
    ]
    received, sent = _device(pid, TUN)
    return {"udp": sum(sockets), "tun": received[3] + sent[3]}


def rest(pid: int, seconds: float) -> dict[str, Any]:
    """What it does when nothing is asked of it: its state, and processor time."""
    thread = Path(f"/proc/{pid}")
    before = _cpu_seconds(thread)
    time.sleep(seconds)
    state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
    return {"state": state, "cpu_s": round(_cpu_seconds(thread) - before, 2), "seconds": seconds}


def _cpu_seconds(thread: Path) -> float:
    fields = (thread / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _ratio(count: float, calls: int) -> float:
    return round(count / calls, 1) if calls else 0.0


def _numbers(text: str) -> dict[str, int]:
    """Lines of a name and a number."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0].rstrip(":"): int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdigit()}


def _ipv4(pid: int, file: str, start: str) -> dict[str, int]:
    """Two lines with the same start: names, then numbers."""
    lines = Path(f"/proc/{pid}/net/{file}").read_text().splitlines()
    names, values = (line.split()[1:] for line in lines if line.startswith(start))
    return dict(zip(names, map(int, values), strict=True))


def _device(pid: int, name: str) -> tuple[list[int], list[int]]:
    """Received and sent, each: bytes, packets, errors, drops; zeros without a device."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        words = line.split()
        if words and words[0] == name:
            numbers = [int(word) for word in words[1:]]
            return numbers[:4], numbers[8:12]
    return [0] * 4, [0] * 4
