"""An echo server over UDP and TCP, IPv4 and IPv6: `python -m fz_core.lab.echo --port 7`.

A datagram comes back unchanged, a stream until its end. Each new peer is logged, so that tests see under which
address somebody came.
"""

from __future__ import annotations

import argparse
import socket
import threading

BUFFER = 65536


def serve_udp(sock: socket.socket) -> None:
    """Send back what comes."""
    known: set[str] = set()
    while True:
        data, source = sock.recvfrom(BUFFER)
        introduce("udp", source, known)
        try:
            sock.sendto(data, source)
        except OSError:  # no way back, which is the peer's trouble
            pass


def serve_tcp(listening: socket.socket) -> None:
    """One thread per stream."""
    known: set[str] = set()
    while True:
        stream, source = listening.accept()
        introduce("tcp", source, known)
        threading.Thread(target=echo, args=(stream,), daemon=True).start()


def echo(stream: socket.socket) -> None:
    """Until the peer ends the stream, or loses it."""
    with stream:
        try:
            while data := stream.recv(BUFFER):
                stream.sendall(data)
        except OSError:
            pass


def introduce(protocol: str, source: tuple[str, int], known: set[str]) -> None:
    """Say who it is, the first time."""
    ip = source[0].removeprefix("::ffff:")
    if ip not in known:
        known.add(ip)
        print(f"{protocol} peer {ip}", flush=True)


def main() -> None:
    """Serve until killed; says 'serving on port N' when ready."""
    parser = argparse.ArgumentParser(description="echo server of the lab")
    parser.add_argument("--port", type=int, default=7)
    port = parser.parse_args().port
    listening = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    datagrams.bind(("", port))
    threading.Thread(target=serve_tcp, args=(listening,), daemon=True).start()
    print(f"serving on port {port}", flush=True)
    serve_udp(datagrams)


if __name__ == "__main__":
    main()
