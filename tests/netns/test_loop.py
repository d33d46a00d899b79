"""The event loop on a real TUN device and real sockets: spec/io.md §14 items 1, 2, 3, 8; `design.md` §5."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import dns.message
import pytest
import trio

from fz_core.crypto import PrivateKey
from fz_core.driver import clock
from fz_core.driver.loop import Loop
from fz_core.lab import Host, Lab
from fz_core.linux import Interface, TunDevice, UdpSocket
from fz_core.packet import DropReason, build_udp
from fz_core.portal import client as messages
from fz_core.portal.types import CidrResource, DnsResource, Filter, Site
from fz_core.portal.types import Interface as Config
from fz_core.tunnel import ClientTunnel, PacketError, TunnelErrors
from fz_core.tunnel.authorizations import AccessKey

pytestmark = [pytest.mark.root, pytest.mark.peer("ip", "nft")]

V4, V6 = IPv4Address("100.64.0.5"), IPv6Address("fd00:2021:1111::5")
SITE = Site("00000000-0000-4000-8000-000000000001", "s")
ALLOWED = CidrResource(
    "00000000-0000-4000-8000-0000000000aa", ip_network("10.20.0.0/24"), "n", (Filter("udp", 7, 7),), (SITE,)
)
KEY = AccessKey(ALLOWED.id)


class Rig:
    """A client's loop in a namespace of its own."""

    def __init__(self, host: Host) -> None:
        self.host = host
        with host.entered():
            self.tun = TunDevice.open("tun-firezone")
            interface = Interface(self.tun.name)
            interface.set_addresses(V4, V6)
            interface.set_routes([ip_network(n) for n in ("10.20.0.0/24", "10.99.0.0/24", "100.64.0.0/11")])
            self.sockets = [UdpSocket.bind(family) for family in (socket.AF_INET, socket.AF_INET6)]
            self.app = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.app.bind((str(V4), 5000))
            self.noise = [socket.socket(family, socket.SOCK_DGRAM) for family in (socket.AF_INET, socket.AF_INET6)]
        self.state = ClientTunnel(
            PrivateKey(secrets.token_bytes(32)), clock.now(), clock.unix_epoch(), secrets.token_bytes
        )
        self.state.handle_portal_message(messages.Init(Config(V4, V6), (ALLOWED,)), clock.now())
        self.turns: list[list[Exception]] = [[]]
        self.loop = Loop(self.state, self.tun, self.sockets, self._end_turn, self._note)

    def _end_turn(self) -> None:
        self.turns.append([])

    def _note(self, errors: TunnelErrors) -> None:
        self.turns[-1].extend(errors.exceptions)

    @property
    def errors(self) -> list[Exception]:
        return [error for turn in self.turns for error in turn]

    def waiting(self) -> list[bytes]:
        """Payloads that wait for the portal's answer, in order."""
        waiting = self.state._pending.resolve(KEY)
        return [p.payload for p in waiting.packets] if waiting else []

    def garble(self, count: int) -> None:
        """Datagrams on both sockets that are nothing."""
        for _ in range(count):
            self.noise[0].sendto(b"\xff" * 40, ("127.0.0.1", self.sockets[0].port))
            self.noise[1].sendto(b"\xff" * 40, ("::1", self.sockets[1].port))

    async def until(self, condition: Callable[[], Any]) -> None:
        with trio.fail_after(10):
            while not condition():
                await trio.sleep(0.005)

    def close(self) -> None:
        for thing in (self.tun, *self.sockets, self.app, *self.noise):
            thing.close()


@contextmanager
def rig() -> Iterator[Rig]:
    with Lab() as lab:
        built = Rig(lab.public_host("loop", 50))
        try:
            yield built
        finally:
            built.close()


@pytest.mark.shows("tunnel", 95)
async def test_a_batch_with_bad_packets_delivers_the_rest_in_order() -> None:
    with rig() as r:
        for n in range(100):
            # 10.99.0.0/24 is routed into the device and belongs to no resource
            target = "10.99.0.1" if n in (10, 50, 51) else "10.20.0.9"
            r.app.sendto(b"%03d" % n, (target, 7))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.loop.run)
            await r.until(lambda: len(r.errors) == 3)
            await r.until(lambda: len(r.state._pending._pending[KEY].packets) == 97)
            r.loop.stop()
        assert r.waiting() == [b"%03d" % n for n in range(100) if n not in (10, 50, 51)]
        assert [e.reason for e in r.errors if isinstance(e, PacketError)] == [DropReason.UNKNOWN_RESOURCE] * 3
        assert "10.99.0.1" in str(r.errors[0])


async def test_every_saturated_source_progresses_within_one_turn() -> None:
    with rig() as r:
        ran: list[float] = []
        for n in range(2000):
            r.app.sendto(b"%d" % n, ("10.20.0.9", 7))
        r.garble(3000)
        for _ in range(50):
            r.loop.submit(ran.append)
        r.state.handle_timeout(clock.now())
        await r.loop._turn()
        kinds = [e.source.is_ipv4 for e in r.errors if isinstance(e, PacketError) and e.source is not None]
        assert True in kinds
        assert False in kinds
        assert len(ran) == 50
        assert KEY in r.state._pending
        # and one turn is bounded: it did not run any source dry
        assert r.sockets[0].recv_batch(1)
        assert r.tun.read_batch(1)


