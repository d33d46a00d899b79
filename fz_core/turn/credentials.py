"""Long-term credentials of one relay, as handed out by the portal (spec/connectivity.md section 3.1)."""

from __future__ import annotations

from fz_core.stun import long_term_key
from fz_core.stun.attributes import NONCE, REALM, USERNAME


class Credentials:
    """User name, password, realm, and the nonce once the relay has told one."""

    def __init__(self, username: str, password: str, realm: str) -> None:
        self.username = username
        self.realm = realm
        self.nonce: str | None = None
        self.key = long_term_key(username, realm, password)
        self._password = password

    def matches(self, username: str, password: str) -> bool:
        """Whether these are the credentials given."""
        return self.username == username and self._password == password

    def attributes(self) -> list[tuple[int, bytes]]:
        """USERNAME, REALM and, if known, NONCE, in this order."""
        found = [(USERNAME, self.username.encode()), (REALM, self.realm.encode())]
        if self.nonce is not None:
            found.append((NONCE, self.nonce.encode()))
        return found

    def __repr__(self) -> str:
        return "<Credentials (redacted)>"
