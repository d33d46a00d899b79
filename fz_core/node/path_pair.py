"""One pair of addresses that may become the path: its probes, its round trip, its rank.

Sources: `spec/connectivity.md` §7.3 (budget, outstanding), §7.4 (schedule, ranking).
"""

from __future__ import annotations

from fz_core.ice import CandidateKind, Nominated
from fz_core.node.path_score import Bucket, Kinds, bucket_of
from fz_core.packet import Address

PROBE_BURST_GAPS = (0.2, 0.3, 0.5)
PROBE_INTERVAL = 1.0
PROBE_BUDGET = 12
PRIMARY_KEEPALIVE = 25.0
# How many probes a pair sends when it is only asked whether it still works.
SHORT_BUDGET = 4

Key = tuple[Address, Address]


class Pair:
    """What we send from, where to, and what its probes told so far."""

    def __init__(self, key: Key, id: int) -> None:
        self.key = key
        self.id = id
        self.local_kind = CandidateKind.HOST
        self.remote_kind = CandidateKind.HOST
        self.bucket: Bucket = (0, 0, False, False, False)
        self.rtt: float | None = None
        self.answered_at = float("-inf")
        self.is_dead = False
        self.next_at: float | None = None
        self.sent = 0
        self._step = 0
        self._seq = 0
        self._outstanding: dict[int, float] = {}

    def rank(self, kinds: Kinds) -> None:
        """Set what its ends are."""
        self.local_kind, self.remote_kind, _ = kinds
        self.bucket = bucket_of(self.key[0], kinds)

    @property
    def nominated(self) -> Nominated:
        """The event that makes it the path."""
        return Nominated(*self.key, self.local_kind, self.remote_kind)

    @property
    def is_relayed(self) -> bool:
        """Whether a relay is on at least one end."""
        return CandidateKind.RELAY in (self.local_kind, self.remote_kind)

    @property
    def is_discovering(self) -> bool:
        """Whether it still has probes of its budget to send."""
        return self.next_at is not None and self.sent < PROBE_BUDGET

    @property
    def outstanding(self) -> int:
        """How many probes may still be answered."""
        return len(self._outstanding)

    @property
    def score(self) -> tuple[Bucket, float]:
        """Smaller is better."""
        return self.bucket, float("inf") if self.rtt is None else self.rtt

    def restart(self, now: float) -> None:
        """Forget what was measured and probe anew. Answers to earlier probes no longer count."""
        self.rtt = None
        self.sent = self._step = 0
        self.next_at = now
        self._outstanding.clear()

    def poke(self, now: float) -> None:
        """Ask whether the path works at this moment, without forgetting anything."""
        if not self.is_discovering:
            self.sent = PROBE_BUDGET - SHORT_BUDGET
            self._step = 0
            self.next_at = now

    def grant(self) -> None:
        """A few more probes for a pair that spent its budget while there was no primary."""
        if self.sent >= PROBE_BUDGET:
            self.sent = PROBE_BUDGET - SHORT_BUDGET

    def fire(self, now: float) -> int:
        """Note that a probe leaves now; its seq."""
        seq = self._seq
        self._seq = seq + 1 & 0xFFFF
        self._outstanding[seq] = now
        if len(self._outstanding) > PROBE_BUDGET:
            del self._outstanding[next(iter(self._outstanding))]
        return seq

    def schedule(self, now: float, is_primary: bool, is_hunting: bool) -> None:
        """After a scheduled probe: when is the next one, if any?"""
        self.sent += 1
        if is_hunting or self.sent < PROBE_BUDGET:
            step = self._step
            self._step = step + 1
            self.next_at = now + (PROBE_BURST_GAPS[step] if step < len(PROBE_BURST_GAPS) else PROBE_INTERVAL)
        else:
            self.next_at = now + PRIMARY_KEEPALIVE if is_primary else None

    def take_answer(self, seq: int, now: float) -> bool:
        """Whether this answers an outstanding probe; if so it is measured."""
        sent_at = self._outstanding.pop(seq, None)
        if sent_at is None:
            return False
        rtt = now - sent_at
        self.rtt = rtt if self.rtt is None else (self.rtt + rtt) / 2
        self.answered_at = now
        self.is_dead = False
        return True
