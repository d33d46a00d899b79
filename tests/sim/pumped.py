"""Peers of the simulation with a pump in front of their states, and a log of everything that peers do.

The pump is the real one, and so is its driver. Its device is a pair of sockets. Its datagrams travel over loopback to
sockets that stand for whom they are for, and from there into the simulated network; the reverse for what arrives.
Its clock is the simulation's.
"""

from __future__ import annotations

import os
import select
import socket
from dataclasses import dataclass, field
from typing import Any

from fz_core.driver.carrier import Carrier
from fz_core.fastpath import split_super_packet
from fz_core.linux import UdpSocket
from fz_core.packet import Address, DropReason, Packet
from fz_core.tunnel import PacketError
from tests.sim.names import Names
from tests.sim.system import PORT, Peer

IP_PKTINFO, IP_RECVTOS, SOL_UDP, UDP_GRO = 8, 13, 17, 104
NO_OFFLOAD = bytes(10)
BUFFER = 4 << 20
# Everything but the pump's own hosts; no two processes on a machine share addresses.
NET = f"127.{1 + os.getpid() % 250}"


class Ends:
    """Sockets on loopback that stand for addresses of the simulated network."""

    def __init__(self) -> None:
        self._sockets: dict[Address, socket.socket] = {}

    def at(self, address: Address) -> socket.socket:
        found = self._sockets.get(address)
        if found is None:
            found = self._sockets[address] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            found.setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)
            found.bind((address.host, address.port))
        return found

    def take(self) -> list[tuple[Address, bytes, int]]:
        """What came: for whom, and its ECN mark."""
        found = []
        for address, end in self._sockets.items():
            while True:
                try:
                    data, control, _, _ = end.recvmsg(2000, 64)
                except BlockingIOError:
                    break
                found.append((address, data, control[0][2][0] & 3 if control else 0))
        return found

    def close(self) -> None:
        for end in self._sockets.values():
            end.close()


@dataclass
class LoggedPeer(Peer):
    """Handles everything through its state, and remembers."""

    sent: list[tuple[Any, ...]] = field(default_factory=list)
    delivered: list[tuple[Any, ...]] = field(default_factory=list)
    refused: list[tuple[Any, ...]] = field(default_factory=list)

    def read(self, raw: bytes) -> None:
        """A read from the device, header included."""
        packets = split_super_packet(raw, self.state.drops)
        if isinstance(packets, DropReason):
            self.state.drops.add(packets)
            self._note(PacketError(packets, "tun", None))
            packets = []
        for packet in packets:
            self._note(self.state.handle_tun_input(packet, self.world.now))
        self.drain()

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
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        sock.bind((Address(self.host.ips[4], PORT).host, PORT))
        for level, option in ((0, IP_PKTINFO), (0, IP_RECVTOS), (SOL_UDP, UDP_GRO)):
            sock.setsockopt(level, option, 1)
        self._udp = UdpSocket(sock, 64)
        self.carrier = Carrier(self.state, Device(self._near), [self._udp])  # type: ignore[arg-type]
        self.noted_at = None

    def close(self) -> None:
        if self.carrier is not None:
            self.carrier.close()
            self.carrier = None
            for end in (self.device, self._near, self._udp):
                end.close()

    def _receive(self, to: Address, source: Address, data: bytes, ecn: int) -> None:
        if self.is_dead:
            return
        self._pump()
        sender = self.ends.at(source)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, ecn)
        sender.sendto(data, (to.host, to.port))
        self._turn()

    def send(self, packet: Packet) -> None:
        self.read(NO_OFFLOAD + packet.data)

    def read(self, raw: bytes) -> None:
        self._pump()
        self.device.send(raw)
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
        for remote, data, ecn in self.ends.take():
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


class Logged(Names):
    """Every packet through the states."""

    peer_kind = LoggedPeer
    inner4, outer4 = f"{NET}.{{}}.100", f"{NET}.200.{{}}"


class Pumped(Names):
    """The same with pumps."""

    inner4, outer4 = Logged.inner4, Logged.outer4

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.ends = Ends()
        super().__init__(*args, **kwargs)

    def peer_kind(self, *args: Any) -> PumpedPeer:
        return PumpedPeer(*args, ends=self.ends)

    def close(self) -> None:
        for peer in (*self.clients, *self.gateways):
            peer.close()
        self.ends.close()
