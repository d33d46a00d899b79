# cython: auto_pickle=False
"""ChaCha20-Poly1305 at packet rate (RFC 8439 section 2.8), by libsodium or by OpenSSL's libcrypto.

libsodium is always there. libcrypto.so.3 is looked for when the program runs, checked against libsodium, and
preferred where it seals a full packet at least 10 % faster; `FZ_CIPHER=libsodium` or `FZ_CIPHER=libcrypto` decides
instead. Short packets are libsodium's in any case: starting over with another nonce costs libcrypto 0.2 us.

Not here: handshakes and associated data of the protocol (`aead.pyx`), counting nonces (`wireguard/session.pyx`).
"""

import os

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp, memcpy, memset
from posix.dlfcn cimport RTLD_LOCAL, RTLD_NOW, dlopen, dlsym
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from fz_core.crypto cimport sodium
from fz_core.crypto.aead cimport KEY_LENGTH, NONCE_LENGTH, TAG_LENGTH, write_nonce

cdef enum:
    EVP_CTRL_AEAD_GET_TAG = 0x10
    EVP_CTRL_AEAD_SET_TAG = 0x11
    PACKET_LENGTH = 1280           # what the choice is measured with
    MAX_LENGTH = 65535             # of an IP packet
    MEASURED_ROUNDS = 9
    MEASURED_PACKETS = 8           # per round

# Measured with libsodium 1.0.18 and OpenSSL 3.0 under AVX-512: libcrypto takes a third longer for 64 bytes, about
# the same from 128 (between 20 % less and 6 % more from 192 to 512), and 30 % less from 640.
cdef Py_ssize_t LIBCRYPTO_FROM = 192
cdef Py_ssize_t NEVER = <Py_ssize_t>1 << 62
cdef double WORTHWHILE = 1.10

if sodium.sodium_init() < 0:
    raise ImportError("libsodium failed to initialise: check that the system can supply randomness")

cdef str VARIABLE = "FZ_CIPHER"
cdef str LIBSODIUM = "libsodium"
cdef str LIBCRYPTO = "libcrypto"

# The part of OpenSSL 3's <openssl/evp.h> that is used; EVP_CIPHER and EVP_CIPHER_CTX are opaque.
ctypedef struct Libcrypto:
    const void *cipher
    void *(*fetch)(void *library, const char *algorithm, const char *properties) noexcept nogil
    void *(*new_context)() noexcept nogil
    void (*free_context)(void *context) noexcept nogil
    int (*init)(
        void *context, const void *cipher, void *engine, const uint8_t *key, const uint8_t *nonce, int is_sealing
    ) noexcept nogil
    int (*update)(void *context, uint8_t *out, int *written, const uint8_t *data, int length) noexcept nogil
    int (*final)(void *context, uint8_t *out, int *written) noexcept nogil
    int (*ctrl)(void *context, int command, int length, void *data) noexcept nogil

cdef Libcrypto libcrypto           # complete, or cipher is NULL; written while this module is imported only
cdef Py_ssize_t chosen_from = NEVER
cdef str chosen = LIBSODIUM
cdef str trouble = None


def cipher_name():
    """The library that full packets are sealed and opened with: "libsodium" or "libcrypto"."""
    return chosen


def cipher_error():
    """Why FZ_CIPHER could not be followed, in one line; None if it was, or is unset."""
    return trouble


def cipher_libraries():
    """The libraries there are."""
    return (LIBSODIUM,) if libcrypto.cipher == NULL else (LIBSODIUM, LIBCRYPTO)


def measure_cipher(str library not None, Py_ssize_t length, int packets):
    """Mean nanoseconds to seal and to open one packet of `length` bytes, at most 1280, without the GIL."""
    cdef PacketCipher cipher = PacketCipher(bytes(KEY_LENGTH), library)
    cdef uint8_t plain[PACKET_LENGTH]
    cdef uint8_t sealed[PACKET_LENGTH + TAG_LENGTH]
    cdef double seal_ns, open_ns
    if not 0 <= length <= PACKET_LENGTH or packets < 1:
        raise ValueError(f"{packets} packets of {length} bytes: measured is with 1 or more of 0 to {PACKET_LENGTH} bytes")
    memset(plain, 0, sizeof(plain))
    with nogil:
        seal_ns = _seal_ns(&cipher._key, sealed, plain, length, packets)
        open_ns = _open_ns(&cipher._key, plain, sealed, length + TAG_LENGTH, packets)
    return seal_ns, open_ns


