"""What is asked of each contestant of `bench_datapath`, and what it costs: one function per kind of load.

iperf3 and a Python echo server make and take the traffic on the same cores. CPU is user and system time of all
threads of a program; what the kernel does in soft interrupts falls to whoever runs at that moment. GB are 10^9 bytes of
payload.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

from fz_core.lab import LabError
from fz_core.lab.processes import Process
from fz_core.lab.servers import IPERF_PORT, start_echo
from tests.bench.datapath_contestants import SERVER, Ends

WAYS = {"up": (), "down": ("-R",)}
UDP_SIZES = (64, 512, 1200)
ONE_GBIT = "1G"
FIRST_RATE, STEP, LADDER = 5_000, 1.4, 6  # packets per second after a flood without result, and steps from there
IPERF_PATIENCE = 15.0  # seconds beyond the load itself
RTT_MS, LOSS_PERCENT = 20.0, 0.1
PING_INTERVAL = 0.01
ECHO_PORT = 7
FLOWS, PACKETS_PER_FLOW = 10_000, 3
SETTLE = 2.0
SEED = 7


@dataclass(frozen=True, slots=True)
class Effort:
    """How long each load lasts, in seconds; `bulk_seconds` before memory is read again."""

    seconds: float
    bulk_seconds: float
    is_quick: bool = False


class LoadError(Exception):
    """A load that could not be measured; one line."""


def tcp(ends: Ends, effort: Effort) -> dict[str, Any]:
    """1 and 8 streams, each way, each family."""
    return {
        f"IPv{family}": {
            str(streams): {way: bulk(ends, effort.seconds, way, streams, family) for way in WAYS} for streams in (1, 8)
        }
        for family in ends.families
    }


def tcp_far(ends: Ends, effort: Effort) -> dict[str, Any]:
    """One stream over a bad cable: half of the round trip and all of the loss each way."""
    try:
        for number, device in enumerate(("internet", "lan")):
            ends.router.delay(device, RTT_MS / 2, LOSS_PERCENT, seed=SEED + number)
        return {way: bulk(ends, max(effort.seconds, 5.0), way) for way in WAYS}
    finally:
        for device in ("internet", "lan"):
            ends.router.delay(device)


def udp(ends: Ends, effort: Effort) -> dict[str, Any]:
    """The most packets per second that come, what is lost at half of that, and what comes of 1 Gbit/s."""
    answer: dict[str, Any] = {}
    for way in ("up",) if effort.is_quick else WAYS:
        answer[way] = {str(size): udp_capacity(ends, effort.seconds, way, size) for size in UDP_SIZES}
        answer[way]["1200 at 1 Gbit"] = guarded(lambda way=way: datagrams(ends, effort.seconds, way, 1200, ONE_GBIT))  # type: ignore[misc]
    return answer


def udp_capacity(ends: Ends, seconds: float, way: str, size: int) -> dict[str, Any]:
    """The most that came of datagrams with this payload, whatever was offered, and what is lost at half of that.

    A sender that offers all it can takes a core from the programs, so rates above what then came are tried too.
    """
    flood = guarded(lambda: datagrams(ends, seconds, way, size, "0"))
    best, rate = flood, flood.get("received_per_s", FIRST_RATE)
    for _ in range(LADDER):
        rate = int(rate * STEP)
        try_ = guarded(lambda rate=rate: datagrams(ends, seconds, way, size, str(rate * size * 8)))  # type: ignore[misc]
        if try_.get("received_per_s", 0) <= best.get("received_per_s", 0):
            break
        best = try_
    if "received_per_s" not in best:
        return best
    half = best["received_per_s"] // 2 * size * 8
    return best | {"flooded": flood, "half": guarded(lambda: datagrams(ends, seconds, way, size, str(half)))}


def ping(ends: Ends, effort: Effort) -> dict[str, Any]:
    """Round trips in milliseconds, at rest and beside one TCP stream."""
    answer = {"idle": guarded(lambda: round_trips(ends, effort.seconds))}
    for way in WAYS:
        answer[way] = guarded(lambda way=way: round_trips_beside(ends, effort.seconds, way))  # type: ignore[misc]
    return answer


def memory(ends: Ends, effort: Effort) -> dict[str, Any]:
    """Resident memory in KiB: at rest, after bulk both ways, after many flows; and how fast these begin."""
    answer: dict[str, Any] = {"idle": resident(ends)}
    for way in WAYS:
        bulk(ends, effort.bulk_seconds / 2, way)
    answer["bulk"] = resident(ends)
    answer["flows"], began = new_flows(ends), answer["bulk"]
    answer["after_flows"] = resident(ends)
    count = answer["flows"].get("flows", 0)
    if count:
        answer["bytes_per_flow"] = {n: (kib - began[n]) * 1024 // count for n, kib in answer["after_flows"].items()}
    return answer


LOADS = {"memory": memory, "tcp": tcp, "far": tcp_far, "udp": udp, "ping": ping}


# TCP and UDP by iperf3


def bulk(ends: Ends, seconds: float, way: str, streams: int = 1, family: int = 4) -> dict[str, Any]:
    """TCP for so long, and what it cost."""

    def run() -> dict[str, Any]:
        cpu, relayed = cpu_seconds(ends), ends.relayed_bytes()
        end = iperf(ends, seconds, "-P", str(streams), *WAYS[way], family=family)
        received = end["sum_received"]
        size = max(received["bytes"], 1)
        return {
            "mbit_s": round(received["bits_per_second"] / 1e6, 1),
            "retransmits": end["sum_sent"].get("retransmits"),
            "cpu_s_per_gb": {n: round((s - cpu[n]) / size * 1e9, 2) for n, s in cpu_seconds(ends).items()},
            "iperf_cpu_percent": [round(end["cpu_utilization_percent"][f"{e}_total"]) for e in ("host", "remote")],
            "path": "relayed" if ends.relayed_bytes() - relayed > size / 2 else "direct",
        }

    return guarded(run)


def datagrams(ends: Ends, seconds: float, way: str, size: int, rate: str) -> dict[str, Any]:
    """UDP offered at this rate ("0" is all the sender can)."""
    end = iperf(ends, seconds, "-u", "-b", rate, "-l", str(size), *WAYS[way])
    sent, received = end["sum_sent"], end["sum_received"]
    packets = received["packets"] - received["lost_packets"]
    return {
        "offered_per_s": round(sent["packets"] / sent["seconds"]),
        "received_per_s": round(packets / received["seconds"]),
        "mbit_s": round(packets * size * 8 / received["seconds"] / 1e6, 1),
        "lost_percent": round(100 * received["lost_packets"] / max(received["packets"], 1), 3),
    }


def iperf(ends: Ends, seconds: float, *options: str, family: int = 4) -> dict[str, Any]:
    """The `end` of iperf3's report; LoadError if it has none."""
    with serving_iperf(ends):
        command = ("iperf3", "-J", "-c", SERVER[family], "-t", str(seconds), *options)
        result = ends.client.run(*command, check=False, timeout=seconds + IPERF_PATIENCE)
    report = json.loads(result.stdout)
    if "error" in report or "sum_received" not in report.get("end", {}):
        raise LoadError(f"iperf3: {report.get('error', 'no result')}")
    end: dict[str, Any] = report["end"]
    return end


