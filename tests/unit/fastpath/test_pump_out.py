"""The pump's sending half, alone: what is read from the device, and what the peer gets (spec/io.md 3.4, 6.3)."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import pytest

from fz_core.fastpath import split_super_packet
from fz_core.packet import Packet, build_echo, verify_checksums
from fz_core.tunnel.verdict import FlowKey
from tests.unit.fastpath.offload_reference import (
    ACK,
    ADDRESSES,
    KINDS,
    PSH,
    TCP,
    UDP,
    packet_of,
    parsed,
    patched,
    super_packet,
    train,
    vnet,
)
from tests.unit.fastpath.pump_rig import FROM_DEVICE, Far, Rig, partial, rewritten, translated, unnumbered

FIN, SYN, RST = 0x01, 0x02, 0x04


# one packet


@pytest.mark.parametrize(("version", "protocol"), KINDS)
@pytest.mark.parametrize("size", [0, 1, 1000, 1220])
def test_an_established_packet_leaves_as_it_is(rig: Rig, version: int, protocol: int, size: int) -> None:
    packet = packet_of(version, protocol, bytes(size))
    rig.install(packet)
    rig.write(packet)
    assert rig.sent() == [packet.data]
    assert rig.records() == []
    counters = rig.pump.counters()
    assert (counters["out_packets"], counters["out_bytes"], counters["out_datagrams"]) == (1, len(packet), 1)


@pytest.mark.parametrize("version", [4, 6])
def test_echo(rig: Rig, version: int) -> None:
    packet = build_echo(*ADDRESSES[version], 77, payload=b"ping")
    rig.install(packet)
    rig.write(packet)
    assert rig.sent() == [packet.data]


@pytest.mark.parametrize(("version", "protocol"), KINDS)
def test_a_checksum_that_the_device_owes_is_completed(rig: Rig, version: int, protocol: int) -> None:
    packet = packet_of(version, protocol, b"odd payload")
    rig.install(packet)
    rig.write(partial(packet))
    assert rig.sent() == [packet.data]


@pytest.mark.parametrize(
    ("start", "offset"), [(20, 6), (20, 18), (0, 10), (24, 12), (60_000, 6), (20, 65_535), (31, 16)]
)
def test_any_other_checksum_is_for_the_driver(rig: Rig, start: int, offset: int) -> None:
    packet = packet_of(4, TCP, b"payload")
    rig.install(packet)
    read = vnet(1, 0, 0, 0, start, offset) + packet.data
    rig.write(read)
    assert rig.handle_slowly() == [read]
    assert rig.sent() == []


@pytest.mark.parametrize("flags", [SYN, FIN | ACK, RST, SYN | ACK])
def test_what_begins_or_ends_a_connection_is_for_the_driver(rig: Rig, flags: int) -> None:
    packet = packet_of(4, TCP, b"", flags=flags)
    rig.install(packet_of(4, TCP, b"x"))
    rig.write(packet)
    assert [record.kind for record in rig.records()] == [FROM_DEVICE]
    assert rig.sent() == []


def with_options(packet: Packet) -> bytes:
    """Four bytes of IPv4 options that do nothing."""
    data = bytearray(packet.data[:20] + b"\1\1\1\0" + packet.data[20:])
    data[0], data[2:4], data[10:12] = 0x46, len(data).to_bytes(2, "big"), bytes(2)
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, 24, 2))
    data[10:12] = (0xFFFF - (total % 0xFFFF)).to_bytes(2, "big")
    return bytes(data)


def with_extension(packet: Packet) -> bytes:
    """A hop-by-hop header of padding."""
    header = bytes([packet.protocol, 0, 1, 4, 0, 0, 0, 0])
    data = bytearray(packet.data[:40] + header + packet.data[40:])
    data[4:6], data[6] = (len(data) - 40).to_bytes(2, "big"), 0
    return bytes(data)


def test_options_extensions_fragments_and_the_unknown_are_for_the_driver(rig: Rig) -> None:
    v4, v6 = packet_of(4, UDP, b"payload"), packet_of(6, UDP, b"payload")
    rig.install(v4)
    rig.install(v6)
    fragment = bytearray(v4.data)
    fragment[6] = 0x20
    short = v4.data[:-1]
    for odd in (with_options(v4), with_extension(v6), bytes(fragment), short, b"\x45", b"\x99" * 40, bytes(1281)):
        rig.write(bytes(10) + odd)
        assert rig.handle_slowly() == [bytes(10) + odd]
    assert rig.sent() == []


# trains


@pytest.mark.parametrize(("version", "protocol"), KINDS)
@pytest.mark.parametrize("sizes", [[1200] * 50 + [7], [100, 100], [3, 3, 1], [999], [1] * 256])
def test_a_train_leaves_as_its_packets(rig: Rig, version: int, protocol: int, sizes: list[int]) -> None:
    packets = train(version, protocol, sizes, last_flags=ACK | PSH, options=b"\1\1\1\1" if protocol == TCP else b"")
    index = rig.install(packets[0])
    rig.write(super_packet(packets))
    assert rig.sent() == [packet.data for packet in packets]
    assert rig.pump.take_flows() == [(False, index, len(sizes), sum(sizes), rig.now)]


@pytest.mark.parametrize(("version", "protocol"), KINDS)
@pytest.mark.parametrize("to", [4, 6])
@pytest.mark.parametrize("sizes", [[1200] * 5 + [7], [999], [0]])
def test_rewriting(rig: Rig, version: int, protocol: int, to: int, sizes: list[int]) -> None:
    packets = train(version, protocol, sizes)
    after = translated(packets[0], to)
    rig.install(packets[0], after)
    rig.write(super_packet(packets) if len(sizes) > 1 else packets[0])
    rig.write(partial(packets[0]))
    sent = rig.sent()
    expected = [unnumbered(rewritten(packet, after).data) for packet in [*packets, packets[0]]]
    assert [unnumbered(packet) for packet in sent] == expected
    assert all(verify_checksums(parsed(packet)) == () for packet in sent)
    if version == 6 and to == 4:
        numbers = [packet[4:6] for packet in sent]
        assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("to", [4, 6])
@pytest.mark.parametrize("reply", [False, True])
def test_rewriting_of_echo(rig: Rig, version: int, to: int, reply: bool) -> None:
    for payload in (b"", b"odd", b"ping", bytes(1000), b"\xff" * 1001):
        packet = build_echo(*ADDRESSES[version], 77, 9, payload, reply=reply)
        after = translated(packet, to)
        rig.install(packet, after)
        rig.write(packet)
        (sent,) = rig.sent()
        assert unnumbered(sent) == unnumbered(rewritten(packet, after).data)
        assert verify_checksums(parsed(sent)) == ()


def without_checksum(packet: Packet) -> Packet:
    data = bytearray(packet.data)
    data[packet.l4_offset + 6 : packet.l4_offset + 8] = bytes(2)
    return parsed(data)


def test_a_udp_checksum_that_was_left_out(rig: Rig) -> None:
    packet = without_checksum(packet_of(4, UDP, b"payload"))
    rig.install(packet, translated(packet, 4))
    rig.write(packet)
    assert rig.sent() == [rewritten(packet, translated(packet, 4)).data]
    rig.install(packet, translated(packet, 6))
    rig.write(packet)
    assert rig.handle_slowly() == [bytes(10) + packet.data]


def test_a_wrong_checksum_stays_wrong(rig: Rig) -> None:
    packet = patched(packet_of(4, TCP, b"payload"))
    data = bytearray(packet.data)
    data[-1] ^= 0xFF
    rig.install(packet, translated(packet, 4))
    rig.write(bytes(10) + data)
    (sent,) = rig.sent()
    assert sent == rewritten(parsed(data), translated(packet, 4)).data
    assert verify_checksums(parsed(sent)) != ()


@pytest.mark.parametrize("gso_type", [1, 4, 5, 3, 0x81])
@pytest.mark.parametrize("gso_size", [0, 1, 65_535])
def test_an_offload_that_does_not_fit_the_packet_is_for_the_driver(rig: Rig, gso_type: int, gso_size: int) -> None:
    """Split by the driver's twin, or refused there: the pump sends nothing that this would not."""
    for version, protocol in KINDS:
        packet = packet_of(version, protocol, bytes(300))
        rig.install(packet)
        read = vnet(1, gso_type, 0, gso_size, packet.l4_offset, 6) + packet.data
        expected = split_super_packet(read)
        rig.write(read)
        slow, sent = rig.handle_slowly(), rig.sent()
        if isinstance(expected, list) and len(expected[0]) <= 1280:
            assert sent == [segment.data for segment in expected] or slow == [read]
        else:
            assert (slow, sent) == ([read], [])