cdef class PacketCipher:
    """An `AeadKey` for Python: what packets go through, and any nonce and associated data. For tests and benchmarks.

    With a library's name, that one does everything; ValueError where it is missing.
    """

    cdef AeadKey _key

    def __cinit__(self):
        memset(&self._key, 0, sizeof(self._key))

    def __init__(self, bytes key not None, library=None):
        if library is not None and library not in cipher_libraries():
            raise ValueError(f"{library!r} is not among the libraries of this process: {', '.join(cipher_libraries())}")
        if PyBytes_GET_SIZE(key) != KEY_LENGTH:
            raise ValueError(f"key is {len(key)} bytes long, pass {KEY_LENGTH}")
        aead_wipe(&self._key)
        aead_init(&self._key, <const uint8_t *>PyBytes_AS_STRING(key))
        if library is not None:
            self._key.libcrypto_from = NEVER if library == LIBSODIUM else 0

    def __dealloc__(self):
        aead_wipe(&self._key)

    @property
    def has_context(self):
        """Whether libcrypto has been given the key."""
        return self._key.context != NULL

    def __reduce__(self):
        raise TypeError("a cipher is not picklable")

    def seal(self, bytes nonce not None, bytes plaintext not None, bytes ad not None=b""):
        """Ciphertext and 16-byte tag, with a 12-byte nonce."""
        _require(nonce, len(plaintext), len(ad))
        out = PyBytes_FromStringAndSize(NULL, len(plaintext) + TAG_LENGTH)
        _seal(
            &self._key, <uint8_t *>PyBytes_AS_STRING(out),
            <const uint8_t *>PyBytes_AS_STRING(plaintext), PyBytes_GET_SIZE(plaintext),
            <const uint8_t *>PyBytes_AS_STRING(ad), PyBytes_GET_SIZE(ad), <const uint8_t *>PyBytes_AS_STRING(nonce))
        return out

    def open(self, bytes nonce not None, bytes ciphertext not None, bytes ad not None=b""):
        """The plaintext, or None for a forgery."""
        _require(nonce, len(ciphertext) - TAG_LENGTH, len(ad))
        out = PyBytes_FromStringAndSize(NULL, len(ciphertext) - TAG_LENGTH)
        failed = _open(
            &self._key, <uint8_t *>PyBytes_AS_STRING(out),
            <const uint8_t *>PyBytes_AS_STRING(ciphertext), PyBytes_GET_SIZE(ciphertext),
            <const uint8_t *>PyBytes_AS_STRING(ad), PyBytes_GET_SIZE(ad), <const uint8_t *>PyBytes_AS_STRING(nonce))
        return None if failed else out

    def seal_into(self, out, plaintext, uint64_t counter):
        """Write ciphertext and tag to the start of `out`, which may begin with `plaintext`; without the GIL."""
        cdef Py_buffer target, source
        PyObject_GetBuffer(out, &target, PyBUF_WRITABLE)
        try:
            PyObject_GetBuffer(plaintext, &source, PyBUF_SIMPLE)
            try:
                if source.len > MAX_LENGTH or target.len < source.len + TAG_LENGTH:
                    raise ValueError(f"{source.len} bytes and the tag do not fit into {target.len}")
                with nogil:
                    aead_seal(&self._key, <uint8_t *>target.buf, <const uint8_t *>source.buf, source.len, counter)
            finally:
                PyBuffer_Release(&source)
        finally:
            PyBuffer_Release(&target)

    def open_into(self, out, ciphertext, uint64_t counter):
        """Write the plaintext to the start of `out`, which may begin with `ciphertext`; False for a forgery."""
        cdef Py_buffer target, source
        cdef int failed
        PyObject_GetBuffer(out, &target, PyBUF_WRITABLE)
        try:
            PyObject_GetBuffer(ciphertext, &source, PyBUF_SIMPLE)
            try:
                if not TAG_LENGTH <= source.len <= MAX_LENGTH or target.len < source.len - TAG_LENGTH:
                    raise ValueError(f"{source.len} bytes cannot be opened into {target.len}")
                with nogil:
                    failed = aead_open(
                        &self._key, <uint8_t *>target.buf, <const uint8_t *>source.buf, source.len, counter)
                return failed == 0
            finally:
                PyBuffer_Release(&source)
        finally:
            PyBuffer_Release(&target)


