"""One DoH server and the connections to it (RFC 8484, GET; `spec/tunnel.md` §10).

httpcore takes long to import, so this module is imported when the first DoH server is known. Not here:
which servers there are, and when one is ready (`doh`).
"""

from __future__ import annotations

import base64
import ssl
from collections.abc import Sequence
from urllib.parse import urlsplit

import httpcore
import trio

from fz_core.dns import Query, is_reply_to
from fz_core.driver.marked_http import HAS_HTTP2, MarkedBackend, as_os_errors, connect_marked
from fz_core.driver.names.dns_client import MAX_MESSAGE, DnsFailed

MAX_CONNECTIONS = 8
CONTENT_TYPE = b"application/dns-message"


async def open_server(
    url: str, host: str, port: int, addresses: Sequence[str], marked: bool, tls: ssl.SSLContext | None
) -> DohServer:
    """A server with one connection that stands. OSError if there is none."""
    if tls is None:  # reads files
        tls = await trio.to_thread.run_sync(ssl.create_default_context)
    tls.set_alpn_protocols(["h2", "http/1.1"] if HAS_HTTP2 else ["http/1.1"])
    with as_os_errors():
        plain = await connect_marked(addresses, port, marked, None)
        first = await plain.start_tls(tls, host)
    return DohServer(url, MarkedBackend(addresses, marked, first), tls)


class DohServer:
    """The connections to one server; as a context, it counts its users."""

    def __init__(self, url: str, backend: MarkedBackend, tls: ssl.SSLContext) -> None:
        self._url, self._backend = url, backend
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls, max_connections=MAX_CONNECTIONS, http2=HAS_HTTP2, network_backend=backend
        )
        self.users = 0
        self.is_retired = False

    def __enter__(self) -> None:
        self.users += 1

    def __exit__(self, *_: object) -> None:
        self.users -= 1

    async def aclose(self) -> None:
        """Close all connections; harmless when repeated."""
        with trio.CancelScope(shield=True):
            await self._backend.aclose()
            await self._pool.aclose()

    async def ask(self, query: Query) -> bytes:
        """One query; DnsFailed or OSError. A kept connection may have ended just now, so a second one is tried."""
        with as_os_errors():
            try:
                return await self._get(query)
            except (httpcore.ReadError, httpcore.WriteError, httpcore.RemoteProtocolError):
                return await self._get(query)

    async def _get(self, query: Query) -> bytes:
        encoded = base64.urlsafe_b64encode(query.data).rstrip(b"=").decode()
        headers = [("Host", urlsplit(self._url).netloc), ("Accept", CONTENT_TYPE.decode())]
        async with self._pool.stream("GET", f"{self._url}?dns={encoded}", headers=headers) as response:
            kind = next((v for name, v in response.headers if name.lower() == b"content-type"), b"nothing")
            if response.status != 200:
                raise DnsFailed(f"{self._url} answered with status {response.status}")
            if kind != CONTENT_TYPE:
                raise DnsFailed(f"{self._url} answered with content type {kind[:80]!r}")
            body = bytearray()
            async for part in response.aiter_stream():
                body += part
                if len(body) > MAX_MESSAGE:
                    raise DnsFailed(f"{self._url} answered with more than {MAX_MESSAGE} bytes")
        if not is_reply_to(query, bytes(body)):
            raise DnsFailed(f"{self._url} answered another question")
        return bytes(body)
