"""Secrets that the portal derives, the same for both ends of a pair (`spec/portal-protocol.md` §8.4 to §8.6).

All are stable while the keys they derive from are.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

from fz_core.portal.types import IceCredentials
from fz_core.turn import relay_credentials

FAR_FUTURE = 2_145_916_800
"""2038-01-01Z: expiry of what does not expire."""


def ice_credentials(
    initiator_id: str, initiator_key: str, receiver_id: str, receiver_key: str
) -> tuple[IceCredentials, IceCredentials]:
    """Of the initiator and of the receiver; keys in Base64."""
    seed = f"{initiator_id}:{initiator_key}:{receiver_id}:{receiver_key}"
    h = base64.b32encode(hashlib.sha256(seed.encode()).digest()).decode().rstrip("=").lower()
    return IceCredentials(h[0:4], h[4:26]), IceCredentials(h[26:30], h[30:52])


def preshared_key(
    client_id: str, client_key: str, client_base: bytes, gateway_id: str, gateway_key: str, gateway_base: bytes
) -> bytes:
    """WireGuard's preshared key of a client and a gateway."""
    salt = f"WG_PSK|C_ID:{client_id}|G_ID:{gateway_id}|C_PK:{client_key}|G_PK:{gateway_key}"
    return hashlib.pbkdf2_hmac("sha256", client_base + gateway_base, salt.encode(), 1)


def client_preshared_key(
    initiator_id: str, initiator_key: str, initiator_base: bytes, target_id: str, target_key: str, target_base: bytes
) -> bytes:
    """WireGuard's preshared key of two clients."""
    salt = f"WG_PSK_CC|CA_ID:{initiator_id}|CB_ID:{target_id}|CA_PK:{initiator_key}|CB_PK:{target_key}"
    return hashlib.pbkdf2_hmac("sha256", initiator_base + target_base, salt.encode(), 1)


def turn_credentials(public_key: str, expires_at: int, stamp_secret: str) -> tuple[str, str]:
    """User name and password of a peer (by its Base64 key) at a relay."""
    salt = base64.b64encode(hashlib.sha256(public_key.encode()).digest()).decode().rstrip("=")
    return relay_credentials(expires_at, salt, stamp_secret)


def ingest_token(claims: dict[str, Any], key: bytes) -> str:
    """A JSON Web Token, HS256."""
    signed = f"{_segment({'alg': 'HS256', 'typ': 'JWT'})}.{_segment(claims)}"
    return f"{signed}.{_url(hmac.digest(key, signed.encode(), 'sha256'))}"


def token_hash(token: str) -> str:
    """What is kept of a token: hex SHA-256 of its text without whitespace."""
    return hashlib.sha256("".join(token.split()).encode("utf-8", "surrogateescape")).hexdigest()


def _url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _segment(value: dict[str, Any]) -> str:
    return _url(json.dumps(value, separators=(",", ":")).encode())
