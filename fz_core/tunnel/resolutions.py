"""Name look-ups a gateway has under way for its clients, bounded per client (`spec/tunnel.md` §15.1, §24)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_PER_CLIENT = 256
RENEWAL = "renewal"


@dataclass(slots=True)
class Resolution:
    """One look-up: who asked, for which resource and name, with which proxy addresses.

    `legacy` is the portal message to finish afterwards, or `RENEWAL`; without one the client gets a domain status.
    """

    client_id: str
    resource_id: str
    domain: str
    proxy_ips: tuple[bytes, ...]
    legacy: Any = None


class Resolutions:
    """Look-ups by token. A client's repeated question joins the one under way."""

    def __init__(self) -> None:
        self._by_token: dict[int, Resolution] = {}
        self._tokens: dict[tuple[str, str, str], int] = {}
        self._per_client: dict[str, int] = {}
        self._next_token = 0

    def __len__(self) -> int:
        return len(self._by_token)

    def begin(self, resolution: Resolution) -> int | None:
        """Register a look-up: its token; 0 if it joined another, None if the client has too many."""
        key = (resolution.client_id, resolution.resource_id, resolution.domain)
        token = self._tokens.get(key)
        if token is not None and resolution.legacy is None and self._by_token[token].legacy is None:
            self._by_token[token].proxy_ips = resolution.proxy_ips
            return 0
        under_way = self._per_client.get(resolution.client_id, 0)
        if under_way >= MAX_PER_CLIENT:
            return None
        token = self._next_token = self._next_token + 1
        self._by_token[token] = resolution
        self._tokens[key] = token
        self._per_client[resolution.client_id] = under_way + 1
        return token

    def end(self, token: int) -> Resolution | None:
        """The look-up is over; what it was for, None if unknown."""
        resolution = self._by_token.pop(token, None)
        if resolution is None:
            return None
        key = (resolution.client_id, resolution.resource_id, resolution.domain)
        if self._tokens.get(key) == token:
            del self._tokens[key]
        self._per_client[resolution.client_id] -= 1
        if not self._per_client[resolution.client_id]:
            del self._per_client[resolution.client_id]
        return resolution
