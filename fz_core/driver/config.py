"""What a tunnel needs to know, and the ways it can end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from fz_core.crypto import PrivateKey


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
    """One tunnel. `max_partition_time` is seconds without the portal before giving up; None: never.

    Client: `dns_control` says how the host's DNS is pointed at the tunnel: `systemd-resolved`,
    `etc-resolv-conf` or `disabled`. Gateway: `userspace_dns` resolves names with a cache that honours
    their TTL instead of the system's functions; `mix_families` lets clients reach a name that has
    addresses of one family only through both (NAT64 and NAT46). `flow_logs` tracks flows for the log even
    if the portal does not want them; those it wants wait in `flow_log_dir`, None: they are not kept.
    """

    role: Role
    api_url: str
    device_id: str
    name: str
    version: str
    token: str = field(repr=False)
    max_partition_time: float | None = None
    internet_resource: bool = False
    dns_control: str = "disabled"
    userspace_dns: bool = True
    mix_families: bool = True
    flow_logs: bool = False
    flow_log_dir: Path | None = None
    tun_name: str = "tun-firezone"
    listen_port: int = 52625


class Start(NamedTuple):
    """What a state machine is constructed from; `unix_epoch` is the Unix time at `now` zero."""

    private_key: PrivateKey
    now: float
    unix_epoch: float
    random_bytes: Callable[[int], bytes]
