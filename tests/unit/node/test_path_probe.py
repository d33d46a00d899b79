"""Bytes of probes (spec/connectivity.md §7.3)."""

from __future__ import annotations

from random import Random

import pytest

from fz_core.node.path_probe import Probe, build_probe, is_probe, parse_probe
from fz_core.packet import Packet, build_udp

SOURCE, DESTINATION = "01000000000000000000dead01ce0001", "01000000000000000000dead01ce0002"
REQUEST = bytes.fromhex(f"6000000000083a40{SOURCE}{DESTINATION}8000541612345678")
REPLY = bytes.fromhex(f"6000000000083a40{SOURCE}{DESTINATION}8100531612345678")


@pytest.mark.shows("connectivity", 37)
def test_the_bytes_of_the_sheet() -> None:
    assert build_probe(True, 0x1234, 0x5678) == REQUEST
    assert build_probe(False, 0x1234, 0x5678) == REPLY
    assert parse_probe(REQUEST) == Probe(True, 0x1234, 0x5678)
    assert parse_probe(REPLY) == Probe(False, 0x1234, 0x5678)


@pytest.mark.shows("connectivity", 37)
def test_id_and_seq_survive_over_the_full_range() -> None:
    random = Random(1)
    edges = (0, 1, 0x7FFF, 0x8000, 0xFFFF)
    numbers = [(a, b) for a in edges for b in edges]
    numbers += [(random.randrange(0x10000), random.randrange(0x10000)) for _ in range(2000)]
    for id, seq in numbers:
        for is_request in (True, False):
            packet = build_probe(is_request, id, seq)
            assert parse_probe(packet) == Probe(is_request, id, seq)
            assert checksum(packet) == 0


def test_it_is_a_packet_like_any_other() -> None:
    packet = Packet.parse_untrusted(REQUEST)
    assert isinstance(packet, Packet)
    assert packet.icmp_type == 128


def test_payload_and_hop_limit_do_not_matter() -> None:
    longer = bytearray(REQUEST + b"payload")
    longer[5], longer[7] = 15, 1
    assert parse_probe(bytes(longer)) == Probe(True, 0x1234, 0x5678)


@pytest.mark.shows("connectivity", 37)
@pytest.mark.parametrize(
    ("at", "value"),
    [(0, 0x45), (6, 17), (23, 2), (39, 1), (8, 0), (24, 0), (40, 1), (40, 130)],
    ids=["version", "protocol", "source", "destination", "source prefix", "destination prefix", "unreachable", "query"],
)
def test_anything_else_is_none(at: int, value: int) -> None:
    other = bytearray(REQUEST)
    other[at] = value
    assert not is_probe(bytes(other))
    assert parse_probe(bytes(other)) is None


@pytest.mark.parametrize("length", [*range(48)])
def test_a_cut_one_is_none(length: int) -> None:
    assert not is_probe(REQUEST[:length])


def test_an_ordinary_packet_is_none() -> None:
    assert not is_probe(build_udp(bytes(16), bytes(15) + b"\x01", 1, 2, b"x").data)


def checksum(packet: bytes) -> int:
    covered = packet[8:40] + bytes((0, 0, 0, 8, 0, 0, 0, 58)) + packet[40:]
    total = sum(int.from_bytes(covered[at : at + 2], "big") for at in range(0, len(covered), 2))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF
