"""Peers of the simulation with a pump in front of their states, and a log of everything that peers do.

The pump is the real one, and so is its driver. Its device is a pair of sockets. Its datagrams travel over loopback to
sockets that stand for whom they are for, and from there into the simulated network; the reverse for what arrives.
Its clock is the simulation's.
"""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from random import Random
from typing import Any

from fz_core.crypto import PrivateKey
from fz_core.driver.carrier import Carrier
from fz_core.fastpath import split_super_packet
from fz_core.linux import UdpSocket
from fz_core.packet import Address, DropReason, Packet
from fz_core.tunnel import ClientTunnel, GatewayTunnel, PacketError
from tests.sim.loopback import BUFFER, Ends, data_socket, messages
from tests.sim.names import Names
from tests.sim.system import EPOCH, PORT, Peer

NO_OFFLOAD, DATA, DATA_OVERHEAD, CLASSES = bytes(10), b"\4\0\0\0", 32, 4
# What is handed over at once; the buffers between have room for it.
MOST_DATAGRAMS, MOST_READ_BYTES = 64, 150_000
# Everything but the pump's own hosts; no two processes on a machine share addresses.
NET = f"127.{1 + os.getpid() % 250}"

Arrival = tuple[Address, Address, bytes, int]


@dataclass
class LoggedPeer(Peer):
    """Handles everything through its state, and remembers.

    One that `gathers` waits with what arrives until the instant is over. Then `script` has the number of datagrams
    after which, each time, data was sent at once: what comes next must not be heard before that. And if it `sorts`,
    data comes in an order that follows from its sizes.
    """

    sent: list[tuple[Any, ...]] = field(default_factory=list)
    delivered: list[tuple[Any, ...]] = field(default_factory=list)
    refused: list[tuple[Any, ...]] = field(default_factory=list)
    told: list[tuple[Any, ...]] = field(default_factory=list)
    gathers: bool = False
    sorts: bool = False
    arrivals: list[Arrival] = field(default_factory=list)
    script: deque[tuple[float, int]] = field(default_factory=deque)

    def _receive(self, to: Address, source: Address, data: bytes, ecn: int) -> None:
        if not self.arrivals:
            self.world.at(self.world.now, self._take_arrivals)
        self.arrivals.append((to, source, data, ecn))
        if not self.gathers:
            self._take_arrivals()

    def _take_arrivals(self) -> None:
        own = self.host.ips.values()
        batch = [arrival for arrival in self.arrivals if arrival[0].ip in own]
        self.arrivals = []
        if self.sorts:
            batch.sort(key=lambda arrival: (arrival[1], class_of(arrival[2])))
        if batch and not self.is_dead:
            self.take(batch)

    def take(self, batch: list[Arrival]) -> None:
        """Datagrams, in order."""
        for number, arrival in enumerate(batch):
            before = len(self.sent)
            super()._receive(*arrival)
            if self.gathers and any(is_data(head) for _, _, (_, head), _ in self.sent[before:]):
                self.script.append((self.world.now, number + 1))

    def read(self, *reads: bytes) -> None:
        """From the device, headers included."""
        for raw in reads:
            packets = split_super_packet(raw, self.state.drops)
            if isinstance(packets, DropReason):
                self.state.drops.add(packets)
                self._note(PacketError(packets, "tun", None))
                packets = []
            for packet in packets:
                self._note(self.state.handle_tun_input(packet, self.world.now))
            self.drain()

    def drain(self) -> None:
        known = len(self.events)
        super().drain()
        self.told += [(self.world.now, event) for event in self.events[known:]]
        self.events.clear()

    def rebind(self) -> None:
        """Our addresses are others: new sockets."""

    def settle(self) -> None:
        """Before a look at the state: whatever is noted late is noted now."""

    def _note(self, error: Exception | None) -> None:
        if error is not None:
            self.errors.append(error)
            self.refused.append((self.world.now, getattr(error, "reason", error)))


