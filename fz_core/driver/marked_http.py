"""Connections for an HTTP client that stay outside the tunnel from their first packet on.

`httpx` and `httpcore` set socket options only once a connection stands, which is too late for a mark, and
they ask the host's resolver. Here, addresses are given, and sockets are marked before they are connected.

httpcore takes long to import, so this module is imported when the first HTTPS server is contacted.
"""

from __future__ import annotations

import importlib.util
import select
import ssl
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpcore
import trio

from fz_core.driver.portal import dial
from fz_core.linux import MARK

Socket = trio.SocketStream
Options = Iterable[Any] | None
HAS_HTTP2 = importlib.util.find_spec("h2") is not None


class HttpFailed(OSError):
    """A connection ended, or what came over it was not HTTP."""


class MarkedPool:
    """Up to `size` connections to one server. Its errors are OSErrors."""

    def __init__(self, addresses: Sequence[str], marked: bool, tls: ssl.SSLContext, size: int) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls, max_connections=size, http2=HAS_HTTP2, network_backend=MarkedBackend(addresses, marked)
        )

    @asynccontextmanager
    async def post(
        self, url: str, headers: list[tuple[str, str]], body: bytes, timeouts: dict[str, float]
    ) -> AsyncIterator[httpcore.Response]:
        """The answer, whose body is read within the context."""
        with as_os_errors():
            async with self._pool.stream(
                "POST", url, headers=headers, content=body, extensions={"timeout": timeouts}
            ) as response:
                yield response

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.aclose()


class MarkedBackend(httpcore.AsyncNetworkBackend):
    """Dials `addresses` whatever name is asked for; `first` is a connection that stands already."""

    def __init__(self, addresses: Sequence[str], marked: bool, first: MarkedStream | None = None) -> None:
        self._addresses, self._marked, self._first = addresses, marked, first

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Options = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection to the first address that answers."""
        if self._first is not None:
            stream, self._first = self._first, None
            return stream
        return await connect_marked(self._addresses, port, self._marked, timeout)

    async def sleep(self, seconds: float) -> None:
        """As trio does."""
        await trio.sleep(seconds)

    async def aclose(self) -> None:
        """Close the connection nobody asked for."""
        if self._first is not None:
            stream, self._first = self._first, None
            await stream.aclose()


class MarkedStream(httpcore.AsyncNetworkStream):
    """A TCP or TLS connection as httpcore wants it."""

    def __init__(self, plain: Socket, tls: trio.SSLStream[Socket] | None = None) -> None:
        self._plain, self._tls = plain, tls
        self._stream: trio.abc.Stream = plain if tls is None else tls

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Bytes from the server; none at the end."""
        with _errors(httpcore.ReadError, httpcore.ReadTimeout, timeout):
            return bytes(await self._stream.receive_some(max_bytes))

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Bytes to the server."""
        with _errors(httpcore.WriteError, httpcore.WriteTimeout, timeout):
            await self._stream.send_all(buffer)

    async def aclose(self) -> None:
        """At once: the server needs no goodbye."""
        await trio.aclose_forcefully(self._plain)

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> MarkedStream:
        """Encrypt; a connection that is encrypted already stays as it is."""
        if self._tls is not None:
            return self
        name = server_hostname.strip("[]") if server_hostname else None  # an IPv6 address has them in URLs
        tls = trio.SSLStream(self._plain, ssl_context, server_hostname=name, https_compatible=True)
        try:
            with _errors(httpcore.ConnectError, httpcore.ConnectTimeout, timeout):
                await tls.do_handshake()
        except BaseException:
            await self.aclose()
            raise
        return MarkedStream(self._plain, tls)

    def get_extra_info(self, info: str) -> Any:
        """What httpcore asks for: the negotiated protocol, and whether an idle connection has ended."""
        if info == "ssl_object":
            return self._tls  # knows selected_alpn_protocol()
        if info == "is_readable":
            poll = select.poll()
            poll.register(self._plain.socket.fileno(), select.POLLIN)
            return bool(poll.poll(0))
        return None


async def connect_marked(addresses: Sequence[str], port: int, marked: bool, timeout: float | None) -> MarkedStream:
    """Try all addresses at once. httpcore.ConnectError if none answers."""
    with _errors(httpcore.ConnectError, httpcore.ConnectTimeout, timeout):
        return MarkedStream(await dial(addresses, port, MARK if marked else None))


@contextmanager
def as_os_errors() -> Iterator[None]:
    """httpcore's errors as `HttpFailed`, whose users need not import httpcore."""
    try:
        yield
    except httpcore.LocalProtocolError:
        raise HttpFailed("the request could not be written") from None  # the error might quote our headers
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
        raise HttpFailed(" ".join(str(error).split()) or type(error).__name__) from None


@contextmanager
def _errors(kind: type[Exception], timeout_kind: type[Exception], timeout: float | None) -> Iterator[None]:
    """trio's and the kernel's errors as httpcore's."""
    try:
        with trio.fail_after(float("inf") if timeout is None else timeout):
            yield
    except trio.TooSlowError as error:
        raise timeout_kind("no answer in time") from error
    except (trio.BrokenResourceError, trio.ClosedResourceError, OSError, ssl.SSLError) as error:
        raise kind(str(error.__cause__ or error)) from error
