"""Narrow paths: how to make them, and what a system with any programs must still do over them."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from fz_core.lab import Host, LabError, Router
from fz_core.lab.system import Programs, Shape, System
from tests.netns.scenarios import Scenario, eventually, ours_took, running

MEGABYTES = 2.0
PORT = 5001
NARROWEST = 1124


def narrow_path(place: str) -> Scenario:
    """A scenario: bulk TCP up and down, over both families, through a direct path of 1124 bytes."""

    def scenario(programs: Programs) -> str:
        with running(programs, Shape(client_families=(4,), gateway_families=(4,))) as system:
            narrow(system, place, NARROWEST)
            speeds = []
            for family in (4, 6):
                eventually(system, 20.0, family=family)
                time.sleep(1.0)  # what is opened while still relayed keeps its segment size (docs/path-mtu.md)
                speeds.append(system.fetch(MEGABYTES, family=family, timeout=20.0).mbit_s)
                upload(system, family)
            ours_took(system, "direct")
            return f"{min(speeds):.0f} Mbit/s"

    return scenario


def narrow_link(host: Host, router: Router, mtu: int) -> None:
    """The cable between a machine and its router."""
    host.ip("link", "set", host.device, "mtu", str(mtu))
    router.ip("link", "set", "lan1", "mtu", str(mtu))


def narrow_router(router: Router, mtu: int) -> None:
    """Inside a router, which tells senders on both sides what it cannot pass on."""
    number = router.number
    limit = ("mtu", "lock", str(mtu))
    if 4 in router.families:
        lan = (f"172.{number}.0.0/24", "dev", "lan", "src", f"172.{number}.0.254")
        outside = ("203.0.113.0/24", "dev", "internet", "src", f"203.0.113.{number}")
        for route in (lan, outside):
            router.ip("route", "replace", *route, "proto", "kernel", "scope", "link", *limit)
    if 6 in router.families:
        for network, device in ((f"172:{number}::/64", "lan"), ("203:0:113::/64", "internet")):
            router.ip("-6", "route", "replace", network, "dev", device, "proto", "kernel", "metric", "256", *limit)


def narrow(system: System, place: str, mtu: int) -> None:
    client, gateway = system.clients[0], system.gateways[0]
    if place == "client":
        narrow_link(client.host, client.router, mtu)
    elif place == "gateway":
        narrow_link(gateway.host, gateway.router, mtu)
    else:
        narrow_router(client.router, mtu)


@contextmanager
def connected(system: System, family: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection through the tunnel: the client's end and the server's."""
    server = system.gateways[0].server
    assert server is not None
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    target = server.ipv4 if family == 4 else server.ipv6
    assert target is not None
    with (
        server.socket(kind, socket.SOCK_STREAM) as listening,
        system.clients[0].host.socket(kind, socket.SOCK_STREAM) as near,
    ):
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((target, PORT))
        listening.listen()
        near.settimeout(20.0)
        near.connect((target, PORT))
        far, _ = listening.accept()
        with far:
            far.settimeout(20.0)
            yield near, far


def transfer(source: socket.socket, sink: socket.socket, count: int = 1_000_000) -> None:
    """Bytes from one end to the other; what arrives is what was sent."""
    sent = os.urandom(count)
    thread = threading.Thread(target=_swallow(source.sendall, sent))
    thread.start()
    digest, rest = hashlib.sha256(), count
    while rest:
        try:
            received = sink.recv(min(rest, 65536))
        except TimeoutError:
            raise LabError(f"{rest} of {count} bytes never came") from None
        if not received:
            raise LabError(f"the connection ended {rest} bytes early")
        digest.update(received)
        rest -= len(received)
    thread.join(20.0)
    if digest.digest() != hashlib.sha256(sent).digest():
        raise LabError("the checksum of what came up is wrong")


def _swallow(send: Callable[[bytes], None], data: bytes) -> Callable[[], None]:
    """A failed sender shows as a receiver that waits in vain."""

    def run() -> None:
        with suppress(OSError):
            send(data)

    return run


def upload(system: System, family: int) -> None:
    with connected(system, family) as (near, far):
        transfer(near, far, int(MEGABYTES * 1_000_000))


MTU_SCENARIOS: dict[str, Scenario] = {
    "narrow link of the client": narrow_path("client"),
    "narrow link of the gateway": narrow_path("gateway"),
    "narrow link behind a router": narrow_path("middle"),
}
