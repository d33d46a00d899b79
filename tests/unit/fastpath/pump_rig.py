"""A pump between a device and sockets whose other ends a test holds, with one peer behind it.

The device is a pair of sockets that keep message borders. Datagrams travel over loopback. Time is what the test says.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from ipaddress import ip_address
from typing import Any, NamedTuple

from fz_core.fastpath import Pump, split_super_packet
from fz_core.linux import UdpSocket
from fz_core.packet import Packet, to_family
from fz_core.tunnel.verdict import FlowKey
from tests.unit.fastpath.offload_reference import NO_OFFLOAD, TCP, UDP, vnet
from tests.unit.wireguard.wireguard_pair import Pair

FROM_DEVICE, DATAGRAM, OPENED, FORGED, NO_PACKET = range(5)
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
OTHER = {
    4: (ip_address("203.0.113.9").packed, ip_address("198.51.100.77").packed),
    6: (ip_address("2001:db8::9").packed, ip_address("2001:db8:ffff::77").packed),
}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
RELAY_PORT = 3478
FOREVER = float("inf")
DEVICE_BUFFER = 4 << 20
SOL_UDP, UDP_SEGMENT = 17, 103
IP_RECVTOS, IPV6_RECVTCLASS, IPV6_TCLASS = 13, 66, 67


class Record(NamedTuple):
    """What the pump hands to the driver."""

    kind: int
    slot: int | None
    local: tuple[bytes, int] | None
    source: tuple[bytes, int] | None
    ecn: int
    is_again: bool
    data: bytes


class Far:
    """A socket of the peer, or of its relay."""

    def __init__(self, version: int = 4, host: str | None = None, port: int = 0) -> None:
        self.version = version
        self.socket = socket.socket(FAMILIES[version], socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, DEVICE_BUFFER)
        if version == 4:
            self.socket.setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)
        else:
            self.socket.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVTCLASS, 1)
        self.socket.bind((host or LOOPBACK[version], port))
        name = self.socket.getsockname()
        self.ip, self.port = socket.inet_pton(FAMILIES[version], name[0]), name[1]

    def send(self, datagrams: list[bytes], port: int, ecn: int = 0) -> None:
        """To a port of the pump; several arrive as one message where they have one size."""
        control: list[Any] = []
        if ecn:
            level, kind = (
                (socket.IPPROTO_IP, socket.IP_TOS) if self.version == 4 else (socket.IPPROTO_IPV6, IPV6_TCLASS)
            )
            control.append((level, kind, struct.pack("=i", ecn)))
        if len(datagrams) > 1:
            control.append((SOL_UDP, UDP_SEGMENT, struct.pack("=H", len(datagrams[0]))))
        self.socket.sendmsg(datagrams, control, 0, (LOOPBACK[self.version], port))

    def take(self) -> list[tuple[int, bytes]]:
        """The ECN mark and the bytes of everything that came."""
        found = []
        while select.select([self.socket], [], [], 0)[0]:
            data, control, _, _ = self.socket.recvmsg(70_000, 512)
            found.append((control[0][2][0] & 3 if control else 0, data))
        return found


class Rig:
    """`tunnels.a` is ours, `tunnels.b` the peer's."""

    def __init__(self, *, start: float = 1000.0, threads: int = 1, merges: bool = True, has_gso: bool = True) -> None:
        self.tunnels = Pair(start, handshake_on_data=True).connect()
        confirm(self.tunnels)
        self.device, self._tun = device_pair()
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)
        self.udp = {v: UdpSocket.bind(family, 0, None) for v, family in FAMILIES.items()}
        self.pump = Pump(
            self._tun.fileno(), self.wake, bytes(range(16)), threads=threads, merges=merges, has_gso=has_gso
        )
        self.pump.set_sockets(*((udp.fileno(), udp.port) for udp in self.udp.values()))
        self.far = Far()
        slot = self.pump.add_peer(0xAAAAAA)
        assert slot is not None
        self.slot = slot
        self.set_peer()

    def close(self) -> None:
        os.close(self.wake)
        for end in (self.device, self._tun, self.far.socket):
            end.close()
        for udp in self.udp.values():
            udp.close()

    @property
    def now(self) -> float:
        return self.tunnels.now

    @now.setter
    def now(self, value: float) -> None:
        self.tunnels.now = value

    def set_peer(self, far: Far | None = None, *, channel: int = 0, limit: int = 1280, **ways: Any) -> None:
        """The peer is behind this socket, maybe in a channel."""
        self.far = far or self.far
        send = (self.far.ip, self.far.port, None, channel)
        receive = (self.far.ip, self.far.port, None, channel)
        self.pump.set_peer(
            self.slot,
            self.tunnels.a.tunnel,
            ways.get("send", send),
            ways.get("send_until", FOREVER),
            ways.get("receive", receive),
            limit,
        )

    def install(
        self,
        packet: Packet,
        after: FlowKey | None = None,
        *,
        inbound: bool = False,
        ttl: float = 100.0,
        until: float = FOREVER,
    ) -> int:
        """A verdict about packets like this one; the index of its flow."""
        self.pump.step(self.now)
        index, _ = self.pump.install(inbound, self.slot, FlowKey.of(packet), after or FlowKey.of(packet), ttl, until)
        return index

    # from the device

    def write(self, *reads: bytes | Packet) -> None:
        """What the host sends: packets, or reads with their header."""
        for read in reads:
            self.write_at_once(read)

    def write_at_once(self, *reads: bytes | Packet) -> None:
        """The same for a single turn of the pump."""
        for read in reads:
            self.device.send(NO_OFFLOAD + read.data if isinstance(read, Packet) else read)
        self.pump.step(self.now)

    def sent(self) -> list[bytes]:
        """The packets in the datagrams that the peer got."""
        return [packet for _, packet in self.sent_marked()]

    def sent_marked(self) -> list[tuple[int, bytes]]:
        found = []
        for ecn, datagram in self.far.take():
            opened = self.tunnels.b.tunnel.handle_untrusted(datagram, None, self.now)
            assert isinstance(opened, bytes), opened
            found.append((ecn, opened))
        return found

    # from the network

    def seal(self, packet: Packet | bytes) -> bytes:
        sealed = self.tunnels.b.tunnel.seal(packet if isinstance(packet, bytes) else packet.data, self.now)
        assert isinstance(sealed, bytes), sealed
        return sealed

    def arrive(self, *packets: Packet | bytes, ecn: int = 0) -> None:
        """The peer sends these, in one message if they have one size."""
        self.arrive_raw(*map(self.seal, packets), ecn=ecn)

    def arrive_raw(self, *datagrams: bytes, ecn: int = 0, far: Far | None = None) -> None:
        far = far or self.far
        far.send(list(datagrams), self.udp[far.version].port, ecn)
        self.pump.step(self.now)

    def writes(self) -> list[bytes]:
        """What was written to the device."""
        found = []
        while select.select([self.device], [], [], 0)[0]:
            found.append(self.device.recv(70_000))
        return found

    def delivered(self) -> list[bytes]:
        """The packets in that, as the host sees them."""
        return [packet for write in self.writes() for packet in as_seen(write)]

    # the driver

    def records(self) -> list[Record]:
        return [Record(*record) for record in self.pump.take()]

    def kinds(self) -> list[int]:
        return [record.kind for record in self.records()]

    def handle_slowly(self) -> list[bytes]:
        """Take and finish, as a driver does; the data of what was taken."""
        data = [record.data for record in self.records()]
        self.pump.finish()
        return data


