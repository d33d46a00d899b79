"""POST to the portal's API past the tunnel: HTTPS on 443 and nowhere else (`spec/binaries.md` §10.4).

A bearer token goes with each request, so no address of another kind is ever contacted, whoever names it.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self
from urllib.parse import SplitResult, urljoin, urlsplit

import trio

from fz_core.driver.names.dns_client import DnsFailed

if TYPE_CHECKING:
    from fz_core.driver.marked_http import MarkedPool

Resolve = Callable[[str], Awaitable[Sequence[str]]]
HTTPS_PORT = 443
REDIRECTS = (301, 302, 307, 308)
MAX_REDIRECTS = 5
TIMEOUT = 30.0
REQUEST_BUDGET = 120.0
MAX_REPLY_BYTES = 64 * 1024
MAX_HOSTS = 8


class BadUrl(ValueError):
    """A place where no token may be sent."""


class Reply(NamedTuple):
    """The head of an answer; missing headers are empty."""

    status: int
    location: str
    retry_after: str


class HttpsClient:
    """Connections to the few hosts of one upload pass, closed at the end of the context."""

    def __init__(
        self, resolve: Resolve, *, marked: bool, tls: ssl.SSLContext | None = None, port: int = HTTPS_PORT
    ) -> None:
        self._resolve, self._marked, self._tls, self._port = resolve, marked, tls, port
        self._pools: dict[str, MarkedPool] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with trio.CancelScope(shield=True):
            await self._stack.aclose()

    async def post(self, url: str, token: str, body: bytes) -> Reply:
        """The final answer; redirects that may be followed are. BadUrl, OSError or TooSlowError."""
        with trio.fail_after(REQUEST_BUDGET):
            for _ in range(MAX_REDIRECTS):
                reply = await self._post(url, token, body)
                if reply.status not in REDIRECTS or not reply.location:
                    return reply
                url = _join(url, reply.location)
            reply = await self._post(url, token, body)
            if reply.status in REDIRECTS:
                raise BadUrl(f"more than {MAX_REDIRECTS} redirects")
            return reply

    async def _post(self, url: str, token: str, body: bytes) -> Reply:
        parts = self._check(url)
        pool = await self._pool(parts.hostname or "")
        headers = [
            ("Host", parts.netloc),
            ("Authorization", f"Bearer {token}"),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
        ]
        timeouts = dict.fromkeys(("connect", "read", "write", "pool"), TIMEOUT)
        async with pool.post(url, headers, body, timeouts) as response:
            found = {name.lower(): value.decode("latin-1") for name, value in response.headers}
            size = 0
            async for part in response.aiter_stream():  # to the end, so that the connection can be used again
                size += len(part)
                if size > MAX_REPLY_BYTES:
                    break
        return Reply(response.status, found.get(b"location", ""), found.get(b"retry-after", ""))

    def _check(self, url: str) -> SplitResult:
        try:
            parts = urlsplit(url)
            port = parts.port or HTTPS_PORT
        except ValueError:
            raise BadUrl("the upload URL is malformed") from None
        if parts.scheme != "https" or not parts.hostname or port != self._port or not url.isascii():
            raise BadUrl(f"flow logs go to https on port {self._port} only, not to {parts.scheme} on {port}")
        if "@" in parts.netloc:
            raise BadUrl("the upload URL has credentials in it")
        return parts

    async def _pool(self, host: str) -> MarkedPool:
        if host in self._pools:
            return self._pools[host]
        if len(self._pools) >= MAX_HOSTS:
            raise BadUrl("redirected to too many hosts")
        try:
            addresses = await self._resolve(host)
        except DnsFailed as error:
            raise OSError(str(error)) from None
        if not addresses:
            raise OSError(f"no addresses for {host}")
        if self._tls is None:  # reads files
            self._tls = await trio.to_thread.run_sync(ssl.create_default_context)
        marked_pool = await trio.to_thread.run_sync(_marked_pool)
        pool = self._pools[host] = marked_pool(addresses, self._marked, self._tls, 1)
        self._stack.push_async_callback(pool.aclose)
        return pool


def _marked_pool() -> type[MarkedPool]:
    """Imported in a thread when there is something to send: httpcore takes a while."""
    from fz_core.driver.marked_http import MarkedPool

    return MarkedPool


def _join(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:
        raise BadUrl("redirected to a malformed URL") from None
