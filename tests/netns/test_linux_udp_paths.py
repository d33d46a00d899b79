"""The UDP data socket on real links (spec/io.md 14, items 5, 16, 18, 19, 20, 22, 25)."""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from fz_core.lab import Host, Lab
from fz_core.linux import UdpSocket
from fz_core.packet import Address
from tests.readiness import readable, writable

pytestmark = pytest.mark.root


class Ends(NamedTuple):
    """Two hosts on one segment, with a socket each."""

    near: Host
    far: Host
    a: UdpSocket
    b: UdpSocket

    @property
    def to_b(self) -> Address:
        return address(self.far, self.b)


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    with Lab() as lab:
        near, far = lab.public_host("near", 10), lab.public_host("far", 11)
        with near.entered():
            a = UdpSocket.bind(request.param)
        with far.entered():
            b = UdpSocket.bind(request.param)
        with a, b:
            yield Ends(near, far, a, b)


@pytest.mark.shows("io", 12)
def test_the_preferred_port_is_taken(ends: Ends) -> None:
    assert ends.a.port == ends.b.port == 52625


@pytest.mark.shows("io", 20)
def test_a_full_train_of_largest_datagrams_arrives_whole(ends: Ends) -> None:
    wanted = [bytes([i]) * 1316 for i in range(49)]
    assert ends.a.send_batch(b"".join(wanted), 1316, ends.to_b) is None
    assert ends.a.counters()["tx_calls"] == 1
    assert receive(ends.b, 49) == wanted


@pytest.mark.shows("io", 5)
def test_a_full_socket_takes_the_rest_later(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow queue holds the datagrams, and with them the socket's buffer."""
    monkeypatch.setenv("FIREZONE_UDP_SEND_BUFFER_SIZE", "5000")
    ends.near.run(
        *["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "2mbit", "burst", "2000", "limit", "1000000"]
    )
    family = socket.AF_INET if ends.a.is_ipv4 else socket.AF_INET6
    with ends.near.entered():
        small = UdpSocket.bind(family, 0, gso=False)
    with small:
        wanted = [bytes([i]) * 1000 for i in range(40)]
        rest, waits = memoryview(b"".join(wanted)), 0
        while (taken := small.send_batch(rest, 1000, ends.to_b)) is not None:
            assert taken % 1000 == 0
            assert taken < len(rest)
            rest, waits = rest[taken:], waits + 1
            assert writable(small)
        assert waits > 0
        assert receive(ends.b, 40) == wanted
        assert small.take_errors() == []


@pytest.mark.shows("io", 19)
def test_above_the_link_mtu_is_an_error_and_no_fragment(ends: Ends) -> None:
    ends.near.ip("link", "set", "eth0", "mtu", "1300")
    assert ends.a.send_batch(bytes(1290), 1290, ends.to_b) is None
    assert ends.a.send_batch(bytes(1290) * 3, 1290, ends.to_b) is None
    assert [e.errno for e in ends.a.take_errors()] == [errno.EMSGSIZE] * 2
    assert not ends.a.is_single(ends.to_b)
    ends.a.send_batch(b"small", 5, ends.to_b)
    assert receive(ends.b, 1) == [b"small"]


@pytest.mark.shows("io", 25)
def test_port_unreachable_storms_leave_no_trace(ends: Ends) -> None:
    closed = ends.to_b._replace(port=9)
    for _ in range(50):
        assert ends.a.send_batch(b"nobody", 6, closed) is None
    ends.b.send_batch(b"hello", 5, address(ends.near, ends.a))
    assert receive(ends.a, 1) == [b"hello"]
    poll = select.poll()
    poll.register(ends.a, select.POLLIN | select.POLLERR)
    assert poll.poll(0) == []
    assert ends.a.take_errors() == []


@pytest.mark.shows("io", 22)
def test_answers_leave_from_the_address_the_peer_used(ends: Ends) -> None:
    second = Address.parse("203.0.113.77:0" if ends.a.is_ipv4 else "[203:0:113::77]:0")
    ends.near.ip("addr", "add", f"{second.host}/{24 if ends.a.is_ipv4 else 64}", "dev", "eth0", "nodad")
    ends.b.send_batch(b"ping", 4, second._replace(port=ends.a.port))
    (local, remote, *_), *_ = wait(ends.a)
    assert local == second._replace(port=ends.a.port)
    ends.a.send_batch(b"pong", 4, remote, local)
    assert wait(ends.b)[0][1] == local


@pytest.mark.shows("io", 16)
def test_datagrams_are_the_same_with_and_without_segmentation(ends: Ends) -> None:
    family = socket.AF_INET if ends.a.is_ipv4 else socket.AF_INET6
    with ends.near.entered():
        single = UdpSocket.bind(family, 0, gso=False)
    data = b"".join(bytes([i]) * 700 for i in range(9)) + b"end"
    with single:
        ends.a.send_batch(data, 700, ends.to_b, None, 1)
        first = receive(ends.b, 10)
        single.send_batch(data, 700, ends.to_b, None, 1)
        assert receive(ends.b, 10) == first
        assert first[-1] == b"end"


def address(host: Host, udp: UdpSocket) -> Address:
    text = host.ipv4 if udp.is_ipv4 else f"[{host.ipv6}]"
    return Address.parse(f"{text}:{udp.port}")


def wait(udp: UdpSocket) -> list[tuple[Address, Address, int, bytes, int]]:
    assert readable(udp)
    return udp.recv_batch()


def receive(udp: UdpSocket, count: int) -> list[bytes]:
    """Datagrams, until `count` have come."""
    found: list[bytes] = []
    while len(found) < count:
        for _, _, _, data, size in wait(udp):
            found += [data[i : i + size] for i in range(0, len(data), size)]
    return found
