"""Who may use a relay: passwords from one secret, nonces per client socket (spec/relay.md section 4).

The relay stores no user: a user name carries its expiry, its password follows from it and the secret.
"""

from __future__ import annotations

import base64
import hashlib
import uuid
from collections.abc import Callable

from fz_core.packet import Address
from fz_core.stun import Message, long_term_key

REALM = "firezone"
USES_PER_NONCE = 10_000
MAX_NONCES = 65_536
MAX_U64 = 2**64 - 1


def relay_password(expires_at: int, salt: str, stamp_secret: str) -> str:
    """The password of the user `<expires_at>:<salt>`."""
    digest = hashlib.sha256(f"{expires_at}:{stamp_secret}:{salt}".encode()).digest()
    return base64.b64encode(digest).decode().rstrip("=")


def relay_credentials(expires_at: int, salt: str, stamp_secret: str) -> tuple[str, str]:
    """(user name, password) as a portal hands them out; `expires_at` is unix seconds."""
    return f"{expires_at}:{salt}", relay_password(expires_at, salt, stamp_secret)


def relay_id(stamp_secret: str) -> str:
    """The id under which the portal knows the relay that holds this secret."""
    return str(uuid.UUID(bytes=hashlib.sha256(stamp_secret.encode()).digest()[:16], version=4))


class Authenticator:
    """Checks requests, and finds the key to sign replies with."""

    def __init__(self, stamp_secret: str, random_bytes: Callable[[int], bytes], unix_epoch: float) -> None:
        self._secret = stamp_secret
        self._random_bytes = random_bytes
        self._unix_epoch = unix_epoch
        self._nonces: dict[Address, tuple[uuid.UUID, int]] = {}
        self._proven: dict[Address, tuple[uuid.UUID, int]] = {}

    def key_for(self, username: str) -> bytes | None:
        """The key of a user, expired or not; None if the name has not the right form."""
        parsed = parse_username(username)
        if parsed is None:
            return None
        return long_term_key(username, REALM, relay_password(parsed[0], parsed[1], self._secret))

    def nonce_for(self, client: Address) -> str:
        """The nonce to challenge this socket with: its present one while that has uses left."""
        table = self._proven if client in self._proven else self._nonces
        known = table.pop(client, None)
        if known is None or known[1] <= 0:
            known = (uuid.UUID(bytes=self._random_bytes(16), version=4), USES_PER_NONCE)
        _put(table, client, known)
        return str(known[0])

    def check(self, message: Message, client: Address, now: float) -> int | None:
        """None if the request is good, else the error code, in the order clients rely on."""
        username, nonce = message.username, parse_nonce(message.nonce)
        if not message.has_integrity or username is None or nonce is None:
            return 401
        if not self._use_nonce(client, nonce):
            return 438
        parsed, key = parse_username(username), self.key_for(username)
        if parsed is None or key is None or parsed[0] < int(now + self._unix_epoch):
            return 401
        if not message.check_integrity(key):
            return 401
        self._prove(client)
        return None

    def _use_nonce(self, client: Address, nonce: uuid.UUID) -> bool:
        table = self._proven if client in self._proven else self._nonces
        known = table.get(client)
        if known is None or known[0] != nonce or known[1] <= 0:
            return False
        table[client] = (known[0], known[1] - 1)
        return True

    def _prove(self, client: Address) -> None:
        """Who has shown a password is not displaced by those who have not, however many they are."""
        known = self._nonces.pop(client, None) or self._proven.pop(client, None)
        if known is not None:
            _put(self._proven, client, known)


def _put(table: dict[Address, tuple[uuid.UUID, int]], client: Address, value: tuple[uuid.UUID, int]) -> None:
    """As the newest; the oldest make room."""
    while len(table) >= MAX_NONCES:
        del table[next(iter(table))]
    table[client] = value


def parse_username(username: str) -> tuple[int, str] | None:
    """(expiry, salt) of `<expiry>:<salt>`."""
    expiry, colon, salt = username.partition(":")
    if not colon or ":" in salt or not (expiry.isascii() and expiry.isdigit() and len(expiry) <= 20):
        return None
    return (int(expiry), salt) if int(expiry) <= MAX_U64 else None


def parse_nonce(text: str | None) -> uuid.UUID | None:
    """A UUID in any common spelling."""
    try:
        return None if text is None else uuid.UUID(text)
    except ValueError:
        return None