# ECN, ways


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("underlay", [4, 6])
@pytest.mark.parametrize("sizes", [[10], [10, 10, 10]])
def test_ecn_is_shown_outside(rig: Rig, version: int, underlay: int, sizes: list[int]) -> None:
    rig.set_peer(Far(underlay))
    for ecn in (0, 1, 2, 3):
        packets = train(version, TCP, sizes)
        for packet in packets:
            packet.set_ecn(ecn)
        rig.install(packets[0])
        rig.write(super_packet(packets) if len(sizes) > 1 else packets[0])
        assert rig.sent_marked() == [(ecn, packet.data) for packet in packets]


def test_a_channel(rig: Rig) -> None:
    packets = train(4, UDP, [1200, 1200, 7])
    rig.set_peer(Far(4), channel=0x4ABC)
    rig.install(packets[0])
    rig.write(super_packet(packets))
    opened = []
    for _, datagram in rig.far.take():
        assert datagram[:2] == b"\x4a\xbc"
        assert int.from_bytes(datagram[2:4], "big") == len(datagram) - 4
        opened.append(rig.tunnels.b.tunnel.handle_untrusted(datagram[4:], None, rig.now))
    assert opened == [packet.data for packet in packets]


def test_the_source_address_is_the_one_asked_for(rig: Rig) -> None:
    packet = packet_of(4, UDP, b"x")
    source = ip_address("127.44.0.3").packed
    rig.set_peer(send=(rig.far.ip, rig.far.port, source, 0))
    rig.install(packet)
    rig.write(packet)
    _, (host, port) = rig.far.socket.recvfrom(2000)
    assert (host, port) == ("127.44.0.3", rig.udp[4].port)


