# The few libsodium functions used here. Other rooms cimport aead.pxd and keys.pxd instead.

cdef extern from "sodium.h" nogil:
    int sodium_init()
    void sodium_memzero(void *memory, size_t length)
    int sodium_memcmp(const void *a, const void *b, size_t length)

    int crypto_aead_chacha20poly1305_ietf_encrypt(
        unsigned char *out, unsigned long long *out_length,
        const unsigned char *message, unsigned long long length,
        const unsigned char *ad, unsigned long long ad_length,
        const unsigned char *unused, const unsigned char *nonce, const unsigned char *key)
    int crypto_aead_chacha20poly1305_ietf_decrypt(
        unsigned char *out, unsigned long long *out_length, unsigned char *unused,
        const unsigned char *ciphertext, unsigned long long length,
        const unsigned char *ad, unsigned long long ad_length,
        const unsigned char *nonce, const unsigned char *key)
    int crypto_aead_xchacha20poly1305_ietf_encrypt(
        unsigned char *out, unsigned long long *out_length,
        const unsigned char *message, unsigned long long length,
        const unsigned char *ad, unsigned long long ad_length,
        const unsigned char *unused, const unsigned char *nonce, const unsigned char *key)
    int crypto_aead_xchacha20poly1305_ietf_decrypt(
        unsigned char *out, unsigned long long *out_length, unsigned char *unused,
        const unsigned char *ciphertext, unsigned long long length,
        const unsigned char *ad, unsigned long long ad_length,
        const unsigned char *nonce, const unsigned char *key)

    int crypto_scalarmult_curve25519(unsigned char *out, const unsigned char *scalar, const unsigned char *point)
    int crypto_scalarmult_curve25519_base(unsigned char *out, const unsigned char *scalar)
