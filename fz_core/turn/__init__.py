"""TURN: the client of one relay, and a relay's protocol (floor 2). The latter is imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fz_core.turn.client import Allocation
from fz_core.turn.events import (
    HostDiscovered,
    HostRemoved,
    ReflexiveDiscovered,
    ReflexiveRemoved,
    RelayedAdded,
    RelayedRemoved,
    TurnEvent,
)
from fz_core.turn.relays import Relays, choose_relay, rtt_threshold

if TYPE_CHECKING:
    from fz_core.turn.server import (
        ChannelBound,
        ChannelUnbound,
        PortFreed,
        RelayCommand,
        RelayServer,
        SendToClient,
        SendToPeer,
    )
    from fz_core.turn.server_auth import relay_credentials, relay_id, relay_password

__all__ = [
    "Allocation",
    "ChannelBound",
    "ChannelUnbound",
    "HostDiscovered",
    "HostRemoved",
    "PortFreed",
    "ReflexiveDiscovered",
    "ReflexiveRemoved",
    "RelayCommand",
    "RelayServer",
    "RelayedAdded",
    "RelayedRemoved",
    "Relays",
    "SendToClient",
    "SendToPeer",
    "TurnEvent",
    "choose_relay",
    "relay_credentials",
    "relay_id",
    "relay_password",
    "rtt_threshold",
]

_RELAY = {
    "server": (
        "ChannelBound",
        "ChannelUnbound",
        "PortFreed",
        "RelayCommand",
        "RelayServer",
        "SendToClient",
        "SendToPeer",
    ),
    "server_auth": ("relay_credentials", "relay_id", "relay_password"),
}
_MODULE_OF = {name: module for module, names in _RELAY.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'fz_core.turn' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fz_core.turn.{module}"), name)
