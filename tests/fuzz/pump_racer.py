"""A pump with a thread for each half, and a driver that changes everything meanwhile. Run by `test_pump_races.py`.

    python -m tests.fuzz.pump_racer SEED SECONDS

Nothing is judged here but that the process lives, and that the pump still carries at the end.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import sys
import threading
import time
from random import Random

from fz_core.driver import clock
from fz_core.linux import UdpSocket
from fz_core.packet import Packet
from fz_core.tunnel.verdict import FlowKey
from tests.unit.fastpath.offload_reference import TCP, UDP, packet_of, super_packet, train
from tests.unit.fastpath.pump_rig import FAMILIES, Far, Rig

INDEX = 0xAAAAAA  # of the rig's own peer
OTHERS = (0xAAAAAB, 0xAAAAAC)  # they share its tunnel, for what changes with them
PORTS = range(1, 9)
PATIENCE = 20.0


class Racer:
    """The main thread is the driver, the peer, and the host's programs in one; only the pump's threads are others."""

    def __init__(self, seed: int) -> None:
        self.chance = Random(seed)
        self.rig = Rig(start=clock.now(), threads=2)
        self.fars = (Far(4), Far(6))
        self.flows = [packet_of(v, UDP, b"x" * 200, ports=(port, 7)) for v in (4, 6) for port in PORTS]
        self.trains = [train(v, TCP, [1000] * 20) for v in (4, 6)]
        self.others: list[int] = []
        self.narrow: tuple[socket.socket, socket.socket] | None = None
        self.done = {"turns": 0, "rekeys": 0, "sockets": 0, "noted": 0, "records": 0}
        self.threads = [threading.Thread(target=self.rig.pump.run, args=(half,), daemon=True) for half in (0, 1)]
        self.deeds = (
            self.install, self.remove, self.void, self.set_peer, self.replace_peer, self.other_peers,
            self.handle_slowly, self.note, self.sweep, self.use_tunnel, self.rekey, self.other_sockets,
            self.narrow_socket, self.look,
        )  # fmt: skip
        self.decide()

    def run(self, seconds: float) -> dict[str, int]:
        end = time.monotonic() + seconds
        for thread in self.threads:
            thread.start()
        while time.monotonic() < end:
            self.done["turns"] += 1
            self.rig.now = max(self.rig.now, clock.now())
            self.load()
            self.chance.choice(self.deeds)()
            if self.chance.random() < 0.3:
                self.decide()
        self.check()
        self.rig.device.close()
        while not self.rig.pump.has_failed:  # the sending half ends by itself then
            assert time.monotonic() < end + 2 * PATIENCE, "nobody saw that the device is gone"
            self.rig.pump.notice()
        self.rig.pump.stop()
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a half of the pump did not end"
        counters = self.rig.pump.counters()
        return self.done | {"carried_out": counters["out_packets"], "carried_in": counters["in_packets"]}

    # traffic

    def load(self) -> None:
        """Something for both halves, and what came of it taken away."""
        rig, chance = self.rig, self.chance
        with contextlib.suppress(BlockingIOError):
            for _ in range(3):
                rig.device.send(bytes(10) + chance.choice(self.flows).data)
            rig.device.send(super_packet(chance.choice(self.trains)))
        with contextlib.suppress(BlockingIOError):
            rig.far.send([rig.seal(chance.choice(self.flows)) for _ in range(5)], rig.udp[rig.far.version].port)
            rig.far.send(list(map(rig.seal, chance.choice(self.trains))), rig.udp[rig.far.version].port)
        rig.writes()
        for far in (rig.far, *self.fars):
            far.take()
        if self.narrow is not None and chance.random() < 0.5:
            with contextlib.suppress(BlockingIOError):
                while True:
                    self.narrow[0].recv(70_000)

    # what the driver does

    def decide(self) -> None:
        for packet in (*self.flows, self.trains[0][0], self.trains[1][0]):
            self.install(packet)

    def install(self, packet: Packet | None = None) -> None:
        key = FlowKey.of(packet or self.chance.choice(self.flows))
        after = key._replace(src_port=key.src_port + 100) if self.chance.random() < 0.5 else key
        for inbound in (False, True):
            self.rig.pump.install(inbound, self.rig.slot, key, after, 10.0, 1e9)

    def remove(self) -> None:
        key = FlowKey.of(self.chance.choice(self.flows))
        self.rig.pump.remove(self.chance.random() < 0.5, self.rig.slot, key)

    def void(self) -> None:
        if self.chance.random() < 0.5:
            self.rig.pump.void_all()
        else:
            self.rig.pump.void_peer(self.rig.slot)

    def set_peer(self) -> None:
        self.rig.set_peer(self.chance.choice(self.fars), limit=self.chance.choice([1280, 1280, 900]))

    def replace_peer(self) -> None:
        self.rig.pump.remove_peer(self.rig.slot)
        slot = self.rig.pump.add_peer(INDEX)
        assert slot is not None
        self.rig.slot = slot
        self.set_peer()

    def other_peers(self) -> None:
        if len(self.others) == len(OTHERS):
            self.rig.pump.remove_peer(self.others.pop())
        else:
            slot = self.rig.pump.add_peer(OTHERS[len(self.others)])
            assert slot is not None
            self.others.append(slot)

    def handle_slowly(self) -> None:
        """Datagrams that the pump handed over are opened here, in the windows that it marks too."""
        for record in self.rig.records():
            self.done["records"] += 1
            if record.kind == 1:
                self.rig.tunnels.a.tunnel.handle_untrusted(record.data, None, self.rig.now)
        self.rig.pump.finish()

    def note(self) -> None:
        self.rig.pump.take_peers()
        self.rig.pump.notice()
        self.done["noted"] += sum(packets for _, _, packets, _, _ in self.rig.pump.take_flows())
        self.rig.pump.take_refusals()

    def sweep(self) -> None:
        self.rig.pump.sweep(100)

    def use_tunnel(self) -> None:
        """The slow path on the sessions that the pump uses."""
        tunnel = self.rig.tunnels.a.tunnel
        sealed = tunnel.seal(self.flows[0].data, self.rig.now)
        assert isinstance(sealed, bytes)
        opened = self.rig.tunnels.b.tunnel.handle_untrusted(sealed, None, self.rig.now)
        assert opened == self.flows[0].data
        tunnel.handle_timeout(self.rig.now)
        tunnel.poll_timeout()
        assert tunnel.last_rx_at is not None
        assert tunnel.last_tx_at is not None

    def rekey(self) -> None:
        """A session replaces the oldest of eight, and the one before it is sent on no more."""
        if self.done["rekeys"] * 10 > self.done["turns"]:
            return
        pair = self.rig.tunnels
        pair.now += 0.05  # a handshake's time stamp must be a later one
        pair.connect()
        self.rig.set_peer()
        self.done["rekeys"] += 1

    def other_sockets(self) -> None:
        new = {version: UdpSocket.bind(family, 0, None) for version, family in FAMILIES.items()}
        self.rig.pump.set_sockets(*((udp.fileno(), udp.port) for udp in new.values()))
        old, self.rig.udp = self.rig.udp, new
        for udp in old.values():
            udp.close()
        self.done["sockets"] += 1
        self.close_narrow()

    def narrow_socket(self) -> None:
        """Instead of the IPv4 socket one that soon is full."""
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        six = self.rig.udp[6]
        self.rig.pump.set_sockets((ends[1].fileno(), 1), (six.fileno(), six.port))
        self.close_narrow()
        self.narrow = ends
        self.rig.set_peer(self.fars[0])

    def close_narrow(self) -> None:
        for end in self.narrow or ():
            end.close()
        self.narrow = None

    def look(self) -> None:
        pump = self.rig.pump
        pump.counters()
        assert pump.lost >= 0
        assert not pump.has_failed
        assert not pump.refused_merged

    def check(self) -> None:
        """Both halves still carry."""
        rig = self.rig
        packet = packet_of(4, UDP, b"still here", ports=(50, 50))
        self.other_sockets()
        rig.set_peer(self.fars[0])
        key = FlowKey.of(packet)
        for inbound in (False, True):
            rig.pump.install(inbound, rig.slot, key, key, 100.0, 1e9)
        end = time.monotonic() + PATIENCE
        sent = seen = False
        while not (sent and seen):
            assert time.monotonic() < end, f"carried no more: sent {sent}, received {seen}"
            self.handle_slowly()
            rig.device.send(bytes(10) + packet.data)
            rig.far.send([rig.seal(packet)], rig.udp[4].port)
            select.select([rig.device], [], [], 0.05)
            tunnel = rig.tunnels.b.tunnel
            sent = sent or any(tunnel.handle_untrusted(d, None, rig.now) == packet.data for _, d in rig.far.take())
            seen = seen or any(packet.data in write for write in rig.writes())


def main() -> None:
    print(json.dumps(Racer(int(sys.argv[1])).run(float(sys.argv[2]))))


if __name__ == "__main__":
    main()
