"""A relay with many allocations at once: its memory, and how long they took.

    python -m tests.bench.bench_relay_allocations [--count 1000]

Every client has a socket of its own on loopback, a dual allocation and one channel. JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import socket
import time
from pathlib import Path

import trio

from fz_core.embedded.open_files import allow_open_files
from fz_core.embedded.relay import RelayConfig, run_relay
from fz_core.packet import Address
from fz_core.stun import (
    Message,
    build,
    channel_number_value,
    long_term_key,
    u8_value,
    xor_address_value,
)
from fz_core.turn import relay_credentials

SECRET = "0" * 64
PORT = 35_478
ALLOCATE, BIND = 3, 9
PEER = Address.parse("127.0.0.1:9")


def serve(port: int) -> None:
    allow_open_files()
    config = RelayConfig(
        public_ip4="127.0.0.1", public_ip6="::1", listen_port=port, lowest_port=36_000, highest_port=60_000,
        stamp_secret=SECRET, allocations_per_source=100_000,
    )  # fmt: skip
    trio.run(run_relay, config)


def rss_kib(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) if found else 0


def ask(sock: socket.socket, method: int, attributes: list[tuple[int, bytes]], key: bytes | None) -> Message:
    data = build(method, 0, random.randbytes(12), attributes, integrity_key=key)
    for _ in range(20):
        sock.send(data)
        try:
            reply = Message.parse_untrusted(sock.recv(2048))
        except (TimeoutError, ConnectionRefusedError):
            time.sleep(0.05)
            continue
        assert isinstance(reply, Message)
        return reply
    raise SystemExit("the relay does not answer")


def connect(number: int) -> socket.socket:
    """One client with an allocation and a channel."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(0.5)
    sock.connect(("127.0.0.1", PORT))
    wanted = [(0x19, u8_value(17)), (0x8000, u8_value(2))]
    nonce = ask(sock, ALLOCATE, wanted, None).nonce
    assert nonce is not None
    username, password = relay_credentials(2_000_000_000, str(number), SECRET)
    key = long_term_key(username, "firezone", password)
    login = [(0x06, username.encode()), (0x14, b"firezone"), (0x15, nonce.encode())]
    assert ask(sock, ALLOCATE, wanted + login, key).is_success
    transaction_id = random.randbytes(12)
    peer = (0x12, xor_address_value(PEER, transaction_id))
    data = build(BIND, 0, transaction_id, [peer, (0x0C, channel_number_value(0x4000)), *login], integrity_key=key)
    sock.send(data)
    reply = Message.parse_untrusted(sock.recv(2048))
    assert isinstance(reply, Message)
    assert reply.is_success
    return sock


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    count = parser.parse_args().count
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(PORT,), daemon=True)
    process.start()
    assert process.pid is not None
    try:
        first = connect(-1)
        before, began = rss_kib(process.pid), time.perf_counter()
        clients = [connect(n) for n in range(count)]
        seconds, after = time.perf_counter() - began, rss_kib(process.pid)
        sockets = len(os.listdir(f"/proc/{process.pid}/fd"))
        result = {
            "allocations": count, "rss_kib_before": before, "rss_kib_after": after,
            "kib_each": round((after - before) / count, 2), "open_files": sockets,
            "allocations_per_s": round(count / seconds),
        }  # fmt: skip
        for sock in (first, *clients):
            sock.close()
    finally:
        process.kill()
        process.join(5)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
