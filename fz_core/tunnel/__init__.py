"""The two roles of a tunnel, client and gateway: policy without I/O (floor 4). Each is imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fz_core.tunnel.errors import PacketError, TunnelErrors
from fz_core.tunnel.role import TunnelRole

if TYPE_CHECKING:
    from fz_core.tunnel.client import ClientTunnel
    from fz_core.tunnel.gateway import GatewayTunnel

__all__ = ["ClientTunnel", "GatewayTunnel", "PacketError", "TunnelErrors", "TunnelRole"]


def __getattr__(name: str) -> Any:
    if name == "ClientTunnel":
        from fz_core.tunnel.client import ClientTunnel

        return ClientTunnel
    if name == "GatewayTunnel":
        from fz_core.tunnel.gateway import GatewayTunnel

        return GatewayTunnel
    raise AttributeError(f"module 'fz_core.tunnel' has no attribute {name!r}")
