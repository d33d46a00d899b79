"""The fast path changes nothing: two equal systems get the same input, and one has pumps in front of its states.

Everything a peer does is held against what the other one's twin does: every datagram with its time, destination and
ECN mark, every packet for the device, every event, error and drop, deadlines, and flow logs. Handshakes, STUN and
relayed data are equal to the byte; of an encrypted packet the header is, and what comes out at its end.
A failure names the seed and the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from itertools import zip_longest
from math import inf
from random import Random
from typing import Any

import pytest

from fz_core.packet import (
    Address,
    Packet,
    build_echo,
    build_icmp_too_big,
    build_icmp_unreachable,
    build_tcp,
    build_udp,
)
from fz_core.portal import gateway as g
from fz_core.portal.types import CidrResource, Filter, Resource
from fz_core.tunnel import gateway as gateway_role
from fz_core.tunnel.flow_tracking import FlowTracking
from tests.model.verdict_twins import told
from tests.sim import system as sim
from tests.sim.names import named, uuid
from tests.sim.pumped import Logged, LoggedPeer, Pumped
from tests.sim.system import EPOCH, RESOURCE, SITE, Scenario, as_seen_by_gateway
from tests.sim.underlay import Faults
from tests.unit.fastpath.offload_reference import super_packet, vnet
from tests.unit.fastpath.pump_rig import partial
from tests.unit.tunnel.flow_samples import token_text

UDP, TCP, ACK, PSH, FIN, SYN, RST = 17, 6, 0x10, 0x08, 0x01, 0x02, 0x04
V6 = CidrResource(uuid(66), ip_network("2001:db8:aa::/64"), "v6", (), (SITE,))
FILTERED = CidrResource(
    uuid(67), ip_network("10.1.0.0/24"), "filtered", (Filter("tcp", 80, 90), Filter("udp", 53, 53)), (SITE,)
)
ZONE: dict[str, tuple[str, ...] | None] = {
    "four.corp.example": ("10.9.0.1", "10.9.0.2"),
    "six.corp.example": ("2001:db8:9::1",),
    "both.corp.example": ("10.9.0.4", "2001:db8:9::4"),
}
RESOURCES: list[Resource] = [RESOURCE, V6, FILTERED, named(1, "*.corp.example")]
FIXED = ("10.0.0.80", "10.0.0.81", "10.1.0.5", "2001:db8:aa::5", "10.77.0.1")
PORTS = (53, 80, 443)
SRC_PORTS = (7000, 7001, 7002)
NOTE_INTERVAL = 0.15


class Twins:
    """`slow` handles everything; `fast` has pumps."""

    def __init__(self, seed: int, *, blocked: bool, symmetric: bool, faults: Faults, clients: int) -> None:
        nat = "symmetric" if symmetric else "cone"
        scenario = Scenario(
            client_nat=nat, gateway_nat=nat, blocked=blocked, faults=faults, clients=clients, latency=0.002
        )
        self.slow = Logged(*RESOURCES, zone=ZONE, scenario=scenario, seed=seed)
        self.fast = Pumped(*RESOURCES, zone=ZONE, scenario=scenario, seed=seed)
        self.carried: Counter[str] = Counter()
        for net in (self.slow, self.fast):
            remember(net)

    def close(self) -> None:
        self.fast.close()

    def do(self, act: Callable[[Any], Any]) -> None:
        for net in (self.slow, self.fast):
            act(net)
        self.compare()

    def compare(self) -> None:
        """What was done since the last time, and where things stand."""
        differences = []
        for one, other in zip(peers(self.slow), peers(self.fast), strict=True):
            for stream in ("sent", "delivered", "refused"):
                mine, its = getattr(one, stream), getattr(other, stream)
                pairs = enumerate(zip_longest(mine, its, fillvalue=(inf,)))
                at = next((i for i, (a, b) in pairs if a != b), None)
                if at is not None:
                    differences.append((f"{one.name} {stream}", mine[at : at + 1], its[at : at + 1]))
            assert one.events == other.events, f"{one.name} says {one.events} and {other.events}"
        if differences:
            raise AssertionError("{}\n{}\nbut with a pump\n{}".format(*min(differences, key=earliest)))
        for peer in (*peers(self.slow), *peers(self.fast)):
            for of in (peer.sent, peer.delivered, peer.refused, peer.events):
                of.clear()
        for one, other in zip(peers(self.slow), peers(self.fast), strict=True):
            mine, its = dict(one.state.drops.items()), dict(other.state.drops.items())
            assert mine == its, f"{one.name} dropped {mine} and {its}"

    def compare_deadlines(self) -> None:
        for one, other in zip(peers(self.slow), peers(self.fast), strict=True):
            other.settle()
            mine, its = one.state.poll_timeout(), other.state.poll_timeout()
            assert (mine is None) == (its is None), (mine, its)
            if mine is not None and its is not None:
                now = self.slow.world.now
                assert abs(max(mine[0], now) - max(its[0], now)) <= NOTE_INTERVAL, (now, mine, its)

    def compare_flows(self) -> None:
        for one, other in zip(peers(self.slow), peers(self.fast), strict=True):
            found = []
            for peer in (one, other):
                peer.settle()
                peer.state.flows.shutdown(peer.world.now)
                records = []
                while (record := peer.state.flows.poll_record()) is not None:
                    records.append(told(record))
                found.append(sorted(records, key=repr))
            only = [record for record in found[0] if record not in found[1]]
            others = [record for record in found[1] if record not in found[0]]
            assert found[0] == found[1], f"{one.name} tells of {only}, with a pump of {others}"


def earliest(difference: tuple[str, list[Any], list[Any]]) -> float:
    return min(what[0] for what in (*difference[1], *difference[2]))


def peers(net: Any) -> list[LoggedPeer]:
    return [*net.clients, *net.gateways]


def remember(net: Any) -> None:
    """Write down whatever leaves a peer, and have the gateways' hosts answer."""
    net.arrived = []
    net.net.send = fated(net)
    for peer in peers(net):
        peer.net = Tap(peer)
        peer.host.listen(4, sim.PORT, receiver(net, peer))
    for client in net.clients:
        client.on_packet = delivered(client, None)
    for gateway in net.gateways:
        gateway.at_gateway = []
        gateway.on_packet = delivered(gateway, lambda packet, gateway=gateway: answer(net, gateway, packet))


