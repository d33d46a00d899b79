"""Every kind of packet that programs send, through a system with any programs: what comes out is what went in."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

from fz_core.lab import Host, LabError
from fz_core.lab.names import dig
from fz_core.lab.system import Programs, System
from tests.netns.name_scenarios import CORP, load, named_system
from tests.netns.name_scenarios import eventually as resolve
from tests.netns.scenarios import Scenario, complain, eventually, find_path, ours_took, running

PORT, CLOSED = 5002, 5003
MTU = 1280
LARGEST = {4: MTU - 28, 6: MTU - 48}  # payload of a datagram
UDP_SEGMENT, SOL_UDP = 103, 17
ATTEMPTS, PATIENCE = 4, 1.0
CONNECTIONS, WRITES = 12, 60
TRAIN, SEGMENT = 40, 1111
DSCP_AND_ECT = 0x2A  # AF11, ECT(0)


class Ends(NamedTuple):
    """A client, what it talks to (`target`, `family`), what that is at the server; what a datagram holds at most."""

    client: Host
    target: str
    family: int
    server: Host
    address: str
    server_family: int
    largest: int


def by_address(path: str) -> Scenario:
    """A scenario: everything over IPv4 and IPv6 inside."""

    def scenario(programs: Programs) -> str:
        with running(programs) as system:
            if path == "relayed":
                system.block_direct()
            for family in (4, 6):
                eventually(system, 20.0, family=family)
                find_path(system, path)
                address = address_of(system, family)
                exchange(ends_of(system, address, family, address, family))
            ours_took(system, path)
            complain(system)
        return ""

    return scenario


def by_name(programs: Programs) -> str:
    """Everything to names: with an address of the same family, and to our gateway of the other one only."""
    kinds = [("four", 4, 4), ("six", 6, 6)]
    if programs.gateway == Programs().gateway:
        kinds += [("four", 6, 4), ("six", 4, 6)]
    with named_system(programs) as system:
        for name, family, server_family in kinds:
            resolve(f"the page of {name}", partial(load, system, name, family=family))
            proxy = dig(system.clients[0].host, f"{name}.{CORP}", "A" if family == 4 else "AAAA").records[0]
            exchange(ends_of(system, proxy, family, address_of(system, server_family), server_family))
        complain(system)
    return ""


def address_of(system: System, family: int) -> str:
    server = system.gateways[0].server
    assert server is not None
    address = server.ipv4 if family == 4 else server.ipv6
    assert address is not None
    return address


def ends_of(system: System, target: str, family: int, address: str, server_family: int) -> Ends:
    server = system.gateways[0].server
    assert server is not None
    largest = min(LARGEST[family], LARGEST[server_family])
    return Ends(system.clients[0].host, target, family, server, address, server_family, largest)


def exchange(ends: Ends) -> None:
    with echoing_datagrams(ends.server, ends.address, ends.server_family):
        datagrams_of_every_size(ends)
        too_large(ends)
        trains(ends)
        marks(ends)
    with echoing_streams(ends.server, ends.address, ends.server_family):
        conversations(ends)
    pings(ends)
    closed_ports(ends)


# the far end


@contextmanager
def echoing_datagrams(server: Host, address: str, family: int) -> Iterator[None]:
    """Answers every datagram with itself and the traffic class it came with."""
    with _socket(server, family, socket.SOCK_DGRAM) as end:
        end.setsockopt(*((socket.IPPROTO_IP, socket.IP_RECVTOS) if family == 4 else (41, socket.IPV6_RECVTCLASS)), 1)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        end.bind((address, PORT))

        def serve() -> None:
            with suppress(OSError):
                while True:
                    data, control, _, source = end.recvmsg(65535, 64)
                    if data == b"end":
                        return
                    end.sendto(data[:-1] + control[0][2][:1] if data.startswith(b"class") else data, source)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            with _socket(server, family, socket.SOCK_DGRAM) as own:
                own.sendto(b"end", (address, PORT))
            thread.join(5.0)


@contextmanager
def echoing_streams(server: Host, address: str, family: int) -> Iterator[None]:
    """Answers every connection with what it sends, in writes of any size."""
    pool = ThreadPoolExecutor(CONNECTIONS + 1)
    with _socket(server, family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, PORT))
        listening.listen(CONNECTIONS)
        listening.settimeout(0.5)

        def answer(connection: socket.socket) -> None:
            with connection:
                connection.settimeout(30.0)
                while data := connection.recv(random.randrange(1, 30_000)):
                    connection.sendall(data)

        stopping = threading.Event()

        def accept() -> None:
            while not stopping.is_set():
                with suppress(TimeoutError):
                    pool.submit(answer, listening.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join(5.0)
            pool.shutdown(wait=False, cancel_futures=True)


# what is exchanged


def datagrams_of_every_size(ends: Ends) -> None:
    sizes = [0, 1, 2, 3, 7, 8, 63, 64, 100, 511, 512, 1000, ends.largest - 1, ends.largest]
    with connected(ends, socket.SOCK_DGRAM) as near:
        for size in sizes:
            echoed(near, os.urandom(size), f"a datagram of {size} bytes")


def too_large(ends: Ends) -> None:
    """A fragment does not pass (spec/tunnel.md section 2); what comes after it does."""
    with connected(ends, socket.SOCK_DGRAM) as near:
        for size in (LARGEST[ends.family] + 1, 4000, 30_000):
            near.send(os.urandom(size))
        near.settimeout(0.3)
        with suppress(TimeoutError):
            raise LabError(f"{len(near.recv(65535))} bytes of a fragmented datagram came back")
        echoed(near, b"after the fragments", "a datagram after fragments")


def trains(ends: Ends) -> None:
    """A program that leaves the splitting of many datagrams to the kernel (`UDP_SEGMENT`), the last one shorter."""
    for attempt in range(ATTEMPTS):
        sent = [bytes([number]) * SEGMENT for number in range(TRAIN)] + [b"the last one"]
        with connected(ends, socket.SOCK_DGRAM) as near:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            option = (SOL_UDP, UDP_SEGMENT, struct.pack("H", SEGMENT))
            near.sendmsg([b"".join(sent)], [option])
            came = received(near, len(sent))
        if came == sent:
            return
        if attempt == ATTEMPTS - 1:
            raise LabError(
                f"of {len(sent)} datagrams sent at once {len(came)} came, in order: {came == sent[: len(came)]}"
            )


def marks(ends: Ends) -> None:
    """The traffic class inside is the application's own affair."""
    with connected(ends, socket.SOCK_DGRAM) as near:
        option = (socket.IPPROTO_IP, socket.IP_TOS) if ends.family == 4 else (41, socket.IPV6_TCLASS)
        near.setsockopt(*option, DSCP_AND_ECT)
        for _ in range(ATTEMPTS):
            near.send(b"class?")
            came = received(near, 1)
            if came and came[0][-1] != DSCP_AND_ECT:
                raise LabError(f"traffic class {DSCP_AND_ECT:#x} came as {came[0][-1]:#x}")
            if came:
                return
        raise LabError("no answer to a datagram with a traffic class")


