"""What a tunnel needs to know, and the ways it can end."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Role(Enum):
    """Which end of the tunnel we are; the value is the portal's topic."""

    CLIENT = "client"
    GATEWAY = "gateway"


class ConfigError(Exception):
    """The caller's configuration cannot work; one line naming thing, value and remedy."""


class TunnelFailed(Exception):
    """The tunnel ended by itself: the portal refused us for good, or the machine lost a device."""


@dataclass(frozen=True, slots=True)
class TunnelConfig:
    """One tunnel. `max_partition_time` is seconds without the portal before giving up; None: never."""

    role: Role
    api_url: str
    device_id: str
    name: str
    version: str
    token: str = field(repr=False)
    max_partition_time: float | None = None
    internet_resource: bool = False
    tun_name: str = "tun-firezone"
    listen_port: int = 52625
