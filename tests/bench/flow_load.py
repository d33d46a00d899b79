"""Many UDP flows to an echo server, each from a port of its own: `python -m tests.bench.flow_load IP PORT [options]`.

At most `--window` flows wait for their first answer, so the rate is what the way there and back allows; one that is
not answered within a second is lost. Answered flows send `--packets` in all, a few bytes each. Every socket stays
open to the end. JSON on stdout: flows, how many were lost, and first packets answered per second.
"""

from __future__ import annotations

import argparse
import json
import resource
import select
import socket
import sys
import time

GIVE_UP = 1.0
PAYLOAD = b"flow" * 4
SPARE_FILES = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("host", help="an IP address")
    parser.add_argument("port", type=int)
    parser.add_argument("--flows", type=int, default=10_000)
    parser.add_argument("--packets", type=int, default=3, help="of each flow, all answered")
    parser.add_argument("--window", type=int, default=64)
    options = parser.parse_args()
    allow_open_files(options.flows + SPARE_FILES)
    sockets: list[socket.socket] = []
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    target = (options.host, options.port)
    started = time.perf_counter()
    lost = open_flows(family, target, options.flows, options.window, sockets)
    elapsed = time.perf_counter() - started
    for _ in range(options.packets - 1):
        repeat(sockets, options.window)
    json.dump({"flows": len(sockets), "lost": lost, "per_s": round((len(sockets) - lost) / elapsed)}, sys.stdout)
    return 0


def allow_open_files(count: int) -> None:
    """Raise the limit of this process, which takes root beyond the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(hard, count)))


def open_flows(family: int, target: tuple[str, int], count: int, window: int, sockets: list[socket.socket]) -> int:
    """Send the first packet of each flow; how many were not answered."""
    waiting: dict[int, tuple[socket.socket, float]] = {}
    lost = 0
    with select.epoll() as ready:
        while len(sockets) < count or waiting:
            while len(sockets) < count and len(waiting) < window:
                sock = socket.socket(family, socket.SOCK_DGRAM)
                sock.setblocking(False)
                sock.connect(target)
                sock.send(PAYLOAD)
                ready.register(sock, select.EPOLLIN)
                sockets.append(sock)
                waiting[sock.fileno()] = sock, time.perf_counter()
            for fd, _ in ready.poll(0.05):
                sock, _ = waiting.pop(fd)
                ready.unregister(fd)
                lost += not is_answered(sock)
            overdue = time.perf_counter() - GIVE_UP
            while waiting and next(iter(waiting.values()))[1] < overdue:
                fd = next(iter(waiting))
                del waiting[fd]
                ready.unregister(fd)
                lost += 1
    return lost


def is_answered(sock: socket.socket) -> bool:
    """Takes what came: an echo, or an error."""
    try:
        return sock.recv(2048) == PAYLOAD
    except OSError:
        return False


def repeat(sockets: list[socket.socket], window: int) -> None:
    """One more packet of each flow, and its answer."""
    wait = select.poll()
    for first in range(0, len(sockets), window):
        some = sockets[first : first + window]
        for sock in some:
            sock.send(PAYLOAD)
        for sock in some:
            wait.register(sock, select.POLLIN)
            if wait.poll(GIVE_UP * 1000):
                is_answered(sock)
            wait.unregister(sock)


if __name__ == "__main__":
    sys.exit(main())