# the seam

cdef void aead_init(AeadKey *k, const uint8_t *key) noexcept nogil:
    memcpy(k.key, key, KEY_LENGTH)
    k.libcrypto_from = chosen_from
    k.context = NULL


cdef void aead_wipe(AeadKey *k) noexcept nogil:
    if k.context != NULL:
        libcrypto.free_context(k.context)
    sodium.sodium_memzero(k, sizeof(AeadKey))


cdef void aead_seal(
    AeadKey *k, uint8_t *out, const uint8_t *plaintext, Py_ssize_t length, uint64_t counter
) noexcept nogil:
    cdef uint8_t nonce[NONCE_LENGTH]
    write_nonce(nonce, counter)
    _seal(k, out, plaintext, length, NULL, 0, nonce)


cdef int aead_open(
    AeadKey *k, uint8_t *out, const uint8_t *ciphertext, Py_ssize_t length, uint64_t counter
) noexcept nogil:
    cdef uint8_t nonce[NONCE_LENGTH]
    write_nonce(nonce, counter)
    return _open(k, out, ciphertext, length, NULL, 0, nonce)


cdef inline void _seal(
    AeadKey *k, uint8_t *out, const uint8_t *plaintext, Py_ssize_t length,
    const uint8_t *ad, Py_ssize_t ad_length, const uint8_t *nonce
) noexcept nogil:
    cdef void *context = _context(k, length)
    if context != NULL and libcrypto.init(context, NULL, NULL, NULL, nonce, 1) == 1:
        if not _seal_with_libcrypto(context, out, plaintext, length, ad, ad_length):
            # Half done: to encrypt again, in place, would bring the plaintext back.
            memset(out, 0, <size_t>(length + TAG_LENGTH))
        return
    sodium.crypto_aead_chacha20poly1305_ietf_encrypt(
        out, NULL, plaintext, <unsigned long long>length, ad, <unsigned long long>ad_length, NULL, nonce, k.key)


cdef inline int _open(
    AeadKey *k, uint8_t *out, const uint8_t *ciphertext, Py_ssize_t length,
    const uint8_t *ad, Py_ssize_t ad_length, const uint8_t *nonce
) noexcept nogil:
    cdef void *context = _context(k, length - TAG_LENGTH)
    if context != NULL and libcrypto.init(context, NULL, NULL, NULL, nonce, 0) == 1:
        if _open_with_libcrypto(context, out, ciphertext, length - TAG_LENGTH, ad, ad_length):
            return 0
        memset(out, 0, <size_t>(length - TAG_LENGTH))  # it decrypts before it knows
        return -1
    return sodium.crypto_aead_chacha20poly1305_ietf_decrypt(
        out, NULL, NULL, ciphertext, <unsigned long long>length, ad, <unsigned long long>ad_length, nonce, k.key)


# libcrypto

cdef inline void *_context(AeadKey *k, Py_ssize_t length) noexcept nogil:
    """The key's context, if a plaintext of this length is for libcrypto; else NULL, and libsodium does it."""
    if length < k.libcrypto_from:
        return NULL
    if k.context == NULL:
        k.context = _new_context(k.key)
        if k.context == NULL:
            k.libcrypto_from = NEVER
    return k.context


