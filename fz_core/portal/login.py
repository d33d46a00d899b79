"""Where and how a peer knocks at the portal (`spec/portal-protocol.md` §1)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlencode, urlsplit, urlunsplit

SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
DEFAULT_PORTS = {"http": 80, "ws": 80, "https": 443, "wss": 443}
PATHS = {
    "client": ("client", "v2", "websocket"),
    "gateway": ("gateway", "v2", "websocket"),
    "relay": ("relay", "websocket"),
}
HYPHENATED = "-".join(f"[0-9a-fA-F]{{{n}}}" for n in (8, 4, 4, 4, 12))
UUID_SPELLINGS = tuple(
    re.compile(form) for form in ("[0-9a-fA-F]{32}", HYPHENATED, rf"\{{{HYPHENATED}\}}", f"urn:uuid:{HYPHENATED}")
)


class BadUrl(ValueError):
    """The API URL cannot be dialled."""


@dataclass(frozen=True, slots=True)
class Login:
    """Everything a connection attempt needs. `role` is client, gateway or relay, and the topic.

    `params` are the query parameters but for `public_key`, which is given at each attempt.
    """

    role: str
    api_url: str
    user_agent: str
    params: Mapping[str, str]
    token: str | None = field(default=None, repr=False)

    def url(self, public_key: str | None = None) -> str:
        """The WebSocket URL. BadUrl for a scheme that is not http, https, ws or wss."""
        parts = urlsplit(self.api_url)
        scheme = SCHEMES.get(parts.scheme)
        if scheme is None:
            raise BadUrl(f"API URL {self.api_url!r} has the scheme {parts.scheme!r}, use ws, wss, http or https")
        path = "/".join((parts.path.rstrip("/"), *PATHS[self.role]))
        params = dict(self.params)
        if public_key is not None:
            params["public_key"] = public_key
        return urlunsplit((scheme, parts.netloc, path, urlencode(params), ""))

    def endpoint(self) -> tuple[str, int, bool]:
        """Host, TCP port and whether TLS is spoken. Without an explicit port it is 443 for every scheme,
        and a scheme's default port counts as not explicit."""
        parts = urlsplit(self.url())
        port = parts.port
        if port is None or port == DEFAULT_PORTS[urlsplit(self.api_url).scheme]:
            port = 443
        return parts.hostname or "", port, parts.scheme == "wss"

    def headers(self) -> list[tuple[str, str]]:
        """Headers besides those of the WebSocket handshake."""
        headers = [("User-Agent", self.user_agent)]
        if self.token is not None:
            headers.append(("X-Authorization", f"Bearer {''.join(self.token.split())}"))
        return headers


def external_id(device_id: str) -> str:
    """The device id as the portal hears it: a UUID in any spelling becomes the SHA-256 of its text."""
    is_uuid = any(spelling.fullmatch(device_id) for spelling in UUID_SPELLINGS)
    return hashlib.sha256(device_id.encode()).hexdigest() if is_uuid else device_id


def user_agent(os_name: str, os_version: str, component: str, version: str, arch: str, kernel: str) -> str:
    """`Debian/12 gateway/1.6.0 (x86_64; 6.1.0)`, ASCII only; spaces in the OS would move the fields."""
    text = f"{os_name.replace(' ', '')}/{os_version.replace(' ', '')} {component}/{version} ({arch}; {kernel})"
    return text.encode("ascii", "ignore").decode()
