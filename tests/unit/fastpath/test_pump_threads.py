"""The pump in threads of its own: it wakes, carries, gives way, and ends when told."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from fz_core.linux import UdpSocket
from fz_core.tunnel.verdict import FlowKey
from tests.unit.fastpath.offload_reference import TCP, UDP, packet_of, super_packet, train
from tests.unit.fastpath.pump_rig import FAMILIES, Rig

PATIENCE = 20.0  # seconds; only a failure takes that long


class Running:
    """A rig whose pump runs."""

    def __init__(self, threads: int, *, has_gso: bool = True) -> None:
        self.rig = Rig(threads=threads, has_gso=has_gso)
        self.rig.pump.step(self.rig.now)
        halves = [()] if threads == 1 else [(0,), (1,)]
        self.threads = [threading.Thread(target=self.rig.pump.run, args=half, daemon=True) for half in halves]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def wait_for(self, fd: int) -> None:
        assert select.select([fd], [], [], PATIENCE)[0], "nothing came"

    def join(self) -> None:
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()

    def end(self) -> None:
        self.rig.pump.stop()
        self.join()


@pytest.fixture(params=[1, 2])
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    running = Running(request.param)
    yield running
    running.rig.pump.stop()
    for thread in running.threads:
        if thread.ident is not None:
            thread.join(PATIENCE)
    running.rig.close()


def test_both_directions_in_order(running: Running) -> None:
    rig = running.rig
    packets = [packet_of(4, UDP, i.to_bytes(4, "big"), ident=i) for i in range(3000)]
    trains = [train(6, TCP, [1000] * 5, seq=i * 5000) for i in range(100)]
    for first in (packets[0], trains[0][0]):
        rig.install(first)
        rig.install(first, inbound=True)
    running.start()
    sent: list[bytes] = []
    seen: list[bytes] = []
    for start in range(0, 3000, 30):
        for packet in packets[start : start + 30]:
            rig.device.send(bytes(10) + packet.data)
        rig.device.send(super_packet(trains[start // 30]))
        rig.far.send(list(map(rig.seal, packets[start : start + 30])), rig.udp[4].port)
        while len(sent) < (start + 30) // 30 * 35:
            running.wait_for(rig.far.socket.fileno())
            sent += rig.sent()
        while len(seen) < start + 30:
            running.wait_for(rig.device.fileno())
            seen += rig.delivered()
    assert seen == [packet.data for packet in packets]
    assert [data for data in sent if data[0] == 0x45] == seen
    assert [data for data in sent if data[0] == 0x60] == [packet.data for one in trains for packet in one]
    assert rig.records() == []


def test_the_driver_is_woken(running: Running) -> None:
    rig = running.rig
    running.start()
    os.eventfd_write(rig.wake, 1)
    os.eventfd_read(rig.wake)
    packet = packet_of(4, UDP, b"x")
    rig.device.send(bytes(10) + packet.data)
    running.wait_for(rig.wake)
    assert rig.handle_slowly() == [bytes(10) + packet.data]


def test_the_driver_is_woken_by_what_is_carried_only_if_it_asked(running: Running) -> None:
    rig = running.rig
    packet = packet_of(4, UDP, b"x")
    rig.install(packet)
    rig.write(packet)  # told of that one
    os.eventfd_read(rig.wake)
    running.start()
    rig.device.send(bytes(10) + packet.data)
    running.wait_for(rig.far.socket.fileno())
    assert not select.select([rig.wake], [], [], 0.05)[0]
    rig.pump.notice()
    rig.device.send(bytes(10) + packet.data)
    running.wait_for(rig.wake)


def test_it_stops_while_idle(running: Running) -> None:
    running.start()
    running.end()


def test_it_stops_while_it_waits_for_the_driver(running: Running) -> None:
    rig = running.rig
    running.start()
    for _ in range(40):
        rig.device.send(bytes(10) + packet_of(4, UDP, b"x").data)
    running.wait_for(rig.wake)
    running.end()


def test_it_ends_with_the_device(running: Running) -> None:
    running.start()
    running.rig.device.close()
    running.wait_for(running.rig.wake)
    assert running.rig.pump.has_failed
    running.rig.pump.stop()
    running.join()


def test_other_sockets(running: Running) -> None:
    rig = running.rig
    packet = packet_of(4, UDP, b"x")
    rig.install(packet)
    rig.install(packet, inbound=True)
    running.start()
    new = {version: UdpSocket.bind(family, 0, None) for version, family in FAMILIES.items()}
    rig.pump.set_sockets(*((udp.fileno(), udp.port) for udp in new.values()))
    old, rig.udp = rig.udp, new
    for udp in old.values():
        udp.close()
    rig.device.send(bytes(10) + packet.data)
    running.wait_for(rig.far.socket.fileno())
    data, (_, port) = rig.far.socket.recvfrom(2000)
    assert port == new[4].port
    assert rig.tunnels.b.tunnel.handle_untrusted(data, None, rig.now) == packet.data
    rig.far.send([rig.seal(packet)], port)
    running.wait_for(rig.device.fileno())
    assert rig.delivered() == [packet.data]


@pytest.mark.parametrize("threads", [1, 2])
def test_room_in_a_full_socket_is_used_at_once(threads: int) -> None:
    """Every few datagrams the socket is full; were each time a poll's timeout, this would take a minute."""
    running = Running(threads, has_gso=False)
    rig = running.rig
    packet = packet_of(4, UDP, bytes(1000))
    rig.install(packet)
    far, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (far, near):
        end.setblocking(False)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    rig.pump.set_sockets((near.fileno(), 1), None)
    running.start()
    written = taken = 0
    end_at = time.monotonic() + PATIENCE
    while taken < 60_000:
        assert time.monotonic() < end_at, f"{taken} datagrams in {PATIENCE} s"
        with contextlib.suppress(BlockingIOError):
            while written < taken + 100:
                rig.device.send(bytes(10) + packet.data)
                written += 1
        running.wait_for(far.fileno())
        with contextlib.suppress(BlockingIOError):
            while True:
                taken += len(far.recv(70_000)) // 1060
    running.end()
    assert rig.pump.counters()["out_dropped"] == 0
    for end in (far, near):
        end.close()
    rig.close()


