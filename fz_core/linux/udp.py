"""The UDP data sockets: one per family, shared by all relays and peers.

`IP_RECVERR` stays off: its error queue would have to be drained, and an ICMP storm would charge it to the
receive buffer. What routers say about a path's MTU the kernel remembers (and checks that they quote a datagram of
ours): a datagram above it is refused with EMSGSIZE, and `path_mtu` asks. Source: spec/io.md 3.1 to 3.3.
"""

from __future__ import annotations

import os
import socket
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from fz_core.linux import switches
from fz_core.linux.compiled import UdpQueue
from fz_core.linux.marks import MARK, set_mark
from fz_core.packet import Address

if TYPE_CHECKING:
    from typing_extensions import Buffer

PREFERRED_PORT = 52625
SEND_BUFFER_BYTES = 2 * 1024 * 1024
RECV_BUFFER_BYTES = 16 * 1024 * 1024
SMALLEST_BUFFER_BYTES = 64 * 1024
SEND_BUFFER_VARIABLE = "FIREZONE_UDP_SEND_BUFFER_SIZE"
RECV_BUFFER_VARIABLE = "FIREZONE_UDP_RECV_BUFFER_SIZE"

IP_MTU_DISCOVER, IP_PKTINFO, IP_RECVTOS = 10, 8, 13
IPV6_MTU_DISCOVER, IPV6_DONTFRAG, IPV6_ADDR_PREFERENCES = 23, 62, 72
IP_MTU, IPV6_MTU = 14, 24
PMTUDISC_DO = 2
IPV6_PREFER_SRC_PUBLIC = 2
SOL_UDP, UDP_SEGMENT, UDP_GRO = 17, 103, 104


class SocketError(NamedTuple):
    """A datagram that could not be sent, or (remote None) a failed receive."""

    errno: int
    remote: Address | None
    local: Address | None
    dropped_bytes: int

    def __str__(self) -> str:
        direction = "receive" if self.remote is None else f"send to {self.remote}"
        return f"{direction}: {os.strerror(self.errno)}"


