"""Super packets become the packets that would have been sent without offload (spec/io.md 6.2, 6.3)."""

from __future__ import annotations

from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from offload_reference import (
    ACK,
    ADDRESSES,
    KINDS,
    NO_OFFLOAD,
    PSH,
    TCP,
    UDP,
    folded_sum,
    packet_of,
    super_packet,
    train,
    vnet,
)

from fz_core.fastpath import split_super_packet
from fz_core.packet import DropCounter, DropReason, Packet, build_tcp, build_udp, verify_checksums

FIN, CWR, ECE = 0x01, 0x80, 0x40


def split(data: bytes) -> list[Packet]:
    found = split_super_packet(data)
    assert not isinstance(found, DropReason), found
    return found


@pytest.mark.shows("io", 32)
@pytest.mark.parametrize(("version", "protocol"), KINDS)
@pytest.mark.parametrize("sizes", [[1200] * 50 + [7], [100, 100], [3, 3, 1], [999], [1] * 256])
def test_segments_equal_what_was_sent_without_offload(version: int, protocol: int, sizes: list[int]) -> None:
    sent = train(version, protocol, sizes, seq=2**32 - 150, ident=65530, last_flags=ACK | PSH | FIN)
    assert split(super_packet(sent)) == sent


@pytest.mark.parametrize("version", [4, 6])
def test_tcp_options_are_on_every_segment_and_cwr_stays(version: int) -> None:
    options = bytes.fromhex("0101080a0102030405060708")
    sent = train(version, TCP, [500, 500, 20], options=options, last_flags=ACK | PSH)
    segments = split(super_packet(sent, extra_flags=CWR))
    assert [s.tcp_flags for s in segments] == [ACK | CWR, ACK | CWR, ACK | PSH | CWR]
    assert [s.payload for s in segments] == [p.payload for p in sent]
    assert all(s.data[s.l4_offset + 20 : s.l4_offset + 32] == options for s in segments)
    assert all(verify_checksums(s) == () for s in segments)


def test_ipv4_options_are_on_every_segment() -> None:
    plain = super_packet(train(4, UDP, [600, 600]))
    ip = bytearray(plain[10:30] + b"\1\1\1\0" + plain[30:])
    ip[0] = 0x46
    segments = split(plain[:10] + bytes(ip))
    assert [(s.l4_offset, s.payload_length) for s in segments] == [(24, 600), (24, 600)]
    assert all(verify_checksums(s) == () for s in segments)


def test_a_udp_checksum_of_zero_becomes_all_ones() -> None:
    """The payload of the second datagram is chosen so that its checksum sums to zero."""
    src, dst = ADDRESSES[4]
    probe = build_udp(src, dst, 40000, 443, b"\0\0")
    first = packet_of(4, UDP, b"ab")
    zero = packet_of(4, UDP, probe.data[26:28], ident=1)
    assert zero.data[26:28] == b"\xff\xff"
    assert split(super_packet([first, zero])) == [first, zero]


@pytest.mark.shows("io", 34)
@pytest.mark.parametrize(("version", "protocol"), KINDS)
@pytest.mark.parametrize("size", [1, 2, 3, 1001, 1200])
def test_partial_checksums_are_completed(version: int, protocol: int, size: int) -> None:
    sent = packet_of(version, protocol, bytes(range(256)) * 5 if size > 1279 else (b"\xa7" * size))
    at = sent.l4_offset
    offset = 16 if protocol == TCP else 6
    pseudo = sent.src + sent.dst + pack("!II", len(sent) - at, protocol)
    raw = bytearray(sent.data)
    raw[at + offset : at + offset + 2] = pack("!H", folded_sum(pseudo))
    assert split(vnet(1, 0, 0, 0, at, offset) + raw) == [sent]


@pytest.mark.shows("io", 34)
def test_a_completed_udp_checksum_of_zero_becomes_all_ones() -> None:
    src, dst = ADDRESSES[4]
    probe = build_udp(src, dst, 40000, 443, b"\0\0")
    zero = packet_of(4, UDP, probe.data[26:28])
    raw = bytearray(zero.data)
    raw[26:28] = pack("!H", folded_sum(zero.src + zero.dst + pack("!HH", 17, 10)))
    assert split(vnet(1, 0, 0, 0, 20, 6) + raw) == [zero]


def test_a_plain_packet_is_taken_as_it_is() -> None:
    raw = bytearray(packet_of(6, TCP, b"abc").data)
    raw[56:58] = b"\1\2"
    assert [p.data for p in split(NO_OFFLOAD + raw)] == [bytes(raw)]


