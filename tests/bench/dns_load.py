"""A load of DNS queries on one server, from one socket: `python -m tests.bench.dns_load SERVER [options]`.

Without `--rate` as fast as a window of outstanding queries allows; with it, evenly spread. JSON on stdout:
answers per second, and how long answers took in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import sys
import time
from statistics import quantiles

import dns.message

SUFFIX = "corp.example"
GIVE_UP = 1.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server")
    parser.add_argument("--names", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--rate", type=float, help="queries per second")
    options = parser.parse_args()
    tails = [dns.message.make_query(f"host{n}.{SUFFIX}", "A").to_wire()[2:] for n in range(options.names)]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        sock.connect((options.server, 53))
        sock.setblocking(False)
        ask(sock, tails, options.names, 16, None, None)  # every name is known from now on
        result = ask(sock, tails, None, options.window, options.rate, options.seconds)
    json.dump(result, sys.stdout)
    return 0


def ask(
    sock: socket.socket, tails: list[bytes], count: int | None, window: int, rate: float | None, seconds: float | None
) -> dict[str, float]:
    """Send `count` queries, or for `seconds`."""
    sent_at: dict[int, float] = {}
    took: list[float] = []
    sent = lost = 0
    started = time.perf_counter()
    wait = select.poll()
    wait.register(sock, select.POLLIN)
    while True:
        now = time.perf_counter()
        is_over = (count is not None and sent >= count) or (seconds is not None and now - started >= seconds)
        if is_over and not sent_at:
            break
        due = window - len(sent_at) if rate is None else min(int((now - started) * rate) - sent, 4096 - len(sent_at))
        for _ in range(0 if is_over else min(due, 64 if count is None else count - sent)):
            identity = sent & 0xFFFF
            sock.send(identity.to_bytes(2, "big") + tails[sent % len(tails)])
            sent_at[identity] = time.perf_counter()
            sent += 1
        wait.poll(1)
        try:
            while True:
                reply = sock.recv(2048)
                at = sent_at.pop(reply[0] << 8 | reply[1], None)
                if at is not None:
                    took.append(time.perf_counter() - at)
                    assert reply[3] & 0xF == 0, "an error was answered"
                    assert reply[6:8] != b"\0\0", "nothing was answered"
        except BlockingIOError:
            pass
        if sent_at and (oldest := next(iter(sent_at.items())))[1] < now - GIVE_UP:
            del sent_at[oldest[0]]
            lost += 1
    elapsed = time.perf_counter() - started
    cuts = quantiles(took, n=1000) if len(took) > 1 else [0.0] * 999
    return {
        "answers_per_s": round(len(took) / elapsed),
        "p50_ms": round(cuts[499] * 1000, 3),
        "p99_ms": round(cuts[989] * 1000, 3),
        "lost": lost,
    }


if __name__ == "__main__":
    sys.exit(main())
