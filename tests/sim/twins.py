"""Two equal systems that get the same input, one with pumps in front of its states; whatever differs is found.

How things are handed over decides how much order can be the same (`Together`):

* `NOTHING`: one by one. Then everything is the same, in the same order.
* `ARRIVALS`: what reaches a peer at one instant of virtual time comes as one batch, runs of one size as one buffer,
  and several reads of one flow wait at the device. What the pump carries of a batch passes what it must hand to
  Python, as long as both are of different flows; and packets it merges are written where the first of them stood. So
  at one instant packets for the device are compared by flow. Nothing else of a batch leaves a peer but through the
  state, in order: all else is the same, in the same order.
* `ALL`: reads of several flows wait at the device as well. Then datagrams of different flows leave in another order,
  and under other counters. So within one instant order counts no more, but at the device: there it does, by flow. Marks
  of congestion (ECN) count to the flow, for a batch to the network has one mark, of the pump's as of the slow path's.
  Sizes, places, times and counters that were used are the same.

The simulated network keeps such differences from growing: servers answer what came at one instant in an order of their
own; and in `ALL`, where each flow has packet sizes of its own, datagrams arrive in an order that follows from those.
Where the state answers a datagram by data at once, what came with it comes later, for whether a keep-alive is owed, or
silence begins, depends on which was first; so does what is no data, for data may wake a connection that is idle.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from enum import Enum, auto
from itertools import groupby, zip_longest
from math import inf
from random import Random
from typing import Any

from fz_core.packet import Address, Packet, build_echo, build_tcp, build_udp
from tests.model.verdict_twins import told
from tests.sim import system as sim
from tests.sim.pumped import DATA, NO_OFFLOAD, Logged, LoggedPeer, Pumped, header_at, is_data
from tests.sim.system import Scenario

UDP, TCP, ACK, FIN, SYN, RST = 17, 6, 0x10, 0x01, 0x02, 0x04
NOTE_INTERVAL = 0.15


class Together(Enum):
    """What is handed over at once."""

    NOTHING = auto()
    ARRIVALS = auto()
    ALL = auto()


class Twins:
    """`slow` handles everything; `fast` has pumps. `counts` tells what happened to be in the sequence."""

    def __init__(self, seed: int, together: Together, scenario: Scenario, resources: Any, zone: Any) -> None:
        self.together = together
        self.slow = Logged(*resources, zone=zone, scenario=scenario, seed=seed)
        self.fast = Pumped(*resources, zone=zone, scenario=scenario, seed=seed)
        for one, other in zip(peers(self.slow), peers(self.fast), strict=True):
            other.script = one.script
        self.counts: Counter[str] = Counter()
        self._sessions: dict[tuple[str, int], tuple[int, Address]] = {}
        for net in (self.slow, self.fast):
            remember(net, together)

    def close(self) -> None:
        self.fast.close()

    def do(self, act: Callable[[Any], Any]) -> None:
        for net in (self.slow, self.fast):
            act(net)
        self.compare()

    def carried(self) -> Counter[str]:
        """What the pumps did since they were made."""
        found: Counter[str] = Counter()
        for peer in peers(self.fast):
            if peer.carrier is not None:  # type: ignore[attr-defined]
                found.update(peer.carrier.counters())  # type: ignore[attr-defined]
        return found

    def compare(self) -> None:
        """What was done since the last time, and where things stand."""
        differences = []
        for one, other in zip(peers(self.slow), peers(self.fast), strict=True):
            self._count(one)
            for stream, arranged in self._arrangements():
                mine, its = arranged(getattr(one, stream)), arranged(getattr(other, stream))
                pairs = enumerate(zip_longest(mine, its, fillvalue=(inf,))) if mine != its else ()
                at = next((i for i, (a, b) in pairs if a != b), None)
                if at is not None:
                    differences.append((f"{one.name} {stream}", mine[at : at + 1], its[at : at + 1]))
        if differences:
            raise AssertionError("{}\n{}\nbut with a pump\n{}".format(*min(differences, key=earliest)))
        for peer in (*peers(self.slow), *peers(self.fast)):
            for of in (peer.sent, peer.delivered, peer.refused, peer.told):
                of.clear()
        for one, other in zip(peers(self.slow), peers(self.fast), strict=True):
            dropped, too = dict(one.state.drops.items()), dict(other.state.drops.items())
            assert dropped == too, f"{one.name} dropped {dropped} and {too}"

    def _arrangements(self) -> list[tuple[str, Callable[[list[Any]], list[Any]]]]:
        match self.together:
            case Together.NOTHING:
                return [("told", as_it_is), ("refused", as_it_is), ("sent", as_it_is), ("delivered", as_it_is)]
            case Together.ARRIVALS:
                return [("told", by_text), ("refused", as_it_is), ("sent", by_kind), ("delivered", by_flow)]
            case Together.ALL:
                return [("told", by_text), ("refused", by_text), ("sent", by_way), ("delivered", by_marked_flow)]

    def _recorded(self, record: str) -> str:
        """Flows that start at one instant are a microsecond apart, in their order."""
        if self.together is not Together.ALL:
            return record
        return re.sub(r"\b\d{16}\b", lambda at: str((int(at[0]) + 25) // 50), record)

    def _count(self, peer: LoggedPeer) -> None:
        """What the datagrams tell of sessions and ways."""
        for _, remote, (_, head), _ in peer.sent:
            start = header_at(head)
            if head[start : start + 4] != DATA:
                continue
            self.counts["data"] += 1
            self.counts[f"data to v{4 if len(remote.ip) == 4 else 6}"] += 1
            self.counts["data by a relay"] += start > 0
            session, connection = head[start + 4], int.from_bytes(head[start + 5 : start + 8], "little")
            known = self._sessions.get((peer.name, connection))
            if known is not None:
                self.counts["rekeys"] += known[0] != session
                self.counts["other ways"] += known[1] != remote
            self._sessions[peer.name, connection] = session, remote

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
                    records.append(self._recorded(repr(told(record))))
                found.append(sorted(records))
            only = [record for record in found[0] if record not in found[1]]
            others = [record for record in found[1] if record not in found[0]]
            assert found[0] == found[1], f"{one.name} tells of {only}, with a pump of {others}"
            self.counts["flow records"] += len(found[0])


def earliest(difference: tuple[str, list[Any], list[Any]]) -> float:
    return min(what[0] for what in (*difference[1], *difference[2]))


def peers(net: Any) -> list[LoggedPeer]:
    return [*net.clients, *net.gateways]


# what may come in another order


def as_it_is(entries: list[Any]) -> list[Any]:
    return entries


def by_kind(sent: list[Any]) -> list[Any]:
    """Data apart from what keeps ways open."""
    return sorted(sent, key=lambda entry: (entry[0], is_data(entry[2][1])))


def by_flow(delivered: list[Any]) -> list[Any]:
    return sorted(delivered, key=lambda entry: (entry[0], flow_of(entry[1])))


def by_marked_flow(delivered: list[Any]) -> list[Any]:
    return sorted(delivered, key=lambda entry: (entry[0], flow_of(entry[1]), mark_of(entry[1])))


def by_text(entries: list[Any]) -> list[Any]:
    return sorted(entries, key=lambda entry: (entry[0], repr(entry[1])))


def by_way(sent: list[Any]) -> list[Any]:
    """Which datagrams there were, and which counters, but not which of them had which counter."""
    datagrams, counters = [], []
    for at, remote, (length, head), ecn in sent:
        start = header_at(head)
        if head[start : start + 4] == DATA:
            counters.append((at, remote, head[start : start + 8], head[start + 8 :]))
            head = head[: start + 8]
        datagrams.append((at, remote, length, head, ecn))
    return sorted(datagrams) + sorted(counters)


def flow_of(data: bytes) -> bytes:
    """Protocol, ends, and ports or what an ICMP message is about."""
    if data[0] >> 4 == 4:
        l4 = (data[0] & 15) * 4
        protocol, ends = data[9], data[12:20]
    else:
        l4, protocol, ends = 40, data[6], data[8:40]
    ports = data[l4 : l4 + 4] if protocol in (TCP, UDP) else data[l4 : l4 + 1] + data[l4 + 4 : l4 + 6]
    return bytes([protocol]) + ends + ports


def mark_of(data: bytes) -> int:
    return data[1] & 3 if data[0] >> 4 == 4 else data[1] >> 4 & 3


# what stands around a peer


def remember(net: Any, together: Together) -> None:
    """Write down whatever leaves a peer, and have the gateways' hosts answer."""
    net.arrived = []
    net.net.send = fated(net)
    for peer in peers(net):
        peer.gathers = together is not Together.NOTHING
        peer.sorts = together is Together.ALL
        peer.net = Tap(peer)
        for family in peer.host.ips:
            peer.host.listen(family, sim.PORT, receiver(net, peer))
    for client in net.clients:
        client.on_packet = delivered(client, None)
    for gateway in net.gateways:
        gateway.at_gateway = []
        answers = Answers(net.world, gateway, together)
        gateway.on_packet = delivered(gateway, answers.take)