@contextmanager
def serving_iperf(ends: Ends) -> Iterator[Process]:
    """A server for one test: one that lost its client would be busy for the next."""
    command = ["iperf3", "-s", "-1", "--forceflush", "-p", str(IPERF_PORT)]
    server = ends.server.spawn(f"iperf3-{len(ends.server.lab.processes)}", command)
    try:
        server.wait_for_line("Server listening")
        yield server
    finally:
        server.kill()


def guarded(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What went wrong, in place of figures."""
    try:
        return work()
    except subprocess.TimeoutExpired:
        return {"error": "took too long"}
    except (LoadError, LabError, OSError, json.JSONDecodeError, subprocess.CalledProcessError) as error:
        return {"error": (str(error).splitlines() or [repr(error)])[0]}


# latency


def round_trips(ends: Ends, seconds: float) -> dict[str, Any]:
    """Of pings, sent evenly."""
    count = max(int(seconds / PING_INTERVAL), 10)
    command = ("ping", "-n", "-i", str(PING_INTERVAL), "-c", str(count), "-W", "1", SERVER[4])
    output = ends.client.run(*command, check=False, timeout=seconds + IPERF_PATIENCE).stdout
    times = [float(ms) for ms in re.findall(r"time=([\d.]+) ms", output)]
    if len(times) < 2:
        raise LoadError(f"{len(times)} of {count} pings were answered")
    cuts = quantiles(times, n=100)
    lost = 100 * (1 - len(times) / count)
    return {"p50": round(cuts[49], 2), "p99": round(cuts[98], 2), "lost_percent": round(lost, 1)}


def round_trips_beside(ends: Ends, seconds: float, way: str) -> dict[str, Any]:
    """While one TCP stream runs."""
    with serving_iperf(ends):
        command = ["iperf3", "-c", SERVER[4], "-t", str(4 * seconds + 10), *WAYS[way]]  # killed when pings are done
        load = ends.client.spawn(f"iperf3-beside-{way}", command)
        try:
            time.sleep(1.0)
            answer = round_trips(ends, seconds)
            if not load.is_running:
                raise LoadError(f"iperf3 ended before the pings: {load.tail(1)}")
            return answer
        finally:
            load.kill()


# CPU and memory


def cpu_seconds(ends: Ends) -> dict[str, float]:
    """Of each program so far."""
    return {name: process.cpu_seconds() for name, process in ends.programs.items()}


def resident(ends: Ends) -> dict[str, int]:
    """KiB of each program, a moment after the load."""
    time.sleep(SETTLE)
    return {name: process.memory_kib() for name, process in ends.programs.items()}


def new_flows(ends: Ends) -> dict[str, Any]:
    """Answered first packets per second, as `flow_load` counts them."""
    server = start_echo(ends.server, ECHO_PORT)
    try:
        return guarded(lambda: flows_to(ends))
    finally:
        server.kill()


def flows_to(ends: Ends) -> dict[str, Any]:
    """From 10,000 ports."""
    options = ("--flows", str(FLOWS), "--packets", str(PACKETS_PER_FLOW))
    command = (sys.executable, "-m", "tests.bench.flow_load", SERVER[4], str(ECHO_PORT), *options)
    answer: dict[str, Any] = json.loads(ends.client.run(*command, timeout=120.0).stdout)
    return answer
