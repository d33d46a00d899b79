"""Socket addresses as the core sees them: packed IP and port.

Not here: name resolution and kernel structures (those are `linux/`).
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple


class Address(NamedTuple):
    """A UDP endpoint. `ip` is 4 or 16 bytes in network order, `port` 0 to 65535.

    Equal to, and hashing like, the plain tuple `(ip, port)`, so both may meet in one dict.
    """

    ip: bytes
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `1.2.3.4:5` or `[::1]:5`; ValueError otherwise."""
        host, _, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            packed: bytes = ipaddress.IPv6Address(host[1:-1]).packed
        else:
            packed = ipaddress.IPv4Address(host).packed
        number = int(port)
        if not 0 <= number <= 65535:
            raise ValueError(f"port {number} is out of range, use 0 to 65535")
        return cls(packed, number)

    @property
    def is_ipv4(self) -> bool:
        """Whether the address is IPv4."""
        return len(self.ip) == 4

    @property
    def host(self) -> str:
        """The IP as text, IPv6 compressed and without brackets."""
        return str(ipaddress.ip_address(self.ip))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.is_ipv4 else f"[{self.host}]:{self.port}"


class Transmit(NamedTuple):
    """One UDP datagram to send. `local` pins the source IP (its port is ignored), `ecn` is 0 to 3."""

    payload: bytes
    remote: Address
    local: Address | None = None
    ecn: int = 0
