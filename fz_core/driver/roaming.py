"""Whether a change of the host's network concerns us: the source addresses towards portal and relays decide.

The kernel tells of every change (netlink); then the sources are asked anew and compared. Marked look-ups do
not see our own device, so it never counts; a second link counts only if it takes over. The pure part is
`RouteWatch`, the waiting part `follow_routes`. Source: `spec/io.md` §10.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Container, Iterable, Mapping
from enum import Enum

import trio

from fz_core.driver import clock
from fz_core.linux import NetworkMonitor, RouteCache

QUIET = 0.2
LONGEST_SETTLING = 1.0
LOSS_PATIENCE = 2.0
FORGOTTEN_AFTER = 10.0
# some address of the internet for each family (root servers): nothing is sent there
ANYWHERE = (bytes([198, 41, 0, 4]), bytes.fromhex("20010503ba3e00000000000000020030"))

Sources = Mapping[bytes, bytes | None]


class Change(Enum):
    """What became of the sources; the value is the reason that is logged."""

    NONE = "nothing changed"
    GAINED = "more of the network can be reached"
    LOST = "a source address is gone"
    MOVED = "a source address changed"
    GONE = "no network"
    BACK = "the network is back"
    BACK_LATE = "the network was away for long"


RESETS = frozenset((Change.MOVED, Change.LOST, Change.BACK_LATE))


class RouteWatch:
    """Compares the sources towards `targets()` now with those of last time.

    A network that comes back as it was is no reason to start over, unless it was away for so long
    (FORGOTTEN_AFTER) that peers and NATs have given us up.
    """

    def __init__(
        self,
        routes: RouteCache,
        targets: Callable[[], Iterable[bytes]],
        own_ips: Callable[[], Iterable[bytes]] = lambda: (),
    ) -> None:
        self._routes, self._targets, self._own_ips = routes, targets, own_ips
        self._known: dict[bytes, bytes | None] = {}
        self._gone_since: float | None = None

    def learn(self, now: float) -> None:
        """Take what is now as the state of things: at the start, and with a reset."""
        self._known = self._look()
        if any(self._known.values()):
            self._gone_since = None
        elif self._gone_since is None:
            self._gone_since = now

    def note_targets(self) -> None:
        """There may be new targets: remember their sources."""
        known = self._known
        known.update((target, source) for target, source in self._look().items() if target not in known)

    def judge(self, now: float) -> Change:
        """What happened since last time. A loss stays pending until `learn`, or until it is made good."""
        self._routes.reset()
        found = self._look()
        change = compare(self._known, found)
        if not any(found.values()):
            self._gone_since = now if self._gone_since is None else self._gone_since
            return Change.GONE if change is not Change.NONE else Change.NONE
        if change is Change.LOST:
            return change
        gone_since, self._gone_since = self._gone_since, None
        self._known = found
        if change is Change.MOVED:
            return change
        if gone_since is None:
            return change
        return Change.BACK if now - gone_since < FORGOTTEN_AFTER else Change.BACK_LATE

    def _look(self) -> dict[bytes, bytes | None]:
        own = set(self._own_ips())
        sources = self._routes.sources_of((*ANYWHERE, *self._targets()))
        return {t: source if source is not None and is_of_use(source, own) else None for t, source in sources.items()}


def is_of_use(source: bytes, own: Container[bytes]) -> bool:
    """The kernel may fall back to an address that nobody out there can answer."""
    ip = ipaddress.ip_address(source)
    return source not in own and not ip.is_link_local and not ip.is_loopback


def compare(before: Sources, after: Sources) -> Change:
    """Of the targets in both, the worst of what happened to one."""
    pairs = [(source, after[target]) for target, source in before.items() if target in after]
    if any(old is not None and new is not None and old != new for old, new in pairs):
        return Change.MOVED
    if any(old is not None and new is None for old, new in pairs):
        return Change.LOST
    return Change.GAINED if any(old != new for old, new in pairs) else Change.NONE


async def follow_routes(watch: RouteWatch, on_change: Callable[[Change], None]) -> None:
    """Report what matters, once each, until cancelled: GAINED, BACK, and the RESETS. Silence means: wait."""
    monitor = NetworkMonitor()
    try:
        watch.learn(clock.now())
        while True:
            await trio.lowlevel.wait_readable(monitor.fileno())
            await _settle(monitor)
            change = watch.judge(clock.now())
            if change is Change.LOST:  # IPv6 addresses come back seconds after the link
                with trio.move_on_after(LOSS_PATIENCE):
                    while change is Change.LOST:
                        await trio.lowlevel.wait_readable(monitor.fileno())
                        await _settle(monitor)
                        change = watch.judge(clock.now())
                change = watch.judge(clock.now()) if change is Change.LOST else change
            if change in RESETS:
                watch.learn(clock.now())
            if change not in (Change.NONE, Change.GONE):
                on_change(change)
    finally:
        monitor.close()


async def _settle(monitor: NetworkMonitor) -> None:
    """Changes come in bursts."""
    with trio.move_on_after(LONGEST_SETTLING):
        while monitor.drain():
            await trio.sleep(QUIET)
