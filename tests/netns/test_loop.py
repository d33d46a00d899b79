"""The event loop on a real TUN device and real sockets: spec/io.md §14 items 1 to 11; `design.md` §5."""

from __future__ import annotations

import contextlib
import errno
import os
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
from fz_core.linux import TunDevice, TunError, UdpSocket
from fz_core.linux.netlink import Interface
from fz_core.packet import Address, DropReason, Transmit, build_udp
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

    def replace_loop(
        self, on_resume: Callable[[float, float], None], now: Callable[[], float], suspended: Callable[[], float]
    ) -> Loop:
        """A loop with clocks of the test's."""
        with self.host.entered():
            sockets = [UdpSocket.bind(family, 0) for family in (socket.AF_INET, socket.AF_INET6)]
        self.loop.close()
        self.loop = Loop(
            self.state, self.tun, sockets, self._end_turn, self._note, on_resume, now=now, suspended=suspended
        )
        return self.loop

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
        for thing in (self.loop, self.tun, *self.sockets, self.app, *self.noise):
            thing.close()


@contextmanager
def rig() -> Iterator[Rig]:
    with Lab() as lab:
        built = Rig(lab.public_host("loop", 50))
        try:
            yield built
        finally:
            built.close()


@pytest.mark.shows("io", 2)
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


@pytest.mark.shows("io", 1)
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


@pytest.mark.shows("io", 3)
async def test_errors_of_one_family_do_not_cost_the_other_its_datagrams() -> None:
    with rig() as r:
        fail_next_receive(r.sockets[1])
        for _ in range(20):
            r.noise[0].sendto(b"\xff" * 40, ("127.0.0.1", r.sockets[0].port))
        await r.loop._turn()  # both are read in this one; socket errors are told by the next
        r.noise[1].sendto(b"\xff" * 40, ("::1", r.sockets[1].port))
        await r.loop._turn()
        refused = [e for e in r.errors if isinstance(e, OSError)]
        assert [e.errno for e in refused] == [errno.ECONNREFUSED]
        assert r.state.drops[DropReason.UNKNOWN_DATAGRAM] == 16 + 1 + 4


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


@pytest.mark.shows("io", 4)
async def test_a_full_device_stops_reading_until_it_takes_packets_again() -> None:
    with rig() as r:
        is_full, write = True, r.tun.write
        r.tun.write = lambda packet: not is_full and write(packet)  # type: ignore[method-assign]
        gateway = ip_address("10.20.0.9").packed
        for n in range(3):
            r.loop.submit(
                lambda now, n=n: r.state._packets.append(build_udp(gateway, V4.packed, 7, 5000, b"ABC"[n : n + 1]))
            )
        r.app.settimeout(10)
        ran: list[float] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.loop.run)
            await r.until(lambda: r.loop._tun_backlog)
            r.garble(5)
            r.app.sendto(b"x", ("10.20.0.9", 7))
            for n in range(20):
                r.loop.submit(ran.append)
                await r.until(lambda n=n: len(ran) == n + 1)
            assert r.errors == []
            assert r.waiting() == []
            is_full = False
            await r.until(lambda: len(r.errors) == 10 and r.waiting() == [b"x"])
            r.loop.stop()
        assert [r.app.recv(100) for _ in range(3)] == [b"A", b"B", b"C"]


@pytest.mark.shows("io", 6)
async def test_a_turn_writes_all_its_packets_in_order() -> None:
    """The reference hands batches of 100 to another thread; here nothing lies between the state and the device."""
    with rig() as r:
        gateway = ip_address("10.20.0.9").packed
        for n in range(205):
            port = 1000 + n % 7  # flows that cannot be merged with their neighbours
            r.state._packets.append(build_udp(gateway, V4.packed, port, 5000, b"%03d" % n))
        r.loop.submit(lambda now: None)
        await r.loop._turn()
        r.app.settimeout(10)
        received = [r.app.recvfrom(100) for _ in range(205)]
        by_flow = {source: [int(data) for data, from_ in received if from_ == source] for _, source in received}
        assert all(numbers == sorted(numbers) for numbers in by_flow.values())
        assert sorted(int(data) for data, _ in received) == list(range(205))


