"""Connections to peers: relays, ICE and WireGuard composed (floor 3)."""

from fz_core.node.connection import Parameters, Path, Profiles
from fz_core.node.events import NodeEvent, NoRelays
from fz_core.node.node import CLIENT_PROFILES, GATEWAY_PROFILES, PEER_CLIENT_PROFILES, Node
from fz_core.node.transport import Carried, Hop, Transport

__all__ = [
    "CLIENT_PROFILES",
    "GATEWAY_PROFILES",
    "PEER_CLIENT_PROFILES",
    "Carried",
    "Hop",
    "NoRelays",
    "Node",
    "NodeEvent",
    "Parameters",
    "Path",
    "Profiles",
    "Transport",
]
