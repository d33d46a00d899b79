"""What the pump's receiving half writes to the device: rewritten, merged as the driver would (spec/io.md 3.6, 6.4)."""

from __future__ import annotations

import ctypes
import os
import random

import pytest

from fz_core.fastpath import Coalescer, Pump
from fz_core.packet import Packet, verify_checksums
from fz_core.tunnel.verdict import FlowKey
from tests.unit.fastpath.offload_reference import (
    ACK,
    KINDS,
    PSH,
    TCP,
    UDP,
    packet_of,
    parsed,
    patched,
    train,
)
from tests.unit.fastpath.pump_rig import (
    Rig,
    device_pair,
    rewritten,
    translated,
    unnumbered,
)

URG, ECE, CWR = 0x20, 0x40, 0x80


# rewriting and merging


@pytest.mark.parametrize(("version", "protocol"), KINDS)
@pytest.mark.parametrize("to", [4, 6])
@pytest.mark.parametrize("sizes", [[1200] * 40 + [7], [999], [1] * 60, [0], [1200] * 54])
def test_rewriting(rig: Rig, version: int, protocol: int, to: int, sizes: list[int]) -> None:
    packets = train(version, protocol, sizes, last_flags=ACK | PSH)
    after = translated(packets[0], to)
    rig.install(packets[0], after, inbound=True)
    fit = [packet for packet in packets if len(packet) + 20 <= 1280 or version == 6 or to == 4]
    for start in range(0, len(fit), 50):
        rig.arrive(*fit[start : start + 50])
    seen = rig.delivered()
    assert [unnumbered(packet) for packet in seen] == [unnumbered(rewritten(packet, after).data) for packet in fit]
    assert all(verify_checksums(parsed(packet)) == () for packet in seen)


@pytest.mark.parametrize(("version", "protocol"), KINDS)
def test_a_packet_that_grows_too_large_is_for_the_driver(rig: Rig, version: int, protocol: int) -> None:
    packet = packet_of(version, protocol, b"")
    room = 1280 - len(packet)
    for to in (4, 6):
        grows = version == 4 and to == 6
        for size in (room, room - 19, room - 20):
            large = packet_of(version, protocol, bytes(size))
            rig.install(large, translated(large, to), inbound=True)
            rig.arrive(large)
            slow, seen = rig.handle_slowly(), rig.delivered()
            assert (len(slow), len(seen)) == ((1, 0) if grows and size > room - 20 else (0, 1))


def test_a_udp_checksum_that_was_left_out(rig: Rig) -> None:
    data = bytearray(packet_of(4, UDP, b"payload").data)
    data[26:28] = bytes(2)
    packet = parsed(data)
    rig.install(packet, translated(packet, 4), inbound=True)
    rig.arrive(packet)
    assert rig.delivered() == [rewritten(packet, translated(packet, 4)).data]
    rig.install(packet, translated(packet, 6), inbound=True)
    rig.arrive(packet)
    assert rig.handle_slowly() == [packet.data]


@pytest.mark.parametrize(("version", "protocol"), KINDS)
@pytest.mark.parametrize("sizes", [[1200] * 40, [1200] * 9 + [1], [5, 5, 5], [5, 6], [6, 5, 6]])
def test_writes_are_those_of_the_driver(rig: Rig, version: int, protocol: int, sizes: list[int]) -> None:
    packets = train(version, protocol, sizes, options=b"\1\1\1\1" if protocol == TCP else b"")
    assert merged_like_the_driver(rig, packets)


def merged_like_the_driver(rig: Rig, packets: list[Packet]) -> bool:
    """One batch of both: the same writes in the same order."""
    for key in dict.fromkeys(map(FlowKey.of, packets)):
        rig.pump.install(True, rig.slot, key, key, 1e6, 1e9)
    coalescer = Coalescer()
    for packet in packets:
        assert coalescer.add(packet) is None
    expected = coalescer.drain()
    sealed = list(map(rig.seal, packets))
    port = rig.udp[rig.far.version].port
    for group in messages_of(sealed):
        rig.far.send(group, port)
    rig.pump.step(rig.now)
    assert rig.records() == []
    assert rig.writes() == expected
    return True


def messages_of(sealed: list[bytes]) -> list[list[bytes]]:
    """As the kernel would join them: one size, the last maybe shorter, at most 50."""
    groups: list[list[bytes]] = []
    for datagram in sealed:
        group = groups[-1] if groups else []
        if group and len(group) < 50 and len(group[-1]) == len(group[0]) and len(datagram) <= len(group[0]):
            group.append(datagram)
        else:
            groups.append([datagram])
    return groups


@pytest.mark.parametrize(
    ("at", "new"),
    [(1, b"\x04"), (6, b"\0"), (8, b"\x3f"), (28, b"\1"), (33, b"\x30"), (33, b"\x50"), (33, b"\x90"),
     (32, b"\x51"), (34, b"\1"), (4, b"\xaa"), (24, b"\xff")],
)  # fmt: skip
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_may_merge_by_header_field(rig: Rig, at: int, new: bytes, which: int) -> None:
    """TOS, flags, TTL, acknowledgement, TCP flags, reserved bits, window, identification, sequence."""
    packets = train(4, TCP, [100] * 4)
    packets[which] = patched(packets[which], (at, new))
    assert merged_like_the_driver(rig, packets)


