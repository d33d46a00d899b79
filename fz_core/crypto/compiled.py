"""The compiled half of this room, with one clear sentence where it cannot be loaded."""

from __future__ import annotations

try:
    from fz_core.crypto.aead import aead_open, aead_seal, xaead_open, xaead_seal
    from fz_core.crypto.cipher import cipher_error, cipher_name
    from fz_core.crypto.keys import PrivateKey, public_key, x25519
except ModuleNotFoundError as error:
    raise ImportError("fz_core is not compiled: run 'python setup.py build_ext --inplace' or 'make build'") from error
except ImportError as error:
    raise ImportError(f"libsodium cannot be loaded ({error}): run 'apt-get install libsodium23'") from error

__all__ = [
    "PrivateKey",
    "aead_open",
    "aead_seal",
    "cipher_error",
    "cipher_name",
    "public_key",
    "x25519",
    "xaead_open",
    "xaead_seal",
]
