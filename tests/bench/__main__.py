"""All benchmarks, one JSON object: `python -m tests.bench`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

results = {}
for path in sorted(Path(__file__).parent.glob("bench_*.py")):
    print(path.stem, file=sys.stderr, flush=True)
    run = subprocess.run(
        [sys.executable, "-m", f"tests.bench.{path.stem}"], stdout=subprocess.PIPE, text=True, check=True
    )
    results[path.stem.removeprefix("bench_")] = json.loads(run.stdout)
print(json.dumps(results, indent=2))
