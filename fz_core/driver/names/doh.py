"""DNS over HTTPS, outside the tunnel (RFC 8484, GET; `spec/tunnel.md` §10).

    doh = DohClient(lambda: system_resolvers)
    nursery.start_soon(doh.run)
    reply = await doh.exchange("https://dns.example/dns-query", query)     # or DnsFailed

A server is made ready in the background: its name is resolved past the tunnel, and one connection opened.
Until then every query fails at once, so that nobody waits for a server that may not exist. Connections the
server closed in between are replaced within the query that finds out.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import structlog
import trio

from fz_core.dns import Query, with_id
from fz_core.driver.names.bootstrap import resolve_host
from fz_core.driver.names.dns_client import DNS_PORT, MAX_IN_FLIGHT, DnsFailed, DnsTimeout, TooBusy
from fz_core.linux import SocketFactory

if TYPE_CHECKING:
    from fz_core.driver.names.doh_server import DohServer

QUERY_TIMEOUT = 5.0
BOOTSTRAP_TIMEOUT = 5.0
MAX_BOOTSTRAPS = 10

log = structlog.get_logger("doh")


class DohClient:
    """Queries to any number of DoH servers. `servers` gives the host's own resolvers, to find those.

    Certificates are checked against the system's roots (or SSL_CERT_FILE) unless `tls` is given. `run` must
    run beside it.
    """

    def __init__(
        self,
        servers: Callable[[], Sequence[bytes]],
        *,
        marked: bool = True,
        tls: ssl.SSLContext | None = None,
        hosts: Path = Path("/etc/hosts"),
        dns_port: int = DNS_PORT,
        sockets: SocketFactory | None = None,
    ) -> None:
        self._servers, self._marked, self._tls, self._sockets = servers, marked, tls, sockets
        self._hosts, self._dns_port = hosts, dns_port
        self._ready: dict[str, DohServer] = {}
        self._starting: set[str] = set()
        self._work, self._todo = trio.open_memory_channel[Callable[[], Awaitable[None]]](math.inf)
        self._scopes: set[trio.CancelScope] = set()
        self._generation = 0
        self._open_servers: set[DohServer] = set()

    async def run(self) -> None:
        """Make servers ready in the background until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                async for job in self._todo:
                    nursery.start_soon(job)
        finally:
            with trio.CancelScope(shield=True):
                await self.aclose()

    @property
    def in_flight(self) -> int:
        """Queries without an answer so far."""
        return len(self._scopes)

    @property
    def is_idle(self) -> bool:
        """Whether no server is being made ready."""
        return not self._starting

    def is_ready(self, url: str) -> bool:
        """Whether queries to this server have a chance."""
        return url in self._ready

    def prepare(self, urls: Iterable[str]) -> None:
        """These are the servers now: make them ready before the first query, and forget all others."""
        urls = tuple(urls)
        for url in [u for u in self._ready if u not in urls]:
            self._retire(url)
        for url in urls:
            if url not in self._ready:
                self._start(url)

    async def exchange(self, url: str, query: bytes) -> bytes:
        """The reply under the query's id. DnsFailed at once while the server is not ready."""
        parsed = Query.parse_untrusted(with_id(query, 0))
        if parsed is None:
            raise DnsFailed("not a DNS query")
        server = self._ready.get(url)
        if server is None:
            self._start(url)
            raise DnsFailed(f"{url} is bootstrapping")
        if len(self._scopes) >= MAX_IN_FLIGHT:
            raise TooBusy(f"{MAX_IN_FLIGHT} DoH queries are under way already")
        reply = await self._ask(url, server, parsed)
        return with_id(reply, int.from_bytes(query[:2], "big"))

    def reset(self) -> None:
        """The network changed: fail what is under way, and make the servers ready again."""
        self._generation += 1
        wanted = {*self._ready, *self._starting}
        self._starting.clear()
        for scope in self._scopes:
            scope.cancel()
        for url in tuple(self._ready):
            self._retire(url)
        for url in wanted:
            self._start(url)

    async def aclose(self) -> None:
        """Close every connection."""
        self._ready.clear()
        for server in tuple(self._open_servers):
            await self._close(server)

    async def _ask(self, url: str, server: DohServer, query: Query) -> bytes:
        scope = trio.CancelScope()
        self._scopes.add(scope)
        try:
            with scope, trio.fail_after(QUERY_TIMEOUT), server:
                return await server.ask(query)
        except trio.TooSlowError:
            self._start(url)  # maybe the path is dead; the old connection serves until the new one stands
            raise DnsTimeout(f"no answer from {url} within {QUERY_TIMEOUT:g} s") from None
        except OSError as error:
            if self._ready.get(url) is server:
                self._retire(url)
            self._start(url)
            raise DnsFailed(f"{url}: {_one_line(error)}") from None
        finally:
            self._scopes.discard(scope)
            self._close_if_unused(server)
        raise DnsFailed("the network was reset")

    def _start(self, url: str) -> None:
        if url not in self._starting and len(self._starting) < MAX_BOOTSTRAPS:
            self._starting.add(url)
            self._work.send_nowait(partial(self._bootstrap, url, self._generation))

    def _retire(self, url: str) -> None:
        server = self._ready.pop(url)
        server.is_retired = True
        self._close_if_unused(server)

    def _close_if_unused(self, server: DohServer) -> None:
        if server.is_retired and not server.users:
            self._work.send_nowait(partial(self._close, server))

    async def _close(self, server: DohServer) -> None:
        self._open_servers.discard(server)
        await server.aclose()

    async def _bootstrap(self, url: str, generation: int) -> None:
        found: DohServer | None = None
        try:
            with trio.fail_after(BOOTSTRAP_TIMEOUT):
                found = await self._open(url)
                self._open_servers.add(found)
            log.debug("DoH server is ready", url=url)
        except trio.TooSlowError:
            log.debug("DoH server is not reachable", url=url, error=f"no answer within {BOOTSTRAP_TIMEOUT:g} s")
        except (DnsFailed, OSError, ValueError) as error:
            log.debug("DoH server is not reachable", url=url, error=_one_line(error))
        if generation != self._generation:  # reset meanwhile: the next bootstrap is under way
            if found is not None:
                await self._close(found)
            return
        self._starting.discard(url)
        if url in self._ready:
            self._retire(url)
        if found is not None:
            self._ready[url] = found

    async def _open(self, url: str) -> DohServer:
        host, port = _endpoint(url)
        addresses = await resolve_host(
            host, self._servers(), self._hosts, port=self._dns_port, marked=self._marked, sockets=self._sockets
        )
        if not addresses:
            raise DnsFailed(f"no addresses for {host}")
        open_server = await trio.to_thread.run_sync(_server_opener)
        return await open_server(url, host, port, addresses, self._marked, self._tls)


def _server_opener() -> Callable[..., Awaitable[DohServer]]:
    """Imported in a thread when there is a DoH server: its HTTP library takes a while."""
    from fz_core.driver.names.doh_server import open_server

    return open_server


def _endpoint(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname or parts.query or not url.isascii():
        raise DnsFailed(f"{url} is no DoH server: use https://host/path")
    return parts.hostname, parts.port or 443


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
