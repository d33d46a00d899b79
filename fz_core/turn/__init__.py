"""TURN: the client of one relay, and a relay's protocol (floor 2)."""

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