def fated(net: Any) -> Callable[..., None]:
    """What happens to a datagram on its way follows from itself, not from what was sent in the same instant."""
    world, send = net.world, net.net.send

    def send_fated(host: Any, port: int, remote: Address, payload: bytes, ecn: int = 0) -> None:
        chance = world.random
        world.random = Random(repr((world.now, host.name, port, remote, seen(payload))))
        send(host, port, remote, payload, ecn)
        world.random = chance

    return send_fated


class Tap:
    """Between a peer and the network."""

    def __init__(self, peer: LoggedPeer) -> None:
        self._peer, self._net = peer, peer.net

    def send(self, host: Any, port: int, remote: Address, payload: bytes, ecn: int = 0) -> None:
        self._peer.sent.append((self._peer.world.now, remote, seen(payload), ecn))
        self._net.send(host, port, remote, payload, ecn)


def seen(payload: bytes) -> tuple[int, bytes]:
    """All of a datagram but what is encrypted; an IPv4 identification may differ within."""
    start = 4 if payload[0] & 0xF0 == 0x40 else 0
    is_data = payload[start : start + 4] == b"\4\0\0\0"
    return len(payload), payload[: start + 16] if is_data else payload


def receiver(net: Any, peer: LoggedPeer) -> Callable[[Address, Address, bytes, int], None]:
    def receive(to: Address, source: Address, data: bytes, ecn: int) -> None:
        net.arrived.append((peer, to, source, data, ecn))
        peer._receive(to, source, data, ecn)

    return receive


def delivered(peer: LoggedPeer, then: Callable[[Packet], None] | None) -> Callable[[Packet], None]:
    def take(packet: Packet) -> None:
        peer.delivered.append((peer.world.now, unnumbered(packet.data)))
        if then is not None:
            then(packet)

    return take


def unnumbered(data: bytes) -> bytes:
    """A translation between the families chooses the identification of IPv4."""
    return data[:4] + bytes(2) + data[6:10] + bytes(2) + data[12:] if data[0] >> 4 == 4 else data