def flood(rig: Rig, until: threading.Event) -> Callable[[], None]:
    def run() -> None:
        read = super_packet(train(4, TCP, [1000] * 50))
        while not until.is_set():
            if select.select([], [rig.device], [], 0.1)[1]:
                rig.device.send(read)
            rig.far.take()

    return run


def test_a_busy_pump_makes_room_for_the_driver(running: Running) -> None:
    """Verdicts come and go, peers change, and notes are taken, while it has always something to do."""
    rig = running.rig
    rig.install(train(4, TCP, [1000])[0])
    running.start()
    done = threading.Event()
    flooding = threading.Thread(target=flood(rig, done), daemon=True)
    flooding.start()
    packet = packet_of(4, UDP, b"x")
    noted = 0
    for turn in range(300):
        key = FlowKey.of(packet)._replace(src_port=1 + turn)
        rig.pump.install(False, rig.slot, key, key, 10.0, 1e9)
        rig.pump.take_peers()
        noted += sum(packets for _, _, packets, _, _ in rig.pump.take_flows())
        rig.set_peer()
        rig.handle_slowly()
        rig.pump.sweep(100)
        rig.pump.remove(False, rig.slot, key)
    done.set()
    flooding.join(PATIENCE)
    running.end()
    noted += sum(packets for _, _, packets, _, _ in rig.pump.take_flows())
    assert noted == rig.pump.counters()["out_packets"]


def test_a_peer_may_go_while_it_is_busy(running: Running) -> None:
    rig = running.rig
    first = train(4, TCP, [1000])[0]
    rig.install(first)
    running.start()
    done = threading.Event()
    flooding = threading.Thread(target=flood(rig, done), daemon=True)
    flooding.start()
    for _ in range(100):
        rig.pump.remove_peer(rig.slot)
        slot = rig.pump.add_peer(0xAAAAAA)
        assert slot is not None
        rig.slot = slot
        rig.set_peer()
        key = FlowKey.of(first)
        rig.pump.install(False, rig.slot, key, key, 10.0, 1e9)
        rig.handle_slowly()
    done.set()
    flooding.join(PATIENCE)
    running.end()
