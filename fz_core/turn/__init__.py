"""TURN: the client of one relay, and a relay's protocol (floor 2)."""

from fz_core.turn.client import Allocation
from fz_core.turn.events import HostDiscovered, ReflexiveDiscovered, RelayedAdded, RelayedRemoved, TurnEvent
from fz_core.turn.relays import Relays, choose_relay, rtt_threshold

__all__ = [
    "Allocation",
    "HostDiscovered",
    "ReflexiveDiscovered",
    "RelayedAdded",
    "RelayedRemoved",
    "Relays",
    "TurnEvent",
    "choose_relay",
    "rtt_threshold",
]
