"""One maker of sockets, one cache of source addresses (spec/io.md 3.8, 10 and 14)."""

from __future__ import annotations

import errno
import os
import select
import socket
from pathlib import Path

import pytest

from fz_core.linux import Alarm, MarkError, RouteCache, SocketFactory, UdpSocket
from fz_core.linux.route_cache import look_up_source
from fz_core.packet import Address

A, B = bytes([192, 0, 2, 1]), bytes([192, 0, 2, 2])
LOOPBACK = bytes([127, 0, 0, 1])
SERVER = Address(LOOPBACK, 53)


class Kernel:
    """Routes as a dict, and what was asked."""

    def __init__(self, sources: dict[bytes, bytes]) -> None:
        self.sources, self.asked = sources, list[bytes]()

    def __call__(self, destination: bytes) -> bytes | None:
        self.asked.append(destination)
        return self.sources.get(destination)


def test_the_kernel_is_asked_once_for_each_destination_and_again_after_a_reset() -> None:
    kernel = Kernel({A: LOOPBACK, B: LOOPBACK})
    routes = RouteCache(kernel)
    for _ in range(3):
        assert routes.source_of(A) == routes.source_of(B) == LOOPBACK
    assert kernel.asked == [A, B]
    kernel.sources[A] = B
    assert routes.source_of(A) == LOOPBACK
    routes.reset()
    assert len(routes) == 0
    assert routes.sources_of((A, B)) == {A: B, B: LOOPBACK}
    assert kernel.asked == [A, B, A, B]


def test_a_missing_route_is_not_remembered() -> None:
    kernel = Kernel({})
    routes = RouteCache(kernel)
    assert routes.source_of(A) is None
    kernel.sources[A] = LOOPBACK
    assert routes.source_of(A) == LOOPBACK


def test_the_cache_is_bounded_and_the_oldest_goes_first() -> None:
    kernel = Kernel({bytes([10, 0, 0, n]): LOOPBACK for n in range(6)})
    routes = RouteCache(kernel, limit=4)
    for destination in kernel.sources:
        routes.source_of(destination)
    assert len(routes) == 4
    del kernel.asked[:]
    assert routes.source_of(bytes([10, 0, 0, 5])) == LOOPBACK
    assert kernel.asked == []
    routes.source_of(bytes([10, 0, 0, 0]))
    assert kernel.asked == [bytes([10, 0, 0, 0])]


def test_the_real_kernel_knows_loopback() -> None:
    assert look_up_source(LOOPBACK, None) == LOOPBACK
    assert look_up_source(bytes(15) + b"\1", None) == bytes(15) + b"\1"


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_all_sockets_of_a_factory_share_one_look_up(kind: int) -> None:
    kernel = Kernel({LOOPBACK: LOOPBACK})
    sockets = SocketFactory(None, RouteCache(kernel))
    opened = [sockets.open_query(SERVER, kind) for _ in range(50)]
    assert kernel.asked == [LOOPBACK]
    assert {sock.getsockname()[0] for sock in opened} == {"127.0.0.1"}
    assert len({sock.getsockname()[1] for sock in opened}) == 50
    assert not any(sock.getblocking() for sock in opened)
    sockets.reset()
    opened.append(sockets.open_query(SERVER, kind))
    assert kernel.asked == [LOOPBACK] * 2
    for sock in opened:
        sock.close()


def test_a_remembered_source_that_is_gone_is_asked_for_again() -> None:
    kernel = Kernel({LOOPBACK: bytes([192, 0, 2, 77])})
    sockets = SocketFactory(None, RouteCache(kernel))
    sockets.routes.source_of(LOOPBACK)
    kernel.sources[LOOPBACK] = LOOPBACK
    with sockets.open_query(SERVER, socket.SOCK_DGRAM) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"
    assert kernel.asked == [LOOPBACK] * 2


def test_a_query_without_a_route_fails_at_once() -> None:
    sockets = SocketFactory(None, RouteCache(Kernel({})))
    with pytest.raises(OSError) as caught:
        sockets.open_query(SERVER, socket.SOCK_DGRAM)
    assert caught.value.errno == errno.ENETUNREACH


@pytest.mark.shows("io", 12)
def test_each_family_falls_back_to_another_port_by_itself() -> None:
    taken = UdpSocket.bind(socket.AF_INET, 0, None)
    sockets, errors = SocketFactory(None).bind_data(taken.port)
    assert [udp.is_ipv4 for udp in sockets] == [True, False]
    assert sockets[0].port not in (0, taken.port)
    assert sockets[1].port == taken.port
    assert errors == []
    for udp in (taken, *sockets):
        udp.close()


@pytest.mark.root
@pytest.mark.shows("io", 14)
def test_without_the_privilege_there_is_no_socket_at_all() -> None:
    """In a child, which gives up its privileges; its exit code tells."""
    child = os.fork()
    if child == 0:
        os.setresuid(65534, 65534, 65534)
        outcomes = 0
        for bit, make in enumerate(
            (
                lambda: SocketFactory().bind_data(0),
                lambda: UdpSocket.bind(socket.AF_INET, 0),
                lambda: SocketFactory().open_query(SERVER, socket.SOCK_DGRAM),
            )
        ):
            try:
                make()
            except MarkError:
                outcomes |= 1 << bit
            except BaseException:
                os._exit(100)
        os._exit(outcomes)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0b111


def test_an_alarm_rings_when_it_is_due_and_is_silent_afterwards() -> None:
    alarm, poll = Alarm(), select.poll()
    for fd in alarm.filenos():
        poll.register(fd, select.POLLIN)
    assert poll.poll(0) == []
    alarm.set(0.0)
    assert poll.poll(10_000)
    alarm.clear()
    assert poll.poll(0) == []
    alarm.set(0.0)
    alarm.set(None)
    alarm.clear()
    alarm.set(3600.0)
    assert poll.poll(0) == []
    alarm.close()


@pytest.mark.shows("io", 9)
def test_an_alarm_goes_on_during_suspend_and_notices_the_end_of_it() -> None:
    """What the kernel was asked for: CLOCK_BOOTTIME (7), and a cancellation when wall-clock time (0) jumps."""
    alarm = Alarm()
    timer, jumps = (Path(f"/proc/self/fdinfo/{fd}").read_text() for fd in alarm.filenos())
    alarm.close()
    assert "clockid: 7\n" in timer
    assert "clockid: 0\n" in jumps
    assert "settime flags: 03\n" in jumps  # absolute, cancelled on set
