"""A gateway with a flow table in front behaves as one without, whatever happens to access, names, sessions and time."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from random import Random
from typing import Any

import pytest
from verdict_run import (
    ACK,
    CREDENTIALS,
    EPOCH,
    FIN,
    MAX_TCP_PAYLOAD,
    RST,
    START,
    SYN,
    VerdictRun,
    packed,
    run_all,
    tracking,
)

from fz_core.crypto import PrivateKey
from fz_core.packet import Packet, build_echo, build_icmp, build_icmp_unreachable, build_ip, build_tcp, build_udp
from fz_core.portal import client as c
from fz_core.portal import gateway as g
from fz_core.portal.types import (
    Authorization,
    CidrResource,
    DnsResource,
    Filter,
    GatewayInterface,
    InternetResource,
    ProxiedName,
)
from fz_core.tunnel import GatewayTunnel, control
from fz_core.tunnel.events import ResolveName
from fz_core.tunnel.verdict import FlowKey
from tests.unit.tunnel.flow_samples import token_text

TOKEN = token_text(role="responder")
MOST = 6
OWN = [("100.64.0.1", "fd00:2021:1111::1"), ("100.64.0.2", "fd00:2021:1111::2")]
CLIENTS = ["one", "two", "three"]
IPS = [
    ("100.64.1.1", "fd00:2021:1111::101"),
    ("100.64.1.2", "fd00:2021:1111::102"),
    ("100.64.1.3", "fd00:2021:1111::103"),
]
FILTERS = [(), (), (Filter("udp", 80, 80),), (Filter("tcp", 80, 443), Filter("udp", 443, 443)), (Filter("icmp"),)]
PROXIES = ["100.96.0.1", "100.96.0.2", "fd00:2021:1111:8000::1", "fd00:2021:1111:8000::2", "100.96.0.3"]
NAMES = {"a.corp.example": PROXIES[:4], "b.corp.example": [PROXIES[4], "fd00:2021:1111:8000::3"]}
REAL = ["192.0.2.1", "192.0.2.2", "10.0.0.5", "10.0.0.5", "2001:db8::5", "2001:db9::1"]
DESTINATIONS = [*PROXIES * 4, "10.0.0.5", "10.0.0.6", "10.9.9.9", "1.1.1.1", "2001:db8::5", "192.0.2.1"]
ODD = ["100.64.0.1", "100.64.1.2", "224.0.0.1", "fd00:2021:1111::1", "100.64.0.2"]
SOURCES = [80, 5000, 5000, 5001, 5002]


def resource(number: int, filters: tuple[Filter, ...]) -> Any:
    kinds: list[Any] = [
        CidrResource("r0", ip_network("10.0.0.0/24"), "n", filters),
        CidrResource("r1", ip_network("10.0.0.0/8"), "n", filters),
        CidrResource("r2", ip_network("2001:db8::/64"), "n", filters),
        CidrResource("r3", ip_network("192.0.2.0/24"), "n", filters),
        InternetResource("r4"),
        DnsResource("r5", "*.corp.example", "n", filters),
        DnsResource("r6", "a.corp.example", "n", filters),
    ]
    return kinds[number]


class GatewayRun(VerdictRun):
    """One seed."""

    payloads = (1, 100, 1225)

    def __init__(self, seed: int, is_tracking: bool) -> None:
        def new_role() -> GatewayTunnel:
            flows = tracking("gateway", MOST, is_on=is_tracking)
            return GatewayTunnel(PrivateKey(b"\x01" * 32), START, EPOCH, Random(seed).randbytes, flows=flows)

        super().__init__(seed, new_role)
        self.ips = dict(zip(CLIENTS, IPS, strict=True))
        self.seen: list[tuple[str, FlowKey]] = []
        self.asked: list[tuple[str, FlowKey]] = []
        self.lookups: list[int] = []
        self.own = OWN[0]
        self.init(())

    def run(self, steps: int) -> None:
        often = (
            [self.from_client] * 6 + [self.from_network] * 8 + [self.ask_again] * 6 + [self.probe] * 4 + [self.announce]
        )
        rare = [
            self.grant, self.grant, self.revoke, self.update, self.resync, self.goodbye, self.connect, self.lose,
            self.move, self.grow_old, self.legacy, self.take_over, self.end_flow, self.refuse, self.tell_candidates,
        ]  # fmt: skip
        for _ in range(6):
            self.grant()
        for _ in range(6):
            self.announce()
        for client in CLIENTS:
            self.twins.settle(lambda node, client=client: node.establish(client))
        for _ in range(steps):
            self.random.choice(often)()
            if self.random.random() < 0.07:
                self.random.choice(rare)()
                self.twins.probe(self.like, self.random, 30)
            if self.random.random() < 0.15:
                self.wait()

    # packets

    def packet(self, src: str | bytes, dst: str | bytes, sport: int, dport: int, flags: int) -> Packet:
        src, dst = (packed(ip) if isinstance(ip, str) else ip for ip in (src, dst))
        payload = bytes(self.random.choice([0, 1, 100, 1225]))
        match self.random.choice(["udp", "udp", "tcp", "tcp", "echo", "echo", "icmp", "gre"]):
            case "udp":
                return build_udp(src, dst, sport, dport, payload)
            case "tcp":
                return build_tcp(src, dst, sport, dport, flags, payload=payload[:MAX_TCP_PAYLOAD])
            case "echo":
                return build_echo(src, dst, sport, 1, payload, reply=self.random.random() < 0.5)
            case "icmp":
                return build_icmp(src, dst, 13 if len(src) == 4 else 133, 0, bytes(16))
        return build_ip(src, dst, 47, bytes(8))

    def flags(self) -> int:
        return self.random.choice([SYN, ACK, ACK, ACK, ACK, ACK | FIN, RST])

    def from_client(self) -> None:
        client = self.random.choice(CLIENTS)
        dst = self.random.choice(DESTINATIONS) if self.random.random() < 0.9 else self.random.choice([*ODD, *self.own])
        src = self.ips[client if self.random.random() < 0.97 else self.random.choice(CLIENTS)][":" in dst]
        packet = self.packet(src, dst, self.random.choice(SOURCES), self.random.choice([80, 443]), self.flags())
        self.give(client, packet)

    def ask_again(self) -> None:
        """A client repeats itself."""
        if self.asked:
            client, key = self.random.choice(self.asked)
            self.give(client, self.like(key))

    def give(self, client: str, packet: Packet) -> None:
        self.twins.from_peer(client, packet)
        if self.twins.delivered and packet.src_port >= 0:
            self.asked = [*self.asked[-20:], (client, FlowKey.of(packet))]
        for data in self.twins.delivered:
            went = Packet.parse_untrusted(data)
            assert isinstance(went, Packet)
            if went.src_port >= 0:
                self.seen = [*self.seen[-20:], (client, FlowKey.of(went))]

    def from_network(self) -> None:
        if self.seen and self.random.random() < 0.85:
            _, key = self.random.choice(self.seen)
            back = key.back
            if self.random.random() < 0.1:
                back = back._replace(src_port=99) if back.protocol in (6, 17) else back
            self.twins.from_device(self.like(back))
            return
        src = self.random.choice([*DESTINATIONS, *self.own])
        dst = self.ips[self.random.choice(CLIENTS)][":" in src]
        packet = self.packet(src, dst, self.random.choice([80, 443]), self.random.choice([80, 5000]), self.flags())
        self.twins.from_device(packet)

    def end_flow(self) -> None:
        """FIN or RST, one way or the other."""
        if not self.seen:
            return
        client, key = self.random.choice(self.seen)
        flags = self.random.choice([ACK | FIN, ACK | FIN, RST])
        if key.protocol == 6:
            back = key.back
            self.twins.from_device(build_tcp(back.src, back.dst, back.src_port, back.dst_port, flags))
            if self.random.random() < 0.7:
                for verdict in self.twins.table.in_force(self.twins.now):
                    v = verdict.before
                    if verdict.is_inbound and verdict.peer_id == client and verdict.after == key:
                        self.twins.from_peer(client, build_tcp(v.src, v.dst, v.src_port, v.dst_port, flags))
                        break

    def refuse(self) -> None:
        """The resource answers by an ICMP error."""
        if self.seen:
            self.twins.from_device(build_icmp_unreachable(self.like(self.random.choice(self.seen)[1])))

    # what the portal says

    def init(self, authorizations: tuple[Authorization, ...]) -> None:
        logs = self.logs()
        v4, v6 = (ip_address(ip) for ip in self.own)
        self.tell(g.Init(GatewayInterface(v4, v6), (), authorizations, None, logs))  # type: ignore[arg-type]

    def grant(self) -> None:
        client = self.random.choice(CLIENTS)
        v4, v6 = (ip_address(ip) for ip in self.ips[client])
        key = self.random.choice([b"k", b"k", b"k", b"K"]) * 32
        who = g.Client(client, key, bytes(32), v4, v6)  # type: ignore[arg-type]
        what = resource(self.random.randrange(7), self.random.choice(FILTERS))
        token = self.random.choice([TOKEN, TOKEN, ""])
        self.tell(g.CreateAuthorization("ref", who, what, *CREDENTIALS, self.expiry(), False, token))
        self.twins.settle(lambda node: node.establish(client))

    def revoke(self) -> None:
        self.tell(c.RejectAccess(self.random.choice(CLIENTS), f"r{self.random.randrange(7)}"))

    def update(self) -> None:
        self.tell(g.ResourceUpdated(resource(self.random.randrange(7), self.random.choice(FILTERS))))

    def resync(self) -> None:
        if self.random.random() < 0.2:
            self.own = self.random.choice(OWN)
        listed = [(client, f"r{n}") for client in CLIENTS for n in range(7) if self.random.random() < 0.9]
        self.init(tuple(Authorization(*pair, self.expiry()) for pair in listed))

    def legacy(self) -> None:
        """A client before 1.4 gets access by a name."""
        client, name = self.random.choice(CLIENTS), self.random.choice(list(NAMES))
        v4, v6 = (ip_address(ip) for ip in self.ips[client])
        proxies = tuple(ip_address(ip) for ip in NAMES[name])
        what, domain = resource(5, self.random.choice(FILTERS)), ProxiedName(name, proxies)
        if self.random.random() < 0.5:
            self.tell(g.AllowAccess("ref", client, v4, v6, what, self.expiry(), domain))  # type: ignore[arg-type]
        else:
            who = g.Client(client, b"k" * 32, bytes(32), v4, v6)  # type: ignore[arg-type]
            self.tell(g.RequestConnection("ref", who, what, CREDENTIALS[0], self.expiry(), domain))
        self.resolve()
        self.twins.settle(lambda node: node.establish(client))

    def take_over(self) -> None:
        """The portal gives a client the addresses of another one."""
        one, other = self.random.sample(CLIENTS, 2)
        self.ips[one] = self.random.choice([self.ips[other], *IPS])
        self.grant()

    # what clients say

    def announce(self) -> None:
        client, name = self.random.choice(CLIENTS), self.random.choice(list(NAMES))
        proxies = NAMES[name if self.random.random() < 0.95 else self.random.choice(list(NAMES))]
        said = control.AssignedIps(f"r{self.random.choice([5, 5, 6])}", name, tuple(ip_address(ip) for ip in proxies))
        self.twins.from_peer(client, said.build())
        self.resolve()

    def resolve(self) -> None:
        self.lookups += [event.token for event in self.twins.events if isinstance(event, ResolveName)]
        while self.lookups and self.random.random() < 0.9:
            token = self.lookups.pop(0)
            self.twins.do(narrow)
            found = [packed(ip) for ip in self.random.sample(REAL, self.random.choice([0, 1, 1, 1, 2, 3]))]
            self.twins.do(lambda role, t=token, f=found: role.handle_name_resolved(t, f, self.twins.now))

    def goodbye(self) -> None:
        if self.random.random() < 0.3:
            self.twins.from_peer(self.random.choice(CLIENTS), control.Goodbye().build())

    # what the node reports

    def connect(self) -> None:
        client = self.random.choice(CLIENTS)
        self.twins.settle(lambda node: node.establish(client))

    def lose(self) -> None:
        client = self.random.choice(CLIENTS)
        self.twins.settle(lambda node: node.fail(client))

    def move(self) -> None:
        client = self.random.choice(CLIENTS)
        self.twins.settle(lambda node: node.move(client))

    def grow_old(self) -> None:
        dst = packed(self.ips[self.random.choice(CLIENTS)][0])
        self.age(CLIENTS, build_udp(packed(self.own[0]), dst, 1, self.random.randrange(6000, 65536)))

    def wait(self) -> None:
        self.twins.advance(self.random.choice([0.1, 0.1, 0.1, 1.0, 1.0, 4.0, 5.0, 30.0, 58.0, 60.0, 118.0, 121.0]))
        if self.random.random() < 0.01:
            self.twins.advance(7440.0)


def narrow(role: Any) -> None:
    """So few sessions that some must make room."""
    for access in role._clients.values():
        if access._nat is not None:
            access._nat._max_sessions = MOST


@pytest.mark.parametrize("is_tracking", [False, True])
def test_a_flow_table_changes_nothing(is_tracking: bool) -> None:
    carried, voided, records = run_all(120, lambda seed: GatewayRun(seed, is_tracking))
    for way in ("in", "out"):
        for protocol in ("tcp", "udp", "echo"):
            for change in ("as is", "translated", "crossing"):
                assert carried[f"{way} {protocol} {change}"] > 10, carried
    assert set(voided) == {"generation", "stale", "revoked", "lapsed"}, voided
    assert (records > 600) == is_tracking, records