@pytest.mark.shows("io", 5)
async def test_a_full_socket_keeps_its_datagrams_in_order_and_stalls_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """IPv4 leaves by a slow link, IPv6 by loopback."""
    monkeypatch.setenv("FIREZONE_UDP_SEND_BUFFER_SIZE", "5000")
    with rig() as r:
        far = r.host.lab.public_host("far", 51)
        sink = far.socket()
        sink.bind((far.ipv4, 7000))
        sink.setblocking(False)
        r.noise[1].bind(("::1", 7000))
        r.noise[1].setblocking(False)
        slow_down(r.host)
        v4, v6 = Address.parse(f"{far.ipv4}:7000"), Address.parse("[::1]:7000")
        v4_lane, v6_lane = r.loop._lanes
        received: dict[socket.socket, list[bytes]] = {sink: [], r.noise[1]: []}

        def send(now: float) -> None:
            for n in range(300):
                r.state._transmits.append(Transmit(b"%03d" % n + bytes(900 + n % 2), v4))
            r.state._transmits.extend(Transmit(b"%03d" % n, v6) for n in range(50))

        def has(sock: socket.socket, count: int) -> bool:
            with contextlib.suppress(BlockingIOError):
                while True:
                    received[sock].append(sock.recv(2000)[:3])
            return len(received[sock]) == count

        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.loop.run)
            r.loop.submit(send)
            await r.until(lambda: v4_lane.is_blocked and has(r.noise[1], 50))
            assert v4_lane.is_blocked
            assert not v6_lane.is_blocked
            assert not has(sink, 300)
            r.app.sendto(b"x", ("10.20.0.9", 7))
            await r.until(lambda: r.waiting() == [b"x"])
            await r.until(lambda: has(sink, 300))
            r.loop.stop()
        assert received[sink] == [b"%03d" % n for n in range(300)]
        assert received[r.noise[1]] == [b"%03d" % n for n in range(50)]
        assert r.errors == []
        sink.close()


async def test_a_socket_that_takes_nothing_stalls_the_device_only_for_a_moment() -> None:
    with rig() as r:
        far, stuck = Address.parse("203.0.113.9:1"), True
        v4_lane, _ = r.loop._lanes
        r.sockets[0].send_batch = lambda *_: 0 if stuck else None  # type: ignore[method-assign]

        def send(now: float) -> None:
            for n in range(600):
                r.state._transmits.append(Transmit(bytes(1 + n % 2), far))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.loop.run)
            r.loop.submit(send)
            await r.until(lambda: len(v4_lane) >= 128)
            assert v4_lane.patience_ends_at() is not None
            r.app.sendto(b"x", ("10.20.0.9", 7))
            await r.until(lambda: r.waiting() == [b"x"])
            assert v4_lane.is_blocked
            assert len(v4_lane) <= 256
            assert r.state.drops[DropReason.BUFFER_FULL] > 0
            stuck = False
            await r.until(lambda: len(v4_lane) == 0)
            r.loop.stop()


async def test_without_a_socket_of_one_family_its_datagrams_are_counted() -> None:
    with rig() as r:
        r.loop.rebind(lambda: [])
        r.state._transmits.append(Transmit(b"x", Address.parse("203.0.113.9:1")))
        r.loop.submit(lambda now: None)
        await r.loop._turn()
        assert r.state.drops[DropReason.NOT_CONNECTED] == 1
        assert r.loop.sockets == []


@pytest.mark.shows("io", 24)
async def test_new_sockets_have_the_old_ports_and_carry_what_the_same_turn_brings() -> None:
    with rig() as r:
        r.noise[0].bind(("127.0.0.1", 0))
        r.noise[0].settimeout(10)
        remote = Address(bytes([127, 0, 0, 1]), r.noise[0].getsockname()[1])
        ports = [udp.port for udp in r.sockets]
        assert ports == [52625, 52625]
        r.loop._lanes.append(Transmit(b"of the old network", remote))

        def open_again() -> list[UdpSocket]:
            with r.host.entered():
                return [UdpSocket.bind(family) for family in (socket.AF_INET, socket.AF_INET6)]

        def reset(now: float) -> None:
            r.loop.rebind(open_again)
            r.state._transmits.append(Transmit(b"first", remote))

        r.loop.submit(reset)
        await r.loop._turn()
        assert [udp.port for udp in r.loop.sockets] == ports
        assert r.noise[0].recvfrom(100) == (b"first", ("127.0.0.1", 52625))
        r.garble(3)
        await r.loop._turn()
        assert r.state.drops[DropReason.UNKNOWN_DATAGRAM] == 6