class Sure:
    """The chance of a network that does nothing to datagrams."""

    @staticmethod
    def random() -> float:
        return 0.5


def fated(net: Any) -> Callable[..., None]:
    """What happens to a datagram on its way follows from itself, not from what was sent in the same instant."""
    world, send, faults = net.world, net.net.send, net.net.faults
    is_sure = not (faults.loss or faults.duplication or faults.jitter)

    def send_fated(host: Any, port: int, remote: Address, payload: bytes, ecn: int = 0) -> None:
        chance = world.random
        ecn = 3 if ecn and is_congested(world.now) else ecn
        world.random = Sure if is_sure else Random(repr((world.now, host.name, port, remote, seen(payload))))
        send(host, port, remote, payload, ecn)
        world.random = chance

    return send_fated


def is_congested(now: float) -> bool:
    """A part of the time: then routers mark what may be marked."""
    return int(now * 8) % 4 == 0


class Tap:
    """Between a peer and the network."""

    def __init__(self, peer: LoggedPeer) -> None:
        self._peer, self._net = peer, peer.net

    def send(self, host: Any, port: int, remote: Address, payload: bytes, ecn: int = 0) -> None:
        self._peer.sent.append((self._peer.world.now, remote, seen(payload), ecn))
        self._net.send(host, port, remote, payload, ecn)


