# cython: auto_pickle=False
"""One WireGuard tunnel to one peer: handshakes, the ring of sessions, data, timers.

    tunnel = Tunnel(private_key, peer_public_key, preshared_key, index_base, now, unix_epoch, random_bytes)
    tunnel.start_handshake(now)
    datagram = tunnel.seal(packet, now)
    packet = tunnel.handle_untrusted(datagram, source_ip, now)
    tunnel.handle_timeout(now)

**After each of these drain `poll_datagram` and `poll_event`, then wait until `poll_timeout`.**

Sources: WireGuard paper sections 5 and 6, spec/connectivity.md section 6. Not here: endpoints and roaming, which are
the caller's. By default data neither queues nor starts handshakes; `queue_limit` and `handshake_on_data` make it the
tunnel of the paper.
"""

from collections import deque

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.math cimport INFINITY
from libc.stdint cimport uint8_t, uint32_t

from fz_core.crypto.keys cimport PrivateKey
from fz_core.wireguard.cookie cimport CookieJar
from fz_core.wireguard.noise cimport (
    Answer, Initiation, Received, build_initiation, build_response, new_identity, open_initiation, open_response,
)
from fz_core.wireguard.protocol cimport (
    COOKIE_LENGTH, DATA_OVERHEAD, INITIATION_LENGTH, MESSAGE_COOKIE, MESSAGE_DATA, MESSAGE_INITIATION,
    MESSAGE_RESPONSE, REJECT_AFTER_TIME, RESPONSE_LENGTH,
)
from fz_core.wireguard.rate_limit cimport RateLimiter
from fz_core.wireguard.session cimport EXHAUSTED, REPLAYED, Session, inner_length, session_open, session_seal
from fz_core.wireguard.shared cimport fz_time_get, fz_time_set
from fz_core.wireguard.timers cimport (
    EXPIRE_SESSION, GIVE_UP, NOTHING, SCHEDULE_INITIATION, SEND_INITIATION, SEND_KEEPALIVE, SEND_PERSISTENT, WIPE,
    Action, Timers, traffic_received, traffic_sent,
)

from fz_core.packet import DropReason
from fz_core.wireguard.events import Expired, SessionEstablished

cdef enum:
    MAX_PLAINTEXT = 1300           # spec section 1
    MAX_UNSENT = 128               # own datagrams nobody fetched; the oldest goes first
    MAX_JITTER_MS = 333

# An initiator stops this long after establishment, so that its packets arrive before the peer's 180 s.
cdef double INITIATOR_STOPS_AFTER = 170.0
cdef object TAI64_BASE = (1 << 62) + 37

cdef object TOO_BIG = DropReason.TOO_BIG
cdef object MALFORMED_PACKET = DropReason.MALFORMED_PACKET
cdef object WG_BAD_COOKIE = DropReason.WG_BAD_COOKIE
cdef object WG_BAD_HANDSHAKE = DropReason.WG_BAD_HANDSHAKE
cdef object WG_BAD_PACKET = DropReason.WG_BAD_PACKET
cdef object WG_EXPIRED_SESSION = DropReason.WG_EXPIRED_SESSION
cdef object WG_MALFORMED = DropReason.WG_MALFORMED
cdef object WG_NO_SESSION = DropReason.WG_NO_SESSION
cdef object WG_REPLAYED_HANDSHAKE = DropReason.WG_REPLAYED_HANDSHAKE
cdef object WG_REPLAYED_PACKET = DropReason.WG_REPLAYED_PACKET
cdef object WG_UNKNOWN_SESSION = DropReason.WG_UNKNOWN_SESSION


