"""All benchmarks, one JSON object: `python -m tests.bench [--peers FOLDER]`.

With --peers those that know the official programs measure them too. What measures longest gets its short form.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

KNOW_PEERS = {"bench_datapath", "bench_idle", "bench_start", "bench_stub", "bench_system"}
SHORT = {"bench_datapath": ["--quick"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="folder with the official programs")
    peers = parser.parse_args().peers
    results = {}
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        name = path.stem
        print(name, file=sys.stderr, flush=True)
        options = [*SHORT.get(name, []), *(["--peers", str(peers)] if peers and name in KNOW_PEERS else [])]
        command = [sys.executable, "-m", f"tests.bench.{name}", *options]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name.removeprefix("bench_")] = json.loads(run.stdout)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