def answer(net: Any, gateway: Any, packet: Packet) -> None:
    """The resource's network answers; TCP like a server that echoes."""
    gateway.at_gateway.append(packet)
    reply: Packet | None = None
    back = packet.dst, packet.src
    if packet.is_echo:
        reply = build_echo(*back, packet.src_port, 0, packet.data[packet.l4_offset + 8 :], reply=True)
    elif packet.protocol == UDP:
        reply = build_udp(*back, packet.dst_port, packet.src_port, packet.payload)
    elif packet.protocol == TCP and not packet.tcp_flags & RST:
        flags = ACK | packet.tcp_flags & (SYN | FIN)
        reply = build_tcp(*back, packet.dst_port, packet.src_port, flags, 1, 1, packet.payload)
    if reply is not None:
        net.world.after(0.0001, lambda: None if gateway.is_dead else gateway.send(reply))


# what happens


class Play:
    """One sequence; every choice follows from the seed."""

    def __init__(self, seed: int, is_tracking: bool) -> None:
        self.chance = chance = Random(seed)
        faults = Faults(*chance.choice([(0, 0, 0)] * 4 + [(0.05, 0.05, 0.01)]))
        self.twins = Twins(
            seed,
            blocked=chance.random() < 0.3,
            symmetric=chance.random() < 0.2,
            faults=faults,
            clients=chance.choice([1, 1, 2]),
        )
        if is_tracking:
            self.both(track)
        self.targets = [ip_address(a).packed for a in FIXED]
        self.steps: list[str] = []
        self.filters = 0

    def both(self, act: Callable[[Any], Any]) -> None:
        self.twins.do(act)

    def learn_names(self) -> None:
        """Ask for names at the client: their proxy addresses become targets."""
        sentinel = ip_address("100.100.111.1").packed
        for number, name in enumerate(ZONE):
            for rdtype in (1, 28):
                question = query(number * 100 + rdtype, name, rdtype)
                self.both(lambda net, q=question: net.client.send(build_udp(net.own(), sentinel, 9000, 53, q)))
                self.both(lambda net: net.world.run_for(0.1))
        for packet in self.twins.slow.client.packets:
            if packet.protocol == UDP and packet.src_port == 53:
                self.targets += proxies(packet.payload)

    def run(self, steps: int) -> None:
        self.learn_names()
        acts = (
            [self.from_client] * 14 + [self.burst] * 4 + [self.train] * 3 + [self.odd] * 4 + [self.from_gateway] * 4
            + [self.wait] * 6 + [self.wire] * 3 + [self.policy] * 1 + [self.network] * 1
        )  # fmt: skip
        for step in range(steps):
            act = self.chance.choice(acts)
            try:
                act()
                if step % 8 == 7:
                    self.twins.compare_deadlines()
            except AssertionError as error:
                raise AssertionError(f"step {step}, {act.__name__}: {error}") from error

    def pick_client(self) -> tuple[int, Any]:
        which = self.chance.randrange(len(self.twins.slow.clients))
        return which, self.twins.slow.clients[which]

    def packet(self, which: int, size: int | None = None) -> Packet:
        chance, net = self.chance, self.twins.slow
        dst = chance.choice(self.targets)
        src = net.own(len(dst) if len(dst) == 4 else 6, net.clients[which])
        size = chance.choice([0, 1, 9, 100, 1000, 1200, 1220]) if size is None else size
        payload = chance.randbytes(min(size, 1240 if len(dst) == 4 else 1220))
        ports = chance.choice(SRC_PORTS), chance.choice(PORTS)
        kind = chance.choice([UDP, UDP, TCP, TCP, TCP, 1])
        if kind == UDP:
            packet = build_udp(src, dst, *ports, payload)
        elif kind == TCP:
            flags = chance.choice([ACK] * 8 + [ACK | PSH, SYN, FIN | ACK, RST])
            packet = build_tcp(src, dst, *ports, flags, chance.randrange(2**32), 5, payload)
        else:
            packet = build_echo(src, dst, ports[0], chance.randrange(99), payload)
        if chance.random() < 0.2:
            packet.set_ecn(chance.randrange(4))
        return packet

    def give(self, which: int, raw: bytes) -> None:
        self.both(lambda net: net.clients[which].read(raw))

    def from_client(self) -> None:
        which, _ = self.pick_client()
        packet = self.packet(which)
        is_partial = packet.protocol in (TCP, UDP) and self.chance.random() < 0.2
        self.give(which, partial(packet) if is_partial else bytes(10) + packet.data)
        self.pause()

    def burst(self) -> None:
        """The same flow several times."""
        which, _ = self.pick_client()
        packet = self.packet(which)
        for _ in range(self.chance.randrange(2, 6)):
            self.give(which, bytes(10) + packet.data)
            if self.chance.random() < 0.7:
                self.pause()

    def train(self) -> None:
        """A super packet, maybe one whose packets are too large."""
        which, _ = self.pick_client()
        first = self.packet(which, self.chance.choice([100, 1000, 1220]))
        if first.protocol not in (TCP, UDP) or not first.payload_length or first.tcp_flags & (SYN | RST):
            return
        more = [first] * self.chance.randrange(1, 40)
        raw = bytearray(super_packet([*more, first]))
        if self.chance.random() < 0.2:
            raw[4:6] = self.chance.randrange(1200, 1300).to_bytes(2, "little")
        if self.chance.random() < 0.1:
            raw[self.chance.randrange(10)] ^= 1 << self.chance.randrange(8)
        self.give(which, bytes(raw))
        self.pause()

    def odd(self) -> None:
        """What is not quite a packet."""
        which, _ = self.pick_client()
        data = bytearray(self.packet(which).data)
        match self.chance.randrange(6):
            case 0:
                data[6] |= 0x20 if data[0] >> 4 == 4 else 0
            case 1:
                data[-1] ^= 0xFF  # a wrong checksum, unless there is no payload
            case 2:
                del data[-1]
            case 3:
                data[self.chance.randrange(min(40, len(data)))] ^= 1 << self.chance.randrange(8)
            case 4:
                data += bytes(4)
            case 5:
                self.give(which, vnet(1, 0, 0, 0, self.chance.randrange(70), self.chance.choice([6, 16, 2])) + data)
                return
        self.give(which, bytes(10) + data)
        self.pause()

    def from_gateway(self) -> None:
        """The resource's network speaks: an answer, an error, or something nobody asked for."""
        which = self.chance.randrange(len(self.twins.slow.gateways))
        got = self.twins.slow.gateways[which].at_gateway  # type: ignore[attr-defined]
        if not got:
            return
        packet = self.chance.choice(got[-20:])
        back = packet.dst, packet.src
        reply: Any
        match self.chance.randrange(4):
            case 0 if packet.protocol == UDP:
                reply = build_udp(*back, packet.dst_port, packet.src_port, bytes(self.chance.randrange(1200)))
            case 0 if packet.protocol == TCP:
                reply = build_tcp(
                    *back, packet.dst_port, packet.src_port, ACK, 9, 9, bytes(self.chance.randrange(1200))
                )
            case 1:
                reply = build_icmp_unreachable(packet)
            case 2:
                reply = build_icmp_too_big(packet, 1100)
            case _:
                reply = build_udp(*back, self.chance.randrange(1, 9), 7000, b"unasked")
        if isinstance(reply, Packet):
            self.both(lambda net: net.gateways[which].read(bytes(10) + reply.data))
            self.pause()

    def pause(self) -> None:
        seconds = self.chance.choice([0, 0, 0.001, 0.02, 0.05])
        self.both(lambda net: net.world.run_for(seconds))

    def wait(self) -> None:
        seconds = self.chance.choice([0.1] * 6 + [1, 1, 3, 10, 25, 61, 119, 130, 185, 400])
        self.both(lambda net: net.world.run_for(seconds))

    def wire(self) -> None:
        """Somebody on the way repeats, damages, or sends from elsewhere."""
        arrived = self.twins.slow.arrived  # type: ignore[attr-defined]
        assert len(arrived) == len(self.twins.fast.arrived)  # type: ignore[attr-defined]
        if not arrived:
            return
        which = len(arrived) - 1 - self.chance.randrange(min(len(arrived), 60))
        kind, at, ecn = self.chance.randrange(5), self.chance.random(), self.chance.randrange(4)

        def act(net: Any) -> None:
            peer, to, source, data, _ = net.arrived[which]
            data = bytearray(data)
            match kind:
                case 0:
                    pass
                case 1 | 2:
                    data[int(at * len(data))] ^= 1 << ecn
                case 3:
                    del data[int(at * len(data)) :]
                case 4:
                    source = Address(source.ip, source.port ^ 1)
            peer._receive(to, source, bytes(data), ecn)

        self.both(act)
        self.pause()

    def policy(self) -> None:
        """The portal changes its mind."""
        match self.chance.randrange(4):
            case 0:
                grants = list(self.twins.slow.portal.grants)
                if grants:
                    grant = self.chance.choice(grants)
                    self.both(lambda net: net.portal.revoke(*grant))
            case 1:
                self.filters += 1
                changed = CidrResource(
                    RESOURCE.id, RESOURCE.address, RESOURCE.name, (Filter("udp", 0, 60 + self.filters % 500),), (SITE,)
                )
                resource = self.chance.choice([changed, RESOURCE])
                self.both(lambda net: tell_gateways(net, g.ResourceUpdated(as_seen_by_gateway(resource))))
            case 2:
                shown = self.chance.sample(RESOURCES, 3) if self.chance.random() < 0.5 else RESOURCES
                self.both(lambda net: show(net, shown))
            case 3:
                seconds = self.chance.choice([None, 5, 60])
                self.both(lambda net: expire(net, seconds))

    def network(self) -> None:
        """Roaming, routers and portals that restart, and other credentials for the relays."""
        match self.chance.randrange(5):
            case 0:
                self.both(lambda net: net.client.host.nat.reboot())
            case 1:
                self.both(lambda net: net.gateway.host.nat.reboot())
            case 2:
                self.both(lambda net: roam(net))
            case 3:
                text = str(self.chance.random())
                self.both(lambda net: net.portal.replace_relay_credentials(text))
            case 4:
                self.both(lambda net: net.portal.disconnect(net.client_id))
                seconds = self.chance.choice([0.1, 5])
                self.both(lambda net: net.world.run_for(seconds))
                self.both(lambda net: net.portal.reconnect(net.client_id))