cdef class Tunnel:
    """One peer. `index_base` is the upper 24 bits of all our session indices."""

    def __init__(
        self,
        private_key,
        bytes peer_public_key not None,
        bytes preshared_key not None,
        uint32_t index_base,
        double now,
        double unix_epoch,
        random_bytes,
        *,
        double rekey_attempt_time=90.0,
        double keepalive_timeout=10.0,
        double rekey_timeout=5.0,
        RateLimiter rate_limiter=None,
        Py_ssize_t queue_limit=0,
        bint handshake_on_data=False,
        persistent_keepalive=None,
    ):
        if len(peer_public_key) != 32 or len(preshared_key) != 32:
            raise ValueError("the peer's public key and the preshared key are 32 bytes long each")
        if index_base >> 24:
            raise ValueError(f"index base {index_base} does not fit in 24 bits")
        key = private_key if isinstance(private_key, PrivateKey) else PrivateKey(private_key)
        self._identity = new_identity(key, peer_public_key, preshared_key)
        self._limiter = RateLimiter(key, now, random_bytes) if rate_limiter is None else rate_limiter
        self._jar = CookieJar(peer_public_key)
        self._random_bytes = random_bytes
        self._unix_epoch = unix_epoch
        self._index_base = index_base << 8
        self._sessions = [None] * RING
        self._peer_timestamp = b""
        self._sent_timestamp = 0
        self._datagrams = deque(maxlen=MAX_UNSENT)
        self._events = deque(maxlen=MAX_UNSENT)
        self._queue = deque(maxlen=queue_limit)
        self._queue_limit = queue_limit
        self._handshake_on_data = handshake_on_data
        self.timers = Timers()
        self.timers.rekey_attempt_time = rekey_attempt_time
        self.timers.keepalive_timeout = keepalive_timeout
        self.timers.rekey_timeout = rekey_timeout
        self.timers.is_lazy = handshake_on_data
        self.timers.created_at = now
        if persistent_keepalive is not None:
            if persistent_keepalive <= 0:
                raise ValueError(f"persistent keep-alive {persistent_keepalive} s is not positive: use None for off")
            self.timers.persistent_keepalive = persistent_keepalive

    def __repr__(self):
        return f"Tunnel(index_base={self._index_base >> 8:#x}, has_session={self.has_session})"

    @property
    def has_session(self):
        """Whether `seal` has a session, age aside."""
        return self.current is not None

    @property
    def is_initiator_of_session(self):
        """Whether we initiated the session in use."""
        return self.current is not None and bool(self.current.is_initiator)

    @property
    def handshake_in_progress(self):
        """Whether an initiation of ours is unanswered."""
        return bool(self.timers.is_attempting())

    @property
    def last_rx_at(self):
        """When an authenticated datagram last came, or None."""
        at = fz_time_get(&self.timers.traffic.received_at)
        return None if at == -INFINITY else at

    @property
    def last_tx_at(self):
        """When we last sent one, or None."""
        at = fz_time_get(&self.timers.traffic.sent_at)
        return None if at == -INFINITY else at

    def current_session(self):
        """The session to send on, or None; for a pump."""
        return self.current

    def session(self, uint32_t local_index):
        """The live session of ours with this index, or None; for a pump. Send only on a confirmed one."""
        return self.session_of(local_index)

    def start_handshake(self, double now, bint force=False):
        """Send an initiation now. Does nothing while one is unanswered, unless forced: then a new run begins."""
        if self.timers.is_attempting():
            if not force:
                return
            self.timers.attempt_ended()
        self.timers.has_given_up = False
        self._send_initiation(now)

    def seal(self, packet, double now):
        """The data packet for an inner packet, or a DropReason; b"" if the packet was queued instead.

        An empty packet makes a keep-alive.
        """
        cdef Py_buffer view
        if not _is_usable(self.current, now):
            return self._seal_without_session(packet, now)
        PyObject_GetBuffer(packet, &view, PyBUF_SIMPLE)
        try:
            if view.len > MAX_PLAINTEXT:
                return TOO_BIG
            sealed = self._seal(<const uint8_t *>view.buf, view.len, now)
            return WG_NO_SESSION if sealed is None else sealed
        finally:
            PyBuffer_Release(&view)

    def seal_into(self, packet, out, Py_ssize_t offset, double now):
        """Like `seal`, but writes to `out` at `offset` and returns the length written. Never queues."""
        cdef Py_buffer view, target
        cdef Py_ssize_t written
        if not _is_usable(self.current, now):
            return WG_NO_SESSION
        PyObject_GetBuffer(packet, &view, PyBUF_SIMPLE)
        try:
            if view.len > MAX_PLAINTEXT:
                return TOO_BIG
            PyObject_GetBuffer(out, &target, PyBUF_WRITABLE)
            try:
                if offset < 0 or target.len - offset < view.len + DATA_OVERHEAD:
                    raise ValueError(f"{view.len + DATA_OVERHEAD} bytes do not fit at offset {offset} of {target.len}")
                written = session_seal(
                    &self.current.state, <const uint8_t *>view.buf, view.len, <uint8_t *>target.buf + offset)
                if written == EXHAUSTED:
                    return WG_NO_SESSION
                traffic_sent(&self.timers.traffic, view.len > 0, now)
                return written
            finally:
                PyBuffer_Release(&target)
        finally:
            PyBuffer_Release(&view)

    def handle_untrusted(self, datagram, source_ip, double now, bint is_verified=False):
        """The inner packet (b"" for a keep-alive), None for a handshake message taken, or a DropReason.

        `is_verified` says that the caller has already put an initiation or response through the limiter.
        """
        cdef Py_buffer view
        cdef const uint8_t *data
        PyObject_GetBuffer(datagram, &view, PyBUF_SIMPLE)
        try:
            data = <const uint8_t *>view.buf
            if view.len < DATA_OVERHEAD or data[1] | data[2] | data[3]:
                return WG_MALFORMED
            if data[0] == MESSAGE_DATA:
                return self._open(data, view.len, now)
            return self._handle_handshake(
                PyBytes_FromStringAndSize(<const char *>data, view.len) if view.len <= INITIATION_LENGTH else b"",
                source_ip, now, is_verified)
        finally:
            PyBuffer_Release(&view)

    def handle_timeout(self, double now):
        """Do everything that is due."""
        cdef Action action = NOTHING
        while self.timers.next(self.current, &action) <= now:
            self._perform(action, now)
        self._retire(now)

    def poll_timeout(self):
        """When `handle_timeout` is next due, or None."""
        cdef Action action = NOTHING
        at = self.timers.next(self.current, &action)
        return None if at == INFINITY else at

    def poll_datagram(self):
        """The next handshake message, cookie reply, keep-alive or formerly queued packet to send, or None."""
        return self._datagrams.popleft() if self._datagrams else None

    def poll_event(self):
        """The next event, or None."""
        return self._events.popleft() if self._events else None

    # sending

    cdef object _seal_without_session(self, object packet, double now):
        if self._handshake_on_data:
            self.start_handshake(now)
        if self._queue_limit == 0 or not (self._handshake_on_data or self.timers.is_attempting()):
            return WG_NO_SESSION
        queued = bytes(packet)
        if len(queued) > MAX_PLAINTEXT:
            return TOO_BIG
        self._queue.append(queued)
        return b""

    cdef bytes _seal(self, const uint8_t *plaintext, Py_ssize_t length, double now):
        """A data packet on the current session; None once its counters are used up."""
        cdef bytes out = PyBytes_FromStringAndSize(NULL, length + DATA_OVERHEAD)
        if session_seal(&self.current.state, plaintext, length, <uint8_t *>PyBytes_AS_STRING(out)) == EXHAUSTED:
            return None
        traffic_sent(&self.timers.traffic, length > 0, now)
        return out

    cdef void _send_keepalive(self, double now):
        keepalive = self._seal(NULL, 0, now)
        if keepalive is not None:
            self._datagrams.append(keepalive)

    cdef void _send_queue(self, double now):
        """What waited for a session, and at least one packet, which confirms the session to the peer."""
        if not self._queue:
            self._send_keepalive(now)
        while self._queue:
            packet = self._queue.popleft()
            self._datagrams.append(self._seal(<const uint8_t *>PyBytes_AS_STRING(packet), len(packet), now))

    cdef void _send_initiation(self, double now):
        """A new initiation; the response to the one before it stays welcome."""
        self._superseded = self._initiation
        self._initiation = build_initiation(
            self._identity, self._next_index(), self._next_timestamp(now), self._random_bytes(32))
        self._datagrams.append(self._jar.stamp(self._initiation.message, now))
        self._initiation.message = None
        self.timers.initiation_sent(now)
        traffic_sent(&self.timers.traffic, False, now)

    # receiving

    cdef object _open(self, const uint8_t *datagram, Py_ssize_t length, double now):
        cdef Py_ssize_t size = length - DATA_OVERHEAD
        cdef Session session
        cdef bytes out
        if size > MAX_PLAINTEXT:
            return TOO_BIG
        session = self.session_of(
            datagram[4] | (<uint32_t>datagram[5] << 8) | (<uint32_t>datagram[6] << 16) | (<uint32_t>datagram[7] << 24))
        if session is None:
            return WG_UNKNOWN_SESSION
        if now >= session.state.receive_until:
            return WG_EXPIRED_SESSION
        out = PyBytes_FromStringAndSize(NULL, size)
        opened = session_open(&session.state, datagram, length, <uint8_t *>PyBytes_AS_STRING(out))
        if opened < 0:
            return WG_REPLAYED_PACKET if opened == REPLAYED else WG_BAD_PACKET
        traffic_received(&self.timers.traffic, size > 0, now)
        if not session.is_confirmed:
            self._confirm(session, now)
        if size == 0:
            return out
        length = inner_length(<const uint8_t *>PyBytes_AS_STRING(out), size)
        if length < 0:
            return MALFORMED_PACKET
        return out if length == size else out[:length]

    cdef Session session_of(self, uint32_t local_index):
        cdef Session session = self._sessions[local_index % RING]
        return session if session is not None and session.state.local_index == local_index else None

    cdef object _handle_handshake(self, bytes datagram, object source_ip, double now, bint is_verified):
        length = len(datagram)
        kind = datagram[0] if length else 0
        if kind == MESSAGE_COOKIE and length == COOKIE_LENGTH:
            return None if self._jar.accept_untrusted(datagram, now) else WG_BAD_COOKIE
        if (kind, length) not in ((MESSAGE_INITIATION, INITIATION_LENGTH), (MESSAGE_RESPONSE, RESPONSE_LENGTH)):
            return WG_MALFORMED
        verdict = None if is_verified else self._limiter.verify_untrusted(datagram, source_ip, now)
        if isinstance(verdict, DropReason):
            return verdict
        if verdict is not None:
            self._datagrams.append(verdict)
            return DropReason.WG_UNDER_LOAD
        if kind == MESSAGE_INITIATION:
            return self._handle_initiation(datagram, now)
        return self._handle_response(datagram, now)

    cdef object _handle_initiation(self, bytes datagram, double now):
        cdef Received received = open_initiation(self._identity, datagram)
        if received is None:
            return WG_BAD_HANDSHAKE
        if received.timestamp <= self._peer_timestamp:
            return WG_REPLAYED_HANDSHAKE
        cdef Answer answer = build_response(self._identity, received, self._next_index(), self._random_bytes(32))
        if answer is None:
            return WG_BAD_HANDSHAKE
        self._peer_timestamp = received.timestamp
        traffic_received(&self.timers.traffic, False, now)
        self._keep(answer.session, now)
        self._datagrams.append(self._jar.stamp(answer.message, now))
        traffic_sent(&self.timers.traffic, False, now)
        return None

    cdef object _handle_response(self, bytes datagram, double now):
        cdef Initiation initiation
        cdef Session session
        index = int.from_bytes(datagram[8:12], "little")
        for initiation in (self._initiation, self._superseded):
            if initiation is not None and initiation.local_index == index:
                session = open_response(self._identity, initiation, datagram)
                if session is None:
                    return WG_BAD_HANDSHAKE
                traffic_received(&self.timers.traffic, False, now)
                self._keep(session, now)
                self._use(session, now)
                return None
        return WG_BAD_HANDSHAKE

    # sessions

    cdef void _keep(self, Session session, double now):
        """Put a new session into the ring, over the one eight handshakes older."""
        self._serial += 1
        session.serial = self._serial
        session.established_at = now
        session.state.send_until = now + (INITIATOR_STOPS_AFTER if session.is_initiator else REJECT_AFTER_TIME)
        session.state.receive_until = now + REJECT_AFTER_TIME
        self.timers.last_session_at = now
        self._sessions[session.state.local_index % RING] = session
        self.version += 1

    cdef void _confirm(self, Session session, double now):
        """The initiator used its new session: so may we, unless ours is newer."""
        if self.current is None or session.serial > self.current.serial:
            self._use(session, now)
        session.is_confirmed = True
        self.version += 1

    cdef void _use(self, Session session, double now):
        """Send on this session from now on."""
        session.is_confirmed = True
        self.current = session
        self.version += 1
        self._initiation = None
        self._superseded = None
        self.timers.attempt_ended()
        self.timers.has_given_up = False
        self._events.append(SessionEstablished(now, bool(session.is_initiator)))
        if session.is_initiator or self._queue:
            self._send_queue(now)

    cdef void _retire(self, double now):
        """Forget sessions past their age; the current one has a timer of its own."""
        cdef Session session
        for slot in range(RING):
            session = self._sessions[slot]
            if session is not None and session is not self.current:
                if now >= session.state.receive_until:
                    self._sessions[slot] = None
                    self.version += 1

    cdef void _wipe(self):
        self.current = None
        self._sessions = [None] * RING
        self.version += 1
        self._initiation = None
        self._superseded = None
        self._queue.clear()
        self.timers.last_session_at = INFINITY
        fz_time_set(&self.timers.traffic.unacknowledged_since, INFINITY)

    # timers

    cdef void _perform(self, int action, double now):
        """One due action. Each moves the deadline that led to it."""
        if action == SEND_INITIATION:
            self._send_initiation(now)
        elif action == SCHEDULE_INITIATION:
            self.timers.scheduled_at = now + self._jitter()
        elif action == SEND_KEEPALIVE:
            fz_time_set(&self.timers.traffic.unacknowledged_since, INFINITY)
            if _is_usable(self.current, now):
                self._send_keepalive(now)
        elif action == SEND_PERSISTENT:
            if _is_usable(self.current, now):
                self._send_keepalive(now)
            else:
                self.start_handshake(now)
        elif action == EXPIRE_SESSION:
            renew = self.current.is_initiator and not self.timers.has_given_up and not self._handshake_on_data
            self._sessions[self.current.state.local_index % RING] = None
            self.current = None
            self.version += 1
            fz_time_set(&self.timers.traffic.unanswered_since, INFINITY)
            fz_time_set(&self.timers.traffic.unacknowledged_since, INFINITY)
            if renew:
                self.timers.scheduled_at = now + self._jitter()
        elif action == GIVE_UP:
            self.timers.attempt_ended()
            self.timers.has_given_up = True
            self._initiation = None
            self._superseded = None
            self._queue.clear()
            self._events.append(Expired(now))
        elif action == WIPE:
            self._wipe()
            self._events.append(Expired(now))

    cdef double _jitter(self):
        return (int.from_bytes(self._random_bytes(4), "little") % (MAX_JITTER_MS + 1)) / 1000.0

    cdef uint32_t _next_index(self):
        self._index_counter = (self._index_counter + 1) & 0xFF
        return self._index_base | self._index_counter

    cdef bytes _next_timestamp(self, double now):
        """TAI64N of now, made strictly greater than the one before."""
        nanos = int((self._unix_epoch + now) * 1_000_000_000)
        nanos = max(nanos, self._sent_timestamp + 1)
        self._sent_timestamp = nanos
        seconds, rest = divmod(nanos, 1_000_000_000)
        return (TAI64_BASE + seconds).to_bytes(8, "big") + rest.to_bytes(4, "big")


cdef inline bint _is_usable(Session session, double now):
    """Whether the session may still be sent on."""
    return session is not None and now < session.state.send_until