@dataclass
class PumpedPeer(LoggedPeer):
    """Has a pump handle what it can."""

    ends: Ends = field(default_factory=Ends)
    carrier: Carrier | None = None
    noted_at: float | None = None

    def _pump(self) -> Any:
        if self.carrier is None or self.carrier._state is not self.state:
            self.close()
            self._open()
        assert self.carrier is not None
        return self.carrier._pump

    def _open(self) -> None:
        self.device, self._near = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.device, self._near):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        self._sockets = self._bind()
        self.carrier = Carrier(self.state, Device(self._near), self._sockets)  # type: ignore[arg-type]
        self.noted_at = None

    def _bind(self) -> list[UdpSocket]:
        return [UdpSocket(data_socket(Address(ip, PORT)), 64) for ip in self.host.ips.values()]

    def rebind(self) -> None:
        self._pump()
        assert self.carrier is not None
        self.carrier.set_sockets(())
        for udp in self._sockets:
            udp.close()
        self._sockets = self._bind()
        self.carrier.set_sockets(self._sockets)

    def close(self) -> None:
        if self.carrier is not None:
            self.carrier.close()
            self.carrier = None
            for end in (self.device, self._near, *self._sockets):
                end.close()

    def take(self, batch: list[Arrival]) -> None:
        self._pump()
        for part in self._parts(batch):
            for to, source, datagrams, ecn in messages(part):
                self.ends.send(source, to, datagrams, ecn)
            self._turn()

    def _parts(self, batch: list[Arrival]) -> Iterator[list[Arrival]]:
        """What may come at once: data or not, by one socket, no more than there is room for, and as the script says."""
        ends = {0, len(batch)}
        while self.script and self.script[0][0] <= self.world.now:
            at, end = self.script.popleft()
            if at == self.world.now:
                ends.add(min(end, len(batch)))
        for first, end in pairwise(sorted(ends)):
            for _, group in groupby(batch[first:end], key=kind_of):
                same = list(group)
                for start in range(0, len(same), MOST_DATAGRAMS):
                    yield same[start : start + MOST_DATAGRAMS]

    def send(self, packet: Packet) -> None:
        self.read(NO_OFFLOAD + packet.data)

    def read(self, *reads: bytes) -> None:
        self._pump()
        waiting = 0
        for raw in reads if self.gathers else ():
            if waiting + len(raw) > MOST_READ_BYTES:
                self._turn()
                waiting = 0
            self.device.send(raw)
            waiting += len(raw)
        for raw in () if self.gathers else reads:
            self.device.send(raw)
            self._turn()
        self._turn()

    def _turn(self) -> None:
        """What the loop does when the pump has something to say."""
        assert self.carrier is not None
        while self._pump().step(self.world.now):
            self._collect()
            while self.carrier.is_behind or select.select([self.carrier.fileno()], [], [], 0)[0]:
                errors: list[Exception] = []
                self.carrier.read(errors, self.world.now)
                for error in errors:
                    self._note(error)
            self.drain()

    def _collect(self) -> None:
        """What the pump wrote, to the device and to the network."""
        for source, remote, data, ecn in self.ends.take():
            assert source in self.host.ips.values(), f"{self.name} sends as {source.hex()}"
            self.net.send(self.host, PORT, remote, data, ecn)
        while select.select([self.device], [], [], 0)[0]:
            packets = split_super_packet(self.device.recv(70_000))
            assert isinstance(packets, list)
            for packet in packets:
                self.packets.append(packet)
                if self.on_packet is not None:
                    self.on_packet(packet)

    def drain(self) -> None:
        super().drain()
        self._pump()
        assert self.carrier is not None
        self.carrier.settle(self.world.now, True)
        due = self.carrier.poll_timeout()
        if due is not None and due <= self.world.now:
            self._be_told()
        elif due is not None and self.noted_at is None:
            self.noted_at = due
            self.world.at(due, self._tell)

    def _tell(self) -> None:
        self.noted_at = None
        self._be_told()

    def _be_told(self) -> None:
        if not self.is_dead and self.carrier is not None:
            self.carrier.note(self.world.now)
            self.drain()

    def _wake(self, due: float) -> None:
        if not self.is_dead and self.wake_at == due and self.carrier is not None:
            self.carrier.note(self.world.now)
        super()._wake(due)

    def settle(self) -> None:
        if self.carrier is not None and not self.is_dead:
            self.carrier.note(self.world.now)
            self.carrier.note_flows()


class Device:
    """What the pump's driver asks of a TUN device."""

    name, offloads = "test", True

    def __init__(self, near: socket.socket) -> None:
        self._near = near

    def fileno(self) -> int:
        return self._near.fileno()


def header_at(payload: bytes) -> int:
    """Where a WireGuard message begins: a relay's channel data has a header of its own."""
    return 4 if b"\x40" <= payload[:1] < b"\x50" else 0


def is_data(payload: bytes) -> bool:
    """Whether it is a WireGuard packet."""
    start = header_at(payload)
    return payload[start : start + 4] == DATA


def kind_of(arrival: Arrival) -> tuple[int, bool]:
    return len(arrival[0].ip), is_data(arrival[2])


def class_of(payload: bytes) -> int:
    """One of `CLASSES` classes of sizes, by which flows can be told apart; -1 for what is no data."""
    return size_class(len(payload) - header_at(payload) - DATA_OVERHEAD) if is_data(payload) else -1


def size_class(length: int) -> int:
    """That of a packet, which is padded to 16 bytes."""
    return (length + 15) // 16 % CLASSES


class Logged(Names):
    """Every packet through the states. Each peer has chances of its own, whatever order they act in."""

    def start(self, role: str, peer: Peer) -> None:
        chance = Random(repr((role, peer.name, self.world.bytes(16))))
        key = PrivateKey(chance.randbytes(32))
        kind: Any = ClientTunnel if role == "client" else GatewayTunnel
        peer.state = kind(key, self.world.now, EPOCH, chance.randbytes)
        self.portal.connect(role, peer.name, peer, key.public)

    peer_kind = LoggedPeer
    inner4, outer4 = f"{NET}.{{}}.100", f"{NET}.200.{{}}"


class Pumped(Logged):
    """The same with pumps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.ends = Ends()
        super().__init__(*args, **kwargs)

    def peer_kind(self, *args: Any) -> PumpedPeer:
        return PumpedPeer(*args, ends=self.ends)

    def close(self) -> None:
        for peer in (*self.clients, *self.gateways):
            peer.close()
        self.ends.close()
