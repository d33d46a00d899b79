"""One WireGuard session: data packets and nothing of handshakes or time.

Data packet: type 4, receiver index 4, counter 8 (all little-endian), ciphertext, tag 16 (paper section 5.4.6).
The peer's plaintext may carry zero padding; `inner_length` finds the packet's end (connectivity.md section 1).
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fz_core.crypto.aead cimport open_into, seal_into
from fz_core.crypto.sodium cimport sodium_memzero
from fz_core.wireguard.protocol cimport DATA_HEADER_LENGTH, DATA_OVERHEAD, MESSAGE_DATA
from fz_core.wireguard.replay cimport replay_is_fresh, replay_mark

cdef extern from *:
    """
    #include <sched.h>
    #define fz_load(counter) __atomic_load_n(counter, __ATOMIC_RELAXED)
    #define fz_take(counter) __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED)
    #define fz_acquire(lock) while (__atomic_test_and_set(lock, __ATOMIC_ACQUIRE)) sched_yield()
    #define fz_release(lock) __atomic_clear(lock, __ATOMIC_RELEASE)
    """
    uint64_t fz_load(uint64_t *counter) noexcept nogil
    uint64_t fz_take(uint64_t *counter) noexcept nogil
    void fz_acquire(char *lock) noexcept nogil
    void fz_release(char *lock) noexcept nogil

cdef uint64_t REJECT_AFTER_MESSAGES = <uint64_t>0xFFFFFFFFFFFFDFFF


cdef class Session:
    """Keys and counters of one session; made by the handshake only."""

    def __cinit__(self):
        memset(&self.state, 0, sizeof(self.state))

    def __init__(self, *args, **kwargs):
        raise TypeError("sessions are made by a handshake")

    def __dealloc__(self):
        sodium_memzero(&self.state, sizeof(self.state))

    @property
    def send_until(self):
        """When sealing with it ends."""
        return self.state.send_until

    @property
    def receive_until(self):
        """When opening with it ends."""
        return self.state.receive_until

    def __repr__(self):
        return f"Session(local_index={self.state.local_index:#x}, is_initiator={bool(self.is_initiator)})"

    def __reduce__(self):
        raise TypeError("a session is not picklable")


cdef Session new_session(
    bytes send_key, bytes receive_key, uint32_t local_index, uint32_t remote_index, bint is_initiator
):
    cdef Session session = Session.__new__(Session)
    memcpy(session.state.send_key, PyBytes_AS_STRING(send_key), 32)
    memcpy(session.state.receive_key, PyBytes_AS_STRING(receive_key), 32)
    session.state.local_index = local_index
    session.state.remote_index = remote_index
    session.is_initiator = is_initiator
    return session


cdef Py_ssize_t session_seal(
    SessionState *state, const uint8_t *plaintext, Py_ssize_t length, uint8_t *out
) noexcept nogil:
    cdef uint64_t counter
    if fz_load(&state.send_counter) >= REJECT_AFTER_MESSAGES:
        return EXHAUSTED
    counter = fz_take(&state.send_counter)
    _write_u32(out, MESSAGE_DATA)
    _write_u32(out + 4, state.remote_index)
    _write_u32(out + 8, <uint32_t>counter)
    _write_u32(out + 12, <uint32_t>(counter >> 32))
    seal_into(out + DATA_HEADER_LENGTH, plaintext, length, NULL, 0, counter, state.send_key)
    if length > 0:
        state.data_sent = True
    return length + DATA_OVERHEAD


cdef Py_ssize_t session_open(
    SessionState *state, const uint8_t *datagram, Py_ssize_t length, uint8_t *out
) noexcept nogil:
    cdef uint64_t counter = _read_u32(datagram + 8) | (<uint64_t>_read_u32(datagram + 12) << 32)
    cdef bint is_fresh, failed
    # A first look without the lock spares decrypting most replays; the one below decides.
    if not replay_is_fresh(&state.replay, counter):
        return REPLAYED
    failed = open_into(
        out, datagram + DATA_HEADER_LENGTH, length - DATA_HEADER_LENGTH, NULL, 0, counter, state.receive_key)
    if failed != 0:
        return FORGED
    fz_acquire(&state.lock)
    is_fresh = replay_is_fresh(&state.replay, counter)
    if is_fresh:
        replay_mark(&state.replay, counter)
    fz_release(&state.lock)
    if not is_fresh:
        return REPLAYED
    if length > DATA_OVERHEAD:
        state.data_received = True
    return length - DATA_OVERHEAD


cdef Py_ssize_t inner_length(const uint8_t *plaintext, Py_ssize_t length) noexcept nogil:
    cdef Py_ssize_t claimed
    if length >= 20 and plaintext[0] >> 4 == 4:
        claimed = (plaintext[2] << 8) | plaintext[3]
        return claimed if 20 <= claimed <= length else <Py_ssize_t>NOT_IP
    if length >= 40 and plaintext[0] >> 4 == 6:
        claimed = 40 + ((plaintext[4] << 8) | plaintext[5])
        return claimed if claimed <= length else <Py_ssize_t>NOT_IP
    return NOT_IP


cdef inline void _write_u32(uint8_t *p, uint32_t value) noexcept nogil:
    p[0] = <uint8_t>value
    p[1] = <uint8_t>(value >> 8)
    p[2] = <uint8_t>(value >> 16)
    p[3] = <uint8_t>(value >> 24)


cdef inline uint32_t _read_u32(const uint8_t *p) noexcept nogil:
    return p[0] | (<uint32_t>p[1] << 8) | (<uint32_t>p[2] << 16) | (<uint32_t>p[3] << 24)
