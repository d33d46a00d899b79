"""A gateway, a client of no manners, and what becomes of packets between them."""

from __future__ import annotations

import json
from ipaddress import ip_address, ip_network
from typing import Any

from fz_core.packet import (
    DropReason,
    Packet,
    build_icmp_prohibited,
    build_icmp_unreachable,
    build_tcp,
    build_udp,
)
from fz_core.portal import gateway as g
from fz_core.portal.types import (
    CidrResource,
    Filter,
)
from fz_core.tunnel import GatewayTunnel
from fz_core.tunnel.events import (
    AccessEnded,
)
from tests.sim.raw_client import RawClient
from tests.sim.system import EPOCH, Scenario, System, credentials, preshared_key

TCP, UDP, ICMP = "tcp", "udp", "icmp"
PASSED, PROHIBITED, UNREACHABLE = "passed", "prohibited", "unreachable"


def uuid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012}"


def packed(text: str) -> bytes:
    return ip_address(text).packed


def cidr(number: int, network: str, *filters: Filter) -> CidrResource:
    return CidrResource(uuid(number), ip_network(network), "net", filters)


class Access:
    """A gateway with one connected client of no manners; `grant` is the portal's message alone."""

    def __init__(self, *resources: Any, clients: int = 1) -> None:
        self.system = System(1, Scenario(client_nat="public", gateway_nat="public", clients=clients), RawClient)
        self.world = self.system.world
        self.state: GatewayTunnel = self.system.gateway.state
        self.client_ids = [peer_id for peer_id, (role, *_) in self.system.portal.peers.items() if role == "client"]
        self.client_id = self.client_ids[0]
        for resource in resources:
            self.grant(resource)
        self.world.run_for(1.0)

    def grant(self, resource: Any, expires_in: float | None = None, client: int = 0) -> None:
        portal = self.system.portal
        portal.resources = [r for r in portal.resources if r.id != resource.id] + [resource]
        portal.expires_at = None if expires_in is None else int(EPOCH + self.world.now + expires_in)
        portal._request(self.client_ids[client], resource.id)
        self.world.run_for(0.1)

    def tell(self, message: Any) -> None:
        self.system.gateway.tell(message)

    def own(self, version: int = 4, client: int = 0) -> str:
        return str(ip_address(self.system.ip_of(self.client_ids[client], version)))

    def gateway_ip(self, version: int = 4) -> str:
        return str(ip_address(self.system.ip_of(self.system.gateway_id, version)))

    def give(self, packet: Packet, client: int = 0) -> str | DropReason | None:
        """What becomes of a packet of the client."""
        gateway, peer = self.system.gateway, self.system.clients[client]
        before = len(gateway.packets), len(peer.packets), len(gateway.errors)
        peer.send(packet)
        self.world.run_for(0.02)
        if len(gateway.packets) > before[0]:
            assert gateway.packets[-1].data == packet.data
            return PASSED
        if len(gateway.errors) > before[2]:
            error: Any = gateway.errors[-1]
            reason: DropReason = error.reason
            return reason
        if len(peer.packets) == before[1]:
            return None
        answer = peer.packets[-1]
        build, kind = {
            (3, 13): (build_icmp_prohibited, PROHIBITED),
            (1, 1): (build_icmp_prohibited, PROHIBITED),
            (3, 0): (build_icmp_unreachable, UNREACHABLE),
            (1, 3): (build_icmp_unreachable, UNREACHABLE),
        }[answer.icmp_type, answer.icmp_code]
        assert answer.data == build(packet).data
        return kind

    def udp(self, dst: str, port: int = 80, src: str | None = None) -> str | DropReason | None:
        own = src or self.own(6 if ":" in dst else 4)
        return self.give(build_udp(packed(own), packed(dst), 1000, port, b"question"))

    def tcp(self, dst: str, port: int) -> str | DropReason | None:
        own = self.own(6 if ":" in dst else 4)
        return self.give(build_tcp(packed(own), packed(dst), 1000, port, flags=2))

    def give_control(self, packet: Packet) -> Any:
        """The decoded status that answers a control packet."""
        self.system.client.send(packet)
        self.world.run_for(0.05)
        answer = self.system.client.packets[-1]
        assert answer.is_fz_control
        assert answer.control_event_type == 1
        return json.loads(answer.control_body)

    def from_tun(self, packet: Packet) -> DropReason | None:
        error = self.state.handle_tun_input(packet, self.world.now)
        self.system.gateway.drain()
        return None if error is None else error.reason

    def answer(self, src: str, port: int = 80, dst: str | None = None) -> DropReason | None:
        """What becomes of a UDP packet out of the TUN device."""
        to = dst or self.own(6 if ":" in src else 4)
        return self.from_tun(build_udp(packed(src), packed(to), port, 1000, b"answer"))

    def ended(self) -> list[tuple[str, str]]:
        return [(e.resource_id, e.reason) for e in self.system.gateway.events if isinstance(e, AccessEnded)]


def create(
    access: Access,
    resource: Any,
    expires_at: int | None,
    client_id: str | None = None,
    ips: tuple[str, str] | None = None,
) -> g.CreateAuthorization:
    client_id = client_id or access.client_id
    _, _, key, (v4, v6) = access.system.portal.peers[client_id]
    addresses: Any = (v4, v6) if ips is None else tuple(ip_address(ip) for ip in ips)
    keys = key + access.system.portal.peers[access.system.gateway_id][2]
    client = g.Client(client_id, key, preshared_key(keys), *addresses)
    return g.CreateAuthorization("ref", client, resource, *credentials(keys), expires_at)
