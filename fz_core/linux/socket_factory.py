"""One maker of UDP sockets for a whole tunnel: all marked, all with one view of the kernel's routes.

    sockets = SocketFactory()
    data = sockets.bind_data(52625)             # one per family this host has; relays and peers share them
    query = sockets.open_query(server, SOCK_DGRAM)
    sockets.reset()                             # the network changed

What the routes are for: a query's socket is bound to the source its server will see, so a query to a server
no route leads to fails at once; and a network change matters if the source towards the portal or a relay
changed (`driver/roaming.py`). Data sockets are bound to the wildcard and take no source from here: those
towards relays leave it to the kernel (spec/io.md 3.8), those towards peers get it from the path.
"""

from __future__ import annotations

import errno
import os
import socket

from fz_core.linux.marks import MARK, MarkError, set_mark
from fz_core.linux.route_cache import RouteCache
from fz_core.linux.udp import UdpSocket
from fz_core.packet import Address

STALE = (errno.EADDRNOTAVAIL, errno.EINVAL)


class SocketFactory:
    """Makes sockets; `routes` is what they share."""

    def __init__(self, mark: int | None = MARK, routes: RouteCache | None = None) -> None:
        self._mark = mark
        self.routes = RouteCache() if routes is None else routes

    def bind_data(self, port: int) -> tuple[list[UdpSocket], list[OSError]]:
        """A socket for each family this host has, and why the others are missing. MarkError is raised."""
        sockets: list[UdpSocket] = []
        errors: list[OSError] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                sockets.append(UdpSocket.bind(family, port, self._mark))
            except OSError as error:
                errors.append(OSError(error.errno, f"no UDP socket for {family.name}: {error.strerror}"))
            except MarkError:
                for opened in sockets:
                    opened.close()
                raise
        return sockets, errors

    def open_query(self, server: Address, kind: int, *, marked: bool = True) -> socket.socket:
        """A non-blocking socket of its own source port towards one server; UDP is connected.

        OSError without a route. `marked` False leaves the mark off, for hosts without routes into the tunnel.
        """
        mark = self._mark if marked else None
        try:
            return _open_query(server, kind, mark, self._source_of(server))
        except OSError as error:
            if error.errno not in STALE:
                raise
        self.routes.forget(server.ip)  # the address is gone, and nobody has told us yet
        return _open_query(server, kind, mark, self._source_of(server))

    def reset(self) -> None:
        """Forget every route."""
        self.routes.reset()

    def _source_of(self, server: Address) -> bytes:
        source = self.routes.source_of(server.ip)
        if source is None:
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        return source


def open_socket(server: Address, kind: int, mark: int | None = MARK) -> socket.socket:
    """A non-blocking socket of the server's family, marked before it can send anything."""
    family = socket.AF_INET if server.is_ipv4 else socket.AF_INET6
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if mark is not None:
            set_mark(sock, mark)
    except BaseException:
        sock.close()
        raise
    return sock


def _open_query(server: Address, kind: int, mark: int | None, source: bytes) -> socket.socket:
    sock = open_socket(server, kind, mark)
    try:
        sock.bind((Address(source, 0).host, 0))
        if kind == socket.SOCK_DGRAM:
            sock.connect((server.host, server.port))
    except BaseException:
        sock.close()
        raise
    return sock
