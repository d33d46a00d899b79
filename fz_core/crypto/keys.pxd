# X25519 keys in C memory.

cimport cython
from libc.stdint cimport uint8_t


@cython.final
cdef class PrivateKey:
    cdef uint8_t _scalar[32]
    cdef readonly bytes public

    # The shared secret, or None where it would be all zeros.
    cdef bytes exchange(self, const uint8_t *public)

# Overwrite a fresh bytes object nobody else holds, before it is freed.
cdef void wipe(bytes secret) noexcept
