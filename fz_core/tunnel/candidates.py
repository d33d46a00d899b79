"""ICE candidates on their way to the portal, held back while it is away (`spec/connectivity.md` §4.5).

And those on their way from it that come before the connection they are for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

EARLY_SECONDS = 10.0
EARLY_PEERS = 64
EARLY_LINES = 64


class CandidateBatch(NamedTuple):
    """What to tell one peer: candidate lines to withdraw and to add, highest priority first."""

    peer_id: str
    added: tuple[str, ...]
    removed: tuple[str, ...]


class CandidateOutbox:
    """Collects candidates per peer and releases them in batches.

    A removal cancels an addition that was not released yet.
    """

    def __init__(self) -> None:
        self._added: dict[str, set[str]] = {}
        self._removed: dict[str, set[str]] = {}

    def add(self, peer_id: str, candidate: str) -> None:
        """A local candidate appeared."""
        self._added.setdefault(peer_id, set()).add(candidate)

    def remove(self, peer_id: str, candidate: str) -> None:
        """A local candidate is gone."""
        held = self._added.get(peer_id, set())
        if candidate in held:
            held.discard(candidate)
        else:
            self._removed.setdefault(peer_id, set()).add(candidate)

    def forget(self, peer_id: str) -> None:
        """The connection ended; its peer need not hear more."""
        self._added.pop(peer_id, None)
        self._removed.pop(peer_id, None)

    def release(self) -> Iterator[CandidateBatch]:
        """Everything held, one batch per peer."""
        for peer_id in dict.fromkeys([*self._added, *self._removed]):
            added = _sorted(self._added.pop(peer_id, set()))
            removed = _sorted(self._removed.pop(peer_id, set()))
            if added or removed:
                yield CandidateBatch(peer_id, added, removed)


class EarlyCandidates:
    """A peer may be told of us, and answer, before the portal's word reaches us: its candidates wait here."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[float, list[str]]] = {}

    def add(self, peer_id: str, lines: Iterable[str], now: float) -> None:
        """Keep the latest lines of a peer we know nothing of, for 10 s."""
        self._lines = {peer: kept for peer, kept in self._lines.items() if now - kept[0] <= EARLY_SECONDS}
        if peer_id not in self._lines and len(self._lines) >= EARLY_PEERS:
            del self._lines[next(iter(self._lines))]
        _, known = self._lines.get(peer_id, (now, []))
        self._lines[peer_id] = now, [*known, *lines][-EARLY_LINES:]

    def withdraw(self, peer_id: str, lines: Iterable[str]) -> None:
        """The peer took some back: rather none than a wrong one."""
        if any(lines):
            self._lines.pop(peer_id, None)

    def take(self, peer_id: str, now: float) -> list[str]:
        """What came before the connection did."""
        at, lines = self._lines.pop(peer_id, (now, []))
        return lines if now - at <= EARLY_SECONDS else []


def _sorted(lines: set[str]) -> tuple[str, ...]:
    return tuple(sorted(lines, key=lambda line: (-int(line.split()[3]), line)))