def seen(payload: bytes) -> tuple[int, bytes]:
    """All of a datagram but what is encrypted; an IPv4 identification may differ within."""
    start = header_at(payload)
    return len(payload), payload[: start + 16] if payload[start : start + 4] == DATA else payload


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
    """Without what a translation between the families chooses, the identification of IPv4, also in its checksum."""
    if data[0] >> 4 != 4:
        return data
    # Ones' complement sums (RFC 1071); of its two zeros one is chosen.
    rest = (0xFFFF - int.from_bytes(data[10:12], "big") + 0xFFFF - int.from_bytes(data[4:6], "big")) % 0xFFFF
    return data[:4] + bytes(2) + data[6:10] + rest.to_bytes(2, "big") + data[12:]


class Answers:
    """The resource's network, which answers everything; TCP like a server that echoes."""

    def __init__(self, world: Any, gateway: Any, together: Together) -> None:
        self._world, self._gateway, self._together = world, gateway, together
        self._waiting: list[Packet] = []

    def take(self, packet: Packet) -> None:
        self._gateway.at_gateway.append(packet)
        reply = answer(packet)
        if reply is not None:
            if not self._waiting:
                self._world.after(0.0001, self._give)
            self._waiting.append(reply)

    def _give(self) -> None:
        waiting = sorted(self._waiting, key=marked_flow_of)
        self._waiting.clear()
        for _, flow in groupby(waiting, key=self._kind_of):
            self._gateway.read(*(NO_OFFLOAD + packet.data for packet in flow))

    def _kind_of(self, packet: Packet) -> Any:
        """What may wait at the device together."""
        return None if self._together is Together.ALL else marked_flow_of(packet)


def marked_flow_of(packet: Packet) -> tuple[bytes, int]:
    return flow_of(packet.data), mark_of(packet.data)


def answer(packet: Packet) -> Packet | None:
    """With the mark of what it answers, so that the order of different ones cannot show."""
    reply: Packet | None = None
    back = packet.dst, packet.src
    if packet.is_echo:
        reply = build_echo(*back, packet.src_port, 0, packet.data[packet.l4_offset + 8 :], reply=True)
    elif packet.protocol == UDP:
        reply = build_udp(*back, packet.dst_port, packet.src_port, packet.payload)
    elif packet.protocol == TCP and not packet.tcp_flags & RST:
        flags = ACK | packet.tcp_flags & (SYN | FIN)
        sequence = int.from_bytes(packet.data[packet.l4_offset + 4 : packet.l4_offset + 8], "big")
        reply = build_tcp(*back, packet.dst_port, packet.src_port, flags, sequence, 1, packet.payload)
    if reply is not None:
        reply.set_ecn(mark_of(packet.data))
    return reply
