"""The two roles of a tunnel, client and gateway: policy without I/O (floor 4)."""

from fz_core.tunnel.client import ClientTunnel
from fz_core.tunnel.errors import PacketError, TunnelErrors
from fz_core.tunnel.gateway import GatewayTunnel
from fz_core.tunnel.role import TunnelRole

__all__ = ["ClientTunnel", "GatewayTunnel", "PacketError", "TunnelErrors", "TunnelRole"]
