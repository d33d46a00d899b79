"""Whole systems over narrow paths: our own link, the gateway's, or one behind a router (docs/path-mtu.md)."""

from __future__ import annotations

import errno
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from struct import pack

import pytest

from fz_core.lab import Host, Lab, Router
from fz_core.lab.system import Shape, System
from fz_core.linux import UdpSocket
from fz_core.packet import Address, checksum
from tests.netns.path_mtu_scenarios import connected, narrow, narrow_link, narrow_router, transfer, upload
from tests.netns.scenarios import eventually
from tests.readiness import readable

pytestmark = [pytest.mark.root, pytest.mark.peer("nft", "curl", "ip")]

MEGABYTES = 2.0
HEADERS = {4: 20, 6: 40}


@contextmanager
def narrowed(place: str, mtu: int, underlay: int, *, relayed: bool = False) -> Iterator[System]:
    """A system whose path was narrow before its programs knew each other."""
    families = (underlay,)
    with Lab() as lab:
        system = System(lab, shape=Shape(client_families=families, gateway_families=families))
        system.start()
        if relayed:
            system.block_direct()
        narrow(system, place, mtu)
        yield system


@pytest.mark.parametrize("relayed", [False, True], ids=["direct", "relayed"])
@pytest.mark.parametrize("place", ["client", "gateway", "middle"])
@pytest.mark.parametrize(("underlay", "mtu"), [(4, 1500), (4, 1400), (4, 1280), (4, 1124), (6, 1400), (6, 1280)])
def test_bulk_tcp_passes_both_ways(underlay: int, mtu: int, place: str, relayed: bool) -> None:
    with narrowed(place, mtu, underlay, relayed=relayed) as system:
        for family in (4, 6):
            eventually(system, 20.0, family=family)
            assert system.fetch(MEGABYTES, family=family, timeout=20.0).status == 200
            upload(system, family)
        assert system.path_of() == ("relayed" if relayed else "direct")
        assert system.warnings() == []


@pytest.mark.parametrize("place", ["client", "gateway", "middle"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_connection_survives_its_path_becoming_narrow(family: int, place: str) -> None:
    """Its segments were sized before; IPv6 senders may not even go below 1280, so they are cut."""
    with narrowed(place, 1500, 4) as system:
        eventually(system, 20.0, family=family)
        with connected(system, family) as (near, far):
            transfer(near, far)
            transfer(far, near)
            narrow(system, place, 1124)
            transfer(near, far)
            transfer(far, near)


def test_a_path_that_grows_again_is_used() -> None:
    with narrowed("client", 1280, 4) as system:
        eventually(system, 20.0)
        client = system.clients[0]
        client.process.wait_for_line(r"PathMtuChanged.*inner_mtu=1220", 5.0)
        narrow(system, "client", 1500)
        # It is asked for every 30 s, while there is traffic.
        ping = client.host.spawn("traffic", ["ping", "-i", "0.5", "-c", "80", "10.20.0.80"])
        client.process.wait_for_line(r"PathMtuChanged.*inner_mtu=1280", 40.0)
        ping.stop()
        assert system.fetch(MEGABYTES).status == 200


@pytest.mark.peer("ping")
@pytest.mark.parametrize(("family", "size"), [(4, 1252), (6, 1232)])
def test_what_cannot_be_cut_is_reported_to_its_sender(family: int, size: int) -> None:
    """An echo request of 1280 bytes; the error names what would have fitted: 1124 less 60."""
    with narrowed("client", 1124, 4) as system:
        eventually(system, 20.0, family=family)
        target = "10.20.0.80" if family == 4 else "fd20::80"
        ping = ["ping", f"-{family}", "-M", "do", "-W", "1"]
        host = system.clients[0].host
        failed = host.run(*ping, "-c", "3", "-i", "0.3", "-s", str(size), target, check=False)
        told = re.search(r"mtu[ =]+(\d+)", failed.stdout + failed.stderr)
        assert told is not None, failed.stdout + failed.stderr
        assert int(told[1]) == 1124 - 60
        fitting = 1124 - 60 - HEADERS[family] - 8
        assert " 0% packet loss" in host.run(*ping, "-c", "2", "-i", "0.3", "-s", str(fitting), target).stdout


# what the kernel learns, without whole systems


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])
def routed(request: pytest.FixtureRequest) -> Iterator[tuple[Router, Host, UdpSocket, Address]]:
    """A socket behind a router, and the address of another on the internet."""
    with Lab() as lab:
        router = lab.router("office", 30, nat="none")
        host, far = lab.host("laptop", router), lab.public_host("far", 11)
        ip = far.ipv4 if request.param == socket.AF_INET else far.ipv6
        assert ip is not None
        with host.entered():
            udp = UdpSocket.bind(request.param)
        with udp:
            yield router, host, udp, Address(socket.inet_pton(request.param, ip), 9)


