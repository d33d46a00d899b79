"""Sequences for `twins`: what hosts, servers, portal, network and attackers do; every choice follows from a seed.

`play(seed, ...)` raises AssertionError with the seed, the step and what differed, and returns what the sequence had in
it: acts, kinds of changes, what the pumps carried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from random import Random
from typing import Any

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
from fz_core.tunnel.flow_tracking import FlowTracking
from fz_core.tunnel.name_setups import BUFFERED_PACKETS
from tests.sim.names import named, uuid
from tests.sim.pumped import CLASSES, NET, NO_OFFLOAD, size_class
from tests.sim.system import EPOCH, RESOURCE, SITE, Scenario, as_seen_by_gateway
from tests.sim.twins import ACK, FIN, RST, SYN, TCP, UDP, Together, Twins, seen
from tests.sim.underlay import Faults
from tests.unit.fastpath.offload_reference import super_packet, vnet
from tests.unit.fastpath.pump_rig import partial

PSH, ECHO = 0x08, 1
APART = 0.0301
MOST_KEPT = BUFFERED_PACKETS - 12  # by a name that is being set up, with those of a read and of `open` to come
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
FAMILIES = [((16,), (16,)), ((4, 16), (4, 16)), ((16,), (4, 16)), ((4, 16), (16,)), ((4,), (16,)), ((4,), (4,))]


class Play:
    """One sequence; every choice follows from the seed."""

    def __init__(self, seed: int, *, is_tracking: bool, together: Together, has_v6: bool) -> None:
        self.chance = chance = Random(seed)
        self.together = together
        self.counts: Counter[str] = Counter()
        loss, duplication, jitter = chance.choice([(0.0, 0.0, 0.0)] * 3 + [(0.05, 0.05, 0.01)])
        if together is not Together.NOTHING:
            jitter = 0.0  # nothing would arrive together
        if together is Together.ALL:
            loss = duplication = 0.0  # they would hit another one of those that may leave in another order
        families = chance.choice(FAMILIES) if has_v6 else ((4,), (4,))
        nat = "symmetric" if chance.random() < 0.2 else "cone"
        self.is_iceless = chance.random() < 0.2
        scenario = Scenario(
            client_nat=nat,
            gateway_nat=nat,
            client_families=families[0],
            gateway_families=families[1],
            blocked=chance.random() < 0.3,
            relay_v6=has_v6,
            clients=chance.choice([1, 1, 2]),
            iceless=self.is_iceless,
            faults=Faults(loss, duplication, jitter),
            latency=0.002,
        )
        self.twins = Twins(seed, together, scenario, RESOURCES, ZONE)
        if is_tracking:
            self.both(track)
        self.targets = [ip_address(a).packed for a in FIXED]
        self.recent: list[tuple[bytes, tuple[int, int], int]] = []
        self.filters = self.moves = 0

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
            [self.from_client] * 12 + [self.burst] * 5 + [self.train] * 4 + [self.volley] * 5 + [self.odd] * 3
            + [self.from_gateway] * 4 + [self.wait] * 6 + [self.wire] * 3 + [self.policy] * 1 + [self.network] * 1
            + [self.upheaval] * 2
        )  # fmt: skip
        for step in range(steps):
            act = self.chance.choice(acts)
            try:
                act()
                if step % 8 == 7:
                    self.twins.compare_deadlines()
            except AssertionError as error:
                raise AssertionError(f"step {step}, {act.__name__}: {error}") from error

    def pick_client(self) -> int:
        return self.chance.randrange(len(self.twins.slow.clients))

    def flow(self) -> tuple[bytes, tuple[int, int], int]:
        """Mostly one that was in use lately: hosts have few conversations, and long ones."""
        chance = self.chance
        if self.recent and chance.random() < 0.92:
            return chance.choice(self.recent)
        ports = chance.choice(SRC_PORTS), chance.choice(PORTS)
        found = chance.choice(self.targets), ports, chance.choice([UDP, UDP, TCP, TCP, TCP, ECHO])
        self.recent = [*self.recent[-2:], found]
        return found

    def packet(self, which: int, size: int | None = None) -> Packet:
        chance = self.chance
        size = chance.choice([0, 1, 9, 100, 1000, 1200, 1220]) if size is None else size
        flags = chance.choice([ACK] * 20 + [ACK | PSH] * 2 + [SYN, FIN | ACK, RST])
        packet = self.build(which, self.flow(), size, chance.randrange(2**32), flags)
        if chance.random() < 0.2:
            packet.set_ecn(chance.randrange(4))
        return packet

    def build(
        self, which: int, flow: tuple[bytes, tuple[int, int], int], size: int, sequence: int, flags: int = ACK
    ) -> Packet:
        net = self.twins.slow
        dst, ports, kind = flow
        src = net.own(len(dst) if len(dst) == 4 else 6, net.clients[which])
        payload = self.chance.randbytes(min(size, 1240 if len(dst) == 4 else 1220))
        if kind == UDP:
            return build_udp(src, dst, *ports, payload)
        if kind == TCP:
            return build_tcp(src, dst, *ports, flags, sequence, 5, payload)
        return build_echo(src, dst, ports[0], self.chance.randrange(99), payload)

    def give(self, which: int, *reads: bytes) -> None:
        self.both(lambda net: net.clients[which].read(*reads))

    def from_client(self) -> None:
        which = self.pick_client()
        packet = self.packet(which)
        self.give(which, self.as_read(packet))
        self.pause()

    def as_read(self, packet: Packet) -> bytes:
        is_partial = packet.protocol in (TCP, UDP) and self.chance.random() < 0.2
        return partial(packet) if is_partial else NO_OFFLOAD + packet.data

    def open(self, which: int, *packets: Packet) -> None:
        """Mostly, what comes in numbers belongs to conversations that have begun."""
        if self.chance.random() < 0.8:
            self.give(which, *(NO_OFFLOAD + packet.data for packet in packets))
            self.both(lambda net: net.world.run_for(0.05))

    def burst(self) -> None:
        """The same flow several times."""
        which = self.pick_client()
        packet = self.packet(which)
        self.open(which, packet)
        for _ in range(self.chance.randrange(3, 9)):
            self.give(which, NO_OFFLOAD + packet.data)
            if self.chance.random() < 0.7:
                self.pause()

    def train(self) -> None:
        """A super packet, maybe one whose packets are too large."""
        which = self.pick_client()
        first = self.packet(which, self.chance.choice([100, 1000, 1220]))
        if first.protocol not in (TCP, UDP) or not first.payload_length or first.tcp_flags & (SYN | RST):
            return
        self.open(which, first)
        more = [first] * self.chance.randrange(1, 40)
        raw = bytearray(super_packet([*more, first]))
        if self.chance.random() < 0.2:
            raw[4:6] = self.chance.randrange(1200, 1300).to_bytes(2, "little")
        if self.chance.random() < 0.1:
            raw[self.chance.randrange(10)] ^= 1 << self.chance.randrange(8)
        self.give(which, bytes(raw))
        self.pause()

    def volley(self) -> None:
        """Several reads wait at the device."""
        which = self.pick_client()
        self.give(which, *self.reads(which))
        self.pause()

    def reads(self, which: int) -> list[bytes]:
        """Of one flow, or of several where their order may change."""
        chance = self.chance
        flows = [self.flow() for _ in range(chance.randrange(1, 5) if self.together is Together.ALL else 1)]
        self.open(which, *(self.build(which, flow, self.fit(flow, at, 20), 0) for at, flow in enumerate(flows)))
        sequences = [chance.randrange(2**32) for _ in flows]
        marks = [chance.choice([0, 0, 1, 2, 3]) for _ in flows]
        size = chance.choice([100, 1000, 1220])
        reads = []
        waiting = 0
        for _ in range(chance.randrange(4, 14)):
            number = chance.randrange(len(flows))
            flags = chance.choice([ACK] * 20 + [ACK | PSH] * 2 + [SYN, FIN | ACK])
            part = self.fit(flows[number], number, size if chance.random() < 0.8 else chance.randrange(size + 1))
            packets = [
                self.build(which, flows[number], part, sequences[number] + at * part & 0xFFFFFFFF, flags)
                for at in range(chance.randrange(1, 8) if chance.random() < 0.4 else 1)
            ]
            for packet in packets:
                packet.set_ecn(marks[number])
            sequences[number] += sum(packet.payload_length for packet in packets)
            waiting += len(packets)
            if self.together is Together.ALL and waiting > MOST_KEPT:
                break  # of more that wait for a name, it depends on the order which are kept
            is_super = len(packets) > 1 and packets[0].payload_length and flows[number][2] != ECHO and not flags & SYN
            reads += [super_packet(packets)] if is_super else [self.as_read(packet) for packet in packets]
        return reads

    def fit(self, flow: tuple[bytes, tuple[int, int], int], number: int, size: int) -> int:
        """Payload bytes, about so many, of packets by which the network knows the flow of this number."""
        header = (20 if len(flow[0]) == 4 else 40) + (20 if flow[2] == TCP else 8)
        if self.together is Together.ALL:
            size -= (size_class(header + size) - number) % CLASSES * 16
        return size if size >= 0 else size + CLASSES * 16

    def upheaval(self) -> None:
        """The portal or the network changes in the middle of a burst that the pumps carry."""
        which = self.pick_client()
        flow, sequence = self.flow(), self.chance.randrange(2**30)
        packets = [self.build(which, flow, 900, sequence + 900 * i) for i in range(8)]
        reads = [NO_OFFLOAD + packet.data for packet in packets]
        self.give(which, reads[0])
        self.both(lambda net: net.world.run_for(0.1))
        before = self.twins.carried()["out_packets"]
        self.give(which, *reads[1:4])
        was_carried = self.twins.carried()["out_packets"] > before
        self.both(lambda net: net.world.run_for(0.002))
        change = self.chance.choice([self.policy, self.network])
        change()
        self.counts[f"{change.__name__} amid a carried burst"] += was_carried
        self.give(which, *reads[4:6])
        self.both(lambda net: net.world.run_for(0.003))
        self.give(which, *reads[6:])
        self.pause()

    def odd(self) -> None:
        """What is not quite a packet.

        On its own: what differs from its flow only in a checksum, a TCP window or a flow label merges with it, and has
        those of the first packet then (`spec/io.md` section 6.4).
        """
        self.both(lambda net: net.world.run_for(APART))
        which = self.pick_client()
        data, header = bytearray(self.packet(which).data), NO_OFFLOAD
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
                header = vnet(1, 0, 0, 0, self.chance.randrange(70), self.chance.choice([6, 16, 2]))
        self.give(which, header + data)
        self.both(lambda net: net.world.run_for(APART))

    def from_gateway(self) -> None:
        """The resource's network speaks: an answer, an error, or something nobody asked for."""
        which = self.chance.randrange(len(self.twins.slow.gateways))
        got = self.twins.slow.gateways[which].at_gateway  # type: ignore[attr-defined]
        if not got:
            return
        packet = self.chance.choice(got[-20:])
        back = packet.dst, packet.src
        reply: Any
        match self.chance.randrange(6):
            case 4 | 5 if packet.protocol in (TCP, UDP):
                self.server_train(which, packet)
                return
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

    def server_train(self, which: int, packet: Packet) -> None:
        """A super packet back, with another number of payload bytes in its last part."""
        chance = self.chance
        ends = packet.dst, packet.src, packet.dst_port, packet.src_port
        size, sequence = chance.choice([100, 1000, 1200]), chance.randrange(2**32)
        sizes = [size] * chance.randrange(1, 40) + [chance.randrange(1, size + 1)]
        parts = [chance.randbytes(part) for part in sizes]
        if packet.protocol == UDP:
            packets = [build_udp(*ends, part) for part in parts]
        else:
            packets = [build_tcp(*ends, ACK, sequence, 9, part) for part in parts]
        self.both(lambda net: net.gateways[which].read(super_packet(packets)))
        self.pause()

    def pause(self) -> None:
        seconds = self.chance.choice([0, 0, 0.001, 0.02, 0.05])
        self.both(lambda net: net.world.run_for(seconds))

    def wait(self) -> None:
        seconds = self.chance.choice([0.1] * 6 + [1, 1, 3, 10, 25, 61, 119, 130, 185, 400])
        self.both(lambda net: net.world.run_for(seconds))

    def wire(self) -> None:
        """Somebody on the way repeats, damages, or sends from elsewhere."""
        arrived, others = self.twins.slow.arrived, self.twins.fast.arrived  # type: ignore[attr-defined]
        assert len(arrived) == len(others)
        if not arrived:
            return
        which = len(arrived) - 1 - self.chance.randrange(min(len(arrived), 60))
        kind, at, ecn = self.chance.randrange(5), self.chance.random(), self.chance.randrange(4)

        if seen(arrived[which][3]) != seen(others[which][3]):
            assert self.together is not Together.NOTHING
            return  # a counter that one of them has received may be new to the other
        self.counts[f"wire {kind}"] += 1

        def act(net: Any) -> None:
            peer, to, source, data, _ = net.arrived[which]
            data = bytearray(data)
            match kind:
                case 0:
                    pass
                case 1 | 2:
                    data[int(at * len(data))] ^= 1 << ecn
                case 3:
                    del data[max(1, int(at * len(data))) :]  # sockets skip empty ones
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
                    self.counts["access revoked"] += 1
                    self.both(lambda net: net.portal.revoke(*grant))
            case 1:
                self.filters += 1
                changed = CidrResource(
                    RESOURCE.id, RESOURCE.address, RESOURCE.name, (Filter("udp", 0, 60 + self.filters % 500),), (SITE,)
                )
                resource = self.chance.choice([changed, RESOURCE])
                self.counts["filters changed"] += 1
                self.both(lambda net: tell_gateways(net, g.ResourceUpdated(as_seen_by_gateway(resource))))
            case 2:
                shown = self.chance.sample(RESOURCES, 3) if self.chance.random() < 0.5 else RESOURCES
                self.counts["resources changed"] += 1
                self.both(lambda net: show(net, shown))
            case 3:
                seconds = self.chance.choice([None, 5, 60])
                self.counts["access ends"] += seconds is not None
                self.both(lambda net: expire(net, seconds))

    def network(self) -> None:
        """Roaming, routers and portals that restart, and other credentials for the relays."""
        match self.chance.randrange(6):
            case 0:
                self.counts["client's NAT restarts"] += 1
                self.both(lambda net: net.client.host.nat.reboot())
            case 1:
                self.counts["gateway's NAT restarts"] += 1
                self.both(lambda net: net.gateway.host.nat.reboot())
            case 2:
                self.counts["client starts anew"] += 1
                self.both(lambda net: roam(net, 0))
            case 3:
                text = str(self.chance.random())
                self.counts["relay credentials"] += 1
                self.both(lambda net: net.portal.replace_relay_credentials(text))
            case 4:
                self.both(lambda net: net.portal.disconnect(net.client_id))
                seconds = self.chance.choice([0.1, 5])
                self.both(lambda net: net.world.run_for(seconds))
                self.counts["portal away"] += 1
                self.both(lambda net: net.portal.reconnect(net.client_id))
            case 5 if not self.is_iceless:  # which stays on its last path until it has another
                self.moves += 1
                self.counts["client moves"] += 1
                self.both(lambda net: roam(net, self.moves))


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


def roam(net: Any, number: int) -> None:
    """The client is somewhere else, by an address of this number if it has one: everything begins anew.

    As the driver does it: timers, sockets, state, portal. Without ICE connections live on under the old key.
    """
    client = net.client
    client.settle()
    client.state.handle_timeout(net.world.now)
    if number:
        new = {4: f"{NET}.30.{100 + number}", 16: f"172:30::{100 + number}"}
        client.host.ips = {family: ip_address(new[family]).packed for family in client.host.ips}
        client.rebind()
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


def play(seed: int, steps: int, *, has_v6: bool = False) -> Counter[str]:
    """One seed; what there was in it."""
    is_tracking = seed % 2 == 0
    game = Play(seed, is_tracking=is_tracking, together=list(Together)[seed % 3], has_v6=has_v6)
    try:
        game.run(steps)
        game.twins.compare_deadlines()
        if is_tracking:
            game.twins.compare_flows()
        return game.counts + game.twins.counts + game.twins.carried()
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error
    finally:
        game.twins.close()
