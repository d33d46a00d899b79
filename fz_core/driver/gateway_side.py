"""What of a tunnel only a gateway has; imported by gateways alone."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Literal

from fz_core.driver.config import Role, Start, TunnelConfig
from fz_core.driver.names.gateway_names import GatewayNames
from fz_core.linux import SocketFactory
from fz_core.portal import Channel, gateway_channel
from fz_core.portal.gateway import Init
from fz_core.tunnel.flow_tracking import FlowTracking
from fz_core.tunnel.gateway import GatewayTunnel

Submit = Callable[[Callable[[float], None]], None]


class GatewaySide:
    """The state machine, the portal's language, and name resolution for clients."""

    init = Init
    role: Literal[Role.GATEWAY] = Role.GATEWAY

    def __init__(self, config: TunnelConfig, start: Start, flows: FlowTracking) -> None:
        self._config = config
        self.state = GatewayTunnel(*start, mix_families=config.mix_families, flows=flows)

    def channel(self) -> Channel:
        """Our end of the link to the portal."""
        return gateway_channel(secrets.token_bytes, self._config.max_partition_time)

    async def open_names(self, submit: Submit, sockets: SocketFactory) -> GatewayNames:
        """The resolver. HostError if it has no configuration."""
        return GatewayNames(self.state, submit, sockets, userspace=self._config.userspace_dns)
