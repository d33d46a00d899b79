"""A client without a network, and what tests say to it."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from random import Random
from typing import Any

from fz_core.crypto import PrivateKey
from fz_core.packet import (
    DropReason,
    Packet,
    build_udp,
)
from fz_core.portal import client as c
from fz_core.portal.types import (
    CidrResource,
    Filter,
    Interface,
    Resource,
    Site,
)
from fz_core.tunnel import ClientTunnel
from fz_core.tunnel.events import (
    SendToPortal,
)

OWN4, OWN6 = IPv4Address("100.64.0.9"), IPv6Address("fd00:2021:1111::9")
SITE, OTHER_SITE = Site("00000000-0000-4000-8000-000000000001", "one"), Site("00000000-0000-4000-8000-000000000002")
FIXED = {
    ip_network(n)
    for n in (
        "100.64.0.0/11", "fd00:2021:1111::/107", "100.96.0.0/11", "fd00:2021:1111:8000::/107",
        "100.100.111.0/24", "fd00:2021:1111:8000:100:100:111:0/120",
    )
}  # fmt: skip


def uuid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012}"


def cidr(number: int, network: str, *filters: Filter, site: Site = SITE, name: str = "net") -> CidrResource:
    return CidrResource(uuid(number), ip_network(network), name, filters, (site,))


def packed(text: str) -> bytes:
    return ip_address(text).packed


class Client:
    """A client that has no network: what it says to the portal and to the TUN device."""

    def __init__(self, *resources: Resource) -> None:
        self.now = 50.0
        self.state = ClientTunnel(PrivateKey(b"\x01" * 32), self.now, 1.7e9, Random(1).randbytes)
        self.state.handle_portal_connected(self.now)
        self.tell(c.Init(Interface(OWN4, OWN6), resources))
        self.start = self.events()

    def tell(self, message: Any) -> None:
        self.state.handle_portal_message(message, self.now)

    def events(self, kind: type | None = None) -> list[Any]:
        events = []
        while (event := self.state.poll_event()) is not None:
            events.append(event)
        return [e for e in events if kind is None or isinstance(e, kind)]

    def asked(self) -> list[str]:
        """Resources access was requested to since the last look."""
        sent = [e.message for e in self.events(SendToPortal)]
        return [m.resource_id for m in sent if isinstance(m, c.RequestAuthorization)]

    def send(self, dst: str, port: int = 80, src: str | None = None, payload: bytes = b"x") -> DropReason | None:
        own = src or str(OWN4 if "." in dst else OWN6)
        return self.give(build_udp(packed(own), packed(dst), 1000, port, payload))

    def give(self, packet: Packet) -> DropReason | None:
        error = self.state.handle_tun_input(packet, self.now)
        return None if error is None else error.reason

    def tun(self) -> list[Packet]:
        packets = []
        while (packet := self.state.poll_packet()) is not None:
            packets.append(packet)
        return packets
