# ChaCha20-Poly1305 at packet rate: no GIL, no allocation, caller's memory.

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy, memset

cdef extern from "endian.h" nogil:
    uint64_t htole64(uint64_t value)

cdef enum:
    KEY_LENGTH = 32
    NONCE_LENGTH = 12
    TAG_LENGTH = 16

# Writes length + TAG_LENGTH bytes to `out`, which may be `plaintext` itself.
cdef void seal_into(
    uint8_t *out, const uint8_t *plaintext, Py_ssize_t length,
    const uint8_t *ad, Py_ssize_t ad_length, uint64_t counter, const uint8_t *key) noexcept nogil

# Writes length - TAG_LENGTH bytes to `out`, which may be `ciphertext` itself. `length` includes the
# tag and is at least TAG_LENGTH. Returns 0, or -1 for a forgery (then `out` is zeroed or untouched).
cdef int open_into(
    uint8_t *out, const uint8_t *ciphertext, Py_ssize_t length,
    const uint8_t *ad, Py_ssize_t ad_length, uint64_t counter, const uint8_t *key) noexcept nogil


cdef inline void write_nonce(uint8_t *nonce, uint64_t counter) noexcept nogil:
    """Four zero bytes and the counter in little-endian."""
    cdef uint64_t word = htole64(counter)
    memset(nonce, 0, 4)
    memcpy(nonce + 4, &word, 8)
