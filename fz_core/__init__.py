"""Firezone data plane: the public names, nothing else. They are imported when first used."""

from __future__ import annotations

import importlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Any

_PACKET = Path(__file__).parent / "packet"
if not any((_PACKET / f"packet{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
    raise ImportError(
        "fz_core is not built for this Python: run 'make build', or 'python setup.py build_ext --inplace'"
    )

if TYPE_CHECKING:
    from fz_core.driver import ConfigError, Role, Tunnel, TunnelConfig, TunnelFailed
    from fz_core.linux import HostError
    from fz_core.packet import Address, DropReason, Packet
    from fz_core.tunnel import ClientTunnel, GatewayTunnel, PacketError, TunnelErrors

__all__ = [
    "Address",
    "ClientTunnel",
    "ConfigError",
    "DropReason",
    "GatewayTunnel",
    "HostError",
    "Packet",
    "PacketError",
    "Role",
    "Tunnel",
    "TunnelConfig",
    "TunnelErrors",
    "TunnelFailed",
]

_ROOMS = {
    "driver": ("ConfigError", "Role", "Tunnel", "TunnelConfig", "TunnelFailed"),
    "linux": ("HostError",),
    "packet": ("Address", "DropReason", "Packet"),
    "tunnel": ("ClientTunnel", "GatewayTunnel", "PacketError", "TunnelErrors"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    room = _ROOM_OF.get(name)
    if room is None:
        raise AttributeError(f"module 'fz_core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fz_core.{room}"), name)