def test_a_single_datagram_at_a_time_without_segmentation() -> None:
    rig = Rig(has_gso=False)
    packets = train(4, TCP, [1000] * 9)
    rig.install(packets[0])
    rig.write(super_packet(packets))
    assert rig.sent() == [packet.data for packet in packets]
    assert rig.pump.counters()["out_calls"] == 9
    rig.close()


def test_a_way_that_refuses_segmentation_gets_single_datagrams(rig: Rig) -> None:
    """A socket without checksums cannot segment: the kernel says EINVAL or EIO."""
    no_check = 11
    with socket.socket(fileno=socket.dup(rig.udp[4].fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, no_check, 1)
    packets = train(4, TCP, [1000] * 9)
    rig.install(packets[0])
    for _ in range(2):
        rig.write(super_packet(packets))
        assert rig.sent() == [packet.data for packet in packets]
    assert rig.pump.counters()["out_calls"] == 1 + 9 + 9
    assert rig.pump.take_refusals() == []
    rig.set_peer()  # the same way
    rig.write(super_packet(packets))
    assert rig.pump.counters()["out_calls"] == 1 + 9 + 9 + 9
    rig.set_peer(send=(bytes([127, 0, 0, 9]), 9, None, 0))  # another way may be better
    rig.set_peer()
    rig.write(super_packet(packets))
    assert rig.pump.counters()["out_calls"] == 1 + 9 + 9 + 9 + 10


def test_what_the_kernel_refuses_is_told(rig: Rig) -> None:
    packets = train(4, TCP, [1000] * 3)
    rig.set_peer(send=(bytes([255, 255, 255, 255]), 9, None, 0))  # no right to broadcast
    rig.install(packets[0])
    rig.write(super_packet(packets))
    ((slot, _, size),) = rig.pump.take_refusals()
    assert (slot, size) == (rig.slot, 3 * (1040 + 32))
    assert rig.pump.counters()["out_dropped"] == 3


def test_without_a_socket_of_the_family_the_driver_decides(rig: Rig) -> None:
    packet = packet_of(4, UDP, b"x")
    rig.install(packet)
    rig.pump.set_sockets(None, (rig.udp[6].fileno(), rig.udp[6].port))
    rig.write(packet)
    assert rig.kinds() == [FROM_DEVICE]


# what ends a verdict


def test_a_way_a_session_and_a_limit_are_needed(rig: Rig) -> None:
    packet = packet_of(4, UDP, bytes(1000))
    rig.install(packet)
    for ways in ({"send": None}, {"send_until": rig.now}, {"limit": len(packet) - 1}):
        rig.set_peer(**ways)
        rig.write(packet)
        assert len(rig.handle_slowly()) == 1
    rig.set_peer(limit=len(packet))
    rig.write(packet)
    assert rig.sent() == [packet.data]


def test_the_limit_counts_what_a_packet_grows_by(rig: Rig) -> None:
    packet = packet_of(4, UDP, bytes(1000))
    rig.install(packet, translated(packet, 6))
    rig.set_peer(limit=len(packet) + 19)
    rig.write(packet)
    assert len(rig.handle_slowly()) == 1
    rig.set_peer(limit=len(packet) + 20)
    rig.write(packet)
    assert len(rig.sent()) == 1


def test_the_session_ends_on_time(rig: Rig) -> None:
    packet = packet_of(4, UDP, b"x")
    session = rig.tunnels.a.tunnel.current_session()
    assert session is not None
    rig.install(packet, ttl=1e6)
    rig.now = session.send_until - 0.001
    rig.write(packet)
    assert rig.handle_slowly() == []
    rig.now = session.send_until
    rig.write(packet)
    assert len(rig.handle_slowly()) == 1


def test_idle_time_and_end(rig: Rig) -> None:
    packet = packet_of(4, UDP, b"x")
    rig.install(packet, ttl=10.0, until=rig.now + 25.0)
    for seconds in (9.9, 9.9):
        rig.now += seconds
        rig.write(packet)
    assert len(rig.sent()) == 2
    rig.now += 5.2
    rig.write(packet)
    assert len(rig.handle_slowly()) == 1
    rig.install(packet, ttl=10.0)
    rig.now += 10.0
    rig.write(packet)
    assert len(rig.handle_slowly()) == 1


def test_generations(rig: Rig) -> None:
    packet = packet_of(4, UDP, b"x")
    for end in (rig.pump.void_all, lambda: rig.pump.void_peer(rig.slot)):
        rig.install(packet)
        rig.write(packet)
        assert len(rig.sent()) == 1
        end()
        rig.write(packet)
        assert len(rig.handle_slowly()) == 1
    rig.install(packet)
    assert rig.pump.remove(False, rig.slot, FlowKey.of(packet)) is not None
    assert rig.pump.remove(False, rig.slot, FlowKey.of(packet)) is None
    rig.write(packet)
    assert len(rig.handle_slowly()) == 1


def test_a_peer_that_is_gone_and_the_next_in_its_slot(rig: Rig) -> None:
    packet = packet_of(4, UDP, b"x")
    rig.install(packet)
    rig.pump.remove_peer(rig.slot)
    rig.write(packet)
    assert len(rig.handle_slowly()) == 1
    rig.slot = rig.pump.add_peer(0xCCCCCC) or 0
    rig.set_peer()
    rig.write(packet)
    assert len(rig.handle_slowly()) == 1, "decided about another peer"
    rig.arrive_raw(rig.seal(packet))
    assert len(rig.handle_slowly()) == 1, "that index is gone"


# notes


def test_notes(rig: Rig) -> None:
    packet = packet_of(4, UDP, b"four")
    index = rig.install(packet)
    rig.write(packet, packet)
    at = rig.now
    assert rig.pump.take_peers() == [(rig.slot, at, None, at)]
    assert rig.pump.take_peers() == []
    assert rig.pump.take_flows() == [(False, index, 2, 8, at)]
    assert rig.pump.take_flows() == []
    rig.now += 1
    rig.write(packet)
    assert rig.pump.install(False, rig.slot, FlowKey.of(packet), FlowKey.of(packet), 1.0, 1e9) == (
        index,
        (1, 4, rig.now),
    )
    rig.write(packet)
    assert rig.pump.remove(False, rig.slot, FlowKey.of(packet)) == (index, (1, 4, rig.now))
    rig.arrive(b"")
    assert rig.pump.take_peers() == [(rig.slot, rig.now, None, None)], "the driver hears of keep-alives by itself"


def test_packets_of_the_pump_move_the_tunnels_timers(rig: Rig) -> None:
    packet = packet_of(4, UDP, b"four")
    rig.install(packet)
    rig.now += 5
    rig.write(packet)
    assert rig.tunnels.a.tunnel.last_tx_at == rig.now
    rig.now += 2
    rig.arrive(b"")
    assert rig.tunnels.a.tunnel.last_rx_at == rig.now


# the device


def test_the_device_is_gone(rig: Rig) -> None:
    assert not rig.pump.has_failed
    rig.device.close()
    rig.pump.step(rig.now)
    assert rig.pump.has_failed
