"""What the pump's sending half holds back: packets behind the driver, and where table, ring or socket are full."""

from __future__ import annotations

import socket

from fz_core.packet import Packet, build_icmp_unreachable, build_udp
from fz_core.tunnel.verdict import FlowKey
from tests.unit.fastpath.offload_reference import (
    ADDRESSES,
    TCP,
    UDP,
    packet_of,
    super_packet,
    train,
)
from tests.unit.fastpath.pump_rig import Rig

# order


def test_nothing_overtakes_what_the_driver_has(rig: Rig) -> None:
    first, second, third = (packet_of(4, UDP, payload) for payload in (b"1", b"2", b"3"))
    rig.write(first)
    assert rig.records()[0].data[10:] == first.data
    rig.install(first)
    rig.write(second)
    assert rig.sent() == [], "the driver has not sent the first yet"
    rig.pump.finish()  # the first
    rig.write(third)
    assert rig.sent() == []
    assert [data[10:] for data in rig.handle_slowly()] == [second.data, third.data]
    rig.write(first)
    assert rig.sent() == [first.data]


def test_another_flow_goes_on_meanwhile(rig: Rig) -> None:
    mine, other = (packet_of(4, UDP, b"x", ports=(port, 53)) for port in (1000, 1001))
    rig.install(other)
    rig.write(mine, other)
    assert rig.sent() == [other.data]


def test_nothing_is_read_while_much_of_a_flow_waits(rig: Rig) -> None:
    mine, other = (packet_of(4, UDP, b"x", ports=(port, 53)) for port in (1000, 1001))
    rig.install(other)
    rig.write(*[mine] * 32)
    rig.write(other)
    assert rig.sent() == []
    assert len(rig.handle_slowly()) == 32
    assert rig.pump.step(rig.now) == 1
    assert rig.sent() == [other.data]


def test_the_driver_is_not_waited_for_longer_than_a_moment(rig: Rig) -> None:
    rig.write(*[packet_of(4, UDP, b"x")] * 33)
    assert rig.pump.step(rig.now + 0.049) == 0
    assert rig.pump.step(rig.now + 0.051) == 1


def test_a_verdict_that_comes_while_more_waits_bars_the_device(rig: Rig) -> None:
    mine, other = (packet_of(4, UDP, b"x", ports=(port, 53)) for port in (1000, 1001))
    rig.install(other)
    rig.write(mine)
    assert len(rig.records()) == 1
    rig.write(mine)
    rig.install(mine)
    rig.write(other)
    assert rig.sent() == [], "until the driver has seen the second"
    rig.pump.finish()
    assert len(rig.handle_slowly()) == 1
    rig.pump.step(rig.now)
    assert rig.sent() == [other.data]


# bounds


def test_what_finds_the_ring_full_is_counted(rig: Rig) -> None:
    read = super_packet(train(4, UDP, [1200] * 53))
    most = (2 << 20) // (len(read) + 40)
    for i in range(most + 20):
        # Each a flow of its own, so that none of them waits for another.
        data = bytearray(read)
        data[10 + 20 : 10 + 22] = (1000 + i).to_bytes(2, "big")
        rig.write(bytes(data))
    records = rig.handle_slowly()
    assert most - 2 <= len(records) <= most
    assert rig.pump.lost == most + 20 - len(records)
    rig.write(read)
    assert len(rig.handle_slowly()) == 1


