"""Where handshake messages go before a path is known, and what happens to their copies.

Sources: `spec/connectivity.md` §7.2.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from fz_core.node.path_pair import Key

INIT_LADDER = (0.05, 0.05, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
RESPONSE_TTL = 10.0


class FanOut:
    """The first init, on its way to every relayed pair at once.

    Relays drop what arrives before both ends have bound a channel, hence the quick repeats: once per pair. Later
    inits go to each pair once, as WireGuard's own repeats drive them.
    """

    def __init__(self, init: bytes) -> None:
        self.init = init
        self._reached: set[Key] = set()
        self._ladders: dict[Key, tuple[int, float]] = {}

    def replace(self, init: bytes) -> None:
        """WireGuard gave up on the last one."""
        self.init = init
        self._reached.clear()

    def take_due(self, relayed: Iterable[Key], now: float) -> list[Key]:
        """The pairs to which the init is to be sent now."""
        due = [key for key in relayed if key not in self._reached]
        for key in due:
            self._reached.add(key)
            self._ladders.setdefault(key, (0, now + INIT_LADDER[0]))
        for key, (step, at) in list(self._ladders.items()):
            if step < len(INIT_LADDER) and now >= at:
                following = INIT_LADDER[step + 1] if step + 1 < len(INIT_LADDER) else 0.0
                self._ladders[key] = (step + 1, now + following)
                due.append(key)
        return due

    def keep(self, keys: Container[Key]) -> None:
        """All other pairs are gone."""
        self._reached = {key for key in self._reached if key in keys}
        self._ladders = {key: ladder for key, ladder in self._ladders.items() if key in keys}

    def poll_timeout(self) -> float | None:
        """When a repeat is due."""
        return min((at for step, at in self._ladders.values() if step < len(INIT_LADDER)), default=None)


class Copies:
    """Remembers the last handshake messages, since their copies arrive on several paths."""

    def __init__(self) -> None:
        self._init = b""
        self._response = b""
        self._accepted_at = 0.0
        self._taken_response = b""

    def note_init(self, init: bytes, response: bytes, now: float) -> None:
        """WireGuard accepted this init and answered so."""
        self._init, self._response, self._accepted_at = init, response, now

    def note_response(self, response: bytes) -> None:
        """WireGuard accepted this response."""
        self._taken_response = response

    def answer(self, datagram: bytes, now: float) -> bytes | None:
        """None: not a copy. Otherwise what to send back where it came from, which may be nothing."""
        if datagram == self._init:
            return self._response if now - self._accepted_at < RESPONSE_TTL else b""
        return b"" if datagram == self._taken_response else None
