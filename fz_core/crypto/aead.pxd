# ChaCha20-Poly1305 at packet rate: no GIL, no allocation, caller's memory.

from libc.stdint cimport uint8_t, uint64_t

cdef enum:
    KEY_LENGTH = 32
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
