"""Data through a relay alone: Gbit/s, and processor seconds of the relay's process per GB.

    python -m tests.bench.bench_relay_path [--seconds 3] [--only ours]

Client, relay and peer are machines of a lab that share the cores. One flow of equal datagrams comes in batches of 49
or 4 (UDP_SEGMENT), at most a window ahead of what has arrived, so little is lost. Beside our relay, in the relay's
place: a bare loop of `recvmsg` and `sendmsg` that copies the same batches as they are, and coturn. JSON on stdout.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import json
import multiprocessing
import os
import select
import shutil
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import trio

from fz_core.embedded.relay import RelayConfig, run_relay
from fz_core.lab import Host, Lab
from fz_core.lab.processes import Process
from fz_core.packet import Address
from fz_core.stun import build, channel_number_value, long_term_key, u8_value, xor_address_value
from fz_core.turn import relay_credentials
from tests.bench.bench_relay_allocations import ALLOCATE, BIND, ask

SECRET = "0" * 64
PORT, PEER_PORT, COPY_PORT = 3478, 7000, 50_000
EXPIRY = 2_000_000_000
CHANNEL = 0x4000
SOL_UDP, UDP_SEGMENT, UDP_GRO = 17, 103, 104
LOADS = {  # bytes and datagrams per batch: full WireGuard datagrams of the tunnel, fewer of them, acknowledgements
    "1312 bytes": (1312, 49),
    "1312 bytes, 4 at once": (1312, 4),
    "100 bytes": (100, 49),
}
WINDOW_BYTES = 1 << 20
STALL = 0.05
GB = 1e9
Counter = Any  # a number in shared memory


class Load(NamedTuple):
    """One direction: who sends what to whom, and who receives with how much header before each payload."""

    sender: socket.socket
    to: tuple[str, int]
    header: bytes
    receiver: socket.socket
    received_header: int


class Contestant(NamedTuple):
    process: Process
    up: Load
    down: Load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--only", choices=STARTS)
    parser.add_argument("--serve", metavar="IP", help="be the relay")
    parser.add_argument("--copy", nargs=4, metavar=("IP", "PORT", "IP", "PORT"), help="be the bare loop between two")
    options = parser.parse_args()
    if options.serve is not None:
        config = RelayConfig(public_ip4=options.serve, listen_port=PORT, stamp_secret=SECRET)
        trio.run(run_relay, config)
    if options.copy is not None:
        one, one_port, other, other_port = options.copy
        copy((one, int(one_port)), (other, int(other_port)))
    names = [options.only] if options.only else [n for n in STARTS if n != "coturn" or shutil.which("turnserver")]
    results = {name: measure(STARTS[name], options.seconds) for name in names}
    print(json.dumps({"cores": os.cpu_count(), "seconds": options.seconds, "results": results}, indent=2))


def measure(start: Callable[[Lab, Host, Host, Host], Contestant], seconds: float) -> dict[str, Any]:
    with Lab() as lab:
        client, relay, peer = (lab.public_host(name, 10 + n) for n, name in enumerate(("client", "relay", "peer")))
        contestant = start(lab, client, relay, peer)
        result: dict[str, Any] = {}
        for title, (size, count) in LOADS.items():
            for way, load in (("up", contestant.up), ("down", contestant.down)):
                result[f"{way}, {title}"] = run(load, size, count, seconds, contestant.process)
                print(start.__name__, way, title, result[f"{way}, {title}"], file=sys.stderr, flush=True)
        result["rss_kib"] = contestant.process.memory_kib()
        return result


# The contestants


def ours(lab: Lab, client: Host, relay: Host, peer: Host) -> Contestant:
    process = relay.spawn("relay", [sys.executable, "-m", __spec__.name, "--serve", host_of(relay)])
    return relayed(process, client, relay, peer, relay_credentials(EXPIRY, "bench", SECRET))


def coturn(lab: Lab, client: Host, relay: Host, peer: Host) -> Contestant:
    process = relay.spawn(
        "turnserver",
        [
            *("turnserver", "-n", "--no-cli", "--no-tls", "--no-dtls", "--no-tcp"),
            *("--use-auth-secret", f"--static-auth-secret={SECRET}", "--realm=firezone"),
            *(f"--listening-ip={host_of(relay)}", f"--relay-ip={host_of(relay)}", f"--listening-port={PORT}"),
            *(f"--userdb={lab.folder}/db", f"--pidfile={lab.folder}/pid", "--log-file=stdout"),
        ],
    )
    username = f"{EXPIRY}:bench"
    password = base64.b64encode(hmac.digest(SECRET.encode(), username.encode(), hashlib.sha1)).decode()
    return relayed(process, client, relay, peer, (username, password))


def bare_copy(lab: Lab, client: Host, relay: Host, peer: Host) -> Contestant:
    near, far = udp(client, 0), udp(peer, PEER_PORT)
    ends = (*near.getsockname(), *far.getsockname())
    process = relay.spawn("copy", [sys.executable, "-m", __spec__.name, "--copy", *map(str, ends)])
    time.sleep(1.0)
    return Contestant(
        process,
        Load(near, (host_of(relay), PORT), b"", far, 0),
        Load(far, (host_of(relay), COPY_PORT), b"", near, 0),
    )


STARTS = {"ours": ours, "bare copy": bare_copy, "coturn": coturn}


def copy(one: tuple[str, int], other: tuple[str, int]) -> None:
    """What comes on the first port goes from the second to `other`, and the other way round."""
    sockets = {}
    poller = select.poll()
    pair = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    for sock, port, exit_by, to in ((pair[0], PORT, pair[1], other), (pair[1], COPY_PORT, pair[0], one)):
        sock.bind(("", port))
        prepare(sock)
        sockets[sock.fileno()] = (sock, exit_by, to)
        poller.register(sock, select.POLLIN)
    buffer = memoryview(bytearray(65536))
    while True:
        for fd, _ in poller.poll():
            sock, exit_by, to = sockets[fd]
            size, ancillary, _, _ = sock.recvmsg_into([buffer], 64)
            segment = int.from_bytes(ancillary[0][2][:2], "little") if ancillary else size
            control = [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", segment))] if size > segment else []
            exit_by.sendmsg([buffer[:size]], control, 0, to)


def relayed(process: Process, client: Host, relay: Host, peer: Host, login: tuple[str, str]) -> Contestant:
    near, far = udp(client, 0), udp(peer, PEER_PORT)
    near.connect((host_of(relay), PORT))
    port = allocate(near, login, Address.parse(f"{host_of(peer)}:{PEER_PORT}"))
    near_to, far_to = (host_of(relay), PORT), (host_of(relay), port)
    header = struct.pack("!H", CHANNEL)
    return Contestant(process, Load(near, near_to, header, far, 0), Load(far, far_to, b"", near, 4))


def allocate(sock: socket.socket, login: tuple[str, str], peer: Address) -> int:
    """An allocation with one channel; its port."""
    username, password = login
    key = long_term_key(username, "firezone", password)
    wanted = [(0x19, u8_value(17))]
    sock.settimeout(0.5)
    nonce = ask(sock, ALLOCATE, wanted, None).nonce
    assert nonce is not None
    attributes = [(0x06, username.encode()), (0x14, b"firezone"), (0x15, nonce.encode())]
    reply = ask(sock, ALLOCATE, wanted + attributes, key)
    transaction_id = os.urandom(12)
    bind = [(0x12, xor_address_value(peer, transaction_id)), (0x0C, channel_number_value(CHANNEL)), *attributes]
    sock.send(build(BIND, 0, transaction_id, bind, integrity_key=key))
    assert sock.recv(2048)[:2] == b"\x01\x09"
    sock.settimeout(None)
    return reply.xor_relayed_addresses[0].port


# The load


def run(load: Load, size: int, count: int, seconds: float, relay: Process) -> dict[str, Any]:
    """One direction for some seconds."""
    context = multiprocessing.get_context("fork")
    sent, received = (context.Value("Q", 0, lock=False) for _ in range(2))
    until = time.monotonic() + seconds
    ends = [
        context.Process(target=receive, args=(load, size, received, until + 0.3)),
        context.Process(target=send, args=(load, size, count, sent, received, until)),
    ]
    cpu = run_ns(relay.pid)
    for end in ends:
        end.start()
    for end in ends:
        end.join()
    gb = received.value / GB
    return {
        "gbit_s": round(gb * 8 / seconds, 3),
        "lost_percent": round(100 * (1 - received.value / max(1, sent.value)), 3),
        "cpu_s_per_gb": round((run_ns(relay.pid) - cpu) / 1e9 / gb, 3) if gb else None,
    }


def run_ns(pid: int) -> int:
    """Processor time of all threads so far, nanoseconds: fine enough for short runs."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


