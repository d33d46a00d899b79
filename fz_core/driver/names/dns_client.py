"""One DNS question to one server, over UDP or TCP (`spec/tunnel.md` §10, §24; `spec/io.md` §4).

Each question has a socket of its own, so a source port nobody can guess, and only a reply from that server
with that id and question counts. Everything else is ignored until time is up. Not here: DoH, and what to ask.
"""

from __future__ import annotations

import os
import socket
from types import TracebackType
from typing import Self

import trio

from fz_core.dns import Query, is_reply_to
from fz_core.linux import MARK, SocketFactory, open_socket
from fz_core.packet import Address

DNS_PORT = 53
MAX_IN_FLIGHT = 1000
MAX_MESSAGE = 65_535
KINDS = (socket.SOCK_DGRAM, socket.SOCK_STREAM)
IP_RECVERR, IPV6_RECVERR = 11, 25


class DnsFailed(Exception):
    """No answer came, and why; one line."""


class DnsTimeout(DnsFailed):
    """Time was up."""


class TooBusy(DnsFailed):
    """As many questions as allowed are under way."""


class DnsClient:
    """Bounds what is under way. After `reset` everything under way has failed."""

    def __init__(self, limit: int = MAX_IN_FLIGHT, sockets: SocketFactory | None = None) -> None:
        self.limit, self._sockets = limit, sockets
        self._scopes: set[trio.CancelScope] = set()

    @property
    def in_flight(self) -> int:
        """Questions without an answer so far."""
        return len(self._scopes)

    async def exchange(
        self,
        server: Address,
        query: bytes,
        *,
        tcp: bool,
        timeout: float,
        local_ip: bytes | None = None,
        marked: bool = True,
    ) -> bytes:
        """As the function `exchange`; TooBusy above the limit."""
        if len(self._scopes) >= self.limit:
            raise TooBusy(f"{self.limit} DNS queries are under way already")
        scope = trio.CancelScope()
        self._scopes.add(scope)
        try:
            with scope:
                return await exchange(
                    server, query, tcp=tcp, timeout=timeout, local_ip=local_ip, marked=marked, sockets=self._sockets
                )
        finally:
            self._scopes.discard(scope)
        raise DnsFailed("the network was reset")

    def reset(self) -> None:
        """Fail what is under way: its sockets belong to a network that is gone."""
        for scope in self._scopes:
            scope.cancel()


async def exchange(
    server: Address,
    query: bytes,
    *,
    tcp: bool,
    timeout: float,
    local_ip: bytes | None = None,
    marked: bool = True,
    sockets: SocketFactory | None = None,
) -> bytes:
    """The server's reply. DnsTimeout after `timeout` seconds, DnsFailed if it cannot be reached.

    `marked` keeps the question out of the tunnel (MarkError where that is forbidden). Without it, and with
    `local_ip` our own address in the tunnel, the kernel sends it through the tunnel; any ICMP error fails it.
    `sockets` spares the kernel a look-up of the route each time.
    """
    parsed = Query.parse_untrusted(query)
    if parsed is None:
        raise DnsFailed("not a DNS query")
    talk = _over_tcp if tcp else _over_udp
    try:
        with trio.fail_after(timeout):
            with QuerySocket(server, KINDS[tcp], local_ip, marked, sockets) as opened:
                return await talk(server, parsed, opened.sock)
    except trio.TooSlowError:
        raise DnsTimeout(f"no answer from {server} within {timeout:g} s") from None
    except trio.BrokenResourceError as error:
        raise DnsFailed(f"{server}: {reason_of(error.__cause__ or error)}") from None
    except OSError as error:
        raise DnsFailed(f"{server}: {reason_of(error)}") from None


def reason_of(error: BaseException) -> str:
    """The kernel's own words for an error."""
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)


class Frames:
    """DNS messages on a TCP stream: two bytes of length, then the message (RFC 1035 §4.2.2)."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream, self._buffer = stream, bytearray()

    async def send(self, message: bytes) -> None:
        """One message of at most 65,535 bytes."""
        await self._stream.send_all(len(message).to_bytes(2, "big") + message)

    async def receive(self) -> bytes | None:
        """The next message; None at the end of the stream. No more than one message is ever buffered."""
        while len(self._buffer) < 2 or len(self._buffer) < self._wanted():
            missing = 2 - len(self._buffer) if len(self._buffer) < 2 else self._wanted() - len(self._buffer)
            data = await self._stream.receive_some(missing)
            if not data:
                return None
            self._buffer += data
        message = bytes(self._buffer[2:])
        self._buffer.clear()
        return message

    def _wanted(self) -> int:
        return 2 + int.from_bytes(self._buffer[:2], "big")


class QuerySocket:
    """A non-blocking socket towards one server, closed on the way out."""

    def __init__(
        self,
        server: Address,
        kind: int,
        local_ip: bytes | None = None,
        marked: bool = True,
        sockets: SocketFactory | None = None,
    ) -> None:
        if sockets is not None and local_ip is None:
            self.sock = sockets.open_query(server, kind, marked=marked)
            return
        self.sock = open_socket(server, kind, MARK if marked else None)
        try:
            if local_ip is not None:
                self._report_all_icmp()
                self.sock.bind((Address(local_ip, 0).host, 0))
            if kind == socket.SOCK_DGRAM:
                self.sock.connect((server.host, server.port))
        except BaseException:
            self.sock.close()
            raise

    def _report_all_icmp(self) -> None:
        """Also "host unreachable", which the kernel otherwise thinks may pass."""
        if self.sock.family == socket.AF_INET:
            self.sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        else:
            self.sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sock.close()


async def _over_udp(server: Address, query: Query, sock: socket.socket) -> bytes:
    sock.send(query.data)
    while True:
        await trio.lowlevel.wait_readable(sock)
        try:
            reply = sock.recv(MAX_MESSAGE)
        except BlockingIOError:  # a datagram with a wrong checksum woke us
            continue
        if is_reply_to(query, reply):
            return reply


async def _over_tcp(server: Address, query: Query, sock: socket.socket) -> bytes:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream = trio.socket.from_stdlib_socket(sock)
    await stream.connect((server.host, server.port))
    frames = Frames(trio.SocketStream(stream))
    await frames.send(query.data)
    while True:
        reply = await frames.receive()
        if reply is None:
            raise DnsFailed(f"{server}: the connection was closed without an answer")
        if is_reply_to(query, reply):
            return reply
