"""All pairs of a connection, and which of them are probed at present.

Not here: which one is the primary. Source: `spec/connectivity.md` §7.2, §7.4, §7.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fz_core.node.path_pair import PRIMARY_KEEPALIVE, PROBE_BUDGET, Key, Pair
from fz_core.node.path_score import Kinds, by_score


class PathPairs:
    """Pairs by their addresses. Without `is_probing` none has a schedule: there is no session to probe in."""

    def __init__(self) -> None:
        self.is_probing = False
        self._pairs: dict[Key, Pair] = {}
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs.values())

    def __contains__(self, key: Key) -> bool:
        return key in self._pairs

    def get(self, key: Key) -> Pair | None:
        """The pair with these addresses."""
        return self._pairs.get(key)

    @property
    def relayed(self) -> list[Key]:
        """Those with a relay on at least one end."""
        return [pair.key for pair in self if pair.is_relayed]

    def best_measured(self) -> Pair | None:
        """The best one of those that have answered since they were restarted."""
        return min((pair for pair in self if pair.rtt is not None), key=by_score, default=None)

    def match(self, wanted: Mapping[Key, Kinds], now: float) -> bool:
        """Bring the pairs in line with the candidates. Whether there are new ones."""
        for key in [key for key in self._pairs if key not in wanted]:
            del self._pairs[key]
        is_new = False
        for key, kinds in wanted.items():
            pair = self._pairs.get(key)
            if pair is None:
                is_new = True
                pair = self._pairs[key] = Pair(key, self._next_id)
                self._next_id = self._next_id + 1 & 0xFFFF
                if self.is_probing:
                    pair.restart(now)
            pair.rank(kinds)
        return is_new

    def clear(self) -> None:
        """Forget all. Ids go on, so an answer to a probe of before finds no pair."""
        self._pairs.clear()

    def start(self, now: float) -> None:
        """There is a session now."""
        self.is_probing = True
        for pair in self:
            pair.restart(now)

    def look_again(self, former: Pair | None, now: float) -> None:
        """Restart the former primary and all that do not probe by themselves."""
        for pair in self:
            if pair is former or not pair.is_discovering:
                pair.restart(now)

    def bury(self, dead: Pair, since: float, now: float) -> None:
        """Restart this one and all that have not answered since then."""
        for pair in self:
            if pair is dead or pair.answered_at < since:
                pair.restart(now)

    def ask_others(self, primary: Pair, now: float) -> None:
        """Do the others work, in case the primary does not?"""
        for pair in self:
            if pair is not primary:
                pair.poke(now)

    def settle_on(self, primary: Pair, now: float) -> None:
        """A primary is chosen: the others probe only what is left of their budgets."""
        for pair in self:
            if pair is primary:
                if pair.next_at is None:
                    pair.next_at = now + PRIMARY_KEEPALIVE
            elif pair.next_at is not None and pair.rtt is None:
                pair.grant()
            elif pair.sent >= PROBE_BUDGET:
                pair.next_at = None

    def poll_timeout(self) -> float | None:
        """When the next probe is due."""
        return min((pair.next_at for pair in self if pair.next_at is not None), default=None)
