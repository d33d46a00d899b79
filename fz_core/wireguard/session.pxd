# One session: keys, counters and replay window in a C struct, sealed and opened without the GIL.
#
# For a pump: hold a reference to the Session, use `&session.state`, and give each direction in each thread an
# AeadKey of its own, made from `seal_key.key` or `open_key.key` and wiped by its owner. Then sealing and opening may
# run in several threads at once: a counter is taken atomically, so no nonce is used twice, and the window is
# changed under a lock of a few instructions. Timers are fed through `timers.pxd`.

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fz_core.crypto.cipher cimport AeadKey
from fz_core.wireguard.replay cimport ReplayWindow

cdef enum:
    REPLAYED = -1
    FORGED = -2
    EXHAUSTED = -3
    NOT_IP = -4

ctypedef struct SessionState:
    AeadKey seal_key           # its context is for those who hold the GIL
    AeadKey open_key           # likewise
    uint64_t send_counter      # taken with an atomic add
    uint32_t local_index       # what the peer puts in its datagrams to us
    uint32_t remote_index
    double send_until          # not sealed with from then on; the caller checks
    double receive_until       # not opened with from then on; the caller checks
    bint data_sent             # something other than keep-alives; both as `shared.pxd` does it
    bint data_received
    char lock                  # guards changes of `replay`
    ReplayWindow replay

# Writes DATA_OVERHEAD + length bytes to `out` and returns that count, or EXHAUSTED. The plaintext
# may already lie at out + DATA_HEADER_LENGTH.
cdef Py_ssize_t session_seal_with(
    SessionState *state, AeadKey *key, const uint8_t *plaintext, Py_ssize_t length, uint8_t *out) noexcept nogil

# `length` is at least DATA_OVERHEAD and the datagram's type and index are checked. Writes
# length - DATA_OVERHEAD bytes to `out` and returns that count, or REPLAYED or FORGED.
# `out` may be datagram + DATA_HEADER_LENGTH.
cdef Py_ssize_t session_open_with(
    SessionState *state, AeadKey *key, const uint8_t *datagram, Py_ssize_t length, uint8_t *out) noexcept nogil

# The same with the session's own keys: only for a caller who holds the GIL, so that there is one at a time.
cdef Py_ssize_t session_seal(
    SessionState *state, const uint8_t *plaintext, Py_ssize_t length, uint8_t *out) noexcept
cdef Py_ssize_t session_open(
    SessionState *state, const uint8_t *datagram, Py_ssize_t length, uint8_t *out) noexcept

# The length of the IP packet at the start of decrypted bytes, without padding, or NOT_IP.
cdef Py_ssize_t inner_length(const uint8_t *plaintext, Py_ssize_t length) noexcept nogil


@cython.final
cdef class Session:
    cdef SessionState state
    cdef readonly double established_at
    cdef readonly bint is_initiator
    cdef readonly bint is_confirmed    # the peer is known to have the keys: it may be sent on
    cdef readonly uint64_t serial      # order of creation within a tunnel

# Copies the keys; the caller wipes its own.
cdef Session new_session(
    bytes send_key, bytes receive_key, uint32_t local_index, uint32_t remote_index, bint is_initiator)