class UdpSocket:
    """`UdpSocket.bind(family)`, then `recv_batch` and `send_batch`. Raises only when binding."""

    def __init__(self, sock: socket.socket, gso_segments: int, mark: int | None = None) -> None:
        self._sock = sock
        self._mark = mark
        self.is_ipv4 = sock.family == socket.AF_INET
        self.port: int = sock.getsockname()[1]
        self._queue = UdpQueue(sock.fileno(), self.is_ipv4, self.port, gso_segments)
        self.recv_batch = self._queue.recv_batch

    @classmethod
    def bind(
        cls,
        family: socket.AddressFamily,
        port: int = PREFERRED_PORT,
        mark: int | None = MARK,
        *,
        gso: bool = True,
        gro: bool = True,
    ) -> Self:
        """Bind the wildcard address, on any port where `port` is taken.

        OSError where the family is unavailable, MarkError without CAP_NET_ADMIN.
        """
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            _set_family_options(sock)
            _bind(sock, port)
            if mark is not None:
                set_mark(sock, mark)
            _set_buffers(sock)
            if gro and switches.is_on(switches.UDP_GRO):
                _try_option(sock, SOL_UDP, UDP_GRO, 1)
            has_gso = gso and switches.is_on(switches.UDP_GSO) and _probe_gso(sock)
            return cls(sock, 64 if has_gso else 1, mark)
        except BaseException:
            sock.close()
            raise

    def fileno(self) -> int:
        """The non-blocking descriptor, -1 once closed."""
        return self._sock.fileno()

    @property
    def gso_segments(self) -> int:
        """The most datagrams one send may carry; 1 without UDP_SEGMENT."""
        return self._queue.gso_segments

    def send_batch(
        self, buffer: Buffer, segment_size: int, remote: Address, local: Address | None = None, ecn: int = 0
    ) -> int | None:
        """Send datagrams of `segment_size` bytes, the last maybe shorter, to one destination.

        None when done. A number: the socket is full after that many bytes; wait until it is writable and
        send the rest. What failed for good is dropped and told by `take_errors`.
        """
        return self._queue.send_batch(buffer, segment_size, remote, local, ecn)

    def take_errors(self) -> list[SocketError]:
        """Errors since the last call, at most 64 of them."""
        return [SocketError(*error) for error in self._queue.take_errors()]

    def path_mtu(self, remote: Address, local: Address | None = None) -> int | None:
        """The largest IP packet that passes to `remote` as far as the kernel knows; None where there is no route.

        That is the MTU of the route's first link, or less for ten minutes (net.ipv4.route.mtu_expires) after a router
        said so. Asked with a socket of its own, connected but never written to: connecting ours would shut others out.
        """
        with socket.socket(self._sock.family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asking:
            try:
                if self._mark is not None:
                    set_mark(asking, self._mark)
                if local is not None:
                    asking.bind((local.host, 0))
                asking.connect((remote.host, remote.port))
                if self.is_ipv4:
                    return asking.getsockopt(socket.IPPROTO_IP, IP_MTU)
                return asking.getsockopt(socket.IPPROTO_IPV6, IPV6_MTU)
            except OSError:
                return None

    def is_single(self, remote: Address) -> bool:
        """Whether this destination gets one datagram per system call."""
        return self._queue.is_single(remote)

    def counters(self) -> dict[str, int]:
        """System calls, bytes, skipped input, errors, and destinations that lost segmentation."""
        names = (
            "rx_calls",
            "rx_bytes",
            "rx_oversized",
            "rx_malformed",
            "rx_errors",
            "tx_calls",
            "tx_bytes",
            "tx_errors",
            "gso_fallbacks",
        )
        return {name: getattr(self._queue, name) for name in names}

    def buffer_sizes(self) -> tuple[int, int]:
        """Granted (send, receive) bytes, without the kernel's doubling."""
        return (
            self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2,
            self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2,
        )

    def close(self) -> None:
        """Free the port; harmless when repeated."""
        self._sock.close()
        self._queue = UdpQueue(-1, self.is_ipv4, self.port)
        self.recv_batch = self._queue.recv_batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _bind(sock: socket.socket, port: int) -> None:
    wildcard = "0.0.0.0" if sock.family == socket.AF_INET else "::"
    try:
        sock.bind((wildcard, port))
    except OSError:
        if port == 0:
            raise
        sock.bind((wildcard, 0))


def _set_family_options(sock: socket.socket) -> None:
    """Never fragment, tell the local address and ECN of each datagram, prefer stable IPv6 addresses."""
    _try_option(sock, socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DO)
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)
        return
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
    _try_option(sock, socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_DO)
    _try_option(sock, socket.IPPROTO_IPV6, IPV6_DONTFRAG, 1)
    _try_option(sock, socket.IPPROTO_IPV6, IPV6_ADDR_PREFERENCES, IPV6_PREFER_SRC_PUBLIC)


def _try_option(sock: socket.socket, level: int, option: int, value: int) -> bool:
    """Set an option that older kernels may lack."""
    try:
        sock.setsockopt(level, option, value)
    except OSError:
        return False
    return True


def _probe_gso(sock: socket.socket) -> bool:
    """Whether the kernel knows UDP_SEGMENT; it is then given per message."""
    return _try_option(sock, SOL_UDP, UDP_SEGMENT, 1500) and _try_option(sock, SOL_UDP, UDP_SEGMENT, 0)


def _set_buffers(sock: socket.socket) -> None:
    """Ask for the kernel buffers; Linux silently grants at most net.core.{w,r}mem_max."""
    for option, variable, default in (
        (socket.SO_SNDBUF, SEND_BUFFER_VARIABLE, SEND_BUFFER_BYTES),
        (socket.SO_RCVBUF, RECV_BUFFER_VARIABLE, RECV_BUFFER_BYTES),
    ):
        size = _wanted_bytes(variable, default)
        while not _try_option(sock, socket.SOL_SOCKET, option, size) and size > SMALLEST_BUFFER_BYTES:
            size //= 2


def _wanted_bytes(variable: str, default: int) -> int:
    """The variable's decimal value; the default where it is unset or unusable."""
    text = os.environ.get(variable, "")
    return int(text) if text.isascii() and text.isdigit() and 0 < int(text) < 1 << 31 else default
