"""Merging packets for the TUN device (spec/io.md 6.4)."""

from __future__ import annotations

from struct import pack, unpack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from offload_reference import (
    ACK,
    ADDRESSES,
    GSO_TYPE,
    KINDS,
    NO_OFFLOAD,
    PSH,
    TCP,
    UDP,
    folded_sum,
    packet_of,
    patched,
    train,
)

from fz_core.fastpath import Coalescer, split_super_packet
from fz_core.packet import DropReason, Packet, build_echo


def coalesce(packets: list[Packet], enabled: bool = True) -> list[bytes]:
    coalescer = Coalescer(enabled)
    for packet in packets:
        assert coalescer.add(packet) is None
    return coalescer.drain()


def split_all(writes: list[bytes]) -> list[Packet]:
    out: list[Packet] = []
    for write in writes:
        segments = split_super_packet(write)
        assert isinstance(segments, list)
        out += segments
    return out


@pytest.mark.parametrize(("version", "protocol"), KINDS)
def test_the_bytes_of_a_merged_train(version: int, protocol: int) -> None:
    packets = train(version, protocol, [1000, 1000, 33], last_flags=ACK | PSH)
    (write,) = coalesce(packets)
    l4, header = packets[0].l4_offset, len(packets[0]) - 1000
    offset = 16 if protocol == TCP else 6
    fields = unpack("=BBHHHH", write[:10])
    assert fields == (1, GSO_TYPE[version, protocol], header, 1000, l4, offset)
    data = write[10:]
    assert data[header:] == b"".join(p.payload for p in packets)
    length = len(data) - l4
    pseudo = packets[0].src + packets[0].dst + pack("!II", length, protocol)
    expected = bytearray(packets[0].data[:header])
    expected[l4 + offset : l4 + offset + 2] = pack("!H", folded_sum(pseudo))
    if version == 4:
        expected[2:4] = pack("!H", len(data))
        expected[10:12] = b"\0\0"
        expected[10:12] = pack("!H", ~folded_sum(bytes(expected[:20])) & 0xFFFF)
    else:
        expected[4:6] = pack("!H", len(data) - 40)
    if protocol == TCP:
        expected[l4 + 13] = ACK | PSH
    else:
        expected[l4 + 4 : l4 + 6] = pack("!H", length)
    assert data[:header] == expected


@pytest.mark.shows("io", 35)
@pytest.mark.parametrize(("version", "protocol"), KINDS)
@given(
    size=st.integers(1, 1200),
    count=st.integers(1, 49),
    seq=st.integers(0, 2**32 - 1),
    push=st.booleans(),
    data=st.data(),
)
def test_coalesce_then_split_is_the_identity(
    version: int, protocol: int, size: int, count: int, seq: int, push: bool, data: st.DataObject
) -> None:
    sizes = [size] * count + [data.draw(st.integers(1, size))]
    packets = train(version, protocol, sizes, seq=seq, ident=65520, last_flags=ACK | PSH if push else ACK)
    writes = coalesce(packets)
    assert len(writes) == 1
    assert split_all(writes) == packets


@pytest.mark.shows("io", 36)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 3), st.integers(0, 40)), max_size=60))
def test_no_payload_is_lost_and_each_connection_keeps_its_order(
    steps: list[tuple[tuple[int, int], int, int]],
) -> None:
    next_seq: dict[tuple[int, int, int], int] = {}
    packets = []
    for number, ((version, protocol), host, size) in enumerate(steps):
        key = (version, protocol, host)
        seq = next_seq.get(key, 0)
        next_seq[key] = seq + size
        payload = bytes([number % 256]) * size
        packets.append(packet_of(version, protocol, payload, seq=seq, ports=(host, 1)))
    out = split_all(coalesce(packets))
    for key in next_seq:
        mine = [(p.payload, p.tcp_flags) for p in packets if (p.version, p.protocol, p.src_port) == key]
        assert [(p.payload, p.tcp_flags) for p in out if (p.version, p.protocol, p.src_port) == key] == mine
    assert len(out) == len(packets)


def test_single_packets_pass_unchanged_under_a_zero_header() -> None:
    src, dst = ADDRESSES[4]
    packets = [packet_of(4, TCP, b"abc"), packet_of(6, UDP, b"def"), build_echo(src, dst, 1)]
    assert coalesce(packets) == [NO_OFFLOAD + p.data for p in packets]


def test_disabled_writes_every_packet_alone() -> None:
    packets = train(4, TCP, [100] * 5)
    assert coalesce(packets, enabled=False) == [NO_OFFLOAD + p.data for p in packets]


