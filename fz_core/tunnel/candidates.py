"""ICE candidates on their way to the portal, held back while it is away (`spec/connectivity.md` §4.5)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class CandidateBatch(NamedTuple):
    """What to tell one peer: candidate lines to add and to withdraw, highest priority first."""

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
        """Everything held, one batch per peer, removals after additions."""
        for peer_id in dict.fromkeys([*self._added, *self._removed]):
            added = _sorted(self._added.pop(peer_id, set()))
            removed = _sorted(self._removed.pop(peer_id, set()))
            if added or removed:
                yield CandidateBatch(peer_id, added, removed)


def _sorted(lines: set[str]) -> tuple[str, ...]:
    return tuple(sorted(lines, key=lambda line: (-int(line.split()[3]), line)))