def track(net: Any) -> None:
    for role, group in (("client", net.clients), ("gateway", net.gateways)):
        for peer in group:
            peer.state.flows = FlowTracking(role, EPOCH, is_local=True)


def show(net: Any, resources: list[Any]) -> None:
    """The portal lists these to clients; requests for others may be under way."""
    for peer in net.clients:
        init = net.portal.init(net._id(peer))
        peer.tell(type(init)(init.interface, tuple(resources), init.relays))


def expire(net: Any, seconds: int | None) -> None:
    net.portal.expires_at = None if seconds is None else int(EPOCH + net.world.now) + seconds


def tell_gateways(net: Any, message: Any) -> None:
    for identity, (role, *_) in net.portal.peers.items():
        if role == "gateway":
            net.portal.to(identity, message)


def roam(net: Any) -> None:
    """The client is somewhere else: everything begins anew, under another key."""
    client = net.client
    client.state.handle_timeout(net.world.now)
    client.state.reset(net.world.now)
    client.host.nat.reboot()
    role, peer, _, ips = net.portal.peers[net.client_id]
    net.portal.peers[net.client_id] = role, peer, client.state.public_key, ips
    client.drain()
    net.portal.reconnect(net.client_id)


def query(number: int, name: str, rdtype: int) -> bytes:
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return number.to_bytes(2, "big") + b"\1\0\0\1\0\0\0\0\0\0" + labels + b"\0" + rdtype.to_bytes(2, "big") + b"\0\1"