@pytest.mark.parametrize(("at", "new"), [(0, b"\x61"), (1, b"\x10"), (1, b"\x01"), (3, b"\1"), (7, b"\x3f")])
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_what_may_merge_by_header_field_v6(rig: Rig, at: int, new: bytes, protocol: int) -> None:
    """Traffic class, flow label, hop limit."""
    packets = train(6, protocol, [100] * 4)
    packets[1] = patched(packets[1], (at, new))
    assert merged_like_the_driver(rig, packets)


@pytest.mark.parametrize("flags", [ACK | PSH, ACK | URG, ACK | ECE, ACK | CWR, 0])
def test_a_push_ends_a_run_and_other_flags_stay_alone(rig: Rig, flags: int) -> None:
    packets = train(4, TCP, [100] * 2, last_flags=flags) + train(4, TCP, [100] * 3, seq=1200)
    assert merged_like_the_driver(rig, packets)


def test_options_differ(rig: Rig) -> None:
    packets = train(4, TCP, [100] * 2, options=b"\1\1\1\1") + train(4, TCP, [100] * 2, seq=1200, options=b"\1\1\1\0")
    packets += train(4, TCP, [100] * 2, seq=1400)
    assert merged_like_the_driver(rig, packets)


def test_most_segments_of_udp(rig: Rig) -> None:
    assert merged_like_the_driver(rig, train(4, UDP, [10] * 300))


@pytest.mark.parametrize("seed", range(60))
def test_random_mixtures_of_flows(rig: Rig, seed: int) -> None:
    chance = random.Random(seed)
    flows = [
        (version, protocol, (port, 443)) for version, protocol in KINDS for port in range(1, chance.choice([2, 4, 17]))
    ]
    following = dict.fromkeys(flows, 1000)
    packets: list[Packet] = []
    while len(packets) < 150:
        flow = version, protocol, ports = chance.choice(flows)
        for _ in range(chance.choice([1, 1, 2, 5, 12])):
            size = chance.choice([0, 1, 50, 50, 50, 100])
            flags = chance.choice([ACK] * 6 + [ACK | PSH, ACK | ECE])
            packets.append(
                packet_of(version, protocol, chance.randbytes(size), seq=following[flow], flags=flags, ports=ports)
            )
            following[flow] += size if chance.random() < 0.9 else 1
    joined = messages_of([packet.data for packet in packets])
    enough = packets[: sum(map(len, joined[:16]))]  # those that one call of the pump receives
    if len(flows) <= 48:
        assert merged_like_the_driver(rig, enough)


def test_more_runs_than_there_is_room_for_keep_their_order(rig: Rig) -> None:
    packets = [packet_of(4, TCP, bytes([i]), seq=1000 + i, ports=(port, 1)) for i in range(2) for port in range(1, 101)]
    for key in dict.fromkeys(map(FlowKey.of, packets)):
        rig.pump.install(True, rig.slot, key, key, 1e6, 1e9)
    for group in messages_of(list(map(rig.seal, packets))):
        rig.far.send(group, rig.udp[4].port)
    rig.pump.step(rig.now)
    seen = [parsed(packet) for packet in rig.delivered()]
    assert len(seen) == 200
    for port in range(1, 101):
        assert [packet.payload for packet in seen if packet.src_port == port] == [b"\0", b"\1"]


# a device that refuses


def test_a_device_that_refuses_merged_packets_gets_single_ones() -> None:
    """A timer takes no writes at all: EINVAL. Then the device is one that does."""
    libc = ctypes.CDLL(None, use_errno=True)
    timer: int = libc.timerfd_create(1, os.O_NONBLOCK)
    rig = Rig()
    rig.pump = Pump(timer, rig.wake, bytes(16))
    rig.pump.set_sockets(*((udp.fileno(), udp.port) for udp in rig.udp.values()))
    rig.slot = rig.pump.add_peer(0xAAAAAA) or 0
    rig.set_peer()
    packets = train(4, TCP, [100] * 3)
    rig.install(packets[0], inbound=True)
    rig.arrive(packets[0])
    assert not rig.pump.refused_merged, "that one was single"
    rig.arrive(*packets)
    assert rig.pump.refused_merged
    assert rig.pump.counters()["in_write_errors"] == 2
    device, tun = device_pair()
    os.dup2(tun.fileno(), timer)
    rig.arrive(*packets)
    assert [len(device.recv(2000)) for _ in packets] == [150] * 3
    for end in (device, tun):
        end.close()
    os.close(timer)
    rig.close()


def test_without_offloads_every_packet_goes_alone() -> None:
    rig = Rig(merges=False)
    packets = train(4, TCP, [100] * 3)
    rig.install(packets[0], inbound=True)
    rig.arrive(*packets)
    assert rig.writes() == [bytes(10) + packet.data for packet in packets]
    rig.close()
