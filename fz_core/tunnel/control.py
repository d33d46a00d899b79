"""The control protocol between tunnel ends, carried inside WireGuard (`spec/tunnel.md` §3).

The framing (an IPv6 packet with next header 0xFF between unspecified addresses) is `packet/`'s.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from fz_core.packet import Packet, build_control

ASSIGNED_IPS, DOMAIN_STATUS, GOODBYE = 0, 1, 2
MAX_NAME = 255


@dataclass(frozen=True)
class AssignedIps:
    """Client to gateway: these proxy addresses stand for a name of a DNS resource."""

    resource_id: str
    domain: str
    proxy_ips: tuple[IPv4Address | IPv6Address, ...]

    def build(self) -> Packet:
        """The control packet."""
        body = {
            "resource": self.resource_id,
            "domain": self.domain,
            "proxy_ips": [str(i) for i in self.proxy_ips],
        }
        return _event(ASSIGNED_IPS, body)


@dataclass(frozen=True)
class DomainStatus:
    """Gateway to client: whether traffic to the name's proxy addresses will be translated."""

    resource_id: str
    domain: str
    active: bool

    def build(self) -> Packet:
        """The control packet."""
        status = "Active" if self.active else "Inactive"
        return _event(DOMAIN_STATUS, {"resource": self.resource_id, "domain": self.domain, "status": status})


@dataclass(frozen=True)
class Goodbye:
    """Either way: the sender has forgotten this connection."""

    def build(self) -> Packet:
        """The control packet, always the same 48 bytes."""
        return build_control(GOODBYE, b"")


Event = AssignedIps | DomainStatus | Goodbye


def parse_untrusted(event_type: int, body: bytes) -> Event | None:
    """Read one event; None for an unknown type or an undecodable body."""
    if event_type == GOODBYE:
        return Goodbye()
    try:
        fields = json.loads(body)
        resource, domain = _name(fields["resource"]), _name(fields["domain"])
        if event_type == ASSIGNED_IPS:
            return AssignedIps(resource, domain, tuple(ip_address(_text(i)) for i in fields["proxy_ips"]))
        if event_type == DOMAIN_STATUS:
            return DomainStatus(resource, domain, _text(fields["status"]) == "Active")
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _name(value: Any) -> str:
    """An id or a domain. The bound lets every answer that repeats it fit in a packet."""
    text = _text(value)
    if len(text) > MAX_NAME or not (text.isascii() and text.isprintable()):
        raise ValueError
    return text


def _event(event_type: int, body: dict[str, Any]) -> Packet:
    return build_control(event_type, json.dumps(body, separators=(",", ":")).encode())