def proxies(message: bytes) -> list[bytes]:
    import dns.message

    return [ip_address(str(rdata)).packed for rrset in dns.message.from_wire(message).answer for rdata in rrset]


@pytest.fixture(autouse=True)
def tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim, "INGEST_TOKEN", token_text())
    # A gateway looks for what has ended once a second, from whenever it began: here it does so in time.
    monkeypatch.setattr(gateway_role, "TICK", 0.001)


def play(seed: int, steps: int) -> Counter[str]:
    """One seed; what the pumps carried."""
    game = Play(seed, is_tracking=seed % 2 == 0)
    try:
        game.run(steps)
        game.twins.compare_deadlines()
        if seed % 2 == 0:
            game.twins.compare_flows()
        found: Counter[str] = Counter()
        for peer in peers(game.twins.fast):
            if peer.carrier is not None:  # type: ignore[attr-defined]
                found.update(peer.carrier.counters())  # type: ignore[attr-defined]
        return found
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error
    finally:
        game.twins.close()


SEEDS, STEPS = 30, 60


@pytest.mark.parametrize("part", range(4))
def test_the_fast_path_changes_nothing(part: int) -> None:
    carried: Counter[str] = Counter()
    for seed in range(part * SEEDS, (part + 1) * SEEDS):
        carried += play(seed, STEPS)
    assert carried["out_packets"] > 500, carried
    assert carried["in_packets"] > 500, carried