@pytest.mark.shows("io", 19)
def test_the_first_link_limits_a_path(routed: tuple[Router, Host, UdpSocket, Address]) -> None:
    router, host, udp, remote = routed
    with host.entered():
        assert udp.path_mtu(remote) == 1500
        narrow_link(host, router, 1300)
        assert udp.path_mtu(remote) == 1300
        assert udp.path_mtu(Address(remote.ip[:-1] + b"\x63", 9)) == 1300
        host.ip("link", "set", host.device, "down")
        assert udp.path_mtu(remote) is None


@pytest.mark.shows("io", 19)
def test_a_router_limits_a_path_and_trains_over_it_fail_whole(
    routed: tuple[Router, Host, UdpSocket, Address],
) -> None:
    router, host, udp, remote = routed
    train = bytes(5 * 1316)
    with host.entered():
        narrow_router(router, 1300)
        assert udp.send_batch(train, 1316, remote) is None
        assert udp.take_errors() == []  # the router had to say it first
        eventually_equal(lambda: udp.path_mtu(remote), 1300)
        assert udp.send_batch(train, 1316, remote) is None
        assert [(e.errno, e.remote) for e in udp.take_errors()] == [(errno.EMSGSIZE, remote)]
        assert not udp.is_single(remote)
        fitting = 1300 - 8 - (20 if udp.is_ipv4 else 40)
        assert udp.send_batch(bytes(3 * fitting), fitting, remote) is None
        assert udp.take_errors() == []


@pytest.mark.shows("io", 25)
def test_a_storm_of_forged_errors_neither_fills_the_socket_nor_ends_a_path() -> None:
    """Even one that quotes what we sent: the kernel's own floor holds, and nothing is queued for us."""
    with Lab() as lab:
        near, far = lab.public_host("near", 10), lab.public_host("far", 11)
        with near.entered():
            udp = UdpSocket.bind(socket.AF_INET)
        with far.entered():
            peer = UdpSocket.bind(socket.AF_INET)
        with udp, peer, far.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
            assert near.ipv4 is not None
            assert far.ipv4 is not None
            ips = socket.inet_aton(near.ipv4) + socket.inet_aton(far.ipv4)
            udp_header = pack("!HHHH", udp.port, peer.port, 1208, 0)
            quote = pack("!BBHHHBBH", 0x45, 0, 1228, 0, 0x4000, 64, 17, 0) + ips + udp_header
            body = pack("!BBHHH", 3, 4, 0, 0, 68) + quote
            body = body[:2] + checksum(body).to_bytes(2, "big") + body[4:]
            for _ in range(3000):
                raw.sendto(body, (near.ipv4, 0))
            remote = Address(socket.inet_aton(far.ipv4), peer.port)
            with near.entered():
                eventually_equal(lambda: udp.path_mtu(remote), 552)
            assert not readable(udp, within=0.0)
            assert udp.send_batch(bytes(500), 500, remote) is None
            assert udp.take_errors() == []
            backwards = Address(socket.inet_aton(near.ipv4), udp.port)
            assert peer.send_batch(bytes(49 * 1316), 1316, backwards) is None
            received = 0
            while received < 49 * 1316:
                assert readable(udp)
                received += sum(len(data) for _, _, _, data, _ in udp.recv_batch())


# helpers


def eventually_equal(read: Callable[[], object], wanted: object) -> None:
    deadline = time.monotonic() + 5.0
    while read() != wanted:
        assert time.monotonic() < deadline, f"{read()} instead of {wanted}"
        time.sleep(0.01)