TIMESTAMP = bytes.fromhex("0101080a0102030405060708")
LATER = bytes.fromhex("0101080a0102030505060708")
FIRST4 = packet_of(4, TCP, b"a" * 100, seq=0)
NEXT4 = packet_of(4, TCP, b"b" * 100, seq=100)
FIRST6 = packet_of(6, TCP, b"a" * 100, seq=0)
NEXT6 = packet_of(6, TCP, b"b" * 100, seq=100)
OPTIONS4 = packet_of(4, TCP, b"a" * 100, seq=0, options=TIMESTAMP)


def with_ipv4_options(packet: Packet) -> Packet:
    raw = bytearray(packet.data)
    raw[20:20] = bytes([1, 1, 1, 0])
    raw[0] = 0x46
    raw[2:4] = pack("!H", len(raw))
    return parse(raw)


def with_extension_header(packet: Packet) -> Packet:
    raw = bytearray(packet.data)
    raw[40:40] = bytes([raw[6], 0]) + bytes(6)
    raw[6] = 60
    raw[4:6] = pack("!H", len(raw) - 40)
    return parse(raw)


def parse(raw: bytearray) -> Packet:
    packet = Packet.parse_untrusted(raw)
    assert isinstance(packet, Packet)
    packet.update_checksums()
    return packet


def test_the_cases_below_would_merge_but_for_their_difference() -> None:
    for pair in (
        (FIRST4, NEXT4),
        (FIRST6, NEXT6),
        (OPTIONS4, packet_of(4, TCP, b"b", seq=100, options=TIMESTAMP)),
    ):
        assert len(coalesce(list(pair))) == 1


def test_what_may_differ() -> None:
    window = patched(NEXT4, (34, b"\x12\x34"))
    ident = patched(NEXT4, (4, b"\x77\x77"))
    flow_label = patched(NEXT6, (2, b"\x77\x77"))
    assert len(coalesce([FIRST4, window])) == 1
    assert len(coalesce([FIRST4, ident])) == 1
    assert len(coalesce([FIRST6, flow_label])) == 1


@pytest.mark.shows("io", 36)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(FIRST4, packet_of(4, TCP, b"b", seq=101), id="gap in seq"),
        pytest.param(FIRST4, packet_of(4, TCP, b"b", seq=99), id="overlap in seq"),
        pytest.param(FIRST4, packet_of(4, TCP, b"b", seq=100, ack=78), id="other ACK"),
        pytest.param(packet_of(4, TCP, b"a" * 100, flags=ACK | PSH), NEXT4, id="PSH before"),
        pytest.param(OPTIONS4, packet_of(4, TCP, b"b", seq=100, options=LATER), id="option bytes"),
        pytest.param(OPTIONS4, packet_of(4, TCP, b"b", seq=100), id="option length"),
        pytest.param(FIRST4, patched(NEXT4, (32, b"\x51")), id="reserved TCP bits"),
        pytest.param(FIRST4, patched(NEXT4, (8, b"\x3f")), id="TTL"),
        pytest.param(FIRST4, patched(NEXT4, (1, b"\x04")), id="DSCP"),
        pytest.param(FIRST4, patched(NEXT4, (1, b"\x03")), id="ECN"),
        pytest.param(FIRST4, patched(NEXT4, (6, b"\x40")), id="DF"),
        pytest.param(FIRST6, patched(NEXT6, (7, b"\x3f")), id="hop limit"),
        pytest.param(FIRST6, patched(NEXT6, (1, b"\x10")), id="ECN v6"),
        pytest.param(FIRST6, patched(NEXT6, (0, b"\x61")), id="DSCP v6"),
        pytest.param(FIRST4, packet_of(4, TCP, b"b", seq=100, ports=(40001, 443)), id="source port"),
        pytest.param(FIRST4, packet_of(4, TCP, b"b", seq=100, ports=(40000, 444)), id="destination port"),
        pytest.param(FIRST4, patched(NEXT4, (15, b"\x09")), id="source address"),
        pytest.param(FIRST6, patched(NEXT6, (39, b"\x09")), id="destination address"),
        pytest.param(FIRST4, packet_of(4, TCP, b"b" * 101, seq=100), id="longer payload"),
        pytest.param(FIRST4, packet_of(4, TCP, b"", seq=100), id="empty payload"),
        pytest.param(packet_of(4, UDP, b"a"), packet_of(4, UDP, b""), id="empty datagram"),
        pytest.param(FIRST4, with_ipv4_options(NEXT4), id="IPv4 options"),
        pytest.param(with_ipv4_options(FIRST4), with_ipv4_options(NEXT4), id="same IPv4 options"),
        pytest.param(FIRST6, with_extension_header(NEXT6), id="extension header"),
        pytest.param(with_extension_header(FIRST6), with_extension_header(NEXT6), id="same extension header"),
    ]
    + [
        pytest.param(FIRST4, packet_of(4, TCP, b"b", seq=100, flags=ACK | flag), id=f"flag {flag:#x}")
        for flag in (0x01, 0x02, 0x04, 0x20, 0x40, 0x80)
    ]
    + [pytest.param(FIRST4, packet_of(4, TCP, b"b", seq=100, flags=0), id="no ACK")],
)
def test_no_merge_and_order_unchanged(first: Packet, second: Packet) -> None:
    assert coalesce([first, second]) == [NO_OFFLOAD + first.data, NO_OFFLOAD + second.data]
    if flow_of(second) == flow_of(first):  # then nothing may reach back over it
        follow_up = NEXT4 if first.version == 4 else NEXT6
        assert coalesce([first, second, follow_up])[0] == NO_OFFLOAD + first.data


