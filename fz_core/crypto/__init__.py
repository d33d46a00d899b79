"""Keys, AEAD and hashes (floor 0)."""

from fz_core.crypto.compiled import (
    PrivateKey,
    aead_open,
    aead_seal,
    cipher_error,
    cipher_name,
    public_key,
    x25519,
    xaead_open,
    xaead_seal,
)
from fz_core.crypto.hashes import blake2s, hmac_blake2s

__all__ = [
    "PrivateKey",
    "aead_open",
    "aead_seal",
    "blake2s",
    "cipher_error",
    "cipher_name",
    "hmac_blake2s",
    "public_key",
    "x25519",
    "xaead_open",
    "xaead_seal",
]
