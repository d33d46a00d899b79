"""Cost of parsing, splitting, merging and batching, beside a bare copy of the same bytes.

Run `python tests/bench/bench_packet.py`; prints one JSON object, nanoseconds per operation. Each figure is
the best of several runs, so that a busy machine disturbs it little.
"""

from __future__ import annotations

import ctypes
import json
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from struct import pack

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fz_core.fastpath import Coalescer, GsoQueue, split_super_packet
from fz_core.packet import Address, Packet, build_tcp

SRC, DST = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
PAYLOAD = 1240


def main() -> None:
    full = build_tcp(SRC, DST, 1, 2, 0x10, payload=bytes(PAYLOAD))
    train = [build_tcp(SRC, DST, 1, 2, 0x10, i * PAYLOAD, payload=bytes(PAYLOAD)) for i in range(50)]
    whole = super_packet(52)
    remote = Address(DST, 52625)
    datagram = bytes(1316)
    raw = full.data
    results = {
        "parse_1280": measure(lambda: Packet.parse_untrusted(raw), raw),
        "split_64k_52_segments": measure(lambda: split_super_packet(whole), whole),
        "coalesce_50": measure(lambda: coalesce(train), bytes(50 * 1280)),
        "gso_append_and_drain_49": measure(lambda: append(remote, datagram), bytes(49 * 1316)),
    }
    print(json.dumps({"unit": "ns", "results": results}, indent=2))


QUEUE = GsoQueue()


def append(remote: Address, datagram: bytes) -> None:
    for _ in range(49):
        QUEUE.append(datagram, remote)
    for _ in QUEUE.drain():
        pass


def coalesce(packets: list[Packet]) -> list[bytes]:
    coalescer = Coalescer()
    for packet in packets:
        coalescer.add(packet)
    return coalescer.drain()


def super_packet(segments: int) -> bytes:
    data = bytearray(build_tcp(SRC, DST, 1, 2, 0x10).data + bytes(PAYLOAD * segments))
    data[2:4] = pack("!H", len(data))
    return pack("=BBHHHH", 1, 1, 40, PAYLOAD, 20, 16) + data


def measure(operation: Callable[[], object], data: bytes) -> dict[str, float]:
    """Nanoseconds of the operation as called from Python, and of a memcpy of `data` net of its call."""
    target = ctypes.create_string_buffer(len(data))
    copy = best(lambda: ctypes.memmove(target, data, len(data)))
    call = best(lambda: ctypes.memmove(target, data, 0))
    return {"ns": best(operation), "memcpy_ns": round(max(0.0, copy - call), 1), "bytes": len(data)}


def best(operation: Callable[[], object]) -> float:
    timer = timeit.Timer(operation)
    number = max(1, timer.autorange()[0] // 4)  # autorange takes 0.2 s or more; a quarter is enough
    return round(min(timer.repeat(repeat=3, number=number)) / number * 1e9, 1)


if __name__ == "__main__":
    main()
