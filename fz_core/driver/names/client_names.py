"""A client's DNS towards the host and the network: servers to ask, and the host pointed at ours.

Queries that the tunnel's name server cannot answer go to an upstream server, past the tunnel or through
it; the host's own name servers are followed while they change. Source: `spec/tunnel.md` §8, §10;
`spec/io.md` §9, §10.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import structlog
import trio

from fz_core.driver.names.bootstrap import resolve_host
from fz_core.driver.names.dns_client import DnsClient, DnsFailed, DnsTimeout
from fz_core.driver.names.doh import DohClient
from fz_core.linux import DnsControl, FileWatch, SocketFactory
from fz_core.packet import Address
from fz_core.tunnel.client import ClientTunnel
from fz_core.tunnel.events import ForwardQuery, TunConfigChanged

LOCAL_TIMEOUT = 5.0
TUNNEL_TIMEOUT = 10.0
FOLLOW_INTERVAL = 5.0
UNWATCHED_FOLLOW_INTERVAL = 5.0
SETTLING = 0.1

log = structlog.get_logger("tunnel")


class ClientNames:
    """`submit` runs a command in the loop's next turn."""

    def __init__(
        self,
        state: ClientTunnel,
        control: DnsControl,
        submit: Callable[[Callable[[float], None]], None],
        sockets: SocketFactory,
    ) -> None:
        self._state, self._control, self._submit, self._sockets = state, control, submit, sockets
        self._client = DnsClient(sockets=sockets)
        self._doh = DohClient(lambda: self._resolvers, sockets=sockets)
        self._look_again = trio.Event()
        self._follow_interval = FOLLOW_INTERVAL
        self._resolvers: tuple[bytes, ...] = ()
        self._own_ips: tuple[bytes, bytes] = (b"", b"")
        self._sentinels: tuple[tuple[str, str], ...] = ()
        self._search_domain: str | None = None
        self._nursery: trio.Nursery | None = None

    async def repair(self) -> None:
        """Undo what a killed process left in the host's DNS, and learn the host's servers."""
        await trio.to_thread.run_sync(self._control.deactivate)
        await self._follow()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry queries and follow the host's servers until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._doh.run)
            nursery.start_soon(self._watch_files)
            task_status.started()
            try:
                while True:
                    with trio.move_on_after(self._follow_interval):
                        await self._look_again.wait()
                    self._look_again = trio.Event()
                    await self._follow()
            finally:
                self._nursery = None

    async def restore(self) -> None:
        """Leave the host's DNS as it was found."""
        await trio.to_thread.run_sync(self._control.deactivate)

    async def apply(self, device: str, config: TunConfigChanged) -> None:
        """Point the host at our sentinels. HostError if it refuses."""
        self._own_ips = (config.ipv4.packed, config.ipv6.packed)
        wanted = (config.sentinels, config.search_domain)
        if wanted == (self._sentinels, self._search_domain):
            return
        self._sentinels, self._search_domain = wanted
        self._doh.prepare(server for _, server in config.sentinels if server.startswith("https:"))
        if not config.sentinels:
            log.warning("No DNS server is known: names of resources cannot be resolved")
        sentinels = [sentinel for sentinel, _ in config.sentinels]
        await trio.to_thread.run_sync(self._control.activate, device, sentinels, config.search_domain)

    def flush_caches(self) -> None:
        """The resources changed: what the host remembers may be wrong now."""
        if self._nursery is not None:
            self._nursery.start_soon(trio.to_thread.run_sync, self._control.flush_caches)

    async def resolve_portal(self, host: str) -> Sequence[str]:
        """Addresses of the portal, whatever the tunnel does with DNS."""
        return await resolve_host(host, self._resolvers, sockets=self._sockets)

    def reset(self) -> None:
        """The network changed: fail what is under way, make DoH servers ready anew, look for other servers."""
        self._client.reset()
        self._doh.reset()
        self._look_again.set()

    def handle(self, query: Any) -> None:
        """Begin the exchange of a `ForwardQuery`; its end is submitted to the loop."""
        if self._nursery is None:
            self._finish(query.token, None)
        else:
            self._nursery.start_soon(self._exchange, query)

    async def _exchange(self, query: ForwardQuery) -> None:
        reply, timed_out = None, False
        try:
            if query.url is not None:
                reply = await self._doh.exchange(query.url, query.payload)
            elif query.server is not None:
                local_ip = self._own_ips[0 if len(query.server) == 4 else 1] if query.via_tunnel else None
                reply = await self._client.exchange(
                    Address(query.server, query.port),
                    query.payload,
                    tcp=query.tcp,
                    timeout=TUNNEL_TIMEOUT if query.via_tunnel else LOCAL_TIMEOUT,
                    local_ip=local_ip,
                    marked=not query.via_tunnel,
                )
        except DnsTimeout as error:
            timed_out = True
            log.debug("DNS query timed out", error=str(error))
        except DnsFailed as error:
            log.debug("DNS query failed", error=str(error))
        self._finish(query.token, reply, timed_out=timed_out)

    def _finish(self, token: int, reply: bytes | None, *, timed_out: bool = False) -> None:
        state = self._state
        self._submit(lambda now: state.handle_dns_result(token, reply, now, timed_out=timed_out))

    async def _watch_files(self) -> None:
        """Look again when the files the host's servers are in change."""
        try:
            watch = FileWatch(self._control.watched_files())
        except OSError as error:
            log.debug("Cannot watch the host's DNS configuration", error=error.strerror)
            self._follow_interval = UNWATCHED_FOLLOW_INTERVAL
            self._look_again.set()
            return
        try:
            while True:
                await trio.lowlevel.wait_readable(watch.fileno())
                if watch.drain():
                    await trio.sleep(SETTLING)
                    self._look_again.set()
        finally:
            watch.close()

    async def _follow(self) -> None:
        found = await trio.to_thread.run_sync(self._control.system_resolvers)
        if found != self._resolvers:
            self._resolvers, state = found, self._state
            self._submit(lambda now: state.set_system_resolvers(found, now))
