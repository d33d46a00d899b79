# ChaCha20-Poly1305 at packet rate: no GIL, no associated data, caller's memory, one of two libraries.

from libc.stdint cimport uint8_t, uint64_t

# One direction of one session, for one thread at a time. All zeros is an invalid key.
ctypedef struct AeadKey:
    uint8_t key[32]
    Py_ssize_t libcrypto_from   # the shortest plaintext that libcrypto gets; the rest is libsodium's
    void *context               # libcrypto's, made for the first such plaintext; NULL until then

# Copies the key and takes no other memory. `k` holds no key: it is fresh, or wiped.
cdef void aead_init(AeadKey *k, const uint8_t *key) noexcept nogil

# Frees the context and zeroes everything; harmless when repeated, and on all zeros.
cdef void aead_wipe(AeadKey *k) noexcept nogil

# `length` is below 2^31 - 16. Writes length + 16 bytes to `out`, which is `plaintext` itself or does not overlap it.
cdef void aead_seal(
    AeadKey *k, uint8_t *out, const uint8_t *plaintext, Py_ssize_t length, uint64_t counter) noexcept nogil

# `length` includes the tag and is at least 16. Writes length - 16 bytes to `out`, which is `ciphertext` itself or
# does not overlap it. Returns 0, or -1 for a forgery: then `out` is zeroed.
cdef int aead_open(
    AeadKey *k, uint8_t *out, const uint8_t *ciphertext, Py_ssize_t length, uint64_t counter) noexcept nogil
