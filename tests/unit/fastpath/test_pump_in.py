"""The pump's receiving half, alone: what peers send, and what is written to the device (spec/io.md 3.6, 6.4)."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from fz_core.fastpath import Coalescer, Pump
from fz_core.packet import DropReason, Packet, build_echo, build_icmp_unreachable, verify_checksums
from fz_core.tunnel.verdict import FlowKey
from tests.unit.fastpath.offload_reference import (
    ACK,
    ADDRESSES,
    PSH,
    TCP,
    UDP,
    packet_of,
    parsed,
    patched,
    train,
)
from tests.unit.fastpath.pump_rig import (
    DATAGRAM,
    FORGED,
    NO_PACKET,
    OPENED,
    RELAY_PORT,
    Far,
    Rig,
    confirm,
    device_pair,
    rewritten,
)

KINDS = [(4, TCP), (6, TCP), (4, UDP), (6, UDP)]
FIN, SYN, RST, URG, ECE, CWR = 0x01, 0x02, 0x04, 0x20, 0x40, 0x80
OTHER = {
    4: (ip_address("203.0.113.9").packed, ip_address("198.51.100.77").packed),
    6: (ip_address("2001:db8::9").packed, ip_address("2001:db8:ffff::77").packed),
}


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def translated(packet: Packet, version: int) -> FlowKey:
    protocol = packet.protocol if packet.protocol in (TCP, UDP) else {4: 1, 6: 58}[version]
    return FlowKey(version, protocol, *OTHER[version], 65_535, 65_535)


def unnumbered(packet: bytes) -> bytes:
    """Without IPv4 identification and header checksum, which a family translation chooses."""
    return packet[:4] + bytes(2) + packet[6:10] + bytes(2) + packet[12:] if packet[0] >> 4 == 4 else packet


# one datagram


@pytest.mark.parametrize(("version", "protocol"), KINDS)
@pytest.mark.parametrize("size", [0, 1, 1220])
@pytest.mark.parametrize("underlay", [4, 6])
def test_an_established_packet_reaches_the_device(
    rig: Rig, version: int, protocol: int, size: int, underlay: int
) -> None:
    packet = packet_of(version, protocol, bytes(size))
    rig.set_peer(Far(underlay))
    index = rig.install(packet, inbound=True)
    rig.arrive(packet)
    assert rig.writes() == [bytes(10) + packet.data]
    assert rig.records() == []
    assert rig.pump.take_flows() == [(True, index, 1, size, rig.now)]
    assert rig.pump.take_peers() == [(rig.slot, None, rig.now, None)]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("to", [4, 6])
@pytest.mark.parametrize("reply", [False, True])
def test_echo(rig: Rig, version: int, to: int, reply: bool) -> None:
    packet = build_echo(*ADDRESSES[version], 77, 1, b"ping", reply=reply)
    after = translated(packet, to)
    rig.install(packet, after, inbound=True)
    rig.arrive(packet)
    (seen,) = rig.delivered()
    assert unnumbered(seen) == unnumbered(rewritten(packet, after).data)
    assert verify_checksums(parsed(seen)) == ()


def test_padding_is_cut_off(rig: Rig) -> None:
    packet = packet_of(4, UDP, b"odd")
    index = rig.install(packet, inbound=True)
    for padding in (1, 15):
        rig.arrive(packet.data + bytes(padding))
    assert rig.delivered() == [packet.data] * 2
    assert rig.pump.take_flows() == [(True, index, 2, 6, rig.now)]


def test_a_keepalive_goes_to_the_driver_and_counts_as_a_sign_of_life(rig: Rig) -> None:
    rig.now += 3
    rig.arrive(b"")
    ((kind, slot, local, source, _, data),) = rig.records()
    assert (kind, slot, data) == (OPENED, rig.slot, b"")
    assert local == (ip_address("127.0.0.1").packed, rig.udp[4].port)
    assert source == (rig.far.ip, rig.far.port)
    assert rig.tunnels.a.tunnel.last_rx_at == rig.now


def test_what_is_no_flow_is_opened_and_goes_to_the_driver(rig: Rig) -> None:
    packets = [
        packet_of(4, UDP, b"new"),
        packet_of(4, TCP, b"", flags=SYN),
        build_icmp_unreachable(packet_of(4, UDP, b"x")),
    ]
    for packet in packets:
        assert isinstance(packet, Packet)
        rig.arrive(packet, ecn=1)
        ((kind, slot, _, _, ecn, data),) = rig.records()
        assert (kind, slot, ecn, data) == (OPENED, rig.slot, 1, packet.data)
    assert rig.writes() == []


@pytest.mark.parametrize("flags", [SYN, FIN | ACK, RST])
def test_what_ends_a_connection_is_for_the_driver(rig: Rig, flags: int) -> None:
    packet = packet_of(6, TCP, b"", flags=flags)
    rig.install(packet, inbound=True)
    rig.arrive(packet)
    assert rig.kinds() == [OPENED]


@pytest.mark.parametrize("plaintext", [b"\0", b"\x45" + bytes(18), b"\x45\0\0\x30" + bytes(16), b"\x99" * 60])
def test_authentic_bytes_that_are_no_packet(rig: Rig, plaintext: bytes) -> None:
    rig.arrive(plaintext)
    ((kind, _, _, _, _, data),) = rig.records()
    assert (kind, data) == (NO_PACKET, b"")


def test_a_forgery(rig: Rig) -> None:
    sealed = bytearray(rig.seal(packet_of(4, UDP, b"x")))
    sealed[-1] ^= 1
    rig.arrive_raw(bytes(sealed))
    ((kind, _, _, _, _, data),) = rig.records()
    assert (kind, data) == (FORGED, b"")
    assert rig.pump.take_peers() == []


def test_a_replay_is_left_to_the_driver_untouched(rig: Rig) -> None:
    packet = packet_of(4, UDP, b"x")
    rig.install(packet, inbound=True)
    sealed = rig.seal(packet)
    rig.arrive_raw(sealed)
    rig.arrive_raw(sealed)
    assert rig.delivered() == [packet.data]
    ((kind, _, _, _, _, data),) = rig.records()
    assert (kind, data) == (DATAGRAM, sealed)
    assert rig.tunnels.a.tunnel.handle_untrusted(sealed, None, rig.now) is DropReason.WG_REPLAYED_PACKET


def test_the_window_is_shared_with_the_slow_path(rig: Rig) -> None:
    packet = packet_of(4, UDP, b"x")
    rig.install(packet, inbound=True)
    sealed = rig.seal(packet)
    assert rig.tunnels.a.tunnel.handle_untrusted(sealed, None, rig.now) == packet.data
    rig.arrive_raw(sealed)
    assert rig.kinds() == [DATAGRAM]


def begin_session(rig: Rig) -> None:
    """The peer initiates, and has sent no data yet."""
    rig.tunnels.lossy = lambda _sender, datagram: datagram[0] == 4
    rig.tunnels.b.tunnel.start_handshake(rig.now, True)
    rig.tunnels.exchange()
    rig.set_peer()


def test_an_unconfirmed_session_is_left_to_the_driver(rig: Rig) -> None:
    """The initiator's first data makes a responder's session usable."""
    begin_session(rig)
    packet = packet_of(4, UDP, b"x")
    rig.install(packet, inbound=True)
    sealed = rig.seal(packet)
    rig.arrive_raw(sealed)
    assert rig.handle_slowly() == [sealed]
    rig.tunnels.a.tunnel.handle_untrusted(sealed, None, rig.now)
    rig.set_peer()
    rig.arrive(packet)
    assert rig.delivered() == [packet.data]


def test_nothing_overtakes_datagrams_of_a_session_that_was_unconfirmed(rig: Rig) -> None:
    packets = [packet_of(4, UDP, payload) for payload in (b"1", b"2", b"3")]
    rig.install(packets[0], inbound=True)
    begin_session(rig)
    first, second, third = map(rig.seal, packets)
    rig.arrive_raw(first)
    assert len(rig.records()) == 1
    rig.arrive_raw(second)  # while the driver looks at the first
    rig.tunnels.a.tunnel.handle_untrusted(first, None, rig.now)
    rig.set_peer()
    rig.pump.finish()
    rig.arrive_raw(third)
    assert rig.delivered() == [], "the second is still with the driver"
    assert rig.handle_slowly() == [second]
    rig.pump.step(rig.now)
    assert rig.delivered() == [packets[2].data]


def test_the_previous_session_is_good_until_it_ends(rig: Rig) -> None:
    packet = packet_of(4, UDP, b"x")
    rig.install(packet, inbound=True, ttl=1e6)
    old = [rig.seal(packet) for _ in range(2)]
    until = rig.tunnels.a.tunnel.current_session().receive_until  # type: ignore[union-attr]
    rig.tunnels.a.tunnel.start_handshake(rig.now, True)
    rig.tunnels.exchange()
    confirm(rig.tunnels)
    rig.set_peer()
    rig.arrive_raw(old[0])
    rig.arrive(packet)
    assert rig.delivered() == [packet.data] * 2
    rig.now = until
    rig.arrive_raw(old[1])
    assert rig.handle_slowly() == [old[1]]


@pytest.mark.parametrize("change", ["source", "port", "local", "channel", "none"])
def test_data_that_comes_another_way_is_left_to_the_driver(rig: Rig, change: str) -> None:
    packet = packet_of(4, UDP, b"x")
    rig.install(packet, inbound=True)
    ip, port, here = rig.far.ip, rig.far.port, (ip_address("127.0.0.1").packed, rig.udp[4].port)
    rig.set_peer(receive=(ip, port, here, 0))
    rig.arrive(packet)
    assert rig.delivered() == [packet.data]
    receive = {
        "source": (ip_address("127.0.0.2").packed, port, here, 0),
        "port": (ip, port ^ 1, here, 0),
        "local": (ip, port, (ip_address("127.0.0.2").packed, rig.udp[4].port), 0),
        "channel": (ip, port, here, 0x4001),
        "none": None,
    }[change]
    rig.set_peer(receive=receive)
    sealed = rig.seal(packet)
    rig.arrive_raw(sealed)
    assert rig.handle_slowly() == [sealed]


@pytest.mark.parametrize("length", [1, 4, 8, 31])
def test_what_is_no_data_is_for_the_driver(rig: Rig, length: int) -> None:
    sealed = rig.seal(packet_of(4, UDP, b"x"))
    unknown = sealed[:5] + bytes([sealed[5] ^ 1]) + sealed[6:]
    another = bytes([sealed[4] ^ 1])
    for odd in (sealed[:length], b"\1" + sealed[1:], sealed[:1] + b"\1" + sealed[2:], unknown,
                sealed[:4] + another + sealed[5:], b"\x40\x00" + sealed[2:]):  # fmt: skip
        rig.arrive_raw(odd)
        ((kind, slot, _, _, _, data),) = rig.records()
        assert (kind, slot, data) == (DATAGRAM, None, odd)


# channels


@pytest.fixture
def relay(rig: Rig) -> Far:
    """Each test process has its own address in 127.0.0.0/8: the port is always the same one."""
    pid = os.getpid()
    far = Far(4, f"127.77.{pid >> 8 & 255}.{pid & 255}", RELAY_PORT)
    rig.set_peer(far, channel=0x4ABC)
    return far


def channel_data(channel: int, data: bytes, length: int | None = None) -> bytes:
    return channel.to_bytes(2, "big") + (len(data) if length is None else length).to_bytes(2, "big") + data


def test_channel_data(rig: Rig, relay: Far) -> None:
    packets = train(4, UDP, [1000, 1000, 9])
    rig.install(packets[0], inbound=True)
    rig.arrive_raw(*(channel_data(0x4ABC, rig.seal(packet)) for packet in packets))
    assert rig.delivered() == [packet.data for packet in packets]


def test_padding_of_channel_data_is_ignored(rig: Rig, relay: Far) -> None:
    packet = packet_of(4, UDP, b"odd")
    rig.install(packet, inbound=True)
    rig.arrive_raw(channel_data(0x4ABC, rig.seal(packet)) + bytes(3))
    assert rig.delivered() == [packet.data]


@pytest.mark.parametrize("length", [0, 1, 31, 32, 59, 61, 65_535])
def test_channel_data_of_another_length(rig: Rig, relay: Far, length: int) -> None:
    packet = packet_of(4, UDP, b"")
    rig.install(packet, inbound=True)
    data = channel_data(0x4ABC, rig.seal(packet), length)
    rig.arrive_raw(data)
    assert rig.delivered() == []
    ((kind, _, _, _, _, kept),) = rig.records()
    assert (kind, kept) == ((FORGED, b"") if length in (32, 59) else (DATAGRAM, data))


def test_another_channel_or_none(rig: Rig, relay: Far) -> None:
    packet = packet_of(4, UDP, b"x")
    rig.install(packet, inbound=True)
    for data in (channel_data(0x4ABD, rig.seal(packet)), rig.seal(packet)):
        rig.arrive_raw(data)
        assert rig.handle_slowly() == [data]


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


# ECN


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("outer", [0, 1, 2, 3])
@pytest.mark.parametrize("inner", [0, 1, 2, 3])
@pytest.mark.parametrize("underlay", [4, 6])
def test_congestion_that_was_met_is_shown_inside(rig: Rig, version: int, outer: int, inner: int, underlay: int) -> None:
    packet = packet_of(version, UDP, b"x")
    packet.set_ecn(inner)
    rig.set_peer(Far(underlay))
    rig.install(packet, inbound=True)
    rig.arrive(packet, ecn=outer)
    packet.merge_ecn(outer)
    assert rig.delivered() == [packet.data]


def test_what_was_marked_does_not_merge_with_what_was_not(rig: Rig) -> None:
    packets = train(4, TCP, [100] * 4)
    for packet in packets:
        packet.set_ecn(2)
    rig.install(packets[0], inbound=True)
    port = rig.udp[4].port
    rig.far.send([rig.seal(packet) for packet in packets[:2]], port, 2)
    rig.far.send([rig.seal(packet) for packet in packets[2:]], port, 3)
    rig.pump.step(rig.now)
    assert len(writes := rig.writes()) == 2
    assert [write[11] & 3 for write in writes] == [2, 3]


# what ends a verdict, order


def test_idle_time_end_and_generations(rig: Rig) -> None:
    packet = packet_of(4, UDP, b"x")

    def passes() -> bool:
        rig.arrive(packet)
        rig.handle_slowly()
        return rig.delivered() == [packet.data]

    rig.install(packet, inbound=True, ttl=10.0, until=rig.now + 15.0)
    rig.now += 9.9
    assert passes()
    rig.now += 5.2
    assert not passes()
    rig.install(packet, inbound=True, ttl=10.0)
    rig.now += 10.0
    assert not passes()
    for end in (
        rig.pump.void_all,
        lambda: rig.pump.void_peer(rig.slot),
        lambda: rig.pump.remove(True, rig.slot, FlowKey.of(packet)),
    ):
        rig.install(packet, inbound=True)
        assert passes()
        end()
        assert not passes()


def test_a_verdict_is_for_one_peer(rig: Rig) -> None:
    """What another peer sends is not covered, whatever addresses it claims."""
    packet = packet_of(4, UDP, b"x")
    other = rig.pump.add_peer(0xCCCCCC)
    assert other is not None
    key = FlowKey.of(packet)
    rig.pump.step(rig.now)
    rig.pump.install(True, other, key, key, 1e6, 1e9)
    rig.arrive(packet)
    assert rig.kinds() == [OPENED]


def test_nothing_overtakes_what_the_driver_has(rig: Rig) -> None:
    packets = [packet_of(4, UDP, payload) for payload in (b"1", b"2", b"3", b"4")]
    rig.arrive(packets[0])
    assert [record.data for record in rig.records()] == [packets[0].data]
    rig.arrive(packets[1])
    rig.install(packets[0], inbound=True)
    rig.pump.finish()
    rig.arrive(packets[2])
    assert rig.delivered() == []
    assert rig.handle_slowly() == [packets[1].data]
    rig.pump.step(rig.now)
    rig.arrive(packets[3])
    assert rig.delivered() == [packets[2].data, packets[3].data]


def test_counters_of_what_no_peer_sends(rig: Rig) -> None:
    rig.arrive_raw(bytes(1317))
    rig.arrive_raw(bytes(1316))
    rig.arrive_raw(b"")
    counters = rig.pump.counters()
    assert (counters["in_oversized"], counters["in_malformed"], counters["in_datagrams"]) == (1, 0, 1)
    assert rig.kinds() == [DATAGRAM]


def test_a_full_table_of_flows_keeps_runs_apart(rig: Rig) -> None:
    """Flows that go while their packets wait to be written take nothing with them."""
    for i in range(65_536):
        key = FlowKey(6, UDP, *ADDRESSES[6], 1 + i % 60_000, 2 + i // 60_000)
        rig.pump.install(True, rig.slot, key, key, 1e6, 1e9)
    port = rig.udp[4].port
    mine = packet_of(4, UDP, b"mine")
    rig.install(mine, inbound=True)
    sealed = []
    for i in range(300):
        sealed += [rig.seal(mine), rig.seal(packet_of(4, UDP, b"else", ports=(1 + i, 9)))]
    for start in range(0, 600, 40):
        rig.far.send(sealed[start : start + 40], port)
    rig.pump.step(rig.now)
    seen = rig.delivered()
    slow = [record.data for record in rig.records()]
    assert seen + [data for data in slow if data == mine.data] == [mine.data] * 300
    assert len(slow) + len(seen) == 600
    assert rig.pump.counters()["flows_in"] == 65_536


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