def send(load: Load, size: int, count: int, sent: Counter, received: Counter, until: float) -> None:
    """Payload bytes sent are counted in `sent`; a window that does not move for a while is written off."""
    header = load.header + struct.pack("!H", size) if load.header else b""
    batch = (header + bytes(size)) * count
    control = [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", size + len(header)))]
    load.sender.setblocking(True)
    window = max(WINDOW_BYTES * size // 1312, size * count * 2)
    seen, seen_at, lost = 0, time.monotonic(), 0
    while (now := time.monotonic()) < until:
        if received.value != seen:
            seen, seen_at = received.value, now
        if sent.value - lost - received.value < window:
            load.sender.sendmsg([batch], control, 0, load.to)
            sent.value += size * count
        elif now - seen_at > STALL:
            lost, seen_at = sent.value - received.value, now
        else:
            time.sleep(0.0001)


def receive(load: Load, size: int, received: Counter, until: float) -> None:
    buffer = bytearray(65536)
    load.receiver.settimeout(0.1)
    share = size / (size + load.received_header)
    while time.monotonic() < until:
        try:
            received.value += int(load.receiver.recv_into(buffer) * share)
        except TimeoutError:
            pass


def udp(host: Host, port: int) -> socket.socket:
    sock = host.socket()
    sock.bind((host_of(host), port))
    prepare(sock)
    return sock


def prepare(sock: socket.socket) -> None:
    for option in (32, 33):  # SO_SNDBUFFORCE, SO_RCVBUFFORCE
        sock.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
    sock.setsockopt(SOL_UDP, UDP_GRO, 1)


def host_of(host: Host) -> str:
    assert host.ipv4 is not None
    return host.ipv4


if __name__ == "__main__":
    main()