def flow_of(packet: Packet) -> tuple[bytes, bytes, int, int, int]:
    return packet.src, packet.dst, packet.protocol, packet.src_port, packet.dst_port


def test_a_short_segment_closes_the_run() -> None:
    packets = train(6, UDP, [100, 100, 50, 50, 100])
    assert [len(w) for w in coalesce(packets)] == [10 + 48 + 250, 10 + 48 + 50, 10 + 48 + 100]


def test_a_run_is_never_resumed_behind_a_packet_of_its_connection() -> None:
    reset = packet_of(4, TCP, b"", seq=100, flags=0x04)
    assert len(coalesce([FIRST4, reset, NEXT4])) == 3


def test_not_even_when_another_connection_comes_between() -> None:
    reset = packet_of(4, TCP, b"", seq=100, flags=0x04)
    assert len(coalesce([FIRST4, reset, FIRST6, NEXT4])) == 4


def test_a_push_inside_a_train_closes_the_run() -> None:
    pushed = packet_of(4, TCP, b"b" * 100, seq=100, flags=ACK | PSH)
    after = packet_of(4, TCP, b"c" * 100, seq=200)
    assert [len(w) for w in coalesce([FIRST4, pushed, after])] == [10 + 40 + 200, 10 + 40 + 100]


def test_other_connections_do_not_interrupt_a_run() -> None:
    other = packet_of(4, UDP, b"x")
    writes = coalesce([FIRST4, other, FIRST6, NEXT4, NEXT6])
    assert [len(w) for w in writes] == [10 + 40 + 200, 10 + 28 + 1, 10 + 60 + 200]


@pytest.mark.shows("io", 37)
@pytest.mark.parametrize("version", [4, 6])
def test_65535_bytes_are_the_limit(version: int) -> None:
    sizes = [1200] * 60
    writes = coalesce(train(version, TCP, sizes))
    header = 40 if version == 4 else 60
    most = (65535 - header) // 1200
    assert [len(w) for w in writes] == [10 + header + 1200 * most, 10 + header + 1200 * (60 - most)]


def test_exactly_65535_bytes_are_allowed() -> None:
    sizes = [1235] * 53 + [40]
    assert 40 + sum(sizes) == 65535
    assert len(coalesce(train(4, TCP, sizes))) == 1
    assert len(coalesce(train(4, TCP, [*sizes[:-1], 41]))) == 2


@pytest.mark.shows("io", 37)
def test_128_datagrams_are_the_limit() -> None:
    writes = coalesce(train(6, UDP, [10] * 130))
    assert [len(w) for w in writes] == [10 + 48 + 1280, 10 + 48 + 20]
    assert len(coalesce(train(6, TCP, [10] * 130))) == 1


def test_bytes_are_accepted_and_bad_ones_refused() -> None:
    coalescer = Coalescer()
    assert coalescer.add(FIRST4.data) is None
    assert coalescer.add(b"nonsense") is DropReason.MALFORMED_PACKET
    assert coalescer.add(bytearray(NEXT4.data)) is None
    assert len(coalescer) == 1
    (write,) = coalescer.drain()
    assert split_all([write]) == [FIRST4, patched(NEXT4, (4, b"\0\1"))]


def test_the_window_is_one_batch() -> None:
    coalescer = Coalescer()
    coalescer.add(FIRST4)
    assert coalescer.drain() == [NO_OFFLOAD + FIRST4.data]
    coalescer.add(NEXT4)
    assert coalescer.drain() == [NO_OFFLOAD + NEXT4.data]
    assert coalescer.drain() == []


def test_turning_it_off_takes_effect_at_once() -> None:
    coalescer = Coalescer()
    coalescer.add(FIRST4)
    coalescer.enabled = False
    coalescer.add(NEXT4)
    assert coalescer.drain() == [NO_OFFLOAD + FIRST4.data, NO_OFFLOAD + NEXT4.data]
