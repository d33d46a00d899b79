"""X25519 (RFC 7748) and the key type that keeps a private key in C memory.

Not here: key files and encodings. An all-zero shared secret, the mark of a low-order public key
(RFC 7748 section 6.1), is refused.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t
from libc.string cimport memcpy

from fz_core.crypto cimport sodium

cdef enum:
    LENGTH = 32


cdef class PrivateKey:
    """A 32-byte X25519 private key: redacted in text, not picklable, zeroed when freed."""

    def __init__(self, secret):
        cdef bytes raw = bytes(secret)
        if PyBytes_GET_SIZE(raw) != LENGTH:
            raise ValueError(f"a private key is 32 bytes long, got {len(raw)}")
        memcpy(self._scalar, PyBytes_AS_STRING(raw), LENGTH)
        self.public = PyBytes_FromStringAndSize(NULL, LENGTH)
        sodium.crypto_scalarmult_curve25519_base(<uint8_t *>PyBytes_AS_STRING(self.public), self._scalar)

    def __dealloc__(self):
        sodium.sodium_memzero(self._scalar, LENGTH)

    def __repr__(self):
        return "PrivateKey(redacted)"

    def __reduce__(self):
        raise TypeError("a private key is not picklable: pass its bytes on purpose")

    def __bytes__(self):
        return PyBytes_FromStringAndSize(<char *>self._scalar, LENGTH)

    def __eq__(self, other):
        if not isinstance(other, PrivateKey):
            return NotImplemented
        return sodium.sodium_memcmp(self._scalar, (<PrivateKey>other)._scalar, LENGTH) == 0

    def __hash__(self):
        return hash(self.public)

    cdef bytes exchange(self, const uint8_t *public):
        cdef bytes shared = PyBytes_FromStringAndSize(NULL, LENGTH)
        if sodium.crypto_scalarmult_curve25519(<uint8_t *>PyBytes_AS_STRING(shared), self._scalar, public) != 0:
            return None
        return shared


def x25519(private, bytes public not None):
    """The shared secret; ValueError where it would be all zeros."""
    if PyBytes_GET_SIZE(public) != LENGTH:
        raise ValueError(f"a public key is 32 bytes long, got {len(public)}")
    cdef PrivateKey key = private if isinstance(private, PrivateKey) else PrivateKey(private)
    shared = key.exchange(<const uint8_t *>PyBytes_AS_STRING(public))
    if shared is None:
        raise ValueError("the public key is of low order: the shared secret would be zero")
    return shared


def public_key(private):
    """The public key of a private one."""
    return private.public if isinstance(private, PrivateKey) else PrivateKey(private).public


cdef void wipe(bytes secret) noexcept:
    sodium.sodium_memzero(PyBytes_AS_STRING(secret), <size_t>PyBytes_GET_SIZE(secret))
