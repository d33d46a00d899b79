"""The pump's receiving half, alone: what peers send, and what becomes of it (spec/io.md 3.6, 6.4)."""

from __future__ import annotations

import os
from ipaddress import ip_address

import pytest

from fz_core.packet import DropReason, Packet, build_echo, build_icmp_unreachable, verify_checksums
from fz_core.tunnel.verdict import FlowKey
from tests.unit.fastpath.offload_reference import (
    ACK,
    ADDRESSES,
    KINDS,
    TCP,
    UDP,
    packet_of,
    parsed,
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
    rewritten,
    translated,
    unnumbered,
)

FIN, SYN, RST = 0x01, 0x02, 0x04


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
    ((kind, slot, local, source, _, _, data),) = rig.records()
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
        ((kind, slot, _, _, ecn, _, data),) = rig.records()
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
    ((kind, _, _, _, _, _, data),) = rig.records()
    assert (kind, data) == (NO_PACKET, b"")


def test_a_forgery(rig: Rig) -> None:
    sealed = bytearray(rig.seal(packet_of(4, UDP, b"x")))
    sealed[-1] ^= 1
    rig.arrive_raw(bytes(sealed))
    ((kind, _, _, _, _, _, data),) = rig.records()
    assert (kind, data) == (FORGED, b"")
    assert rig.pump.take_peers() == []


def test_a_replay_is_left_to_the_driver_untouched(rig: Rig) -> None:
    packet = packet_of(4, UDP, b"x")
    rig.install(packet, inbound=True)
    sealed = rig.seal(packet)
    rig.arrive_raw(sealed)
    rig.arrive_raw(sealed)
    assert rig.delivered() == [packet.data]
    ((kind, _, _, _, _, _, data),) = rig.records()
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
        ((kind, slot, _, _, _, _, data),) = rig.records()
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
    ((kind, _, _, _, _, _, kept),) = rig.records()
    assert (kind, kept) == ((FORGED, b"") if length in (32, 59) else (DATAGRAM, data))


def test_another_channel_or_none(rig: Rig, relay: Far) -> None:
    packet = packet_of(4, UDP, b"x")
    rig.install(packet, inbound=True)
    for data in (channel_data(0x4ABD, rig.seal(packet)), rig.seal(packet)):
        rig.arrive_raw(data)
        assert rig.handle_slowly() == [data]


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
