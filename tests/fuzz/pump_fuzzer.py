"""Mutated device reads and datagrams for the pump. Run by `test_pump_fuzz.py`, with modules that find their own errors.

    python -m tests.fuzz.pump_fuzzer SEED SECONDS

Nothing is judged here but that the process lives and that the pump still carries what is whole.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from random import Random

from fz_core.packet import Packet, build_echo
from fz_core.tunnel.verdict import FlowKey
from tests.unit.fastpath.offload_reference import ACK, ADDRESSES, PSH, TCP, UDP, packet_of, super_packet, train
from tests.unit.fastpath.pump_rig import RELAY_PORT, Far, Rig, partial

KINDS = [(4, TCP), (6, TCP), (4, UDP), (6, UDP)]
EDGES = (*range(0, 44, 4), 1, 15, 19, 21, 39, 41, 255, 256, 1279, 1280, 1281, 1316, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)
ELSEWHERE = {4: (bytes([203, 0, 113, 9]), bytes([198, 51, 100, 7])), 6: (bytes(15) + b"\7", bytes(15) + b"\x09")}
SIZES = ([1200] * 40 + [7], [3, 3, 1], [1] * 200, [1208, 1208], [1])
TURNS_PER_LOOK = 64


class Fuzzer:
    """One pump and everything that may arrive at it."""

    def __init__(self, seed: int) -> None:
        self.chance = Random(seed)
        self.rig = Rig()
        # The port of relays is taken where another test has it: then without channels.
        self.ways: list[tuple[Far, int]] = [(Far(4), 0), (Far(6), 0)]
        host = f"127.{self.chance.randrange(100, 250)}.{self.chance.randrange(250)}.{self.chance.randrange(1, 250)}"
        self.ways += [(Far(4, host, RELAY_PORT), 0x4ABC)] * 2
        self.reads = device_reads()
        self.packets = [packet for packet in plaintexts()]
        self.done = {"device": 0, "network": 0, "carried_out": 0, "carried_in": 0}
        self.move()

    def run(self, until: Callable[[], bool]) -> dict[str, int]:
        turn = 0
        while not until():
            turn += 1
            if self.chance.random() < 0.5:
                self.from_device()
            else:
                self.from_network()
            if turn % TURNS_PER_LOOK == 0:
                self.look()
        self.check()
        counters = self.rig.pump.counters()
        self.done["carried_out"], self.done["carried_in"] = counters["out_packets"], counters["in_packets"]
        return self.done

    # what arrives

    def from_device(self) -> None:
        read = self.mutated(self.chance.choice(self.reads), 10 + 80)
        if read:
            self.done["device"] += 1
            self.rig.device.send(read)
            self.rig.pump.step(self.rig.now)

    def from_network(self) -> None:
        """Damaged before it is sealed, or after, or only in how it is wrapped."""
        chance, far, channel = self.chance, *self.way
        plaintexts = [chance.choice(self.packets)] * chance.choice([1, 1, 3, 20])
        if chance.random() < 0.7:
            plaintexts = [self.mutated(plain, 80)[:1300] for plain in plaintexts]
        datagrams = [self.rig.seal(plain) for plain in plaintexts]
        if channel:
            datagrams = [self.wrapped(channel, datagram) for datagram in datagrams]
        if chance.random() < 0.3:
            datagrams = [self.mutated(datagram, 24) for datagram in datagrams]
        longest = len(datagrams[0])
        datagrams = [datagram[:longest].ljust(longest, b"\0") for datagram in datagrams[:-1]] + [
            datagrams[-1][:longest]
        ]
        if longest:
            self.done["network"] += len(datagrams)
            self.rig.arrive_raw(*datagrams, ecn=chance.randrange(4), far=far)

    def wrapped(self, channel: int, datagram: bytes) -> bytes:
        length = len(datagram) if self.chance.random() < 0.6 else self.edge(len(datagram))
        return channel.to_bytes(2, "big") + length.to_bytes(2, "big") + datagram

    def mutated(self, data: bytes, header: int) -> bytes:
        """Mostly in the header: bits, bytes, lengths that nearly fit, an end that is missing or too much."""
        chance, out = self.chance, bytearray(data)
        for _ in range(chance.choice([0, 1, 1, 1, 2, 4])):
            at = chance.randrange(min(header, len(out))) if out else 0
            match chance.randrange(6):
                case 0 if out:
                    out[at] ^= 1 << chance.randrange(8)
                case 1 if out:
                    out[at] = chance.randrange(256)
                case 2:
                    out[at : at + 2] = self.edge(len(out)).to_bytes(2, chance.choice(["big", "little"]))
                case 3:
                    del out[chance.randrange(len(out) + 1) :]
                case 4:
                    del out[max(0, at) + chance.choice([0, 1, 8, 20, 40]) :]
                case 5:
                    out += chance.randbytes(chance.choice([1, 4, 20, 200]))
        return bytes(out[:65_545])

    def edge(self, size: int) -> int:
        near = (size + self.chance.randrange(-60, 61)) & 0xFFFF
        return near if self.chance.random() < 0.6 else self.chance.choice(EDGES)

    # what the driver does

    def look(self) -> None:
        """Drain, and decide anew."""
        for one in (self.rig.records(), self.rig.writes(), *(far.take() for far, _ in self.ways)):
            assert isinstance(one, list)
        pump = self.rig.pump
        pump.finish()
        pump.take_flows()
        pump.take_peers()
        pump.take_refusals()
        if self.chance.random() < 0.1:
            pump.sweep(1000)
        if self.chance.random() < 0.3:
            self.move()

    def move(self) -> None:
        """Another way, and verdicts for every whole packet, some of which change it."""
        rig, chance = self.rig, self.chance
        self.way = chance.choice(self.ways)
        rig.set_peer(self.way[0], channel=self.way[1], limit=chance.choice([1280, 1280, 1280, 600]))
        rig.pump.step(rig.now)
        for key in {FlowKey.of(packet) for packet in whole()}:
            for inbound in (False, True):
                rig.pump.install(inbound, rig.slot, key, self.after(key), 1e6, 1e9)

    def after(self, key: FlowKey) -> FlowKey:
        if self.chance.random() < 0.4:
            return key
        version = self.chance.choice([4, 6])
        protocol = key.protocol if key.protocol in (TCP, UDP) else {4: 1, 6: 58}[version]
        ports = (9, 9) if protocol not in (TCP, UDP) else (1, 65_535)
        return FlowKey(version, protocol, *ELSEWHERE[version], *ports)

    def check(self) -> None:
        """It still works."""
        self.look()
        packet = packet_of(4, UDP, b"still here", ports=(5, 5))
        self.rig.set_peer(self.ways[0][0])
        for inbound in (False, True):
            self.rig.install(packet, inbound=inbound)
        self.rig.handle_slowly()
        self.rig.write(packet)
        assert self.rig.sent()[-1] == packet.data
        self.rig.arrive(packet)
        assert packet.data in self.rig.delivered()


def whole() -> list[Packet]:
    """One packet of each kind."""
    found = [packet_of(version, protocol, b"payload") for version, protocol in KINDS]
    return found + [build_echo(*ADDRESSES[version], 77, payload=b"ping") for version in (4, 6)]


def device_reads() -> list[bytes]:
    reads = [bytes(10) + packet.data for packet in whole()]
    reads += [partial(packet) for packet in whole()[:4]]
    for version, protocol in KINDS:
        options = b"\1" * 12 if protocol == TCP else b""
        reads += [super_packet(train(version, protocol, sizes, options=options)) for sizes in SIZES]
    return reads


def plaintexts() -> list[bytes]:
    trains = [train(version, protocol, [1000, 1000], last_flags=ACK | PSH) for version, protocol in KINDS]
    return [packet.data for packet in whole()] + [packet.data for one in trains for packet in one]


def main() -> None:
    seed, seconds = int(sys.argv[1]), float(sys.argv[2])
    end = time.monotonic() + seconds
    print(json.dumps(Fuzzer(seed).run(lambda: time.monotonic() >= end)))


if __name__ == "__main__":
    main()
