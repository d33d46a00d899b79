# cython: auto_pickle=False
"""The timers of one tunnel: from its state to one next action and its time (paper section 6, spec section 6.3).

Nothing is armed or cancelled: the deadline is computed from what last happened. Exactly one regime counts at a time:
1. a jittered initiation is scheduled: only its time;
2. an initiation is unanswered: its retransmission and the end of the attempt;
3. otherwise: wiping, session expiry, re-keying, keep-alives.
INFINITY stands for "not pending" or "off". Not here: performing the actions, and jitter (`tunnel`).
"""

from libc.math cimport INFINITY

from fz_core.wireguard.protocol cimport REJECT_AFTER_TIME, REKEY_AFTER_TIME, WIPE_AFTER_TIME
from fz_core.wireguard.session cimport Session
from fz_core.wireguard.shared cimport fz_flag_get, fz_time_get, fz_time_set


cdef class Timers:
    def __cinit__(self):
        self.traffic.sent_at = -INFINITY
        self.traffic.received_at = -INFINITY
        self.traffic.unanswered_since = INFINITY
        self.traffic.unacknowledged_since = INFINITY
        self.attempt_started_at = INFINITY
        self.initiation_sent_at = INFINITY
        self.scheduled_at = INFINITY
        self.last_session_at = INFINITY
        self.persistent_keepalive = INFINITY

    cdef bint is_attempting(self) noexcept:
        return self.attempt_started_at != INFINITY

    cdef void initiation_sent(self, double now) noexcept:
        if not self.is_attempting():
            self.attempt_started_at = now
        self.initiation_sent_at = now
        self.scheduled_at = INFINITY

    cdef void attempt_ended(self) noexcept:
        self.attempt_started_at = INFINITY
        self.initiation_sent_at = INFINITY
        self.scheduled_at = INFINITY
        fz_time_set(&self.traffic.unanswered_since, INFINITY)

    cdef double next(self, Session current, Action *action) noexcept:
        """The next action and its time."""
        cdef double give_up_at = self.attempt_started_at + self.rekey_attempt_time
        cdef double repeat_at = self.initiation_sent_at + self.rekey_timeout
        if self.scheduled_at <= give_up_at and self.scheduled_at != INFINITY:
            action[0] = SEND_INITIATION
            return self.scheduled_at
        if self.is_attempting():
            if self.scheduled_at != INFINITY or give_up_at <= repeat_at:
                action[0] = GIVE_UP
                return give_up_at
            action[0] = SCHEDULE_INITIATION
            return repeat_at
        return self._established(current, action)

    cdef double _established(self, Session current, Action *action) noexcept:
        cdef double at = self.last_session_at + WIPE_AFTER_TIME
        cdef double other
        action[0] = WIPE if at != INFINITY else NOTHING
        if current is not None:
            other = current.established_at + REJECT_AFTER_TIME
            if other < at:
                at, action[0] = other, EXPIRE_SESSION
            other = self._rekey_at(current)
            if other < at:
                at, action[0] = other, SCHEDULE_INITIATION
            other = fz_time_get(&self.traffic.unacknowledged_since) + self.keepalive_timeout
            if other < at:
                at, action[0] = other, SEND_KEEPALIVE
        if self.persistent_keepalive == INFINITY:
            return at
        other = max(fz_time_get(&self.traffic.sent_at) + self.persistent_keepalive, self.created_at)
        if other < at:
            at, action[0] = other, SEND_PERSISTENT
        return at

    cdef double _rekey_at(self, Session current) noexcept:
        """By age, which is the initiator's duty alone, or because data stays unanswered."""
        cdef double silence = self.keepalive_timeout + self.rekey_timeout
        cdef double at = INFINITY
        if not self.has_given_up or self.is_lazy:
            at = fz_time_get(&self.traffic.unanswered_since) + silence
        if self.has_given_up or not current.is_initiator:
            return at
        if fz_flag_get(&current.state.data_received):
            at = min(at, current.established_at + REJECT_AFTER_TIME - silence)
        if fz_flag_get(&current.state.data_sent):
            at = min(at, current.established_at + REKEY_AFTER_TIME)
        return at
