"""A relay where the kernel has no room, or refuses segments: in network namespaces that make it do so.

A neighbour that does not answer ARP holds datagrams back, and with them a small send buffer is full. Once its
link address is known, everything goes out.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator

import pytest

from fz_core.fastpath.relay_path import RelayPath
from fz_core.lab import Lab
from fz_core.lab.topology import Namespace
from fz_core.packet import Address

pytestmark = [pytest.mark.root, pytest.mark.peer("ip")]

SOL_UDP, UDP_SEGMENT, UDP_GRO, SO_RCVBUFFORCE = 17, 103, 104, 33
OURS, THEIRS = "10.9.0.1", "10.9.0.2"
LISTEN, PORT, PEER = 3478, 50_000, 7000
NUMBER = 0x4000


class Scene:
    """A client on the relay's machine, and a peer on the next one."""

    def __init__(self, lab: Lab) -> None:
        self.here, self.there = Namespace(lab, "relay"), Namespace(lab, "peer")
        self.here.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth1", "netns", self.there.netns)
        for namespace, device, ip in ((self.here, "eth0", OURS), (self.there, "eth1", THEIRS)):
            namespace.ip("addr", "add", f"{ip}/24", "dev", device)
        self.there.ip("link", "set", "eth1", "arp", "off")
        self.here.sysctl("net.ipv4.neigh.eth0.mcast_solicit=100")
        self.here.ip("link", "set", "eth0", "up")
        self.there.ip("link", "set", "eth1", "up")
        self.peer = bound(self.there, THEIRS, PEER)
        self.client = bound(self.here, OURS, 0)
        self.path = RelayPath(lambda datagram, source: None)
        self.path.add_port(self._small(LISTEN), True, LISTEN, True)
        self.path.add_port(self._small(PORT), True, PORT)
        peer = Address(socket.inet_aton(THEIRS), PEER)
        self.path.open_route(Address(socket.inet_aton(OURS), self.client.getsockname()[1]), NUMBER, PORT, peer)

    def _small(self, port: int) -> int:
        sock = bound(self.here, OURS, port)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sock.setsockopt(SOL_UDP, UDP_GRO, 1)
        return sock.detach()

    def relay(self, payloads: list[bytes]) -> None:
        """One batch, through the relay as far as it gets."""
        size = len(payloads[0])
        control = [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", size + 4))] if len(payloads) > 1 else []
        parts = [struct.pack("!HH", NUMBER, len(p)) + p for p in payloads]
        self.client.sendmsg(parts, control, 0, (OURS, LISTEN))
        self.path.turn(1000, 0)

    def resolve(self) -> None:
        """The peer's link address becomes known."""
        shown = self.there.run("ip", "-j", "link", "show", "dev", "eth1")
        mac = json.loads(shown.stdout)[0]["address"]
        self.here.ip("neigh", "replace", THEIRS, "lladdr", mac, "dev", "eth0", "nud", "permanent")

    def arrived(self) -> list[bytes]:
        """All of it, and what follows from the queue."""
        found: list[bytes] = []
        while True:
            before = len(found)
            self.path.turn(100, 10)
            try:
                while True:
                    found.append(self.peer.recv(65536))
            except BlockingIOError:
                if len(found) == before:
                    return found

    def close(self) -> None:
        self.path.close()
        self.peer.close()
        self.client.close()


def bound(namespace: Namespace, ip: str, port: int) -> socket.socket:
    sock = namespace.socket()
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
    sock.bind((ip, port))
    return sock


@pytest.fixture
def scene() -> Iterator[Scene]:
    with Lab() as lab:
        made = Scene(lab)
        yield made
        made.close()


@pytest.mark.parametrize("together", [1, 7])
def test_a_blocked_send_loses_and_reorders_nothing(scene: Scene, together: int) -> None:
    payloads = [n.to_bytes(2, "big") * 50 for n in range(210)]
    for start in range(0, len(payloads), together):
        scene.relay(payloads[start : start + together])
    assert scene.path.queued_bytes > 0
    assert scene.arrived() == []
    scene.resolve()
    assert scene.arrived() == payloads
    assert (scene.path.queued_bytes, scene.path.overflowed, scene.path.refused) == (0, 0, 0)


def test_empty_datagrams_wait_too(scene: Scene) -> None:
    payloads = [b"" if n % 2 else bytes([n]) * 100 for n in range(100)]
    for payload in payloads:
        scene.relay([payload])
    assert scene.path.queued_bytes > 0
    scene.resolve()
    assert scene.arrived() == payloads


def test_the_queue_of_a_blocked_socket_is_bounded(scene: Scene) -> None:
    payloads = [n.to_bytes(2, "big") for n in range(2000)]
    for payload in payloads:
        scene.relay([payload])
    overflowed = scene.path.overflowed
    assert 2000 - 512 - 300 <= overflowed < 2000 - 512
    scene.resolve()
    found = scene.arrived()
    assert found == payloads[: len(found)]
    assert len(found) + overflowed == 2000
    scene.relay([b"after"])
    assert scene.arrived() == [b"after"]


def test_the_queue_is_bounded_in_bytes(scene: Scene) -> None:
    for _ in range(200):
        scene.relay([bytes(1000)] * 60)
    assert scene.path.queued_bytes <= 4 << 20
    assert scene.path.overflowed > 0
    assert scene.path.overflowed % 60 == 0


def test_a_port_that_goes_takes_its_queue_along(scene: Scene) -> None:
    for _ in range(100):
        scene.relay([bytes(1000)])
    assert scene.path.queued_bytes > 0
    scene.path.close_route(Address(socket.inet_aton(OURS), scene.client.getsockname()[1]), NUMBER)
    scene.path.remove_port(PORT)
    assert scene.path.queued_bytes == 0


def test_a_blocked_socket_holds_up_no_other(scene: Scene) -> None:
    for _ in range(100):
        scene.relay([bytes(1000)])
    client = Address(socket.inet_aton(OURS), scene.client.getsockname()[1])
    scene.path.send(client, b"reply")
    assert scene.client.recv(100) == b"reply"


def test_a_destination_that_refuses_segments_gets_single_datagrams(scene: Scene) -> None:
    """Segments above the MTU are refused, single datagrams are fragmented."""
    scene.here.ip("link", "set", "eth0", "mtu", "1000")
    scene.resolve()
    batches = [[bytes([7 * b + n]) * 1312 for n in range(6)] + [b"end"] for b in range(3)]
    found = []
    for batch in batches:
        scene.relay(batch)
        found += scene.arrived()
    assert found == [payload for batch in batches for payload in batch]
    assert scene.path.refused == 0


def test_segments_that_are_refused_only_after_they_have_waited(scene: Scene) -> None:
    payloads = [bytes([n]) * 900 for n in range(60)]
    for start in range(0, 60, 6):
        scene.relay(payloads[start : start + 6])
    scene.here.ip("link", "set", "eth0", "mtu", "800")
    scene.resolve()
    assert scene.arrived() == payloads
    assert (scene.path.refused, scene.path.queued_bytes) == (0, 0)


def test_what_the_kernel_refuses_is_counted(scene: Scene) -> None:
    scene.here.ip("route", "add", "prohibit", f"{THEIRS}/32", "metric", "1")
    scene.relay([bytes(100)] * 5)
    scene.relay([bytes(100)])
    assert scene.path.refused == 6
    scene.here.ip("route", "del", "prohibit", f"{THEIRS}/32", "metric", "1")
    scene.resolve()
    scene.relay([b"through"])
    assert scene.arrived() == [b"through"]
