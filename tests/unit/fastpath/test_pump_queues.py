"""Queues in front of the pump stay short, and calm flows do not wait for busy ones."""

from __future__ import annotations

import time

from fz_core.driver import clock
from fz_core.packet import Packet
from tests.unit.fastpath.offload_reference import TCP, UDP, packet_of, super_packet, train
from tests.unit.fastpath.pump_rig import Rig

TURN = 0.01  # seconds between turns of a pump that is too slow for its senders


def trains(count: int, ecn: int = 0) -> list[list[Packet]]:
    """Super packets of one flow, of 48 KiB each."""
    made = [train(4, TCP, [1200] * 40, seq=i * 48_000) for i in range(count)]
    for packet in (p for one in made for p in one):
        packet.set_ecn(ecn)
    return made


def backlog(rig: Rig, ecn: int) -> tuple[list[bytes], list[tuple[int, bytes]]]:
    """A queue that stands for 0.2 s; what was to be sent, and what was, with its outer mark."""
    sent, queued = [], trains(60, ecn)
    rig.install(queued[0][0])
    for one in queued[:30]:
        rig.device.send(super_packet(one))
    waiting = iter(queued[30:])
    for _ in range(40):
        rig.now += TURN
        rig.pump.step(rig.now)
        sent += rig.sent_marked()
        for _, one in zip(range(3), waiting, strict=False):
            rig.device.send(super_packet(one))
    return [packet.data for one in queued for packet in one], sent


def test_a_standing_queue_drops_now_and_then(rig: Rig) -> None:
    wanted, sent = backlog(rig, ecn=0)
    signalled = rig.pump.counters()["out_signalled"]
    assert 2 <= signalled <= 10, "one after 40 ms, then slowly more"
    got = [packet for _, packet in sent]
    assert len(got) == len(wanted) - signalled
    assert [packet for packet in wanted if packet in set(got)] == got, "the rest is whole and in order"


def test_a_standing_queue_marks_who_speaks_ecn(rig: Rig) -> None:
    wanted, sent = backlog(rig, ecn=2)
    signalled = rig.pump.counters()["out_signalled"]
    assert signalled >= 2
    assert len(sent) == len(wanted)
    inner = [packet[1] & 3 for _, packet in sent]
    assert inner.count(3) == signalled
    assert [outer for outer, _ in sent] == inner
    assert rig.pump.take_flows()[0][2] == len(wanted)


def test_a_queue_that_passes_is_left_alone(rig: Rig) -> None:
    queued = trains(20)
    rig.install(queued[0][0])
    got = []
    for start in range(0, 20, 4):
        for one in queued[start : start + 4]:
            rig.device.send(super_packet(one))
        for _ in range(4):
            rig.now += 0.002
            rig.pump.step(rig.now)
            got += rig.sent()
    assert got == [packet.data for one in queued for packet in one]
    assert rig.pump.counters()["out_signalled"] == 0


def test_udp_is_never_dropped_for_a_queue(rig: Rig) -> None:
    packets = [packet_of(4, UDP, bytes([i]) * 1200) for i in range(100)]
    rig.install(packets[0])
    for i in range(0, 100, 20):
        rig.device.send(super_packet(trains(1)[0]))  # goes the slow way, and takes its time
        for packet in packets[i : i + 20]:
            rig.device.send(bytes(10) + packet.data)
        rig.now += 0.05
        rig.pump.step(rig.now)
    while rig.pump.step(rig.now):
        rig.now += 0.05
    assert rig.sent() == [packet.data for packet in packets]


def test_a_calm_flow_passes_large_packets_but_never_its_own(rig: Rig) -> None:
    """The echo goes before what is left of the bulk; the end of the bulk, small as it is, goes after the rest of it."""
    bulk = trains(8)
    last = train(4, TCP, [100], seq=8 * 48_000)[0]
    echo = packet_of(4, UDP, b"quick")
    rig.install(bulk[0][0])
    rig.install(echo)
    for one in bulk:
        rig.device.send(super_packet(one))
    for packet in (last, echo):
        rig.device.send(bytes(10) + packet.data)
    got: list[bytes] = []
    while rig.pump.step(rig.now):
        got += rig.sent()
    got += rig.sent()
    assert got.index(echo.data) == 0
    assert [packet for packet in got if packet != echo.data] == [p.data for one in bulk for p in one] + [last.data]


def test_a_queue_in_the_socket_signals_too() -> None:
    """The kernel stamps what arrives; what waited for long makes the pump drop a full segment. By real clocks."""
    rig = Rig(start=clock.now())
    packets = train(4, TCP, [1000] * 80)
    rig.install(packets[0], inbound=True)
    rig.pump.step()
    got: list[bytes] = []
    for start in range(0, 80, 4):
        rig.far.send([rig.seal(packet) for packet in packets[start : start + 4]], rig.udp[4].port)
        time.sleep(0.01)
        rig.pump.step()
        got += rig.delivered()
    signalled = rig.pump.counters()["in_signalled"]
    assert signalled >= 1
    assert len(got) == 80 - signalled
    rig.close()