cdef void *_new_context(const uint8_t *key) noexcept nogil:
    cdef void *context = libcrypto.new_context()
    if context != NULL and libcrypto.init(context, libcrypto.cipher, NULL, key, NULL, 1) != 1:
        libcrypto.free_context(context)
        return NULL
    return context


cdef inline bint _seal_with_libcrypto(
    void *context, uint8_t *out, const uint8_t *plaintext, Py_ssize_t length, const uint8_t *ad, Py_ssize_t ad_length
) noexcept nogil:
    cdef int written
    if ad_length > 0 and libcrypto.update(context, NULL, &written, ad, <int>ad_length) != 1:
        return False
    if length > 0 and libcrypto.update(context, out, &written, plaintext, <int>length) != 1:
        return False
    return (
        libcrypto.final(context, out + length, &written) == 1
        and libcrypto.ctrl(context, EVP_CTRL_AEAD_GET_TAG, TAG_LENGTH, out + length) == 1
    )


cdef inline bint _open_with_libcrypto(
    void *context, uint8_t *out, const uint8_t *ciphertext, Py_ssize_t size, const uint8_t *ad, Py_ssize_t ad_length
) noexcept nogil:
    cdef int written
    cdef uint8_t tag[TAG_LENGTH]
    memcpy(tag, ciphertext + size, TAG_LENGTH)
    if libcrypto.ctrl(context, EVP_CTRL_AEAD_SET_TAG, TAG_LENGTH, tag) != 1:
        return False
    if ad_length > 0 and libcrypto.update(context, NULL, &written, ad, <int>ad_length) != 1:
        return False
    if size > 0 and libcrypto.update(context, out, &written, ciphertext, <int>size) != 1:
        return False
    return libcrypto.final(context, tag, &written) == 1


# the choice, once, while this module is imported

cdef int _choose() except -1:
    global chosen, chosen_from, trouble
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", LIBSODIUM, LIBCRYPTO):
        trouble = f"{VARIABLE}: {wanted!r} is not a library for ciphers, use {LIBSODIUM} or {LIBCRYPTO}"
    if wanted == LIBSODIUM:
        return 0
    _load()
    if libcrypto.cipher == NULL:
        if wanted == LIBCRYPTO:
            trouble = f"{VARIABLE}: libcrypto.so.3 cannot be used, install libssl3 or unset {VARIABLE}"
        return 0
    if wanted == LIBCRYPTO or _is_libcrypto_worthwhile():
        chosen, chosen_from = LIBCRYPTO, LIBCRYPTO_FROM
    return 0


cdef void _load() noexcept:
    """Fill in `libcrypto`, where there is one and it agrees with libsodium.

    Python's own `ssl` mostly has it loaded already. It stays loaded.
    """
    cdef void *library = dlopen("libcrypto.so.3", RTLD_NOW | RTLD_LOCAL)
    if library == NULL:
        return
    # Through void ** because a cast between object and function pointers is not C.
    (<void **>&libcrypto.fetch)[0] = dlsym(library, "EVP_CIPHER_fetch")
    (<void **>&libcrypto.new_context)[0] = dlsym(library, "EVP_CIPHER_CTX_new")
    (<void **>&libcrypto.free_context)[0] = dlsym(library, "EVP_CIPHER_CTX_free")
    (<void **>&libcrypto.init)[0] = dlsym(library, "EVP_CipherInit_ex")
    (<void **>&libcrypto.update)[0] = dlsym(library, "EVP_CipherUpdate")
    (<void **>&libcrypto.final)[0] = dlsym(library, "EVP_CipherFinal_ex")
    (<void **>&libcrypto.ctrl)[0] = dlsym(library, "EVP_CIPHER_CTX_ctrl")
    if (
        libcrypto.fetch != NULL and libcrypto.new_context != NULL and libcrypto.free_context != NULL and libcrypto.init != NULL
        and libcrypto.update != NULL and libcrypto.final != NULL and libcrypto.ctrl != NULL
    ):
        libcrypto.cipher = libcrypto.fetch(NULL, "ChaCha20-Poly1305", NULL)  # NULL too where FIPS is enforced
        if libcrypto.cipher != NULL and not _agrees():
            libcrypto.cipher = NULL


