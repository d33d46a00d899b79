"""Throughput, loss, latency, CPU and memory of data paths on the same machines, side by side.

    python -m tests.bench.bench_datapath [--only NAME]... [--load NAME]... [--seconds 3] [--quick]
        [--peers FOLDER] [--mixes] [--wireguard-go PATH] [--pump-source FILE.c] [--table FILE.md]

Contestants are those of `datapath_contestants`, loads those of `datapath_load`; `--only` and `--load` take a part of
the name and may be repeated; a part that ends in $ ends the name, so that 'ours, direct$' is one alone. A contestant
whose program is missing is left out, which the report says. wireguard-go is the one on the PATH, or the newest from
`go install golang.zx2c4.com/wireguard@latest`. JSON on stdout, progress on stderr; `--table` also writes the tables
of `datapath_table` between the markers of that file. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fz_core.lab import LabError
from tests.bench.datapath_contestants import Contestant, Settings, contestants
from tests.bench.datapath_load import LOADS, Effort, guarded
from tests.bench.datapath_table import write_tables


def main() -> None:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # so that labs are taken down
    settings = Settings(options.peers, options.wireguard_go, options.pump_source, options.mixes)
    found, left_out = contestants(settings)
    for name, reason in left_out.items():
        note(f"without {name}: {reason}")
    seconds = 1.0 if options.quick else options.seconds
    effort = Effort(seconds, 4.0 if options.quick else options.bulk_seconds, options.quick)
    chosen = {name: c for name, c in found.items() if is_wanted(name, options.only)}
    report: dict[str, Any] = {"machine": machine(), "seconds": seconds, "bulk_seconds": effort.bulk_seconds}
    report |= {"left_out": left_out, "contestants": {}}
    for name, contestant in chosen.items():
        loads = [load for load in LOADS if is_wanted(load, options.load)]
        report["contestants"][name] = measure(name, contestant, loads, effort)
    print(json.dumps(report, indent=2))
    if options.table is not None:
        write_tables(options.table, report)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], help="contestants with this in their name")
    parser.add_argument("--load", action="append", default=[], help=f"loads: {', '.join(LOADS)}")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load")
    parser.add_argument("--bulk-seconds", type=float, default=60.0, help="of TCP before memory is read again")
    parser.add_argument("--quick", action="store_true", help="a second of each, UDP one way only")
    parser.add_argument("--peers", type=Path, help="folder with the official programs")
    parser.add_argument("--mixes", action="store_true", help="also ours with official ones")
    parser.add_argument("--wireguard-go", default="wireguard-go", help="another one than that on the PATH")
    parser.add_argument("--pump-source", type=Path, help="C source of a bare pump, the ceiling")
    parser.add_argument("--table", type=Path, help="write the tables into this Markdown file")
    return parser.parse_args()


def measure(name: str, contestant: Contestant, loads: list[str], effort: Effort) -> dict[str, Any]:
    """Every load on one layout; an error in place of what did not work."""
    result: dict[str, Any] = {"load_average": os.getloadavg()}

    def work() -> dict[str, Any]:
        with contestant() as ends:
            for load in loads:
                note(f"{name}: {load}")
                began_at = time.monotonic()
                result[load] = guarded(lambda load=load: LOADS[load](ends, effort))  # type: ignore[misc]
                result.setdefault("took_s", {})[load] = round(time.monotonic() - began_at, 1)
            dead = [program for program, process in ends.programs.items() if not process.is_running]
            return {"ended": dead} if dead else {}

    return result | guarded(work)


def is_wanted(name: str, parts: list[str]) -> bool:
    """Whether one of the parts is in the name, or none was given; a part with a dollar at its end ends the name."""
    return not parts or any(part.lower() in f"{name.lower()}$" for part in parts)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    version = subprocess.run(["iperf3", "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    limits = {n: int(Path(f"/proc/sys/net/core/{n}").read_text()) for n in ("rmem_max", "wmem_max")}
    return {
        "cores": os.cpu_count(), "kernel": os.uname().release, "python": sys.version.split()[0],
        "iperf3": version.split()[1], **limits, "load_average": os.getloadavg(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def note(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(str(error))
