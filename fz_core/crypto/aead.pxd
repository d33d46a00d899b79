# Lengths and the nonce of ChaCha20-Poly1305. At packet rate, see cipher.pxd.

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy, memset

cdef extern from "endian.h" nogil:
    uint64_t htole64(uint64_t value)

cdef enum:
    KEY_LENGTH = 32
    NONCE_LENGTH = 12
    TAG_LENGTH = 16


cdef inline void write_nonce(uint8_t *nonce, uint64_t counter) noexcept nogil:
    """Four zero bytes and the counter in little-endian."""
    cdef uint64_t word = htole64(counter)
    memset(nonce, 0, 4)
    memcpy(nonce + 4, &word, 8)
