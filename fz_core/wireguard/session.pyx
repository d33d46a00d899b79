"""One WireGuard session: data packets and nothing of handshakes or time.

Data packet: type 4, receiver index 4, counter 8 (all little-endian), ciphertext, tag 16 (paper section 5.4.6).
The peer's plaintext may carry zero padding; `inner_length` finds the packet's end (connectivity.md section 1).
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fz_core.crypto.cipher cimport AeadKey, aead_init, aead_open, aead_seal, aead_wipe
from fz_core.crypto.sodium cimport sodium_memzero
from fz_core.wireguard.protocol cimport DATA_HEADER_LENGTH, DATA_OVERHEAD, MESSAGE_DATA
from fz_core.wireguard.replay cimport replay_is_fresh, replay_mark
from fz_core.wireguard.shared cimport fz_flag_set, fz_word_get

cdef extern from "endian.h" nogil:
    uint32_t htole32(uint32_t value)
    uint64_t htole64(uint64_t value)
    uint64_t le64toh(uint64_t value)

cdef extern from *:
    """
    #include <sched.h>
    #define fz_take(counter) __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED)
    #define fz_acquire(lock) while (__atomic_test_and_set(lock, __ATOMIC_ACQUIRE)) sched_yield()
    #define fz_release(lock) __atomic_clear(lock, __ATOMIC_RELEASE)
    """
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
        aead_wipe(&self.state.seal_key)
        aead_wipe(&self.state.open_key)
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
    aead_init(&session.state.seal_key, <const uint8_t *>PyBytes_AS_STRING(send_key))
    aead_init(&session.state.open_key, <const uint8_t *>PyBytes_AS_STRING(receive_key))
    session.state.local_index = local_index
    session.state.remote_index = remote_index
    session.is_initiator = is_initiator
    return session


cdef Py_ssize_t session_seal(
    SessionState *state, const uint8_t *plaintext, Py_ssize_t length, uint8_t *out
) noexcept:
    return session_seal_with(state, &state.seal_key, plaintext, length, out)


cdef Py_ssize_t session_open(
    SessionState *state, const uint8_t *datagram, Py_ssize_t length, uint8_t *out
) noexcept:
    return session_open_with(state, &state.open_key, datagram, length, out)


cdef Py_ssize_t session_seal_with(
    SessionState *state, AeadKey *key, const uint8_t *plaintext, Py_ssize_t length, uint8_t *out
) noexcept nogil:
    cdef uint64_t counter
    if fz_word_get(&state.send_counter) >= REJECT_AFTER_MESSAGES:
        return EXHAUSTED
    counter = fz_take(&state.send_counter)
    _write_header(out, state.remote_index, counter)
    aead_seal(key, out + DATA_HEADER_LENGTH, plaintext, length, counter)
    if length > 0:
        fz_flag_set(&state.data_sent, True)
    return length + DATA_OVERHEAD


cdef Py_ssize_t session_open_with(
    SessionState *state, AeadKey *key, const uint8_t *datagram, Py_ssize_t length, uint8_t *out
) noexcept nogil:
    cdef uint64_t counter = _counter_of(datagram)
    cdef bint is_fresh
    # A first look without the lock spares decrypting most replays; the one below decides.
    if not replay_is_fresh(&state.replay, counter):
        return REPLAYED
    if aead_open(key, out, datagram + DATA_HEADER_LENGTH, length - DATA_HEADER_LENGTH, counter) != 0:
        return FORGED
    fz_acquire(&state.lock)
    is_fresh = replay_is_fresh(&state.replay, counter)
    if is_fresh:
        replay_mark(&state.replay, counter)
    fz_release(&state.lock)
    if not is_fresh:
        return REPLAYED
    if length > DATA_OVERHEAD:
        fz_flag_set(&state.data_received, True)
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


cdef inline void _write_header(uint8_t *out, uint32_t receiver_index, uint64_t counter) noexcept nogil:
    cdef uint32_t kind = htole32(MESSAGE_DATA)
    cdef uint32_t index = htole32(receiver_index)
    cdef uint64_t word = htole64(counter)
    memcpy(out, &kind, 4)
    memcpy(out + 4, &index, 4)
    memcpy(out + 8, &word, 8)


cdef inline uint64_t _counter_of(const uint8_t *datagram) noexcept nogil:
    cdef uint64_t word
    memcpy(&word, datagram + 8, 8)
    return le64toh(word)
