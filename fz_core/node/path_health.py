"""Whether the primary path still works: silence while data flows, and handshakes that lead nowhere.

The reference has the second only (`spec/connectivity.md` §7.5), which takes 9 s at best and never sees a path
filtered in one direction. Here also: what data we send must be followed by something on the same path. If not
within 1 s, the path is probed every 0.15 s, as every peer answers every probe; twelve probes without an answer,
the first and the last given two round trips, mean the path is dead: 2.8 s after the first lost packet. The fifth
one also asks the other pairs, so that one of them can take over at that moment.

Hearing the peer proves only its direction. So while data is sent, a probe must be answered every 5 s; if the
peer is heard on that path meanwhile, the twelve go out every 0.4 s, for a full uplink delays answers.

False alarms: with 20 % of packets lost each way a probe fails with p = 1 - 0.8² = 0.36, twelve in a row with
p¹² = 4.7e-6 per alarm. A stream that is never answered raises an alarm about every 1.2 s, 500 in 10 min: 0.24 %
of such connections see one false death; at 30 % loss (p = 0.51) it is one in seven. It is harmless then: data
stays on the path until another pair has answered, and the dead one wins again by one answer.

An idle connection sends nothing here: every timer is armed by data.
"""

from __future__ import annotations

from enum import Enum, auto

from fz_core.node.transport import first_unheard
from fz_core.packet import Address

SILENCE = 1.0
PROOF_INTERVAL = 5.0
ATTEMPTS = 12
ASK_OTHERS_AT = 5
ATTEMPT_GAP = 0.15
PATIENT_GAP = 0.4
UNMEASURED_WAIT = 0.5
LONGEST_FIRST_GAP = 0.5
# How long all pairs get to answer: after a death, and after a change that made us look again.
OUTAGE_PATIENCE = 1.5
CHANGE_PATIENCE = 4.0
DISTRESS_INITS = 2


class Verdict(Enum):
    """What a due timer asks the agent to do."""

    NOTHING = auto()
    PROBE = auto()
    PROBE_ALL = auto()
    DEAD = auto()
    ALL_SILENT = auto()


