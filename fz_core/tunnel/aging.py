"""Things that lapse a fixed time after their last use, kept in the order of that use.

One dict access per use, nothing is ever scanned. Time must not run backwards.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)


class Use(NamedTuple, Generic[K]):
    """A key and when it was used last."""

    key: K
    at: float


class Aging(Generic[K]):
    """Keys that lapse `ttl` seconds after their last use; a lapse at exactly `now` has happened."""

    __slots__ = ("_used_at", "ttl")

    def __init__(self, ttl: float) -> None:
        self.ttl = ttl
        self._used_at: OrderedDict[K, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._used_at)

    def __contains__(self, key: K) -> bool:
        return key in self._used_at

    def touch(self, key: K, now: float) -> None:
        """Note a use; an unknown key becomes known."""
        self._used_at[key] = now
        self._used_at.move_to_end(key)

    def note(self, key: K, at: float) -> None:
        """Hear of a use a little later; of an unknown key nothing is noted.

        Where other keys were used since, it counts as of then, so that the order stays that of the times.
        """
        used_at = self._used_at.get(key)
        if used_at is None:
            return
        newest = self._used_at[next(reversed(self._used_at))]
        if at > used_at or at == newest:
            self.touch(key, max(at, newest))

    def remove(self, key: K) -> bool:
        """Forget a key; whether it was known."""
        return self._used_at.pop(key, None) is not None

    def is_live(self, key: K, now: float) -> bool:
        """Whether the key is known and has not lapsed, swept or not."""
        used_at = self._used_at.get(key)
        return used_at is not None and used_at + self.ttl > now

    @property
    def oldest(self) -> Use[K] | None:
        """The key unused for longest."""
        for key, at in self._used_at.items():
            return Use(key, at)
        return None

    @property
    def deadline(self) -> float | None:
        """When the next key lapses."""
        oldest = self.oldest
        return None if oldest is None else oldest.at + self.ttl

    def sweep(self, now: float) -> list[K]:
        """Take out everything that has lapsed, oldest first."""
        lapsed = []
        for key, at in self._used_at.items():
            if at + self.ttl > now:
                break
            lapsed.append(key)
        for key in lapsed:
            del self._used_at[key]
        return lapsed

    def clear(self) -> None:
        """Forget everything."""
        self._used_at.clear()


def earliest(*queues: Aging[K]) -> float | None:
    """When the first key of any of them lapses."""
    return min((d for d in (queue.deadline for queue in queues) if d is not None), default=None)


def longest_unused(*queues: Aging[K]) -> Aging[K] | None:
    """The queue that holds the key unused for longest."""
    uses = [(oldest.at, n) for n, oldest in enumerate(queue.oldest for queue in queues) if oldest is not None]
    return queues[min(uses)[1]] if uses else None
