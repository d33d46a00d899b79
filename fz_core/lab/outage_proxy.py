"""A portal whose word comes late: a TCP proxy in front of it that holds one message to the client back.

    python -m fz_core.lab.outage_proxy --listen 8082 --portal 203.0.113.10:8081 --delay 1

Everything passes at once but the first WebSocket frame of each connection that brings an authorization
(authorization_created, flow_created of older clients), which comes `--delay` seconds later; frames behind it overtake.
"""

from __future__ import annotations

import argparse
import socket
import threading
from typing import BinaryIO

EVENTS = ("authorization_created", "flow_created")
BUFFER = 65536


def main() -> None:
    """Serve until killed; says 'serving' when ready."""
    parser = argparse.ArgumentParser(description="late portal of the lab")
    parser.add_argument("--listen", type=int, required=True)
    parser.add_argument("--portal", required=True, help="IP:PORT")
    parser.add_argument("--delay", type=float, default=1.0)
    options = parser.parse_args()
    ip, _, port = options.portal.rpartition(":")
    listening = socket.create_server(("", options.listen), family=socket.AF_INET6, dualstack_ipv6=True)
    print("serving", flush=True)
    while True:
        client, _ = listening.accept()
        portal = socket.create_connection((ip, int(port)))
        for target, arguments in ((copy, (client, portal)), (hold_back, (portal, client, options.delay))):
            threading.Thread(target=target, args=arguments, daemon=True).start()


def copy(source: socket.socket, sink: socket.socket) -> None:
    """Until the source ends."""
    try:
        while data := source.recv(BUFFER):
            sink.sendall(data)
    except OSError:
        pass
    hang_up(sink)


def hold_back(source: socket.socket, sink: socket.socket, delay: float) -> None:
    """The upgrade as it is, then frame by frame."""
    reader = source.makefile("rb")
    lock = threading.Lock()  # frames stay whole

    def send(data: bytes) -> None:
        try:
            with lock:
                sink.sendall(data)
        except OSError:
            pass

    while (line := reader.readline()).strip():
        send(line)
    send(line)
    held = False
    while frame := read_frame(reader):
        if not held and is_held(frame):
            held = True
            print(f"holding {len(frame)} bytes back", flush=True)
            timer = threading.Timer(delay, send, (frame,))
            timer.daemon = True
            timer.start()
        else:
            send(frame)
    hang_up(sink)


def read_frame(reader: BinaryIO) -> bytes:
    """The next frame with its header, as servers send them: without a mask. Nothing at the end (RFC 6455 §5.2)."""
    header = reader.read(2)
    if len(header) < 2:
        return b""
    extra = {126: 2, 127: 8}.get(header[1] & 0x7F, 0)
    header += reader.read(extra)
    length = int.from_bytes(header[2:], "big") if extra else header[1] & 0x7F
    return header + reader.read(length)


def is_held(frame: bytes) -> bool:
    """Whether it brings one of the events."""
    return any(f'"{event}"'.encode() in frame for event in EVENTS)


def hang_up(sock: socket.socket) -> None:
    """Let the other end see the end."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


if __name__ == "__main__":
    main()
