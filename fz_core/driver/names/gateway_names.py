"""A gateway's DNS: real addresses for the names of clients, and a name server for their other questions.

Source: `spec/tunnel.md` §17.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog
import trio

from fz_core.driver.names.bootstrap import resolve_host
from fz_core.driver.names.dns_server import TunnelDnsServer
from fz_core.driver.names.nameservers import Nameservers, read_resolv_conf
from fz_core.driver.names.resolver import NameResolver, ResolveTimeout, TooBusy
from fz_core.linux import SocketFactory
from fz_core.tunnel.events import ResolveName, TunConfigChanged
from fz_core.tunnel.gateway import GatewayTunnel

RESOLV_CONF = Path("/etc/resolv.conf")
HOSTS = Path("/etc/hosts")

log = structlog.get_logger("tunnel")


class GatewayNames:
    """`submit` runs a command in the loop's next turn. HostError if /etc/resolv.conf cannot be read."""

    def __init__(
        self,
        state: GatewayTunnel,
        submit: Callable[[Callable[[float], None]], None],
        sockets: SocketFactory,
        *,
        userspace: bool = True,
    ) -> None:
        self._state, self._submit, self._sockets = state, submit, sockets
        servers = self._servers = read_resolv_conf(RESOLV_CONF)
        self._nameservers = Nameservers(servers, sockets=sockets)
        self._resolver = NameResolver(servers, HOSTS, userspace=userspace, sockets=sockets)
        self._server = TunnelDnsServer(self._nameservers, sockets=sockets)
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Resolve and serve until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            nursery.start_soon(self._nameservers.run)
            nursery.start_soon(self._resolver.run)
            nursery.start_soon(self._server.run)

    async def resolve_portal(self, host: str) -> Sequence[str]:
        """Addresses of the portal."""
        return await resolve_host(host, self._servers, sockets=self._sockets)

    def reset(self) -> None:
        """The network changed: find out anew which name server answers fastest."""
        self._nameservers.reset()

    async def apply(self, device: str, config: TunConfigChanged) -> None:
        """Serve on the device's addresses. HostError if they cannot be bound."""
        await self._server.serve((config.ipv4.packed, config.ipv6.packed))

    async def restore(self) -> None:
        """Nothing of the host's was changed."""

    def flush_caches(self) -> None:
        """The host does not ask us."""

    def handle(self, event: Any) -> None:
        """Begin the look-up of a `ResolveName`; its end is submitted to the loop."""
        if self._nursery is not None:
            self._nursery.start_soon(self._resolve, event)

    async def _resolve(self, event: ResolveName) -> None:
        addresses: tuple[bytes, ...] | None = None
        try:
            found = await self._resolver.resolve(event.name)
            addresses = (*found.v4, *found.v6)
        except (ResolveTimeout, TooBusy) as error:
            log.debug("Name was not resolved", name=event.name, error=str(error))
        state = self._state
        self._submit(lambda now: state.handle_name_resolved(event.token, addresses, now))
