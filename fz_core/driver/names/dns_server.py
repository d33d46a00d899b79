"""The gateway's DNS server inside the tunnel, for the questions clients cannot answer themselves (SRV, TXT).

    server = TunnelDnsServer(nameservers)
    nursery.start_soon(server.run)
    await server.serve([ipv4, ipv6])

It passes queries on, by the transport they came with, to the fastest name server of the site. Whatever goes
wrong becomes SERVFAIL. Source: `spec/tunnel.md` §17, `spec/io.md` §5.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import structlog
import trio

from fz_core.dns import Query, build_error, truncate
from fz_core.driver.names.dns_client import DNS_PORT, DnsClient, DnsFailed, Frames
from fz_core.driver.names.nameservers import Nameservers
from fz_core.linux import HostError, SocketFactory
from fz_core.packet import Address

PORT = 53535
UPSTREAM_TIMEOUT = 5.0
MAX_UDP_REPLY = 1200
UDP_BUFFER = 2000
BIND_ATTEMPTS = 3
BIND_PAUSE = 0.1
MAX_CONNECTIONS = 256
IDLE_TIMEOUT = 30.0
BACKLOG = 128
SERVFAIL = 2

log = structlog.get_logger("dns_server")


class TunnelDnsServer:
    """Serves on any set of addresses, one set at a time. `run` must run beside `serve`."""

    def __init__(
        self,
        nameservers: Nameservers,
        *,
        upstream_port: int = DNS_PORT,
        marked: bool = True,
        sockets: SocketFactory | None = None,
    ) -> None:
        self._nameservers, self._upstream_port, self._marked = nameservers, upstream_port, marked
        self._client = DnsClient(sockets=sockets)
        self._nursery: trio.Nursery | None = None
        self._addresses: tuple[Address, ...] = ()
        self._serving = trio.CancelScope()
        self._ended = trio.Event()
        self._ended.set()
        self._connections = 0

    async def run(self) -> None:
        """Answer queries until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                await trio.sleep_forever()
        finally:
            self._nursery = None

    async def serve(self, ips: Sequence[bytes], port: int = PORT) -> None:
        """Serve on these addresses, and no longer on others. HostError, and no socket left, if one is refused."""
        await trio.lowlevel.checkpoint()  # whoever is being cancelled comes no further: `run` may have ended
        if self._nursery is None:
            raise RuntimeError("the server must run before it can serve")
        addresses = tuple(Address(ip, port) for ip in ips)
        if addresses == self._addresses:
            return
        self._addresses = ()
        self._serving.cancel()
        await self._ended.wait()
        sockets = await _bind_patiently(addresses)
        self._addresses, self._serving, self._ended = addresses, trio.CancelScope(), trio.Event()
        self._nursery.start_soon(self._serve_all, sockets, self._serving, self._ended)

    async def _serve_all(self, sockets: Sequence[socket.socket], scope: trio.CancelScope, ended: trio.Event) -> None:
        """Until cancelled; all sockets are closed then."""
        with ExitStack() as stack:
            stack.callback(ended.set)
            for sock in sockets:
                stack.enter_context(sock)
            with scope:
                async with trio.open_nursery() as nursery:
                    for sock in sockets:
                        is_udp = sock.type == socket.SOCK_DGRAM
                        nursery.start_soon(self._serve_udp if is_udp else self._serve_tcp, sock, nursery)

    async def _serve_udp(self, sock: socket.socket, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                data, asker = sock.recvfrom(UDP_BUFFER)
            except BlockingIOError:
                continue
            except OSError as error:
                await _pause(error)
                continue
            query = Query.parse_untrusted(data)
            if query is not None and self._client.in_flight < self._client.limit:
                nursery.start_soon(self._answer_by_udp, sock, asker, query)

    async def _answer_by_udp(self, sock: socket.socket, asker: Any, query: Query) -> None:
        reply = await self._forward(query, tcp=False)
        with suppress(OSError):  # a full buffer too: the asker will ask again
            sock.sendto(truncate(reply, MAX_UDP_REPLY), asker)

    async def _serve_tcp(self, sock: socket.socket, nursery: trio.Nursery) -> None:
        listener = trio.socket.from_stdlib_socket(sock)
        while True:
            try:
                accepted, _ = await listener.accept()
            except OSError as error:
                await _pause(error)
                continue
            nursery.start_soon(self._serve_connection, trio.SocketStream(accepted))

    async def _serve_connection(self, stream: trio.SocketStream) -> None:
        """One query at a time, as many as the client likes."""
        self._connections += 1
        try:
            if self._connections <= MAX_CONNECTIONS:
                await self._talk(Frames(stream))
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass
        finally:
            self._connections -= 1
            await trio.aclose_forcefully(stream)

    async def _talk(self, frames: Frames) -> None:
        while True:
            with trio.fail_after(IDLE_TIMEOUT):
                data = await frames.receive()
            query = None if data is None else Query.parse_untrusted(data)
            if query is None:
                return
            reply = await self._forward(query, tcp=True)
            with trio.fail_after(IDLE_TIMEOUT):
                await frames.send(reply)

    async def _forward(self, query: Query, *, tcp: bool) -> bytes:
        fastest = self._nameservers.fastest
        if fastest is None:
            log.debug("No name server is known")
            return build_error(query, SERVFAIL)
        server = Address(fastest, self._upstream_port)
        try:
            return await self._client.exchange(
                server, query.data, tcp=tcp, timeout=UPSTREAM_TIMEOUT, marked=self._marked
            )
        except DnsFailed as error:
            log.debug("Query failed", error=str(error))
            return build_error(query, SERVFAIL)


async def _bind_patiently(addresses: Sequence[Address]) -> list[socket.socket]:
    """Addresses that were set just now may need a moment."""
    for _ in range(BIND_ATTEMPTS - 1):
        with suppress(HostError):
            return _bind_all(addresses)
        await trio.sleep(BIND_PAUSE)
    return _bind_all(addresses)


def _bind_all(addresses: Sequence[Address]) -> list[socket.socket]:
    """UDP and TCP on every address, or nothing and a HostError that names all refusals."""
    sockets: list[socket.socket] = []
    errors: list[str] = []
    for address in addresses:
        for kind, name in ((socket.SOCK_DGRAM, "UDP"), (socket.SOCK_STREAM, "TCP")):
            try:
                sockets.append(_bind(address, kind))
            except OSError as error:
                errors.append(f"{name} {address}: {error.strerror}")
    if errors:
        for sock in sockets:
            sock.close()
        raise HostError(f"cannot serve DNS in the tunnel ({'; '.join(errors)}): free the port")
    return sockets


def _bind(address: Address, kind: int) -> socket.socket:
    family = socket.AF_INET if address.is_ipv4 else socket.AF_INET6
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address.host, address.port))
        if kind == socket.SOCK_STREAM:
            sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


async def _pause(error: OSError) -> None:
    """Errors of single datagrams and connections pass; a lack of descriptors must not make us spin."""
    log.debug("Cannot receive", error=error.strerror)
    await trio.sleep(BIND_PAUSE)
