"""What the silence of a peer means, as it lasts: for the owner to be told, and for the path to be doubted.

Not here: the choice of a path (the agents), and what is done about a silence (`node.py`). Without ICE the path agent
minds data by itself; then only silences that it reports are followed here. Source: `spec/connectivity.md` §6.5, §8.
"""

from __future__ import annotations

from typing import Protocol

from fz_core.node.transport import Unheard

# Data without any answer for so long is a reason to check the path, which a live peer answers at once.
UNANSWERED = 0.5
# From a silent path to telling the peer, then again after ever longer gaps.
STILL_SILENT_FIRST, STILL_SILENT_NEXT, STILL_SILENT_MOST = 0.5, 4.0, 60.0
# A peer whose answer to a handshake does not come within this, over a path that answers checks, will not let go.
STUCK = 3.0
# So long may data go unanswered on a path that answers checks before the peer has to prove, by a handshake, that it
# sends to where we are; a stream in one direction has it do so this often at most.
MUTE = 3.0
PROOF_INTERVAL = 10.0
# A connection in the making that has no path by then is worth asking the portal again, which tells the peer again.
SLOW_FIRST = 2.5


class Watched(Protocol):
    """What is asked of the connection."""

    @property
    def has_path(self) -> bool: ...

    @property
    def has_live_path(self) -> bool: ...

    @property
    def is_resting(self) -> bool: ...

    @property
    def may_be_mute(self) -> bool: ...

    def check_path(self, unheard_since: float, now: float) -> None: ...

    def ask_for_proof(self, now: float) -> bool: ...


class PathWatch:
    """The silence of one peer. The owner reads the flags after each call, and takes them back."""

    def __init__(self, now: float, slow_at: float | None) -> None:
        self.is_silenced = False
        self.has_lasting_silence = False
        self.is_stuck = False
        self.is_slow = False
        self.heard_at = now  # data, not handshakes: those may come in while answers go nowhere
        self.unheard = Unheard()
        self.mute = Unheard()  # as `unheard`, but checks do not count
        self._silent_at = now
        self._silent_gap = STILL_SILENT_NEXT
        self._still_silent_at: float | None = None
        self._proof_asked_at = now - PROOF_INTERVAL
        self._stuck_at: float | None = None
        self._slow_at = slow_at

    def note_sent(self, now: float) -> None:
        """An IP packet leaves."""
        if self.unheard.since is None:
            self.unheard.note_sent(now)
            self.mute.note_sent(now)

    def note_carried(self, first: float | None, last: float) -> None:
        """Packets left elsewhere, of which all from `first` on is unheard by what is known there."""
        is_first = self.unheard.since is None
        self.unheard.note_carried(first, last)
        if is_first or self.mute.since is not None:
            self.mute.note_carried(first, last)

    def note_heard(self, at: float) -> None:
        """The peer is there."""
        self.heard_at = max(self.heard_at, at)

    def note_answered(self, at: float) -> None:
        """Data came, and so nothing sent before that is unheard."""
        self.note_heard(at)
        self.unheard.clear(at)
        self.mute.clear(at)

    def note_path_silent(self, now: float) -> None:
        """The path in use gives no answers to checks."""
        self.is_silenced, self._silent_at = True, now
        self._silent_gap, self._still_silent_at = STILL_SILENT_NEXT, now + STILL_SILENT_FIRST

    def note_all_silent(self, now: float) -> None:
        """No path at all gives answers, and data is sent."""
        if self._still_silent_at is None:
            self.note_path_silent(now)
        self.is_silenced = True

    def handle_timeout(self, connection: Watched, now: float) -> None:
        """Run every timer that is due."""
        unheard_since = self.unheard.since
        if unheard_since is not None and now >= unheard_since + UNANSWERED:
            connection.check_path(unheard_since, now)
            self.unheard.clear(now)
        if self._still_silent_at is not None and now >= self._still_silent_at:
            self._still_silent_at = None
            if self.heard_at <= self._silent_at and not connection.is_resting:
                self.has_lasting_silence = True
                self._ask_for_proof(connection, now)
                self._still_silent_at = now + self._silent_gap
                self._silent_gap = min(self._silent_gap * 2, STILL_SILENT_MOST)
        mute_at = self._mute_at(connection)
        if mute_at is not None and now >= mute_at:
            self._silent_at = now
            self.mute.clear(now)
            self._silent_gap, self._still_silent_at = STILL_SILENT_NEXT, now + STUCK / 2
            self._ask_for_proof(connection, now)
        if self._stuck_at is not None and now >= self._stuck_at:
            self._stuck_at = None
            self.is_stuck = self.heard_at <= self._silent_at and connection.has_live_path
        if self._slow_at is not None and now >= self._slow_at:
            self.is_slow = not connection.has_path
            self._slow_at = now + SLOW_FIRST if self.is_slow else None

    def poll_timeout(self, connection: Watched) -> float | None:
        """When `handle_timeout` is next due."""
        due = (
            None if self.unheard.since is None else self.unheard.since + UNANSWERED,
            self._still_silent_at,
            self._slow_at,
            self._mute_at(connection),
            self._stuck_at,
        )
        return min((at for at in due if at is not None), default=None)

    def _mute_at(self, connection: Watched) -> float | None:
        """When the peer will have answered no data for too long."""
        if self.mute.since is None or not connection.may_be_mute:
            return None
        return max(self.mute.since + MUTE, self._proof_asked_at + PROOF_INTERVAL)

    def _ask_for_proof(self, connection: Watched, now: float) -> None:
        """The answer to a handshake takes the path that the peer believes in."""
        if connection.ask_for_proof(now):
            self._proof_asked_at = now
            if self._stuck_at is None:
                self._stuck_at = now + STUCK
