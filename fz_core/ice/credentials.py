"""The name and password of one side of a connection, as handed out by the portal."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Credentials:
    """`ufrag` is public, `password` signs checks (RFC 8445 section 5.3)."""

    ufrag: str
    password: str = field(repr=False)

    @property
    def key(self) -> bytes:
        """The HMAC key: the raw bytes of the password."""
        return self.password.encode()
