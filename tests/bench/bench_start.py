"""How long a start takes: importing, `--version`, and from the start of a process to an answer through its tunnel.

    python -m tests.bench.bench_start [--runs 5] [--peers <folder with the official programs>]

The restarts need root. With `--peers`, the official programs are restarted in turns with ours, in a lab of their own
each, so that all meet the same machine. Seconds; JSON on stdout, progress on stderr.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fz_core.lab.faults import mixes
from fz_core.lab.faults_bench import Settings, bench

NOTHING = ("-c", "pass")
IMPORTS = {
    "client": "import fz_headless.__main__, fz_core.driver.client_side",
    "gateway": "import fz_gateway.__main__, fz_core.driver.gateway_side",
}
MODULES = {"client": "fz_headless", "gateway": "fz_gateway"}
STEADY = 4.0  # seconds of a tunnel's life before it is restarted


def python(runs: int, *arguments: str) -> dict[str, float]:
    """One interpreter after the other. On a busy machine the least processor time says most."""
    cpu, wall = [], []
    for _ in range(runs):
        before, began = children_cpu(), time.monotonic()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        wall.append(time.monotonic() - began)
        cpu.append(children_cpu() - before)
    return {"least_cpu": min(cpu), "median_cpu": statistics.median(cpu), "median_wall": statistics.median(wall)}


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def restarts(runs: int, peers: Path | None) -> dict[str, Any]:
    """Each run is a lab for each pair of programs: the client is restarted in it, then the gateway."""
    found = mixes(peers)
    pairs = {
        name: found[key] for name, key in (("ours", "ours"), ("official", "their client and gateway")) if key in found
    }
    figures: dict[str, dict[str, list[float]]] = {name: {"client": [], "gateway": []} for name in pairs}
    for run in range(runs):
        for name, programs in pairs.items():
            note(f"restarts, run {run + 1}, {name}")
            with bench(programs, Settings()) as b:
                for role, member in (("client", b.client), ("gateway", b.gateway)):
                    time.sleep(STEADY)
                    stopped_at = time.monotonic()
                    member.process.stop()
                    b.system.relaunch(member)
                    # a client's figure begins with its process, a gateway's with the signal to the old one
                    since = member.process.started_at if role == "client" else stopped_at
                    figures[name][role].append(b.answer_after(since))
    return {name: {role: summary(values) for role, values in roles.items()} for name, roles in figures.items()}


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"least": min(values), "median": statistics.median(values), "worst": max(values)}


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="folder with the official programs")
    options = parser.parse_args()
    note("imports")
    result: dict[str, Any] = {
        "interpreter": python(options.runs, *NOTHING),
        "imports": {role: python(options.runs, "-c", code) for role, code in IMPORTS.items()},
        "version": {role: python(options.runs, "-m", module, "--version") for role, module in MODULES.items()},
        "first_answer": restarts(options.runs, options.peers),
    }
    print(json.dumps(rounded(result), indent=2))


if __name__ == "__main__":
    main()
