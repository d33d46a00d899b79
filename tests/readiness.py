"""Waiting for sockets and devices, whatever the number of their descriptors; `select` takes only those below 1024."""

from __future__ import annotations

import select
from typing import Protocol, TypeVar


class Source(Protocol):
    """A socket, a device or a watch."""

    def fileno(self) -> int: ...


S = TypeVar("S", bound=Source)


def readable(*sources: S, within: float = 10.0) -> list[S]:
    """Those with something to read, an error or an end, as soon as there is one; none after `within` seconds."""
    return _ready(sources, select.POLLIN, within)


def writable(*sources: S, within: float = 10.0) -> list[S]:
    """Those that take something, as soon as one does; none after `within` seconds."""
    return _ready(sources, select.POLLOUT, within)


def _ready(sources: tuple[S, ...], events: int, within: float) -> list[S]:
    poll = select.poll()
    for source in sources:
        poll.register(source.fileno(), events)
    ready = {fd for fd, _ in poll.poll(within * 1000)}
    return [source for source in sources if source.fileno() in ready]