def confirm(pair: Pair) -> None:
    """Data in both directions: both ends have a session that they may send on and receive from."""
    for end in (pair.a, pair.b):
        sealed = end.tunnel.seal(bytes([0x45]) + bytes(19), pair.now)
        assert isinstance(sealed, bytes)
        pair.other(end).tunnel.handle_untrusted(sealed, None, pair.now)


def device_pair() -> tuple[socket.socket, socket.socket]:
    """The test's and the pump's end."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, DEVICE_BUFFER)
    return ends


def as_seen(write: bytes) -> list[bytes]:
    """What the host's kernel makes of a write: one packet, or a train with its checksums completed."""
    packets = split_super_packet(write)
    assert isinstance(packets, list), (packets, write[:10])
    return [packet.data for packet in packets]


def translated(packet: Packet, version: int) -> FlowKey:
    """Other addresses and ports, maybe of the other family."""
    if packet.protocol in (TCP, UDP):
        return FlowKey(version, packet.protocol, *OTHER[version], 1, 65_535)
    return FlowKey(version, {4: 1, 6: 58}[version], *OTHER[version], 65_535, 65_535)


def unnumbered(packet: bytes) -> bytes:
    """Without IPv4 identification and header checksum, which a family translation chooses."""
    return packet[:4] + bytes(2) + packet[6:10] + bytes(2) + packet[12:] if packet[0] >> 4 == 4 else packet


def rewritten(packet: Packet, after: FlowKey) -> Packet:
    """What the slow path makes of it."""
    changed = packet.copy()
    if after.version != packet.version:
        moved = to_family(changed, after.src, after.dst)
        assert isinstance(moved, Packet)
        changed = moved
    changed.set_src(after.src)
    changed.set_dst(after.dst)
    changed.set_src_port(after.src_port)
    changed.set_dst_port(after.dst_port)
    return changed


def partial(packet: Packet) -> bytes:
    """A packet as a host writes it that leaves the checksum to the device."""
    l4, field = packet.l4_offset, 16 if packet.protocol == 6 else 6
    data = bytearray(packet.data)
    part = len(data) - l4
    if packet.version == 4:
        pseudo = packet.src + packet.dst + struct.pack("!BBH", 0, packet.protocol, part)
    else:
        pseudo = packet.src + packet.dst + struct.pack("!IHBB", part, 0, 0, packet.protocol)
    total = sum(int.from_bytes(pseudo[i : i + 2], "big") for i in range(0, len(pseudo), 2))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    data[l4 + field : l4 + field + 2] = struct.pack("!H", total)
    return vnet(1, 0, 0, 0, l4, field) + data
