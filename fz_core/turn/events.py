"""What a TURN client learns: addresses of ours, and when relayed ones come and go."""

from __future__ import annotations

from dataclasses import dataclass

from fz_core.packet import Address


@dataclass(frozen=True, slots=True)
class HostDiscovered:
    """The relay's answer arrived on this local address."""

    address: Address


@dataclass(frozen=True, slots=True)
class HostRemoved:
    """The relay's answers arrive on another local address now."""

    address: Address


@dataclass(frozen=True, slots=True)
class ReflexiveDiscovered:
    """The relay sees us at `address`; `base` is the local address behind it."""

    address: Address
    base: Address


@dataclass(frozen=True, slots=True)
class ReflexiveRemoved:
    """The relay no longer sees us at `address`."""

    address: Address
    base: Address


@dataclass(frozen=True, slots=True)
class RelayedAdded:
    """The relay gave us this address; `server_is_ipv4` tells how we talk to the relay."""

    address: Address
    server_is_ipv4: bool


@dataclass(frozen=True, slots=True)
class RelayedRemoved:
    """This relayed address no longer works."""

    address: Address


TurnEvent = HostDiscovered | HostRemoved | ReflexiveDiscovered | ReflexiveRemoved | RelayedAdded | RelayedRemoved
