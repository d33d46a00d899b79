"""The sockets of a relay: bound, with large buffers. What passes through them is `fastpath.RelayPath`."""

from __future__ import annotations

import socket

SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
SOL_UDP = 17
UDP_GRO = 104
BUFFER_BYTES = 4 * 1024 * 1024


def bind_port(family: int, host: str, port: int) -> socket.socket:
    """A non-blocking UDP socket; `family` is 4 or 16, the length of an IP. OSError if the port is taken."""
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    sock = socket.socket(kind, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        _configure(sock)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


def _configure(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    for forced, plain in ((SO_RCVBUFFORCE, socket.SO_RCVBUF), (SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, BUFFER_BYTES)
        except OSError:  # without CAP_NET_ADMIN, up to the limit of the host
            sock.setsockopt(socket.SOL_SOCKET, plain, BUFFER_BYTES)
    try:
        sock.setsockopt(SOL_UDP, UDP_GRO, 1)
    except OSError:
        pass  # an older kernel: one datagram per message
