"""One candidate pair and its checks: what was sent, what is unanswered, when the next is due."""

from __future__ import annotations

from collections import deque

from fz_core.ice.candidate import Candidate
from fz_core.ice.timing import TimingProfile

# A peer whose requests still arrive is not given up (spec/connectivity.md section 5.4).
RECENT_REQUEST_GRACE = 15.0
NEVER = float("-inf")


class Pair:
    """State of one pair. Deadlines are absolute."""

    def __init__(self, local: Candidate, remote: Candidate, now: float) -> None:
        self.local = local
        self.remote = remote
        self.priority = 0
        self.has_succeeded = False
        self.is_nominated = False  # by us, controlling: every further check says USE-CANDIDATE
        self.is_chosen_by_peer = False  # USE-CANDIDATE received, controlled
        self.next_check_at = now
        self.triggered_at = NEVER
        self.transaction_ids: deque[bytes] = deque()
        self._attempts = 0
        self._unanswered: list[float] = []
        self._sent_at = NEVER
        self._request_at = NEVER

    def rank(self, controlling: bool) -> None:
        """Pair priority, RFC 8445 section 6.1.2.3."""
        ours, theirs = self.local.priority, self.remote.priority
        g, d = (ours, theirs) if controlling else (theirs, ours)
        self.priority = (min(g, d) << 32) + 2 * max(g, d) + (1 if g > d else 0)

    def note_check(self, profile: TimingProfile, now: float) -> None:
        """A check leaves now; the next is due after a delay that restarts small when an outage begins."""
        self._attempts = min(self._attempts + 1, profile.max_retrans)
        if len(self._unanswered) >= profile.max_retrans:
            del self._unanswered[0]
        self._unanswered.append(now)
        self._sent_at = now
        self.next_check_at = now + self._delay(profile)

    def _delay(self, profile: TimingProfile) -> float:
        attempts = self._attempts
        if self._unanswered and self._sent_at - self._unanswered[0] > profile.max_rto / 2:
            attempts = len(self._unanswered)
        return profile.delay_after(attempts)

    def note_answer(self, sent_at: float) -> None:
        """The check sent then was answered, which settles those before it."""
        self._unanswered = [at for at in self._unanswered if at > sent_at]
        self.has_succeeded = True

    def note_request(self, now: float) -> None:
        """The peer checks this pair."""
        self._request_at = now

    def note_triggered(self, now: float) -> None:
        """Check again from the start: the peer is alive, and our way out may have just opened."""
        self.triggered_at = now
        self._attempts = 0
        self._unanswered.clear()

    def note_nominated(self) -> None:
        """USE-CANDIDATE follows at once; should it be lost, it is repeated soon."""
        self.is_nominated = True
        self._attempts = 0

    @property
    def is_doubtful(self) -> bool:
        """Whether our checks are unconfirmed at present."""
        return not self.has_succeeded or len(self._unanswered) >= 2

    def has_failed(self, profile: TimingProfile, now: float) -> bool:
        """Whether to give the pair up, once its next check is due."""
        if len(self._unanswered) < profile.max_retrans:
            return False
        return now >= self.next_check_at and now >= self._request_at + RECENT_REQUEST_GRACE

    def adopt(self, profile: TimingProfile, now: float) -> None:
        """Go on under another profile: sooner if it is faster, and never failed by the change itself."""
        if len(self._unanswered) >= profile.max_retrans:
            del self._unanswered[: len(self._unanswered) - profile.max_retrans + 1]
        self._attempts = min(self._attempts, profile.max_retrans)
        self.next_check_at = min(self.next_check_at, max(now, self._sent_at + self._delay(profile)))
