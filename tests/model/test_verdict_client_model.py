"""A client with a flow table in front behaves as one without, whatever happens to resources, names, peers and time."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from random import Random
from typing import Any

import dns.message
import pytest
from verdict_run import ACK, CREDENTIALS, EPOCH, FIN, RST, START, SYN, VerdictRun, packed, run_all, tracking

from fz_core.crypto import PrivateKey
from fz_core.packet import Packet, build_echo, build_icmp_prohibited, build_icmp_unreachable, build_tcp, build_udp
from fz_core.portal import client as c
from fz_core.portal.types import (
    Authorization,
    CidrResource,
    DnsResource,
    Filter,
    Interface,
    InternetResource,
    PoolDevice,
    Site,
    StaticDevicePool,
)
from fz_core.tunnel import ClientTunnel, control
from fz_core.tunnel.events import SendToPortal
from fz_core.tunnel.verdict import FlowKey
from tests.unit.tunnel.flow_samples import token_text

TOKEN = token_text()
MOST = 12
SITE = (Site("site", "site"),)
OWN = [("100.64.0.9", "fd00:2021:1111::9"), ("100.64.0.10", "fd00:2021:1111::10")]
GATEWAYS = {"g1": ("100.64.3.1", "fd00:2021:1111::301"), "g2": ("100.64.3.2", "fd00:2021:1111::302")}
DEVICES = {"d1": ("100.64.2.1", "fd00:2021:1111::201"), "d2": ("100.64.2.2", "fd00:2021:1111::202")}
FILTERS = [(), (), (), (Filter("udp", 80, 80),), (Filter("tcp", 80, 443), Filter("udp", 443, 443)), (Filter("icmp"),)]
NAMES = ["a.corp.example", "b.corp.example", "c.corp.example", "d.corp.example"]
UPSTREAMS = ["192.0.2.53", "10.0.0.53"]
SENTINEL = "100.100.111.1"
PLACES = ["10.0.0.5", "10.9.9.9", "1.1.1.1", "2001:db8::5", "192.0.2.53", "10.0.0.53"]
REASONS = [c.FailReason.OFFLINE, c.FailReason.FORBIDDEN]


class ClientRun(VerdictRun):
    """One seed."""

    payloads = (1, 100)

    def __init__(self, seed: int, is_tracking: bool) -> None:
        def new_role() -> ClientTunnel:
            flows = tracking("client", MOST, is_on=is_tracking)
            role = ClientTunnel(PrivateKey(b"\x01" * 32), START, EPOCH, Random(seed).randbytes, flows=flows)
            role._names._max_names = 3
            return role

        super().__init__(seed, new_role)
        self.own = OWN[0]
        self.seen: list[FlowKey] = []  # as sent or delivered
        self.heard: list[tuple[str, FlowKey]] = []
        self.questions: list[Any] = []
        self.statuses: list[tuple[str, control.AssignedIps]] = []
        self.resync()

    def run(self, steps: int) -> None:
        often = (
            [self.send] * 6 + [self.send_again] * 8 + [self.receive] * 8 + [self.receive_again] * 3 + [self.probe] * 3
            + [self.answer_portal] * 4 + [self.tell_status] * 4 + [self.ask_name] * 2
        )  # fmt: skip
        rare = [
            self.resync, self.configure, self.add, self.add, self.remove, self.fail_request, self.admit_device,
            self.admit_device, self.admit_device, self.change_filters, self.reject, self.deny_device,
            self.toggle_internet, self.change_resolvers, self.change_resolvers, self.connect, self.lose, self.move,
            self.grow_old, self.goodbye, self.any_status,
            self.end_flow, self.refuse, self.reset, self.tell_candidates,
        ]  # fmt: skip
        for _ in range(steps):
            self.random.choice(often)()
            self.remember()
            if self.random.random() < 0.06:
                self.random.choice(rare)()
                self.remember()
                self.twins.probe(self.like, self.random, 30)
            if self.random.random() < 0.12:
                self.wait()

    def remember(self) -> None:
        """What the portal and the gateways were asked."""
        for event in self.twins.events:
            if isinstance(event, SendToPortal) and isinstance(event.message, c.RequestAuthorization):
                self.questions = [*self.questions[-10:], event.message]
        for peer_id, data in self.twins.sent:
            packet = Packet.parse_untrusted(data)
            assert isinstance(packet, Packet)
            if packet.is_fz_control:
                said = control.parse_untrusted(packet.control_event_type, packet.control_body)
                if isinstance(said, control.AssignedIps):
                    self.statuses = [*self.statuses[-10:], (peer_id, said)]
        self.twins.events, self.twins.sent = [], []

    # packets

    def proxies(self) -> list[str]:
        entries = self.twins.slow._names.names()  # type: ignore[attr-defined]
        return [str(ip_address(ip)) for entry in entries for ip in (entry.v4[0], entry.v6[0])]

    def packet(self, src: str, dst: str, sport: int, dport: int) -> Packet:
        payload = bytes(self.random.choice([0, 1, 100]))
        match self.random.choice(["udp", "udp", "tcp", "echo"]):
            case "udp":
                return build_udp(packed(src), packed(dst), sport, dport, payload)
            case "tcp":
                flags = self.random.choice([SYN, ACK, ACK, ACK | FIN, RST])
                return build_tcp(packed(src), packed(dst), sport, dport, flags, payload=payload)
        return build_echo(packed(src), packed(dst), sport, 1, payload)

    def send(self) -> None:
        """To a resource, a name, a gateway, a device, or ourselves."""
        ends = [ip for pair in (*GATEWAYS.values(), *DEVICES.values(), *DEVICES.values()) for ip in pair]
        unknown = f"100.96.0.{self.random.randrange(40)}"  # no name's, or not yet
        dst = self.random.choice([*PLACES, *PLACES, *self.proxies() * 3, *ends, *self.own, unknown])
        own = self.own if self.random.random() < 0.95 else self.random.choice(OWN)
        ports = self.random.choice([(5000, 80), (5000, 443), (5001, 80), (80, 5000), (5000, 53)])
        self.give(self.packet(own[":" in dst], dst, *ports))

    def give(self, packet: Packet) -> None:
        self.twins.from_device(packet)
        if packet.src_port >= 0:
            self.seen = [*self.seen[-20:], FlowKey.of(packet)]

    def send_again(self) -> None:
        """More of a flow, ours or one that a peer opened."""
        if self.seen or self.heard:
            keys = [*self.seen, *(key.back for _, key in self.heard)]
            self.give(self.like(self.random.choice(keys)))

    def receive(self) -> None:
        """From a peer: an answer, or something new."""
        peer = self.random.choice([*GATEWAYS, *DEVICES])
        if self.seen and self.random.random() < 0.6:
            key = self.random.choice(self.seen)
            owners = [p for p, ips in DEVICES.items() if key.dst in map(packed, ips)]
            peer = owners[0] if owners and self.random.random() < 0.9 else peer
            packet = self.like(key.back)
        else:
            sources = DEVICES[peer] if peer in DEVICES else [*GATEWAYS[peer], *PLACES, *self.proxies()]
            src = self.random.choice(sources) if self.random.random() < 0.95 else "172.16.0.1"
            ports = self.random.choice([(80, 5000), (5000, 80), (443, 5000), (5000, 443)])
            packet = self.packet(src, self.own[":" in src], *ports)
        self.take(peer, packet)

    def take(self, peer: str, packet: Packet) -> None:
        self.twins.from_peer(peer, packet)
        if self.twins.delivered and packet.src_port >= 0:
            self.heard = [*self.heard[-20:], (peer, FlowKey.of(packet))]

    def receive_again(self) -> None:
        if self.heard:
            peer, key = self.random.choice(self.heard)
            self.take(peer, self.like(key))

    def end_flow(self) -> None:
        """FIN or RST of what is in force."""
        for verdict in self.twins.table.in_force(self.twins.now):
            key = verdict.before
            if key.protocol == 6 and self.random.random() < 0.5:
                flags = self.random.choice([ACK | FIN, ACK | FIN, RST])
                packet = build_tcp(key.src, key.dst, key.src_port, key.dst_port, flags)
                if verdict.is_inbound:
                    self.twins.from_peer(verdict.peer_id, packet)
                else:
                    self.twins.from_device(packet)

    def refuse(self) -> None:
        """A peer answers by an ICMP error; "prohibited" makes us ask again."""
        if self.seen:
            build = self.random.choice([build_icmp_prohibited, build_icmp_prohibited, build_icmp_unreachable])
            error = build(self.like(self.random.choice(self.seen)))
            self.twins.from_peer(self.random.choice([*GATEWAYS, *DEVICES]), error)

    # names

    def ask_name(self) -> None:
        name = self.random.choice(NAMES)
        wire = dns.message.make_query(name, self.random.choice(["A", "AAAA"]), id=7).to_wire()
        self.twins.from_device(build_udp(packed(self.own[0]), packed(SENTINEL), 5353, 53, wire))

    def tell_status(self) -> None:
        """A gateway answers what it was told."""
        if self.statuses:
            peer, said = self.statuses.pop()
            is_active = self.random.random() < 0.9
            self.twins.from_peer(peer, control.DomainStatus(said.resource_id, said.domain, is_active).build())

    def any_status(self) -> None:
        said = control.DomainStatus(self.random.choice(["r3", "r4"]), self.random.choice(NAMES), False)
        self.twins.from_peer(self.random.choice(list(GATEWAYS)), said.build())

    # what the portal says

    def token(self) -> str:
        return self.random.choice([TOKEN, TOKEN, ""])

    def resource(self, number: int) -> Any:
        filters = self.random.choice(FILTERS)
        members = self.random.sample(list(DEVICES), self.random.choice([1, 2, 2]))
        devices = tuple(PoolDevice(d, *(ip_network(ip) for ip in DEVICES[d])) for d in members)
        kinds: list[Any] = [
            CidrResource("r0", ip_network("10.0.0.0/24"), "n", filters, SITE),
            CidrResource("r1", ip_network("10.0.0.0/8"), "n", filters, SITE),
            InternetResource("r2", sites=SITE),
            DnsResource("r3", "*.corp.example", "n", filters, SITE, None, self.random.choice(["dual", "ipv4_only"])),
            DnsResource("r4", "a.corp.example", "n", filters, SITE),
            StaticDevicePool("r5", "n", devices, filters),
            CidrResource("r6", ip_network("100.64.0.0/12"), "n", filters, SITE),  # as wide as to cover devices
            CidrResource("r7", ip_network("100.96.0.0/16"), "n", filters, SITE),  # and names
        ]
        return kinds[number]

    def interface(self) -> Interface:
        v4, v6 = (ip_address(ip) for ip in self.own)
        upstreams = tuple(ip_address(ip) for ip in self.random.sample(UPSTREAMS, self.random.choice([0, 1])))
        return Interface(v4, v6, upstreams)  # type: ignore[arg-type]

    def resync(self) -> None:
        logs = self.logs()
        resources = tuple(self.resource(n) for n in range(8) if n < 6 or self.random.random() < 0.3)
        grants = [(d, f"p{n}") for d in DEVICES for n in range(2) if self.random.random() < 0.8]
        listed = tuple(Authorization(*pair, self.expiry()) for pair in grants)
        self.tell(c.Init(self.interface(), resources, (), listed, logs))

    def configure(self) -> None:
        self.own = self.random.choice(OWN)
        self.tell(c.ConfigChanged(self.interface()))

    def add(self) -> None:
        self.tell(c.ResourceCreatedOrUpdated(self.resource(self.random.randrange(8))))

    def remove(self) -> None:
        self.tell(c.ResourceDeleted(f"r{self.random.randrange(8)}"))

    def answer_portal(self) -> None:
        """A question is answered, by whom it may please."""
        if not self.questions:
            return
        asked = self.questions.pop()
        address = asked.ipv4 or asked.ipv6
        if address is not None:
            device = next((d for d, ips in DEVICES.items() if str(address) in ips), None)
            if device is not None:
                self.authorize_device(device, None)
            return
        gateway = self.random.choice(list(GATEWAYS))
        key = self.random.choice([b"k"] * 9 + [b"K"]) * 32
        v4, v6 = (ip_address(ip) for ip in GATEWAYS[gateway])
        self.tell(
            c.AuthorizationCreated(
                asked.resource_id,
                gateway,
                "site",
                key,
                v4,
                v6,
                bytes(32),
                *CREDENTIALS,
                False,
                self.token(),  # type: ignore[arg-type]
            )
        )
        if self.random.random() < 0.9:
            self.twins.settle(lambda node: node.establish(gateway))

    def authorize_device(self, device: str, grant: c.PoolGrant | None) -> None:
        v4, v6 = (ip_address(ip) for ip in DEVICES[device])
        expires_at = None if grant is None else self.expiry()
        self.tell(
            c.ClientDeviceAccessAuthorized(
                device,
                device,
                b"k" * 32,
                v4,
                v6,
                bytes(32),
                *CREDENTIALS,
                True,
                False,
                grant,
                expires_at,
                self.token(),  # type: ignore[arg-type]
            )
        )
        self.twins.do(narrow)
        self.twins.settle(lambda node: node.establish(device))

    def admit_device(self) -> None:
        grant = c.PoolGrant(f"p{self.random.randrange(2)}", self.random.choice(FILTERS))
        self.authorize_device(self.random.choice(list(DEVICES)), grant)

    def change_filters(self) -> None:
        self.tell(c.ResourceFiltersUpdated(f"p{self.random.randrange(2)}", self.random.choice(FILTERS)))

    def reject(self) -> None:
        self.tell(c.RejectAccess(self.random.choice(list(DEVICES)), f"p{self.random.randrange(2)}"))

    def deny_device(self) -> None:
        device = self.random.choice(list(DEVICES))
        v4, v6 = (ip_address(ip) for ip in DEVICES[device])
        if self.random.random() < 0.5:
            self.tell(c.ClientDeviceAccessDenied(v4, v6, c.FailReason.FORBIDDEN))  # type: ignore[arg-type]
        else:
            self.tell(c.ClientIceCandidateError(device, c.FailReason.OFFLINE))

    def fail_request(self) -> None:
        self.tell(c.AuthorizationCreationFailed(f"r{self.random.randrange(8)}", self.random.choice(REASONS)))

    # what the owner and the node say

    def toggle_internet(self) -> None:
        active = self.random.random() < 0.7
        self.twins.do(lambda role: role.set_internet_resource(active, self.twins.now))

    def change_resolvers(self) -> None:
        ips = [packed(self.random.choice(UPSTREAMS))]
        self.twins.do(lambda role: role.set_system_resolvers(ips, self.twins.now))

    def reset(self) -> None:
        if self.random.random() < 0.2:
            self.twins.do(lambda role: role.reset(self.twins.now))

    def goodbye(self) -> None:
        if self.random.random() < 0.3:
            self.twins.from_peer(self.random.choice([*GATEWAYS, *DEVICES]), control.Goodbye().build())

    def connect(self) -> None:
        peer = self.random.choice([*GATEWAYS, *DEVICES])
        self.twins.settle(lambda node: node.establish(peer))

    def lose(self) -> None:
        peer = self.random.choice([*GATEWAYS, *DEVICES])
        self.twins.settle(lambda node: node.fail(peer))

    def move(self) -> None:
        peer = self.random.choice(list(self.twins.node.paths) or ["g1"])
        if peer in self.twins.node.paths:
            self.twins.settle(lambda node: node.move(peer))

    def grow_old(self) -> None:
        fresh = build_udp(packed(self.own[0]), packed("10.0.0.5"), self.random.randrange(6000, 65536), 80)
        self.age(list(self.twins.node.paths), fresh)

    def wait(self) -> None:
        self.twins.advance(self.random.choice([0.1, 0.1, 0.1, 1.0, 2.0, 2.0, 5.0, 30.0, 58.0, 118.0, 121.0]))
        if self.random.random() < 0.03:
            self.twins.advance(7440.0)


def narrow(role: Any) -> None:
    """So few tracked flows that some must make room."""
    for peer in role._peers:
        peer.flows._ours._capacity = peer.flows._theirs._capacity = MOST // 2


@pytest.mark.parametrize("is_tracking", [False, True])
def test_a_flow_table_changes_nothing(is_tracking: bool) -> None:
    carried, voided, records = run_all(60, lambda seed: ClientRun(seed, is_tracking))
    for way in ("in", "out"):
        for protocol in ("tcp", "udp", "echo"):
            assert carried[f"{way} {protocol} as is"] > 100, carried
    assert set(voided) >= {"generation", "stale", "lapsed"}, voided
    assert (records > 500) == is_tracking, records
