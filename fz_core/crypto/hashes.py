"""BLAKE2s and HMAC over it, at handshake rate (RFC 7693, RFC 2104).

Not here: HMAC-SHA-1 of STUN, which uses `hmac` directly.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer


def blake2s(data: Buffer, key: bytes = b"", size: int = 32) -> bytes:
    """BLAKE2s of `size` bytes, keyed if `key` is given."""
    return hashlib.blake2s(data, key=key, digest_size=size).digest()


def hmac_blake2s(key: bytes, data: Buffer) -> bytes:
    """HMAC with BLAKE2s-256; unlike keyed BLAKE2s this is what Noise's key derivation asks for."""
    return hmac.digest(key, data, "blake2s")