@pytest.mark.shows("io", 7)
async def test_a_deadline_is_kept_whatever_else_happens_and_nothing_else_wakes_the_loop() -> None:
    with rig() as r:
        due: list[float] = []
        calls: list[float] = []
        r.state.poll_timeout = lambda: (due[0], "test") if due else None  # type: ignore[method-assign]

        def handle_timeout(now: float) -> None:
            calls.append(now)
            if due and due[0] <= now:
                due.pop(0)

        set_at: list[float] = []

        def nearer(now: float) -> None:
            due.insert(0, now + 0.2)
            set_at.append(now)

        r.state.handle_timeout = handle_timeout  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.loop.run)
            await trio.sleep(0.05)
            assert calls == []
            # a change without any output; then a nearer deadline; then noise, which must not put it off
            r.loop.submit(lambda now: due.append(now + 300.0))
            r.loop.submit(nearer)
            while not calls:
                r.loop.submit(lambda now: None)
                await trio.sleep(0.01)
            assert calls[0] >= set_at[0] + 0.2
            await trio.sleep(0.1)
            assert len(calls) == 1
            r.loop.stop()


@pytest.mark.shows("io", 8)
async def test_permanent_input_leaves_turns_to_others() -> None:
    with rig() as r:
        turns: list[float] = []

        def again(now: float) -> None:
            turns.append(now)
            r.loop.submit(again)

        others = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.loop.run)
            r.loop.submit(again)
            await r.until(lambda: turns)
            for _ in range(50):
                before = len(turns)
                await trio.lowlevel.checkpoint()
                others += 1
                await r.until(lambda before=before: len(turns) > before)
            r.loop.stop()
        assert others == 50


@pytest.mark.shows("io", 9)
async def test_a_suspend_is_noticed_and_time_never_goes_back() -> None:
    with rig() as r:
        jumped, slept = 0.0, 0.0
        resumed: list[float] = []
        loop = r.replace_loop(lambda seconds, now: resumed.append(seconds), lambda: clock.now() + jumped, lambda: slept)
        start = clock.now()
        timeouts: list[float] = []
        seen: list[float] = []
        r.state.poll_timeout = lambda: (start + 500.0, "test") if not timeouts else None  # type: ignore[method-assign]
        r.state.handle_timeout = timeouts.append  # type: ignore[method-assign,assignment]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.run)
            loop.submit(seen.append)
            await r.until(lambda: seen)
            assert timeouts == []
            jumped = slept = 600.0
            loop.submit(seen.append)  # as the timer of the kernel would wake it
            await r.until(lambda: timeouts and len(seen) == 2)
            jumped = 100.0
            loop.submit(seen.append)
            await r.until(lambda: len(seen) == 3)
            loop.stop()
        assert resumed == [600.0]
        assert timeouts[0] >= start + 600.0
        assert seen[1] >= seen[0] + 600.0
        assert seen[2] >= seen[1]


@pytest.mark.shows("io", 10)
async def test_a_dead_device_ends_the_loop() -> None:
    with rig() as r:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, r.host.ip, "link", "del", "tun-firezone")
            with pytest.raises(TunError, match="was the device deleted"), trio.fail_after(10):
                await r.loop.run()


@pytest.mark.shows("io", 11)
async def test_goodbyes_are_flushed_but_a_blocked_network_costs_a_second_at_most() -> None:
    with rig() as r:
        r.noise[0].bind(("127.0.0.1", 0))
        r.noise[0].settimeout(10)
        remote = Address(bytes([127, 0, 0, 1]), r.noise[0].getsockname()[1])
        r.state.shutdown = lambda now: r.state._transmits.append(Transmit(b"goodbye", remote))  # type: ignore[method-assign]
        loop = r.loop
        loop.stop()
        await loop.run()
        assert r.noise[0].recv(100) == b"goodbye"
    with rig() as r:
        r.sockets[0].send_batch = lambda *_: 0  # type: ignore[method-assign]
        r.state.shutdown = lambda now: r.state._transmits.append(Transmit(b"goodbye", remote))  # type: ignore[method-assign]
        r.loop.stop()
        with trio.fail_after(5):
            await r.loop.run()


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


def fail_next_receive(udp: UdpSocket) -> None:
    """An ICMP error, told by the next receive: asked for just long enough to get one."""
    with socket.socket(fileno=os.dup(udp.fileno())) as copy:
        copy.setsockopt(socket.IPPROTO_IPV6, 25, 1)  # IPV6_RECVERR
        copy.sendto(b"nobody", ("::1", 9))
        copy.setsockopt(socket.IPPROTO_IPV6, 25, 0)


def slow_down(host: Host) -> None:
    """2 Mbit/s, in a queue that holds everything, and with it the socket's buffer."""
    shaper = ["tbf", "rate", "2mbit", "burst", "2000", "limit", "1000000"]
    host.run("tc", "qdisc", "add", "dev", "eth0", "root", *shaper)