GOOD = super_packet(train(4, TCP, [100] * 3))


@pytest.mark.shows("io", 39)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        GOOD[:9],
        GOOD[:10],
        GOOD[:29],
        GOOD[:49],
        GOOD[:50],
        vnet(1, 1, 0, 0, 20, 16) + GOOD[10:],
        vnet(1, 4, 0, 100, 20, 16) + GOOD[10:],
        vnet(1, 5, 0, 100, 20, 16) + GOOD[10:],
        vnet(1, 3, 0, 100, 20, 16) + GOOD[10:],
        vnet(1, 0x81, 0, 100, 20, 16) + GOOD[10:],
        vnet(1, 1, 0, 100, 20, 16) + b"\x44" + GOOD[11:],
        vnet(1, 1, 0, 100, 20, 16) + b"\x75" + GOOD[11:],
        vnet(1, 1, 0, 100, 20, 16) + GOOD[10:42] + b"\x40" + GOOD[43:],
        vnet(1, 1, 0, 1, 20, 16) + GOOD[10:],
        vnet(1, 0, 0, 0, 65535, 65535) + GOOD[10:],
        vnet(1, 0, 0, 0, len(GOOD) - 10 - 17, 16) + GOOD[10:],
    ],
)
def test_malformed_offload_drops_the_read(data: bytes) -> None:
    assert split_super_packet(data) is DropReason.MALFORMED_OFFLOAD


@pytest.mark.shows("io", 39)
def test_257_segments_are_too_many() -> None:
    assert len(split(super_packet(train(6, UDP, [2] * 256)))) == 256
    too_many = super_packet(train(6, UDP, [2] * 256 + [1]))
    assert split_super_packet(too_many) is DropReason.MALFORMED_OFFLOAD


@pytest.mark.shows("io", 40)
def test_large_packets_and_fragments_are_dropped() -> None:
    assert split_super_packet(NO_OFFLOAD + bytes([0x45]) + bytes(1280)) is DropReason.TOO_BIG
    fragment = bytearray(packet_of(4, UDP, b"abc").data)
    fragment[6] = 0x20
    assert split_super_packet(NO_OFFLOAD + fragment) is DropReason.FRAGMENTED
    assert split_super_packet(NO_OFFLOAD + b"\x45") is DropReason.MALFORMED_PACKET


def rescaled(gso_size: int) -> bytes:
    """A UDP super packet whose segments have `gso_size` bytes, the last one 10."""
    whole = super_packet(train(4, UDP, [1200] * 3))
    return vnet(1, 5, 0, gso_size, 20, 6) + whole[10 : 10 + 28 + 2 * gso_size + 10]


def test_a_segment_above_the_mtu_does_not_drop_the_others() -> None:
    drops = DropCounter()
    found = split_super_packet(rescaled(1253), drops)
    assert isinstance(found, list)
    assert [p.payload_length for p in found] == [10]
    assert drops == {DropReason.TOO_BIG: 2}
    assert len(split(rescaled(1252))) == 3


def test_a_segment_above_the_packet_buffer_drops_the_read() -> None:
    drops = DropCounter()
    assert isinstance(split_super_packet(rescaled(1316 - 28), drops), list)
    assert split_super_packet(rescaled(1317 - 28), drops) is DropReason.TOO_BIG


def test_fragmented_segments_are_counted_one_by_one() -> None:
    whole = bytearray(super_packet(train(4, UDP, [100] * 3)))
    whole[10 + 6] = 0x20
    drops = DropCounter()
    assert split_super_packet(whole, drops) == []
    assert drops == {DropReason.FRAGMENTED: 3}


@given(st.sampled_from(KINDS), st.integers(1, 1200), st.integers(1, 30), st.data())
def test_any_in_order_train_survives(kind: tuple[int, int], size: int, count: int, data: st.DataObject) -> None:
    count = min(count, (65535 - 60) // size)
    sizes = [size] * count + [data.draw(st.integers(1, size))]
    version, protocol = kind
    sent = train(version, protocol, sizes, seq=data.draw(st.integers(0, 2**32 - 1)), ident=60000)
    segments = split(super_packet(sent))
    assert segments == sent
    assert all(verify_checksums(s) == () for s in segments)


def test_the_reader_accepts_any_contiguous_buffer() -> None:
    sent = build_tcp(ADDRESSES[6][0], ADDRESSES[6][1], 1, 2, ACK, payload=b"x")
    data = NO_OFFLOAD + sent.data
    assert split_super_packet(bytearray(data)) == [sent]
    assert split_super_packet(memoryview(data)) == [sent]
