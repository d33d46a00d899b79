"""A system whose resources are names: queries by the client's host, servers in the gateway's network."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import dns.message
import dns.rcode
import dns.rdatatype

from fz_core.packet import Packet, build_echo, build_tcp, build_udp
from fz_core.portal import client as c
from fz_core.portal.types import DnsResource, Filter, Interface, Resource
from fz_core.tunnel.events import SendToPortal
from tests.sim.system import SITE, Peer, Scenario, System

UPSTREAM = ip_address("192.0.2.53")
SENTINEL = "100.100.111.1"
UDP, TCP = 17, 6


def uuid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012}"


def named(number: int, address: str, *filters: Filter, ip_stack: str = "dual", site: Any = SITE) -> DnsResource:
    return DnsResource(uuid(number), address, f"name {number}", filters, (site,), None, ip_stack)


class Names(System):
    """`zone` is what the gateway finds out about names; every address in it echoes UDP, TCP and ping."""

    def __init__(
        self,
        *resources: Resource,
        zone: dict[str, tuple[str, ...] | None] | None = None,
        scenario: Scenario | None = None,
        seed: int = 1,
    ) -> None:
        super().__init__(seed, scenario)
        for gateway in self.gateways:
            gateway.zone = zone if zone is not None else {}
            gateway.on_packet = lambda packet, gateway=gateway: self._serve(gateway, packet)
        self.seen: list[Packet] = []
        self.port = 40_000
        self.set_resources(*resources)

    def set_resources(self, *resources: Resource) -> None:
        self.portal.resources = list(resources)
        for client in self.clients:
            init = self.portal.init(self._id(client))
            interface = Interface(init.interface.ipv4, init.interface.ipv6, (UPSTREAM,))
            client.tell(c.Init(interface, init.resources, init.relays))

    def set_upstreams(self, *servers: Any) -> None:
        """The portal names these servers."""
        ips = self.portal.init(self._id(self.client)).interface
        self.client.tell(c.ConfigChanged(Interface(ips.ipv4, ips.ipv6, servers)))

    def _id(self, peer: Peer) -> str:
        return next(i for i, (_, p, *_) in self.portal.peers.items() if p is peer)

    def _serve(self, gateway: Peer, packet: Packet) -> None:
        """The resource's network: everything that arrives is answered."""
        self.seen.append(packet)
        reply: Packet | None = None
        if packet.is_echo:
            reply = build_echo(
                packet.dst, packet.src, packet.src_port, 0, packet.data[packet.l4_offset + 8 :], reply=True
            )
        elif packet.protocol == UDP:
            reply = build_udp(packet.dst, packet.src, packet.dst_port, packet.src_port, packet.payload)
        elif packet.protocol == TCP:
            reply = build_tcp(packet.dst, packet.src, packet.dst_port, packet.src_port, flags=0x12, ack=1)
        if reply is not None:
            self.world.after(0.0001, lambda: None if gateway.is_dead else gateway.send(reply))

    # the client's host

    def own(self, family: int = 4, client: Peer | None = None) -> bytes:
        return self.ip_of(self._id(client or self.client), family)

    def query(
        self, name: str, rdtype: str = "A", *, sentinel: str = SENTINEL, client: Peer | None = None, wait: float = 0.05
    ) -> dns.message.Message | None:
        """Ask the sentinel over UDP; the answer, if one came in time."""
        client = client or self.client
        question = dns.message.make_query(name, rdtype, use_edns=False)
        self.port += 1
        to = ip_address(sentinel).packed
        before = len(client.packets)
        client.send(build_udp(self.own(4 if len(to) == 4 else 6, client), to, self.port, 53, question.to_wire()))
        if wait:
            self.world.run_for(wait)
        for packet in client.packets[before:]:
            if packet.protocol == UDP and packet.src_port == 53 and packet.dst_port == self.port:
                assert packet.src == to
                answer = dns.message.from_wire(packet.payload)
                assert answer.id == question.id
                assert answer.question == question.question
                return answer
        return None

    def addresses(self, name: str, rdtype: str = "A", **kwargs: Any) -> list[str]:
        answer = self.query(name, rdtype, **kwargs)
        assert answer is not None, f"no answer for {name}"
        assert answer.rcode() == dns.rcode.NOERROR
        return [str(rdata) for rrset in answer.answer for rdata in rrset]

    def talk(
        self, dst: str, *, protocol: int = UDP, port: int = 80, src_port: int = 7000, wait: float = 2.0
    ) -> list[Packet]:
        """Send one packet to an address; what came back within the time."""
        to = ip_address(dst).packed
        own = self.own(4 if len(to) == 4 else 6)
        before = len(self.client.packets)
        match protocol:
            case 17:
                packet = build_udp(own, to, src_port, port, b"question")
            case 6:
                packet = build_tcp(own, to, src_port, port, flags=2)
            case _:
                packet = build_echo(own, to, src_port, 1, b"ping")
        self.client.send(packet)
        self.world.run_for(wait)
        return self.client.packets[before:]

    def asked(self) -> list[str]:
        """Resources the client has asked access to, in order."""
        sent = [e.message for e in self.client.events if isinstance(e, SendToPortal)]
        return [m.resource_id for m in sent if isinstance(m, c.RequestAuthorization)]