class PathHealth:
    """Watches one primary at a time."""

    def __init__(self, now: float) -> None:
        self._local: Address | None = None
        self._remote: Address | None = None
        self._due_at: float | None = None
        self._waiting_since: float | None = None  # the first data sent since the primary was heard
        self._heard_at = self._heard_any_at = self._proved_at = float("-inf")
        self._suspected_at = now
        self._attempts = 0
        self._cleared = False
        self._reported = False
        self._own_inits = 0
        self._peer_inits = 0

    # Per packet

    def note_sent(self, now: float) -> bool:
        """Data leaves on the path in use. True if `poll_timeout` has changed."""
        if self._waiting_since is not None:
            return False
        self._waiting_since = now
        if self._due_at is not None or self._local is None:
            return False
        self._due_at = now + SILENCE
        return True

    def note_carried(self, first: float | None, last: float) -> bool:
        """Data was sent elsewhere (`Unheard.note_carried`). True if `poll_timeout` has changed."""
        at = first_unheard(first, last, self._heard_at)
        if at is not None and (self._waiting_since is None or at < self._waiting_since):
            self._waiting_since = at
        if self._due_at is not None or self._local is None:
            return False
        self._due_at = (last if at is None else at) + SILENCE
        return True

    def note_received(self, local: Address, remote: Address, now: float) -> None:
        """An authentic data packet, a keep-alive included, but no probe request."""
        self._heard_any_at = max(self._heard_any_at, now)
        self._peer_inits = 0
        if remote == self._remote and local == self._local:
            self._heard_at = max(self._heard_at, now)
            if self._waiting_since is not None and self._waiting_since <= now:
                self._waiting_since = None

    # Probes

    def note_answer(self, now: float) -> None:
        """The primary answered a probe."""
        self._heard_at = self._proved_at = now
        self._waiting_since = None
        self._attempts = 0
        self._due_at = None

    def note_request(self, on_primary: bool, now: float) -> None:
        """The peer probes. If it does so on our primary while we send there, it may have stopped hearing us."""
        self._heard_any_at = now
        self._peer_inits = 0
        if on_primary and self._due_at is not None and not self._attempts and now - self._proved_at > SILENCE:
            self._proved_at = float("-inf")
            self._due_at = now

    @property
    def suspected_at(self) -> float:
        """When the alarm began that led to the last death."""
        return self._suspected_at

    # Handshakes

    def is_second_own_init(self) -> bool:
        """One more init of ours in the established session: is it the one too many?"""
        self._own_inits += 1
        return self._own_inits == DISTRESS_INITS

    def is_second_peer_init(self) -> bool:
        """One more init of the peer with no data in between: is it the one too many?"""
        self._peer_inits += 1
        return self._peer_inits == DISTRESS_INITS

    def note_response(self) -> None:
        """Our init was answered."""
        self._own_inits = 0

    # The primary

    def watch(self, local: Address, remote: Address, now: float) -> None:
        """A primary is chosen. It counts as proved: an answer or a handshake chose it."""
        self._local, self._remote = local, remote
        self._heard_at = self._proved_at = now
        self._waiting_since = self._due_at = None
        self._attempts = self._own_inits = self._peer_inits = 0
        self._cleared = self._reported = False

    def unwatch(self, now: float, patience: float) -> None:
        """There is no primary from now on; if that lasts and data is sent, it is an outage."""
        self._local = self._remote = None
        self._attempts = 0
        if not self._cleared or (self._due_at is not None and self._due_at > now + patience):
            self._due_at = now + patience
        self._cleared = True

    # Time

    def poll_timeout(self) -> float | None:
        """When `step` is due."""
        return self._due_at

    def step(self, rtt: float | None, now: float) -> Verdict:
        """Run the timer if it is due; `rtt` is the primary's."""
        if self._due_at is None or now < self._due_at:
            return Verdict.NOTHING
        if self._local is None:
            return self._await_any(now)
        if self._attempts == 0:
            return self._watch_data(rtt, now)
        return self._suspect(UNMEASURED_WAIT if rtt is None else 2 * rtt, now)

    def _watch_data(self, rtt: float | None, now: float) -> Verdict:
        since = self._waiting_since
        if (since is not None and now >= since + SILENCE) or now >= self._proved_at + PROOF_INTERVAL:
            self._suspected_at = now
            self._attempts = 1
            # a live path answers the first one, so most alarms cost one probe
            self._due_at = now + min(max(ATTEMPT_GAP, 2 * (rtt or 0.0)), LONGEST_FIRST_GAP)
            return Verdict.PROBE
        self._due_at = None if since is None else since + SILENCE
        return Verdict.NOTHING

    def _suspect(self, wait: float, now: float) -> Verdict:
        is_heard = self._heard_at > self._suspected_at
        if is_heard and now < self._proved_at + PROOF_INTERVAL:
            self._attempts = 0
            self._due_at = None if self._waiting_since is None else now + SILENCE
            return Verdict.NOTHING
        if self._attempts == ATTEMPTS:
            return Verdict.DEAD
        self._attempts += 1
        gap = PATIENT_GAP if is_heard else ATTEMPT_GAP
        if self._attempts == ATTEMPTS:
            gap = max(gap, wait)
        self._due_at = now + gap
        return Verdict.PROBE_ALL if self._attempts == ASK_OTHERS_AT else Verdict.PROBE

    def _await_any(self, now: float) -> Verdict:
        if self._reported:
            self._due_at = None
            return Verdict.NOTHING
        if self._waiting_since is None or self._heard_any_at > now - OUTAGE_PATIENCE:
            self._due_at = now + OUTAGE_PATIENCE
            return Verdict.NOTHING
        self._reported = True
        self._due_at = None
        return Verdict.ALL_SILENT
