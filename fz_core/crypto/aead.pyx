"""ChaCha20-Poly1305 with a 64-bit counter nonce, and XChaCha20-Poly1305, over libsodium.

The nonce of the first is four zero bytes and the counter in little-endian (RFC 8439 section 2.8, WireGuard paper
section 5.4.6); the second takes 24 random bytes (draft-irtf-cfrg-xchacha-03). At handshake rate; packets go
through `cipher.pyx`. Not here: key management, and counting nonces, which is the session's duty.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint64_t

from fz_core.crypto cimport sodium

cdef enum:
    XNONCE_LENGTH = 24

if sodium.sodium_init() < 0:
    raise ImportError("libsodium failed to initialise: check that the system can supply randomness")


def aead_seal(bytes key not None, uint64_t counter, plaintext, ad=b""):
    """Ciphertext and 16-byte tag."""
    cdef Py_buffer message, extra
    _require(key, KEY_LENGTH, "key")
    PyObject_GetBuffer(plaintext, &message, PyBUF_SIMPLE)
    try:
        PyObject_GetBuffer(ad, &extra, PyBUF_SIMPLE)
        try:
            out = PyBytes_FromStringAndSize(NULL, message.len + TAG_LENGTH)
            _seal(
                <uint8_t *>PyBytes_AS_STRING(out), <const uint8_t *>message.buf, message.len,
                <const uint8_t *>extra.buf, extra.len, counter, <const uint8_t *>PyBytes_AS_STRING(key))
            return out
        finally:
            PyBuffer_Release(&extra)
    finally:
        PyBuffer_Release(&message)


def aead_open(bytes key not None, uint64_t counter, ciphertext, ad=b""):
    """The plaintext, or None for a forgery."""
    cdef Py_buffer message, extra
    _require(key, KEY_LENGTH, "key")
    PyObject_GetBuffer(ciphertext, &message, PyBUF_SIMPLE)
    try:
        if message.len < TAG_LENGTH:
            return None
        PyObject_GetBuffer(ad, &extra, PyBUF_SIMPLE)
        try:
            out = PyBytes_FromStringAndSize(NULL, message.len - TAG_LENGTH)
            failed = _open(
                <uint8_t *>PyBytes_AS_STRING(out), <const uint8_t *>message.buf, message.len,
                <const uint8_t *>extra.buf, extra.len, counter, <const uint8_t *>PyBytes_AS_STRING(key))
            return None if failed else out
        finally:
            PyBuffer_Release(&extra)
    finally:
        PyBuffer_Release(&message)


def xaead_seal(bytes key not None, bytes nonce not None, bytes plaintext not None, bytes ad not None=b""):
    """Ciphertext and 16-byte tag, with a 24-byte nonce."""
    _require(key, KEY_LENGTH, "key")
    _require(nonce, XNONCE_LENGTH, "nonce")
    out = PyBytes_FromStringAndSize(NULL, len(plaintext) + TAG_LENGTH)
    sodium.crypto_aead_xchacha20poly1305_ietf_encrypt(
        <uint8_t *>PyBytes_AS_STRING(out), NULL,
        <const uint8_t *>PyBytes_AS_STRING(plaintext), <unsigned long long>PyBytes_GET_SIZE(plaintext),
        <const uint8_t *>PyBytes_AS_STRING(ad), <unsigned long long>PyBytes_GET_SIZE(ad),
        NULL, <const uint8_t *>PyBytes_AS_STRING(nonce), <const uint8_t *>PyBytes_AS_STRING(key))
    return out


def xaead_open(bytes key not None, bytes nonce not None, bytes ciphertext not None, bytes ad not None=b""):
    """The plaintext, or None for a forgery."""
    _require(key, KEY_LENGTH, "key")
    _require(nonce, XNONCE_LENGTH, "nonce")
    if len(ciphertext) < TAG_LENGTH:
        return None
    out = PyBytes_FromStringAndSize(NULL, len(ciphertext) - TAG_LENGTH)
    failed = sodium.crypto_aead_xchacha20poly1305_ietf_decrypt(
        <uint8_t *>PyBytes_AS_STRING(out), NULL, NULL,
        <const uint8_t *>PyBytes_AS_STRING(ciphertext), <unsigned long long>PyBytes_GET_SIZE(ciphertext),
        <const uint8_t *>PyBytes_AS_STRING(ad), <unsigned long long>PyBytes_GET_SIZE(ad),
        <const uint8_t *>PyBytes_AS_STRING(nonce), <const uint8_t *>PyBytes_AS_STRING(key))
    return None if failed else out


cdef void _seal(
    uint8_t *out, const uint8_t *plaintext, Py_ssize_t length,
    const uint8_t *ad, Py_ssize_t ad_length, uint64_t counter, const uint8_t *key
) noexcept nogil:
    cdef uint8_t nonce[NONCE_LENGTH]
    write_nonce(nonce, counter)
    sodium.crypto_aead_chacha20poly1305_ietf_encrypt(
        out, NULL, plaintext, <unsigned long long>length, ad, <unsigned long long>ad_length, NULL, nonce, key)


cdef int _open(
    uint8_t *out, const uint8_t *ciphertext, Py_ssize_t length,
    const uint8_t *ad, Py_ssize_t ad_length, uint64_t counter, const uint8_t *key
) noexcept nogil:
    cdef uint8_t nonce[NONCE_LENGTH]
    write_nonce(nonce, counter)
    return sodium.crypto_aead_chacha20poly1305_ietf_decrypt(
        out, NULL, NULL, ciphertext, <unsigned long long>length, ad, <unsigned long long>ad_length, nonce, key)


cdef int _require(bytes value, Py_ssize_t length, str name) except -1:
    if PyBytes_GET_SIZE(value) != length:
        raise ValueError(f"{name} is {len(value)} bytes long, pass {length}")
    return 0
