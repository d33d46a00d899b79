"""Where a saturated gateway's (or client's) processor time goes, by function: `perf` over one TCP stream.

    python -m tests.bench.profile_gateway [--end gateway|client] [--load upload|download|udp] [--seconds 5]

JSON on stdout: the share of samples and nanoseconds per packet of 1280 bytes, of each function itself. Needs `perf`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from fz_core.lab import Host, Lab
from fz_core.lab.system import Programs, Shape, System
from tests.bench.bench_system import SERVER, iperf, serve_iperf

LOADS = {"upload": (), "download": ("-R",), "udp": ("-u", "-b", "1G", "-l", "1200")}
LINE = re.compile(r"^\s*([0-9.]+)%\s+\S+\s+(\S+)\s+\[(.)\]\s+(\S+)")
TOP = 25


def profile(end: str, load: str, seconds: float) -> dict[str, object]:
    with Lab() as lab, tempfile.TemporaryDirectory() as folder:
        system = System(lab, Programs(), Shape())
        system.start()
        server = next(n for n in lab.namespaces if n.name == "gateway-web")
        assert isinstance(server, Host)
        serve_iperf(server)
        system.fetch(0.001, timeout=20)
        process = (system.gateways[0] if end == "gateway" else system.clients[0]).process
        data = Path(folder) / "perf.data"
        measured: dict[str, object] = {}
        stream = threading.Thread(
            target=lambda: measured.update(iperf(system.clients[0].host, SERVER, seconds + 2, *LOADS[load]))
        )
        stream.start()
        time.sleep(1.0)
        before = process.cpu_seconds()
        subprocess.run(
            [
                "perf",
                "record",
                "-q",
                "-F",
                "1999",
                "-o",
                str(data),
                "-p",
                str(process.pid),
                "--",
                "sleep",
                str(seconds),
            ],
            check=True,
            stderr=subprocess.DEVNULL,
        )
        used = process.cpu_seconds() - before
        stream.join()
        report = subprocess.run(
            ["perf", "report", "-i", str(data), "--stdio", "--no-children", "-g", "none"],
            capture_output=True,
            text=True,
        ).stdout
    mbit = measured.get("mbit_s", 0.0)
    assert isinstance(mbit, float | int)
    packets = mbit * 1e6 / 8 / 1228 * seconds
    shares: dict[tuple[str, str], float] = {}
    for line in report.splitlines():
        found = LINE.match(line)
        if found:
            # What a stripped library does not name is told by the library.
            name = "(unnamed)" if found[4].startswith("0x") else found[4].removeprefix("__pyx_f_7fz_core_8fastpath_")
            key = name, "kernel" if found[3] == "k" else found[2].partition(".")[0]
            shares[key] = shares.get(key, 0.0) + float(found[1])
    functions = [
        {
            "function": name,
            "where": where,
            "percent": round(share, 2),
            "ns_per_packet": round(share / 100 * used / packets * 1e9) if packets else None,
        }
        for (name, where), share in sorted(shares.items(), key=lambda item: -item[1])[:TOP]
    ]
    return {"end": end, "load": load, **measured, "cpu_seconds": round(used, 2), "functions": functions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--end", choices=("gateway", "client"), default="gateway")
    parser.add_argument("--load", choices=tuple(LOADS), default="upload")
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    json.dump(profile(options.end, options.load, options.seconds), sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
