"""TCP made to fit: MSS options of every shape, cut segments, shortened errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fz_core.packet import (
    DropReason,
    Packet,
    build_icmp,
    build_ip,
    build_tcp,
    build_udp,
    clamp_mss,
    shorten_error,
    split_tcp,
    verify_checksums,
)

V4 = (bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]))
V6 = (bytes(15) + b"\1", bytes(15) + b"\2")
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = 1, 2, 4, 8, 16, 32, 64, 128
families = pytest.mark.parametrize(("ends", "headers"), [(V4, 40), (V6, 60)], ids=["v4", "v6"])


def syn(ends: tuple[bytes, bytes], options: bytes, flags: int = SYN) -> Packet:
    padded = options + bytes(-len(options) % 4)
    return build_tcp(*ends, 1000, 2000, flags, 7, 9, options=padded)


def options_of(packet: Packet) -> bytes:
    return packet.data[packet.l4_offset + 20 : len(packet) - packet.payload_length]


@families
@pytest.mark.parametrize("flags", [SYN, SYN | ACK, SYN | ECE | CWR])
def test_the_mss_of_a_syn_is_lowered_to_what_fits(ends: tuple[bytes, bytes], headers: int, flags: int) -> None:
    packet = syn(ends, b"\2\4\x05\xb4\1\3\3\7", flags)
    assert clamp_mss(packet, 1064)
    assert options_of(packet) == b"\2\4" + (1064 - headers).to_bytes(2, "big") + b"\1\3\3\7"
    assert verify_checksums(packet) == ()
    assert not clamp_mss(packet, 1064)


@families
def test_an_mss_that_fits_is_left_alone(ends: tuple[bytes, bytes], headers: int) -> None:
    packet = syn(ends, b"\2\4\x02\x18")
    before = packet.data
    assert not clamp_mss(packet, 1064)
    assert packet.data == before


@pytest.mark.parametrize(
    "ahead", [b"", b"\1", b"\1\1", b"\3\3\7", b"\4\2", b"\x08\x0a" + bytes(range(8)), b"\x1e\5abc"]
)
@families
def test_the_option_is_found_behind_others_at_odd_offsets_too(
    ends: tuple[bytes, bytes], headers: int, ahead: bytes
) -> None:
    packet = syn(ends, ahead + b"\2\4\x05\xb4")
    assert clamp_mss(packet, 600)
    assert options_of(packet).startswith(ahead + b"\2\4" + (600 - headers).to_bytes(2, "big"))
    assert verify_checksums(packet) == ()


@pytest.mark.parametrize(
    "options",
    [
        b"",  # none
        b"\1\1\1\1",
        b"\0\2\4\x05\xb4",  # behind the end
        b"\2",  # cut short
        b"\1\1\1\2",
        b"\2\0\x05\xb4",  # impossible lengths
        b"\2\3\x05\xb4",
        b"\2\6\x05\xb4\0\0\0\0",
        b"\x08\x0a\0\0",
        b"\3\0\1\1\2\4\x05\xb4",
        b"\3\1\1\1\2\4\x05\xb4",
        b"\1\1\2\4",
    ],
)
def test_options_that_cannot_be_trusted_are_left_alone(options: bytes) -> None:
    packet = syn(V4, options)
    before = packet.data
    assert not clamp_mss(packet, 576)
    assert packet.data == before


@given(st.binary(max_size=40), st.integers(-10, 2000), st.integers(0, 255))
def test_any_options_are_safe(options: bytes, limit: int, flags: int) -> None:
    packet = syn(V4, options[: len(options) // 4 * 4], flags)
    before = packet.data
    changed = clamp_mss(packet, limit)
    assert changed == (packet.data != before)
    assert verify_checksums(packet) == ()
    assert changed <= bool(flags & SYN)


def test_only_tcp_syns_have_an_mss() -> None:
    option = b"\2\4\x05\xb4"
    for packet in (syn(V4, option, ACK), build_udp(*V4, 1, 2, bytes(20) + option), build_ip(*V4, 47, option)):
        assert not clamp_mss(packet, 600)


@families
@given(
    size=st.integers(1, 1200), limit=st.integers(200, 1280), flags=st.sampled_from([ACK, ACK | PSH, ACK | PSH | FIN])
)
def test_the_pieces_are_the_segment(ends: tuple[bytes, bytes], headers: int, size: int, limit: int, flags: int) -> None:
    payload = bytes(i * 7 & 0xFF for i in range(size))
    packet = build_tcp(*ends, 1000, 2000, flags, 0xFFFFFF00, 9, payload, options=b"\1\1\x08\x0a12345678")
    pieces = split_tcp(packet, limit)
    assert pieces is not None
    at = 0
    for number, piece in enumerate(pieces):
        assert len(piece) <= limit
        assert verify_checksums(piece) == ()
        assert (piece.src, piece.dst, piece.src_port, piece.dst_port) == (*ends, 1000, 2000)
        l4 = piece.data[piece.l4_offset :]
        assert int.from_bytes(l4[4:8], "big") == (0xFFFFFF00 + at) & 0xFFFFFFFF
        assert options_of(piece) == options_of(packet)
        is_last = number == len(pieces) - 1
        assert piece.tcp_flags == (flags if is_last else ACK)
        assert is_last or len(piece) == limit
        at += piece.payload_length
    assert b"".join(piece.payload for piece in pieces) == payload


def test_congestion_window_reduced_is_said_once_and_identifications_differ() -> None:
    pieces = split_tcp(build_tcp(*V4, 1, 2, ACK | CWR, payload=bytes(1000)), 540)
    assert pieces is not None
    assert [p.tcp_flags for p in pieces] == [ACK | CWR, ACK]
    assert [p.data[4:6] for p in pieces] == [b"\0\0", b"\0\1"]


def test_what_cannot_be_cut() -> None:
    payload = bytes(1000)
    damaged = bytearray(build_tcp(*V4, 1, 2, ACK, payload=payload).data)
    damaged[-1] ^= 1
    broken = Packet.parse_untrusted(bytes(damaged))
    assert not isinstance(broken, DropReason)
    refused = [
        build_udp(*V4, 1, 2, payload),
        build_tcp(*V4, 1, 2, SYN, payload=payload),
        build_tcp(*V4, 1, 2, RST, payload=payload),
        build_tcp(*V4, 1, 2, ACK | URG, payload=payload),
        build_tcp(*V4, 1, 2, ACK),
        broken,
    ]
    for packet in refused:
        assert split_tcp(packet, 600) is None
    assert split_tcp(build_tcp(*V4, 1, 2, ACK, payload=payload), 47) is None


@pytest.mark.parametrize(("ends", "icmp_type"), [(V4, 3), (V6, 1)], ids=["v4", "v6"])
def test_an_error_quotes_less(ends: tuple[bytes, bytes], icmp_type: int) -> None:
    quoted = build_udp(*ends, 5, 6, bytes(1100)).data
    error = build_icmp(*ends, icmp_type, 1, bytes(4) + quoted)
    shortened = shorten_error(error, 1063)
    assert shortened is not None
    assert len(shortened) == 1060
    assert verify_checksums(shortened) == ()
    inside = shortened.icmp_error()
    assert inside is not None
    assert not isinstance(inside, DropReason)
    assert (inside.src_port, inside.dst_port) == (5, 6)
    assert shorten_error(error, 60) is None
    assert shorten_error(quoted_packet(quoted), 600) is None


def quoted_packet(data: bytes) -> Packet:
    packet = Packet.parse_untrusted(data)
    assert not isinstance(packet, DropReason)
    return packet