cdef bint _agrees() noexcept nogil:
    """Whether libcrypto makes what libsodium makes, with a second nonce too, opens it, and refuses a forgery."""
    cdef AeadKey sodiums, other
    cdef uint8_t expected[PACKET_LENGTH + TAG_LENGTH]
    cdef uint8_t packet[PACKET_LENGTH + TAG_LENGTH]
    cdef bint agrees
    cdef uint64_t counter
    _init_both(&sodiums, &other)
    for counter in range(1, 3):
        memset(expected, 1, PACKET_LENGTH)
        memset(packet, 1, PACKET_LENGTH)
        aead_seal(&sodiums, expected, expected, PACKET_LENGTH, counter)
        aead_seal(&other, packet, packet, PACKET_LENGTH, counter)
        agrees = memcmp(packet, expected, sizeof(packet)) == 0
        agrees = agrees and aead_open(&other, packet, packet, <Py_ssize_t>sizeof(packet), counter) == 0
        agrees = agrees and packet[0] == 1 and packet[PACKET_LENGTH - 1] == 1
        expected[PACKET_LENGTH] ^= 1
        agrees = agrees and aead_open(&other, expected, expected, <Py_ssize_t>sizeof(expected), counter) != 0
        if not agrees or other.context == NULL:
            break
    agrees = agrees and other.context != NULL
    aead_wipe(&other)
    return agrees


cdef bint _is_libcrypto_worthwhile() noexcept nogil:
    """Whether it seals full packets at least 10 % faster: the best of several rounds of each, in 0.2 ms."""
    cdef AeadKey sodiums, other
    cdef uint8_t plain[PACKET_LENGTH]
    cdef uint8_t sealed[PACKET_LENGTH + TAG_LENGTH]
    cdef double best = 1e18, best_of_other = 1e18
    cdef int i
    _init_both(&sodiums, &other)
    memset(plain, 0, sizeof(plain))
    _seal_ns(&other, sealed, plain, PACKET_LENGTH, 1)  # makes the context
    for i in range(MEASURED_ROUNDS):
        best = min(best, _seal_ns(&sodiums, sealed, plain, PACKET_LENGTH, MEASURED_PACKETS))
        best_of_other = min(best_of_other, _seal_ns(&other, sealed, plain, PACKET_LENGTH, MEASURED_PACKETS))
    aead_wipe(&other)
    return best >= best_of_other * WORTHWHILE


cdef void _init_both(AeadKey *sodiums, AeadKey *other) noexcept nogil:
    cdef uint8_t key[KEY_LENGTH]
    memset(key, 7, sizeof(key))
    aead_init(sodiums, key)
    aead_init(other, key)
    sodiums.libcrypto_from = NEVER
    other.libcrypto_from = 0


cdef double _seal_ns(
    AeadKey *k, uint8_t *out, const uint8_t *plaintext, Py_ssize_t length, int packets
) noexcept nogil:
    cdef double start = _now_ns()
    cdef int i
    for i in range(packets):
        aead_seal(k, out, plaintext, length, 1)
    return (_now_ns() - start) / packets


cdef double _open_ns(
    AeadKey *k, uint8_t *out, const uint8_t *ciphertext, Py_ssize_t length, int packets
) noexcept nogil:
    cdef double start = _now_ns()
    cdef int i
    for i in range(packets):
        aead_open(k, out, ciphertext, length, 1)
    return (_now_ns() - start) / packets


cdef double _now_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <double>t.tv_sec * 1e9 + <double>t.tv_nsec


cdef int _require(bytes nonce, Py_ssize_t length, Py_ssize_t ad_length) except -1:
    if PyBytes_GET_SIZE(nonce) != NONCE_LENGTH:
        raise ValueError(f"nonce is {len(nonce)} bytes long, pass {NONCE_LENGTH}")
    if not 0 <= length <= MAX_LENGTH or ad_length > MAX_LENGTH:
        raise ValueError(f"{length} bytes and {ad_length} of associated data are no packet")
    return 0


_choose()
