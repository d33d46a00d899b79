"""Destination → the source address the kernel would send from, remembered until the network changes.

A look-up connects a marked UDP socket, which sends nothing, so routes into our own tunnel do not count.
Stable IPv6 addresses are preferred, as by the data sockets: temporary ones come and go unnoticed.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from contextlib import suppress

from fz_core.linux.marks import MARK, set_mark

MAX_DESTINATIONS = 4096
IPV6_ADDR_PREFERENCES, IPV6_PREFER_SRC_PUBLIC = 72, 2
ANY_PORT = 9  # connecting needs one; nothing is sent


class RouteCache:
    """`source_of(ip)`, packed; None where no route leads. That is asked again each time: it may end any moment."""

    def __init__(self, look_up: Callable[[bytes], bytes | None] | None = None, limit: int = MAX_DESTINATIONS) -> None:
        self._look_up, self._limit = look_up or look_up_source, limit
        self._sources: dict[bytes, bytes] = {}
        self.lookups = 0

    def __len__(self) -> int:
        return len(self._sources)

    def source_of(self, destination: bytes) -> bytes | None:
        """From the cache, else from the kernel."""
        source = self._sources.get(destination)
        if source is not None:
            return source
        self.lookups += 1
        source = self._look_up(destination)
        if source is not None:
            if len(self._sources) >= self._limit:
                self._sources.pop(next(iter(self._sources)))
            self._sources[destination] = source
        return source

    def sources_of(self, destinations: Iterable[bytes]) -> dict[bytes, bytes | None]:
        """Several at once."""
        return {destination: self.source_of(destination) for destination in destinations}

    def forget(self, destination: bytes) -> None:
        """One answer proved wrong."""
        self._sources.pop(destination, None)

    def reset(self) -> None:
        """The network changed: ask the kernel anew."""
        self._sources.clear()


def look_up_source(destination: bytes, mark: int | None = MARK) -> bytes | None:
    """Ask the kernel. MarkError where sockets cannot be marked."""
    family = socket.AF_INET if len(destination) == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            if mark is not None:
                set_mark(sock, mark)
            if family == socket.AF_INET6:
                with suppress(OSError):
                    sock.setsockopt(socket.IPPROTO_IPV6, IPV6_ADDR_PREFERENCES, IPV6_PREFER_SRC_PUBLIC)
            sock.connect((socket.inet_ntop(family, destination), ANY_PORT))
            return socket.inet_pton(family, sock.getsockname()[0].partition("%")[0])
    except OSError:
        return None