def test_more_flows_than_there_is_room_for(rig: Rig) -> None:
    """The table is full at 65,536: others go, and only those that were not used lately."""
    kept = build_udp(*ADDRESSES[4], 1, 1, b"kept")
    rig.install(kept)
    packets = [build_udp(*ADDRESSES[6], 1 + i % 60_000, 2 + i // 60_000, b"x") for i in range(70_000)]
    for i, packet in enumerate(packets):
        key = FlowKey(6, UDP, *ADDRESSES[6], packet.src_port, packet.dst_port)
        rig.pump.install(False, rig.slot, key, key, 1e6, 1e9)
        if i % 1000 == 0:
            rig.write(kept)
    counters = rig.pump.counters()
    assert counters["flows_out"] == 65_536
    assert counters["evictions"] >= 70_001 - 65_536
    assert len(rig.sent()) + len(rig.handle_slowly()) == 70
    for packet in packets[-100:]:
        rig.write(packet)
    assert len(rig.sent()) == 100


def test_lapsed_flows_are_swept(rig: Rig) -> None:
    packets = [packet_of(4, UDP, b"four", ports=(port, 53)) for port in range(1, 101)]
    indices = [rig.install(packet, ttl=10.0) for packet in packets]
    rig.write(packets[0])
    assert rig.pump.sweep(1000) == []
    rig.now += 10.0
    rig.pump.step(rig.now)
    gone = rig.pump.sweep(1000)
    assert sorted(index for _, index, _ in gone) == sorted(indices)
    assert [note for _, _, note in gone if note] == [(1, 4, rig.now - 10.0)]
    assert rig.pump.counters()["flows_out"] == 0
    rig.write(packets[1])
    rig.handle_slowly()
    rig.now += 29.9
    rig.pump.step(rig.now)
    rig.pump.sweep(1000)
    assert rig.pump.counters()["flows_out"] == 1, "its second packet may still come"
    rig.now += 0.1
    rig.pump.step(rig.now)
    rig.pump.sweep(1000)
    assert rig.pump.counters()["flows_out"] == 0


def test_the_driver_is_told_which_packets_are_not_the_first_of_their_flow(rig: Rig) -> None:
    one, other = (packet_of(4, UDP, b"x", ports=(port, 53)) for port in (1000, 1001))
    rig.write(one, other, one)
    assert [record.is_again for record in rig.records()] == [False, False, True]
    rig.pump.finish()
    rig.now += 25.0
    refusal = build_icmp_unreachable(one)
    assert isinstance(refusal, Packet)
    rig.write(other, refusal)
    assert [record.is_again for record in rig.records()] == [True, False]
    rig.write(super_packet(train(4, TCP, [1000] * 3)))
    assert [record.is_again for record in rig.records()] == [True], "it stands for several"


def test_packets_of_a_flow_keep_their_order_whatever_their_marks(rig: Rig) -> None:
    """Datagrams of another mark go in another call, but no earlier one goes on behind it."""
    flow, other = (
        [packet_of(4, UDP, bytes([number]) * 100, ports=(port, 53)) for number in range(9)] for port in (1000, 1001)
    )
    for number, packet in enumerate(flow):
        packet.set_ecn((0, 2, 0, 0, 3, 2, 2, 0, 2)[number])
    rig.install(flow[0])
    rig.install(other[0])
    rig.write_at_once(*(packet for pair in zip(flow, other, strict=True) for packet in pair))
    sent = rig.sent()
    assert [packet for packet in sent if packet[20:22] == flow[0].data[20:22]] == [packet.data for packet in flow]
    assert [packet for packet in sent if packet[20:22] == other[0].data[20:22]] == [packet.data for packet in other]
    assert rig.pump.counters()["out_calls"] < 18, "what may go together still does"


# full sockets


class Narrow:
    """Instead of the pump's IPv4 socket one that soon is full. It ignores where datagrams are to go."""

    def __init__(self, rig: Rig) -> None:
        self.far, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        near.setblocking(False)
        self.far.setblocking(False)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        self.near = near
        rig.pump.set_sockets((near.fileno(), 1), None)

    def take(self) -> list[bytes]:
        found = []
        while True:
            try:
                found.append(self.far.recv(70_000))
            except BlockingIOError:
                return found

    def close(self) -> None:
        self.far.close()
        self.near.close()


def test_a_full_socket_holds_up_the_device_and_loses_nothing() -> None:
    rig = Rig(has_gso=False)
    narrow = Narrow(rig)
    packets = [packet_of(4, UDP, bytes([i]) * 1000) for i in range(40)]
    rig.install(packets[0])
    for packet in packets:
        rig.device.send(bytes(10) + packet.data)
    got: list[bytes] = []
    turns = 0
    while len(got) < len(packets) and turns < 200:
        turns += 1
        rig.pump.step(rig.now)
        got += [split for batch in narrow.take() for split in datagrams_of(batch, 1028 + 32)]
    opened = [rig.tunnels.b.tunnel.handle_untrusted(datagram, None, rig.now) for datagram in got]
    assert opened == [packet.data for packet in packets]
    assert rig.pump.counters()["out_dropped"] == 0
    narrow.close()
    rig.close()


def datagrams_of(batch: bytes, size: int) -> list[bytes]:
    return [batch[at : at + size] for at in range(0, len(batch), size)]


def test_patience_with_a_full_socket_ends(rig: Rig) -> None:
    narrow = Narrow(rig)
    packets = [packet_of(4, UDP, bytes([i]) * 1000) for i in range(40)]
    rig.install(packets[0])
    for packet in packets:
        rig.write(packet)
    before = rig.pump.counters()
    assert before["out_reads"] < 40, "the device waits"
    assert before["out_dropped"] == 0
    assert rig.pump.step(rig.now + 0.09) == 0
    assert rig.pump.step(rig.now + 0.11) > 0
    after = rig.pump.counters()
    assert after["out_dropped"] > 0
    sent = sum(len(batch) // 1060 for batch in narrow.take())
    assert sent + after["out_dropped"] <= after["out_packets"]
    narrow.close()


def test_a_new_socket_ends_the_wait(rig: Rig) -> None:
    narrow = Narrow(rig)
    packet = packet_of(4, UDP, bytes(1000))
    rig.install(packet)
    rig.write(*[packet] * 20)
    rig.pump.set_sockets((rig.udp[4].fileno(), rig.udp[4].port), None)
    narrow.close()
    reads = rig.pump.counters()["out_reads"]
    for _ in range(20):
        rig.pump.step(rig.now)
    assert len(rig.far.take()) >= 20 - reads > 0