def conversations(ends: Ends) -> None:
    """Connections at once, in writes of every size, both ways at the same time."""

    def talk(seed: int) -> None:
        chance = random.Random(seed)
        with connected(ends, socket.SOCK_STREAM) as near:
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, seed % 2)
            near.settimeout(30.0)
            writes = [
                chance.randbytes(chance.choice([1, 7, 100, 1239, 1240, 1241, 9000, 65000])) for _ in range(WRITES)
            ]
            total = sum(map(len, writes))
            came = hashlib.sha256()

            def listen() -> None:
                rest = total
                while rest:
                    data = near.recv(65536)
                    if not data:
                        raise LabError(f"a connection ended {rest} bytes early")
                    rest -= len(data)
                    came.update(data)

            with ThreadPoolExecutor(1) as pool:
                listening = pool.submit(listen)
                for data in writes:
                    near.sendall(data)
                    if chance.random() < 0.1:
                        time.sleep(0.01)
                listening.result(40.0)
            near.shutdown(socket.SHUT_WR)
            if near.recv(1) != b"":
                raise LabError("bytes after the end of a connection")
            if came.digest() != hashlib.sha256(b"".join(writes)).digest():
                raise LabError("a connection's bytes came back changed")

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for done in [pool.submit(talk, seed) for seed in range(CONNECTIONS)]:
            done.result(60.0)


def pings(ends: Ends) -> None:
    for size in (0, 8, 56, 1000, ends.largest):
        command = ["ping", "-c", "4", "-i", "0.05", "-W", "2", "-s", str(size), ends.target]
        result = ends.client.run(*command, check=False, timeout=20)
        if " 0% packet loss" not in result.stdout:
            raise LabError(f"pings of {size} bytes: {result.stdout.strip().splitlines()[-1:]}")


def closed_ports(ends: Ends) -> None:
    """Refusals come back as what they are."""
    with _socket(ends.client, ends.family, socket.SOCK_STREAM) as near:
        near.settimeout(5.0)
        with suppress(ConnectionRefusedError):
            near.connect((ends.target, CLOSED))
            raise LabError("a closed TCP port took a connection")
    with _socket(ends.client, ends.family, socket.SOCK_DGRAM) as near:
        near.connect((ends.target, CLOSED))
        near.settimeout(PATIENCE)
        for _ in range(ATTEMPTS):
            try:
                near.send(b"anybody?")
                near.recv(10)
            except ConnectionRefusedError:
                return
            except TimeoutError:
                continue
            raise LabError("a closed UDP port answered")
        raise LabError("nobody told that a UDP port is closed")


# sockets


@contextmanager
def connected(ends: Ends, kind: socket.SocketKind) -> Iterator[socket.socket]:
    with _socket(ends.client, ends.family, kind) as near:
        near.settimeout(PATIENCE if kind == socket.SOCK_DGRAM else 10.0)
        near.connect((ends.target, PORT))
        yield near


def _socket(host: Host, family: int, kind: socket.SocketKind) -> socket.socket:
    return host.socket(socket.AF_INET if family == 4 else socket.AF_INET6, kind)


def echoed(near: socket.socket, data: bytes, what: str) -> None:
    """A datagram may be lost, never changed."""
    for _ in range(ATTEMPTS):
        near.send(data)
        came = received(near, 1)
        if came:
            if came[0] != data:
                raise LabError(f"{what} came back as {len(came[0])} others")
            return
    raise LabError(f"{what} never came back")


def received(near: socket.socket, count: int) -> list[bytes]:
    """Up to so many datagrams, as long as they keep coming."""
    came: list[bytes] = []
    with suppress(TimeoutError):
        while len(came) < count:
            came.append(near.recv(65535))
    return came


TRAFFIC_SCENARIOS: dict[str, Callable[[Programs], str]] = {
    "all kinds of packets": by_address("direct"),
    "all kinds of packets, relayed": by_address("relayed"),
    "all kinds of packets, by name": by_name,
}
