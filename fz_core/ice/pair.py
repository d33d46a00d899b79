"""One candidate pair and its checks: what was sent, what is unanswered, when the next is due."""

from __future__ import annotations

from collections import deque

from fz_core.ice.candidate import Candidate
from fz_core.ice.timing import TimingProfile

# A peer whose requests still arrive is not given up (spec/connectivity.md section 5.4).
RECENT_REQUEST_GRACE = 15.0
NEVER = float("-inf")
# The pair in use is checked again soon when an answer is late: the gaps, in units of `patience`. After the last of
# them it counts as silent. With 20 % loss each way five checks in a row fail in 0.6 % of all cases.
LATE_GAPS = (1, 1, 1, 2)
MIN_PATIENCE = 0.15
# A silent pair that answers again is trusted after this many answers in a row.
ANSWERS_TO_TRUST = 2
# The controlled side checks by itself if the peer's checks, due every 1.5 s, stay away for so long.
UNHEARD = 3.0


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
        self.is_watched = False  # in use: a late answer is worth a second look
        self.is_silent = False  # was in use and gave no answers
        self.chosen_at: deque[float] = deque(maxlen=3)  # the last USE-CANDIDATE received
        self._srtt: float | None = None
        self._answers = 0
        self._answered = NEVER  # when the last answered check was sent
        self._attempts = 0
        self._unanswered: list[float] = []
        self._unanswered_since = now
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
        if not self._unanswered:
            self._unanswered_since = now
        elif len(self._unanswered) >= profile.max_retrans:
            del self._unanswered[0]
        self._unanswered.append(now)
        self._sent_at = now
        self.next_check_at = now + self._delay(profile)
        give_up_at = self._unanswered_since + profile.timeout
        if len(self._unanswered) >= profile.max_retrans and give_up_at > now:
            self.next_check_at = min(self.next_check_at, give_up_at)
        late = len(self._unanswered) - 1
        if self.is_watched and self.has_succeeded and late < len(LATE_GAPS):
            self.next_check_at = min(self.next_check_at, now + LATE_GAPS[late] * self.patience)

    @property
    def patience(self) -> float:
        """Seconds after which an answer is late."""
        return MIN_PATIENCE if self._srtt is None else max(MIN_PATIENCE, 1.5 * self._srtt)

    @property
    def unanswered(self) -> int:
        """Checks since the last answered one."""
        return len(self._unanswered)

    def is_unheard(self, now: float) -> bool:
        """Whether the pair in use gave no answer to a whole row of checks."""
        if not self.is_watched or not self.has_succeeded or len(self._unanswered) < len(LATE_GAPS):
            return False
        return now >= self._unanswered_since + sum(LATE_GAPS) * self.patience - 1e-6

    def was_checked_within(self, seconds: float, now: float) -> bool:
        """Whether a check left lately."""
        return now < self._sent_at + seconds

    def _delay(self, profile: TimingProfile) -> float:
        attempts = self._attempts
        if self._unanswered and self._sent_at - self._unanswered[0] > profile.max_rto / 2:
            attempts = len(self._unanswered)
        return profile.delay_after(attempts)

    def note_answer(self, sent_at: float, profile: TimingProfile, now: float) -> None:
        """The check sent then was answered, which settles those before it."""
        self._unanswered = [at for at in self._unanswered if at > sent_at]
        self._unanswered_since = self._unanswered[0] if self._unanswered else now
        self.has_succeeded = True
        rtt = now - sent_at
        self._srtt = rtt if self._srtt is None else self._srtt * 7 / 8 + rtt / 8
        self._answers += 1
        self._answered = max(self._answered, sent_at)
        if self.is_silent and self._answers >= ANSWERS_TO_TRUST:
            self.is_silent = False
        if not self._unanswered:
            self.next_check_at = max(self.next_check_at, self._sent_at + self._delay(profile))

    def note_silent(self) -> None:
        """No answers any more: not to be used until there are some again."""
        self.is_silent = True
        self._answers = 0

    def note_request(self, use_candidate: bool, profile: TimingProfile, now: float) -> None:
        """The peer checks this pair, and perhaps chooses it."""
        self._request_at = now
        if use_candidate:
            self.is_chosen_by_peer = True
            self.chosen_at.append(now)
        if self.is_watched and not self._unanswered and not profile.is_idle:
            self.next_check_at = min(self._sent_at + self._delay(profile), now + UNHEARD)

    def is_late(self, now: float) -> bool:
        """Whether an answer has been missing for longer than it should take."""
        return bool(self._unanswered) and now > self._unanswered_since + 2 * self.patience

    def was_heard_since(self, silent: Pair) -> bool:
        """Whether it answered a check sent after the other one fell silent, or was chosen by the peer after that."""
        since = silent._unanswered_since + silent.patience / 2
        return self._answered > since or (bool(self.chosen_at) and self.chosen_at[-1] > since)

    def is_outlived_by(self, other: Pair) -> bool:
        """Whether the peer, which had chosen this pair, has since chosen the other one again and again."""
        times = other.chosen_at
        return len(times) == times.maxlen and bool(self.chosen_at) and times[0] > self.chosen_at[-1]

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
        if len(self._unanswered) < profile.max_retrans or now < self._unanswered_since + profile.timeout:
            return False
        return now >= self.next_check_at and now >= self._request_at + RECENT_REQUEST_GRACE

    def adopt(self, profile: TimingProfile, now: float) -> None:
        """Go on under another profile: sooner if it is faster, and never failed by the change itself."""
        if len(self._unanswered) >= profile.max_retrans:
            del self._unanswered[: len(self._unanswered) - profile.max_retrans + 1]
        self._attempts = min(self._attempts, profile.max_retrans)
        self.next_check_at = min(self.next_check_at, max(now, self._sent_at + self._delay(profile)))
