"""What of a tunnel only a client has; imported by clients alone."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Literal

from fz_core.driver.config import Role, Start, TunnelConfig
from fz_core.driver.names.client_names import ClientNames
from fz_core.linux import SocketFactory, make_dns_control
from fz_core.portal import Channel, client_channel
from fz_core.portal.client import Init
from fz_core.tunnel.client import ClientTunnel
from fz_core.tunnel.flow_tracking import FlowTracking

Submit = Callable[[Callable[[float], None]], None]


class ClientSide:
    """The state machine, the portal's language, and the host's DNS."""

    init = Init
    role: Literal[Role.CLIENT] = Role.CLIENT

    def __init__(self, config: TunnelConfig, start: Start, flows: FlowTracking) -> None:
        self._config = config
        self.state = ClientTunnel(*start, flows=flows)
        self.state.set_internet_resource(config.internet_resource, start.now)

    def channel(self) -> Channel:
        """Our end of the link to the portal."""
        return client_channel(secrets.token_bytes, self._config.max_partition_time)

    async def open_names(self, submit: Submit, sockets: SocketFactory) -> ClientNames:
        """The host's DNS, repaired."""
        names = ClientNames(self.state, make_dns_control(self._config.dns_control), submit, sockets)
        await names.repair()
        return names

    def reset(self, now: float) -> None:
        """Our network changed: start over."""
        self.state.reset(now)
