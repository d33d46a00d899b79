"""Random bytes against everything that reads packets: nothing raises, nothing comes out that went not in.

The seed is fixed and printed on failure through the test id; FZ_FUZZ_ROUNDS asks for a longer run.
"""

from __future__ import annotations

import os
import random
from struct import pack

import pytest

from fz_core.fastpath import Coalescer, split_super_packet
from fz_core.packet import DropReason, Packet, build_icmp_unreachable, build_tcp, build_udp, verify_checksums

ROUNDS = int(os.environ.get("FZ_FUZZ_ROUNDS", "20000"))
SEEDS = [1, 2021]


@pytest.mark.parametrize("seed", SEEDS)
def test_parse(seed: int) -> None:
    rng = random.Random(seed)
    accepted = 0
    for _ in range(ROUNDS):
        packet = Packet.parse_untrusted(random_packet(rng))
        if isinstance(packet, DropReason):
            continue
        accepted += 1
        exercise(packet, rng)
    assert accepted > ROUNDS // 20


@pytest.mark.parametrize("seed", SEEDS)
def test_split(seed: int) -> None:
    rng = random.Random(seed)
    split = 0
    for _ in range(ROUNDS):
        data = random_super_packet(rng)
        found = split_super_packet(data)
        if isinstance(found, DropReason):
            continue
        split += len(found)
        assert all(len(packet) <= 1280 for packet in found)
        assert sum(packet.payload_length for packet in found) <= len(data)
    assert split > ROUNDS // 20


@pytest.mark.parametrize("seed", SEEDS)
def test_coalesce(seed: int) -> None:
    """Whatever is added comes out again after splitting, payload by payload, in order per flow."""
    rng = random.Random(seed)
    for _ in range(ROUNDS // 100):
        coalescer = Coalescer()
        added: dict[object, list[bytes]] = {}
        for _ in range(100):
            packet = random_flow_packet(rng)
            if coalescer.add(packet) is None:
                added.setdefault(flow(packet), []).append(packet.payload)
        out: dict[object, list[bytes]] = {}
        for write in coalescer.drain():
            assert len(write) <= 10 + 65535
            segments = split_super_packet(write)
            assert isinstance(segments, list)
            for packet in segments:
                out.setdefault(flow(packet), []).append(packet.payload)
        assert out == added


def exercise(packet: Packet, rng: random.Random) -> None:
    packet.update_checksums()
    for _ in range(3):
        packet.set_src(rng.randbytes(len(packet.src)))
        packet.set_dst_port(rng.randrange(65536))
        packet.merge_ecn(rng.randrange(4))
    assert verify_checksums(packet) == ()
    packet.icmp_error()
    assert repr(packet)
    assert verify_checksums(build_icmp_unreachable(packet)) == ()


def random_packet(rng: random.Random) -> bytes:
    """Mostly plausible: right version and lengths, everything else random or lightly damaged."""
    raw = bytearray(rng.randbytes(rng.choice((0, 19, 28, 40, 48, 60, 100, 300, 1280, 1290))))
    if len(raw) < 20:
        return bytes(raw)
    if rng.random() < 0.5:
        raw[0] = 0x40 | rng.choice((5, 5, 5, 6, 15, 4))
        raw[2:4] = pack("!H", len(raw))
        raw[6:8] = rng.choice((b"\0\0", b"\x40\0", b"\x20\0"))
        raw[9] = rng.choice((1, 6, 17, 47, 58))
    elif len(raw) >= 48:
        raw[0] = 0x60
        raw[4:6] = pack("!H", len(raw) - 40)
        raw[6] = rng.choice((0, 6, 17, 43, 44, 58, 60, 255))
        raw[40] = rng.choice((0, 6, 17, 44, 58, 60))
        raw[41] = rng.choice((0, 0, 1, 255))
    return bytes(raw)


def random_super_packet(rng: random.Random) -> bytes:
    header = pack(
        "=BBHHHH",
        rng.choice((0, 1, 1, 255)),
        rng.choice((0, 1, 4, 5, 5, 0x81)),
        rng.randrange(100),
        rng.choice((0, 1, 7, 100, 1200, 1300, 65535)),
        rng.choice((0, 20, 40, 1000, 65535)),
        rng.choice((0, 6, 16, 1000, 65535)),
    )
    body = bytearray(rng.randbytes(rng.choice((0, 20, 28, 60, 61, 500, 1280, 3000))))
    if len(body) >= 20:
        body[0] = rng.choice((0x45, 0x45, 0x60, 0x60, 0x4F, rng.randrange(256)))
        body[2:4] = pack("!H", len(body))
        body[6] = rng.choice((6, 17)) if body[0] == 0x60 else 0
        body[7] = 0
        body[9] = rng.choice((6, 17, 17, 1))
    if len(body) >= 53 and rng.random() < 0.8:
        body[32] = body[52] = rng.choice((0x50, 0x50, 0x80, 0xF0))
        body[24:26] = pack("!H", len(body) - 20)
    return header + bytes(body)


def random_flow_packet(rng: random.Random) -> Packet:
    """One of few flows with few values per field, so that runs and every way to break them occur."""
    size = rng.choice((4, 16))
    src, dst = bytes(size - 1) + b"\1", bytes(size - 1) + bytes([rng.choice((2, 3))])
    payload = rng.randbytes(rng.choice((0, 10, 10, 10, 20)))
    if rng.random() < 0.5:
        return build_udp(src, dst, 1, 2, payload)
    flags = rng.choice((0x10, 0x10, 0x10, 0x18, 0x11))
    return build_tcp(src, dst, 1, 2, flags, rng.choice((0, 10, 20, 30)), 7, payload)


def flow(packet: Packet) -> object:
    return packet.src, packet.dst, packet.protocol, packet.src_port, packet.dst_port
