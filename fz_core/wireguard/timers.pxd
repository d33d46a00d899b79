# When a tunnel must act. `Traffic` is what packets change; a pump updates it without the GIL, and maybe with one thread
# for each direction: so its numbers are only touched as `shared.pxd` does it. No two of them have to fit together.

cimport cython
from libc.math cimport INFINITY

from fz_core.wireguard.session cimport Session
from fz_core.wireguard.shared cimport fz_time_get, fz_time_set

ctypedef struct Traffic:
    double sent_at              # last authenticated datagram of any kind; -INFINITY for never
    double received_at
    double unanswered_since     # first data packet sent after the last receipt; INFINITY for none
    double unacknowledged_since  # first data packet received after the last sending; INFINITY for none

cdef enum Action:
    NOTHING
    SEND_INITIATION
    SCHEDULE_INITIATION
    GIVE_UP
    WIPE
    EXPIRE_SESSION
    SEND_KEEPALIVE
    SEND_PERSISTENT


cdef inline void traffic_sent(Traffic *traffic, bint is_data, double now) noexcept nogil:
    """Any authenticated datagram left; `is_data` is false for keep-alives and handshakes."""
    fz_time_set(&traffic.sent_at, now)
    fz_time_set(&traffic.unacknowledged_since, INFINITY)
    if is_data and fz_time_get(&traffic.unanswered_since) == INFINITY:
        fz_time_set(&traffic.unanswered_since, now)


cdef inline void traffic_received(Traffic *traffic, bint is_data, double now) noexcept nogil:
    """Any authenticated datagram came; `is_data` is false for keep-alives and handshakes."""
    fz_time_set(&traffic.received_at, now)
    fz_time_set(&traffic.unanswered_since, INFINITY)
    if is_data and fz_time_get(&traffic.unacknowledged_since) == INFINITY:
        fz_time_set(&traffic.unacknowledged_since, now)


@cython.final
cdef class Timers:
    cdef double rekey_attempt_time
    cdef double keepalive_timeout
    cdef double rekey_timeout
    cdef double persistent_keepalive    # INFINITY for off
    cdef bint is_lazy                   # data starts handshakes, so an idle tunnel need not renew

    cdef Traffic traffic
    cdef double attempt_started_at      # first initiation of the run in progress
    cdef double initiation_sent_at      # its latest initiation
    cdef double scheduled_at            # a jittered initiation to come
    cdef double last_session_at
    cdef double created_at
    cdef bint has_given_up              # until a handshake succeeds or is asked for

    cdef bint is_attempting(self) noexcept
    cdef void initiation_sent(self, double now) noexcept
    cdef void attempt_ended(self) noexcept
    cdef double next(self, Session current, Action *action) noexcept
    cdef double _established(self, Session current, Action *action) noexcept
    cdef double _rekey_at(self, Session current) noexcept
