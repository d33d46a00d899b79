"""Non-blocking UDP sockets of a relay: many datagrams per system call, and a bounded queue for what must wait.

Receiving uses UDP_GRO, sending UDP_SEGMENT; either may be missing, and a destination that refuses segments gets
single datagrams from then on.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

SockAddr = Any
"""What the socket module uses: (host, port) for IPv4, (host, port, flow, scope) for IPv6."""

SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
SOL_UDP = 17
UDP_SEGMENT = 103
UDP_GRO = 104
MAX_SEGMENTS = 64
MAX_DATAGRAM = 65507
MAX_QUEUE = 512
MAX_PLAIN_DESTINATIONS = 1024
BUFFER_BYTES = 4 * 1024 * 1024
WOULD_BLOCK = (errno.EAGAIN, errno.EWOULDBLOCK, errno.ENOBUFS)


class UdpPort:
    """One bound socket. `routes` belongs to its user (the peers of an allocation)."""

    def __init__(self, family: int, host: str, port: int, on_queue: Callable[[UdpPort], None]) -> None:
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        self.family = family
        self.routes: dict[SockAddr, tuple[UdpPort, SockAddr, int]] = {}
        self.dropped = 0
        self._on_queue = on_queue
        self._queue: deque[tuple[bytes, int, SockAddr]] = deque()
        self._plain: set[SockAddr] = set()
        self._sock = socket.socket(kind, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            self._configure(kind)
            self._sock.bind((host, port))
        except OSError:
            self._sock.close()
            raise
        self.number: int = self._sock.getsockname()[1]

    def _configure(self, kind: int) -> None:
        if kind == socket.AF_INET6:
            self._sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        for forced, plain in ((SO_RCVBUFFORCE, socket.SO_RCVBUF), (SO_SNDBUFFORCE, socket.SO_SNDBUF)):
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, forced, BUFFER_BYTES)
            except OSError:  # without CAP_NET_ADMIN, up to the limit of the host
                self._sock.setsockopt(socket.SOL_SOCKET, plain, BUFFER_BYTES)
        try:
            self._sock.setsockopt(SOL_UDP, UDP_GRO, 1)
        except OSError:
            pass  # an older kernel: one datagram per call

    def fileno(self) -> int:
        """For the poller."""
        return self._sock.fileno()

    def close(self) -> None:
        """Closes; what is queued is lost."""
        self._queue.clear()
        self._sock.close()

    @property
    def has_queue(self) -> bool:
        """Whether something waits for room in the kernel."""
        return bool(self._queue)

    def receive(self, view: memoryview) -> tuple[int, int, SockAddr] | None:
        """(bytes, bytes per datagram, source), or None when nothing is left.

        Several datagrams of one source may arrive at once, all of one size but the last, which may be shorter.
        """
        try:
            size, ancillary, _, source = self._sock.recvmsg_into([view], 64)
        except OSError:
            return None
        for level, kind, data in ancillary:
            if level == SOL_UDP and kind == UDP_GRO:
                return size, int.from_bytes(data[:2], "little"), source
        return size, size, source

    def send(self, parts: list[Any], count: int, segment: int, destination: SockAddr) -> None:
        """Send `count` datagrams made of `parts`, each of `segment` bytes but the last, which may be shorter.

        What the kernel does not take at once waits in order; beyond the bound it is dropped.
        """
        if self._queue:
            self._enqueue(parts, segment, destination)
            return
        rest = self._send_now(parts, count, segment, destination)
        if rest:
            self._enqueue(rest, segment, destination)

    def _send_now(self, parts: list[Any], count: int, segment: int, destination: SockAddr) -> list[Any]:
        """What the kernel did not take for now; what it refuses is counted as dropped."""
        try:
            if count == 1 and len(parts) == 1:
                self._sock.sendto(parts[0], destination)
            elif count == 1:
                self._sock.sendmsg(parts, (), 0, destination)
            elif destination in self._plain:
                return self._send_singly(parts, segment, destination)
            else:
                control = [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", segment))]
                self._sock.sendmsg(parts, control, 0, destination)
        except OSError as error:
            if error.errno in WOULD_BLOCK:
                return parts
            if count > 1:
                return self._give_up_segments(parts, segment, destination)
            self.dropped += 1
        return []

    def _give_up_segments(self, parts: list[Any], segment: int, destination: SockAddr) -> list[Any]:
        if len(self._plain) >= MAX_PLAIN_DESTINATIONS:
            self._plain.clear()
        self._plain.add(destination)
        return self._send_singly(parts, segment, destination)

    def _send_singly(self, parts: list[Any], segment: int, destination: SockAddr) -> list[Any]:
        data = b"".join(parts)
        for at in range(0, len(data), segment):
            try:
                self._sock.sendto(data[at : at + segment], destination)
            except OSError as error:
                if error.errno in WOULD_BLOCK:
                    return [data[at:]]
                self.dropped += 1
        return []

    def _enqueue(self, parts: list[Any], segment: int, destination: SockAddr) -> None:
        if len(self._queue) >= MAX_QUEUE:
            self.dropped += 1
            return
        self._queue.append((b"".join(parts), segment, destination))
        if len(self._queue) == 1:
            self._on_queue(self)

    def flush(self) -> None:
        """Send what waits, as far as the kernel takes it."""
        while self._queue:
            data, segment, destination = self._queue[0]
            count = max(1, -(-len(data) // segment)) if segment else 1
            rest = self._send_now([data], count, segment, destination)
            if rest:
                self._queue[0] = (rest[0], segment, destination)
                return
            self._queue.popleft()


class Poller:
    """Readiness of many sockets behind one file descriptor, so that one task can wait for all."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ports: dict[int, UdpPort] = {}

    def fileno(self) -> int:
        """Readable while any socket is ready."""
        return self._epoll.fileno()

    def add(self, port: UdpPort) -> None:
        """Watch for datagrams."""
        self._ports[port.fileno()] = port
        self._epoll.register(port.fileno(), select.EPOLLIN)

    def remove(self, port: UdpPort) -> None:
        """Before closing."""
        self._epoll.unregister(port.fileno())
        del self._ports[port.fileno()]

    def watch_queue(self, port: UdpPort) -> None:
        """Tell also when there is room to send."""
        self._epoll.modify(port.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def ready(self) -> list[UdpPort]:
        """Those with datagrams to read; queues that can move are flushed on the way."""
        readable = []
        for fd, mask in self._epoll.poll(0):
            port = self._ports[fd]
            if mask & select.EPOLLOUT:
                port.flush()
                if not port.has_queue:
                    self._epoll.modify(fd, select.EPOLLIN)
            if mask & ~select.EPOLLOUT:
                readable.append(port)
        return readable

    def close(self) -> None:
        """Closes all sockets as well."""
        for port in self._ports.values():
            port.close()
        self._epoll.close()