@pytest.mark.shows("tunnel", 95)
async def test_a_command_that_fails_costs_no_other_command() -> None:
    with rig() as r:
        ran: list[int] = []

        def fail(now: float) -> None:
            raise ValueError("a message nobody expected")

        for n in range(5):
            r.loop.submit(fail if n == 2 else lambda now, n=n: ran.append(n))
        await r.loop._turn()
        assert ran == [0, 1, 3, 4]
        assert [type(e) for e in r.errors] == [ValueError]


@pytest.mark.shows("tunnel", 95)
async def test_bad_datagrams_in_a_batch_leave_the_rest_in_order() -> None:
    with rig() as r:
        taken: list[bytes] = []

        def take(local: Any, remote: Any, datagram: bytes, ecn: int, now: float) -> PacketError | None:
            if datagram.startswith(b"bad"):
                return PacketError(DropReason.UNKNOWN_DATAGRAM, remote, local)
            taken.append(bytes(datagram))
            return None

        r.state.handle_network_input = take  # type: ignore[method-assign,assignment]
        for n in range(40):
            payload = b"bad" if n in (7, 20, 21) else b"%02d" % n
            r.noise[0].sendto(payload, ("127.0.0.1", r.sockets[0].port))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.loop.run)
            await r.until(lambda: len(r.errors) == 3 and len(taken) == 37)
            r.loop.stop()
        assert taken == [b"%02d" % n for n in range(40) if n not in (7, 20, 21)]
        assert all(str(r.noise[0].getsockname()[1]) in str(e) for e in r.errors)


@pytest.mark.shows("tunnel", 50, 95)
async def test_bad_queries_in_a_batch_leave_the_others_answered() -> None:
    with rig() as r:
        r.state.set_system_resolvers([bytes([192, 0, 2, 53])], clock.now())
        name = DnsResource("00000000-0000-4000-8000-0000000000ab", "*.example", "d", (), (SITE,))
        r.state.handle_portal_message(messages.ResourceCreatedOrUpdated(name), clock.now())
        interface = Interface(r.tun.name)
        with r.host.entered():
            interface.set_addresses(V4, V6)
            interface.set_routes([ip_network("100.100.111.0/24")])
        r.app.setblocking(False)
        for n in range(30):
            query = dns.message.make_query(f"host{n}.example", "A", id=n)
            r.app.sendto(b"\0" * 5 if n in (4, 15) else query.to_wire(), ("100.100.111.1", 53))
        answered: list[int] = []

        def collect() -> bool:
            try:
                while True:
                    answered.append(dns.message.from_wire(r.app.recv(2000)).id)
            except BlockingIOError:
                return len(answered) == 28

        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.loop.run)
            await r.until(collect)
            r.loop.stop()
        assert answered == [n for n in range(30) if n not in (4, 15)]
        assert r.state.drops[DropReason.MALFORMED_DNS] == 2


@pytest.mark.shows("tunnel", 94)
async def test_packets_keep_their_order_when_the_device_makes_us_wait() -> None:
    with rig() as r:
        refusals = iter([True, True, False] * 100)
        write = r.tun.write
        r.tun.write = lambda packet: False if next(refusals) else write(packet)  # type: ignore[method-assign]
        gateway = ip_address("10.20.0.9").packed
        for n in range(20):
            r.loop.submit(lambda now, n=n: r.state._packets.append(build_udp(gateway, V4.packed, 7, 5000, b"%02d" % n)))
        r.app.setblocking(False)
        received: list[bytes] = []

        def collect() -> bool:
            try:
                while True:
                    received.append(r.app.recv(100))
            except BlockingIOError:
                return len(received) == 20

        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.loop.run)
            await r.until(collect)
            r.loop.stop()
        assert received == [b"%02d" % n for n in range(20)]


async def test_errors_of_one_family_do_not_cost_the_other_its_datagrams() -> None:
    with rig() as r:
        r.garble(20)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.loop.run)
            await r.until(lambda: len(r.errors) == 40)
            r.loop.stop()
        assert r.state.drops[DropReason.UNKNOWN_DATAGRAM] == 40


async def test_a_denied_packet_is_answered_by_icmp_through_the_device() -> None:
    with rig() as r:
        r.app.connect(("10.20.0.9", 8))
        r.app.settimeout(0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.loop.run)
            r.app.send(b"denied")
            # the kernel turns "administratively prohibited" into EHOSTUNREACH
            await r.until(lambda: r.app.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
            r.loop.stop()
        assert r.errors == []


async def test_an_idle_loop_does_not_turn() -> None:
    with rig() as r:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.loop.run)
            await trio.sleep(0.3)
            turns = len(r.turns)
            await trio.sleep(0.7)
            assert len(r.turns) - turns <= 2
            r.loop.stop()


async def test_a_stopped_loop_ends_within_a_second() -> None:
    with rig() as r:
        with trio.fail_after(2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(r.loop.run)
                await trio.sleep(0.05)
                r.loop.stop()
