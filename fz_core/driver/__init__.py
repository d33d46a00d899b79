"""trio around the core: the event loop, the portal connection, the Tunnel API (floor 6)."""

from fz_core.driver.config import ConfigError, Role, TunnelConfig, TunnelFailed
from fz_core.driver.service import serve
from fz_core.driver.tunnel import Tunnel

__all__ = ["ConfigError", "Role", "Tunnel", "TunnelConfig", "TunnelFailed", "serve"]
