# One peer. For a pump: `current` is the session to send on, `session_of` the one to open with, if it
# is confirmed (the first packet of an unconfirmed one changes the tunnel: leave it to
# `handle_untrusted`); `timers.traffic` is what both must keep true through traffic_sent and
# traffic_received. Deadlines follow from it, so ask `poll_timeout` again now and then.

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fz_core.wireguard.cookie cimport CookieJar
from fz_core.wireguard.noise cimport Answer, Identity, Initiation, Received
from fz_core.wireguard.rate_limit cimport RateLimiter
from fz_core.wireguard.session cimport Session
from fz_core.wireguard.timers cimport Timers

cdef enum:
    RING = 8


@cython.final
cdef class Tunnel:
    cdef Session current
    cdef readonly uint64_t version   # changes with what `current` and `session_of` give
    cdef Timers timers
    cdef Identity _identity
    cdef RateLimiter _limiter
    cdef CookieJar _jar
    cdef object _random_bytes
    cdef double _unix_epoch
    cdef uint32_t _index_base
    cdef uint32_t _index_counter
    cdef uint64_t _serial
    cdef list _sessions            # RING of Session | None, slot = local index % RING
    cdef Initiation _initiation
    cdef Initiation _superseded
    cdef bytes _peer_timestamp
    cdef object _sent_timestamp
    cdef object _datagrams
    cdef object _events
    cdef object _queue
    cdef Py_ssize_t _queue_limit
    cdef bint _handshake_on_data

    # The session a data packet with this receiver index belongs to, or None. It may be unconfirmed.
    cdef Session session_of(self, uint32_t local_index)

    cdef object _seal_without_session(self, object packet, double now)
    cdef bytes _seal(self, const uint8_t *plaintext, Py_ssize_t length, double now)
    cdef object _open(self, const uint8_t *datagram, Py_ssize_t length, double now)
    cdef object _handle_handshake(self, bytes datagram, object source_ip, double now, bint is_verified)
    cdef object _handle_initiation(self, bytes datagram, double now)
    cdef object _handle_response(self, bytes datagram, double now)
    cdef void _confirm(self, Session session, double now)
    cdef void _use(self, Session session, double now)
    cdef void _keep(self, Session session, double now)
    cdef void _retire(self, double now)
    cdef void _perform(self, int action, double now)
    cdef void _send_initiation(self, double now)
    cdef void _send_keepalive(self, double now)
    cdef void _send_queue(self, double now)
    cdef void _wipe(self)
    cdef double _jitter(self)
    cdef uint32_t _next_index(self)
    cdef bytes _next_timestamp(self, double now)
