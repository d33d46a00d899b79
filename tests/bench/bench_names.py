"""Names per second of the gateway's resolver, each name new and asked for both families.

    python -m tests.bench.bench_names [--names 20000] [--at-once 500]

The server is unbound on loopback in a process of its own, so half of the machine's work is not ours:
`cpu_us_per_name` counts ours alone. JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from fz_core.driver.names.resolver import NameResolver

LOOPBACK = bytes([127, 0, 0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", type=int, default=20_000)
    parser.add_argument("--at-once", type=int, default=500)
    options = parser.parse_args()
    if shutil.which("unbound") is None:
        sys.exit("bench_names needs unbound: run 'make system-packages'")
    with unbound() as port:
        results = {
            "distinct": trio.run(measure, port, options.names, options.at_once, options.names),
            "repeated": trio.run(measure, port, options.names, options.at_once, 100),
        }
    print(json.dumps({"at_once": options.at_once, "results": results}, indent=2))


async def measure(port: int, count: int, at_once: int, distinct: int) -> dict[str, float]:
    """Resolve `count` names, `distinct` different ones, always `at_once` at the same time."""
    names = iter([f"host{n % distinct}.bench.example" for n in range(count)])
    with tempfile.TemporaryDirectory() as folder:
        resolver = NameResolver([LOOPBACK], Path(folder) / "hosts", port=port)
        async with trio.open_nursery() as outer:
            outer.start_soon(resolver.run)
            await trio.lowlevel.checkpoint()
            started, cpu = time.perf_counter(), _cpu()
            async with trio.open_nursery() as nursery:
                for _ in range(at_once):
                    nursery.start_soon(_resolve_all, resolver, names)
            elapsed, cpu = time.perf_counter() - started, _cpu() - cpu
            outer.cancel_scope.cancel()
    return {
        "names": count,
        "seconds": round(elapsed, 3),
        "names_per_second": round(count / elapsed),
        "cpu_us_per_name": round(cpu / count * 1e6, 1),
    }


async def _resolve_all(resolver: NameResolver, names: Iterator[str]) -> None:
    for name in names:
        found = await resolver.resolve(name)
        if not (found.v4 and found.v6):
            raise RuntimeError(f"{name} was not resolved")
        await trio.lowlevel.checkpoint()


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def unbound() -> Iterator[int]:
    """Knows every name below bench.example; its port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "unbound.conf"
        config.write_text(CONFIG.format(port=port, folder=folder))
        command = ["unbound", "-d", "-p", "-c", str(config)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                _wait_until_open(port)
                yield port
            finally:
                process.kill()


def _wait_until_open(port: int) -> None:
    ends_at = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > ends_at:
                raise
            time.sleep(0.05)


CONFIG = """\
server:
  interface: 127.0.0.1
  port: {port}
  username: ""
  chroot: ""
  directory: "{folder}"
  use-syslog: no
  do-daemonize: no
  module-config: "iterator"
  num-threads: 1
  so-rcvbuf: 1m
  local-zone: "bench.example." redirect
  local-data: "bench.example. 300 IN A 192.0.2.1"
  local-data: "bench.example. 300 IN AAAA 2001:db8::1"
remote-control:
  control-enable: no
"""


if __name__ == "__main__":
    main()
