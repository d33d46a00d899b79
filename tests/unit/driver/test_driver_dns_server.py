"""The gateway's DNS server in the tunnel (spec/tunnel.md 17 and 23; spec/io.md 14, item 28)."""

from __future__ import annotations

import socket

import dns.message
import dns.rcode
import pytest
import trio
import trio.testing
from driver_dns_peers import LOOPBACK, Asked, Peer, reply, zone

from fz_core.driver.names.dns_client import DnsFailed, Frames, exchange
from fz_core.driver.names.dns_server import PORT as DNS_PORT_IN_TUNNEL
from fz_core.driver.names.dns_server import TunnelDnsServer
from fz_core.driver.names.nameservers import Nameservers
from fz_core.linux import HostError
from fz_core.packet import Address

OTHER = bytes([127, 0, 0, 3])
V6 = bytes(15) + b"\x01"
SRV = zone(
    {
        ("_sip._tcp.site.example", "SRV"): ["1 2 5060 sip.site.example."],
        ("site.example", "TXT"): ['"hello"'],
        ("sip.site.example", "A"): ["192.0.2.7"],
    }
)
LARGE = zone({("large.example", "TXT"): [f'"{n:03}{"x" * 200}"' for n in range(20)]})


@pytest.mark.shows("io", 28)
@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("ip", [LOOPBACK, V6])
async def test_passes_questions_on_by_the_same_transport(system: System, tcp: bool, ip: bytes) -> None:
    await system.start(SRV)
    for name, rdtype in (("_sip._tcp.site.example", "SRV"), ("site.example", "TXT"), ("sip.site.example", "A")):
        found = await system.ask(name, rdtype, tcp=tcp, ip=ip)
        assert found.answer[0].rdtype.name == rdtype
    assert system.upstream.transports() == ["tcp" if tcp else "udp"] * 3
    assert DNS_PORT_IN_TUNNEL == 53535  # what official clients ask


@pytest.mark.shows("io", 28)
async def test_a_large_answer_is_cut_off_by_udp_and_whole_by_tcp(system: System) -> None:
    await system.start(LARGE)
    query = dns.message.make_query("large.example", "TXT", id=7, use_edns=0, payload=4096).to_wire()
    cut = await exchange(system.address(), query, tcp=False, timeout=20, marked=False)
    message = dns.message.from_wire(cut)
    assert len(cut) <= 1200
    assert message.flags & dns.flags.TC
    assert (len(message.question), len(message.answer)) == (1, 0)
    whole = await exchange(system.address(), query, tcp=True, timeout=20, marked=False)
    assert len(dns.message.from_wire(whole).answer[0]) == 20


@pytest.mark.shows("io", 28)
async def test_many_questions_on_one_connection(system: System) -> None:
    await system.start(SRV)
    stream = await trio.open_tcp_stream("127.0.0.1", system.port)
    frames = Frames(stream)
    async with stream:
        for n in range(5):
            await frames.send(dns.message.make_query("site.example", "TXT", id=n).to_wire())
            assert dns.message.from_wire(await frames.receive() or b"").id == n


@pytest.mark.shows("io", 28)
@pytest.mark.parametrize("tcp", [False, True])
async def test_without_a_name_server_the_answer_is_servfail(system: System, tcp: bool) -> None:
    await system.start(SRV)
    system.nameservers.fastest = None
    assert (await system.ask("site.example", "TXT", tcp=tcp)).rcode() == dns.rcode.SERVFAIL


@pytest.mark.parametrize("tcp", [False, True])
async def test_silence_above_becomes_servfail_after_five_seconds(
    system: System, autojump_clock: trio.testing.MockClock, tcp: bool
) -> None:
    autojump_clock.autojump_threshold = 0.05
    await system.start(lambda asked: None)
    started = trio.current_time()
    assert (await system.ask("site.example", "TXT", tcp=tcp)).rcode() == dns.rcode.SERVFAIL
    assert trio.current_time() - started == pytest.approx(5.0, abs=0.3)


@pytest.mark.parametrize("garbage", [b"", b"x", bytes(12), bytes(100), dns.message.make_response(
    dns.message.make_query("a.example", "A")).to_wire()])  # fmt: skip
async def test_what_is_no_query_gets_no_reply(system: System, garbage: bytes) -> None:
    await system.start(SRV)
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        await sock.sendto(garbage, ("127.0.0.1", system.port))
        query = dns.message.make_query("site.example", "TXT", id=9).to_wire()
        await sock.sendto(query, ("127.0.0.1", system.port))
        assert (await sock.recv(2000))[:2] == b"\x00\x09"
    stream = await trio.open_tcp_stream("127.0.0.1", system.port)
    async with stream:
        await Frames(stream).send(garbage)
        assert await Frames(stream).receive() is None
    assert len(system.upstream.asked) == 1


async def test_an_idle_connection_is_closed(system: System, autojump_clock: trio.testing.MockClock) -> None:
    autojump_clock.autojump_threshold = 0.05
    await system.start(SRV)
    stream = await trio.open_tcp_stream("127.0.0.1", system.port)
    async with stream:
        await stream.send_all(b"\x00")
        assert await stream.receive_some() == b""


@pytest.mark.shows("tunnel", 54)
async def test_changing_addresses_with_questions_under_way(
    system: System, autojump_clock: trio.testing.MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.05
    await system.start(lambda asked: None)
    query = dns.message.make_query("site.example", "TXT", id=9).to_wire()

    async def ask(tcp: bool) -> None:
        with pytest.raises(DnsFailed):
            await exchange(system.address(), query, tcp=tcp, timeout=20, marked=False)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, False)
        nursery.start_soon(ask, True)
        with trio.fail_after(10):
            while len(system.upstream.asked) < 2:
                await trio.lowlevel.checkpoint()
        await system.server.serve([OTHER], system.port)
    system.upstream.answer = SRV
    assert (await system.ask("site.example", "TXT", ip=OTHER)).answer
    with pytest.raises(DnsFailed, match="refused"):
        await exchange(system.address(), query, tcp=True, timeout=20, marked=False)


async def test_serving_the_same_addresses_again_keeps_connections(system: System) -> None:
    await system.start(SRV)
    stream = await trio.open_tcp_stream("127.0.0.1", system.port)
    async with stream:
        await system.server.serve([LOOPBACK, V6], system.port)
        await Frames(stream).send(dns.message.make_query("site.example", "TXT", id=3).to_wire())
        assert await Frames(stream).receive()


@pytest.mark.shows("tunnel", 60)
async def test_an_address_that_is_not_ours_leaves_no_socket(
    system: System, autojump_clock: trio.testing.MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.05
    await system.start(SRV)
    port = free_port()
    started = trio.current_time()
    with pytest.raises(HostError) as caught:
        await system.server.serve([LOOPBACK, bytes([192, 0, 2, 1])], port)
    assert trio.current_time() - started == pytest.approx(0.2, abs=0.05)
    for text in (f"UDP 192.0.2.1:{port}", f"TCP 192.0.2.1:{port}"):
        assert text in str(caught.value)
    assert "127.0.0.1" not in str(caught.value)
    assert "\n" not in str(caught.value)
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with socket.socket(socket.AF_INET, kind) as sock:
            sock.bind(("127.0.0.1", port))
    await system.server.serve([LOOPBACK], system.port)
    assert (await system.ask("site.example", "TXT")).answer


async def test_an_address_that_comes_late_is_bound(system: System, nursery: trio.Nursery) -> None:
    """The port is freed between two attempts."""
    await system.start(SRV)
    port = free_port()
    holder = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    holder.bind(("127.0.0.1", port))

    async def free() -> None:
        await trio.testing.wait_all_tasks_blocked()
        holder.close()

    nursery.start_soon(free)
    await system.server.serve([LOOPBACK], port)
    system.port = port
    assert (await system.ask("site.example", "TXT")).answer


async def test_each_asker_gets_the_answer_to_its_own_question(system: System) -> None:
    """Same ids, one socket: replies go by address and port."""

    def answer(asked: Asked) -> list[bytes]:
        return [reply(asked, f'"{asked.name}"')]

    await system.start(answer)

    async def ask(n: int) -> None:
        found = await system.ask(f"n{n}.example", "TXT")
        assert found.answer[0][0].strings == (f"n{n}.example".encode(),)

    async with trio.open_nursery() as nursery:
        for n in range(50):
            nursery.start_soon(ask, n)


class System:
    """A server on loopback and the name server behind it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.nameservers = Nameservers(())
        self.port = 0

    async def start(self, behaviour) -> None:  # type: ignore[no-untyped-def]
        self.upstream = Peer(behaviour)
        self.nameservers.fastest = LOOPBACK
        self.server = TunnelDnsServer(self.nameservers, upstream_port=self.upstream.port, marked=False)
        self._nursery.start_soon(self.upstream.run)
        self._nursery.start_soon(self.server.run)
        await trio.testing.wait_all_tasks_blocked()
        self.port = free_port()
        await self.server.serve([LOOPBACK, V6], self.port)

    def address(self, ip: bytes = LOOPBACK) -> Address:
        return Address(ip, self.port)

    async def ask(self, name: str, rdtype: str, *, tcp: bool = False, ip: bytes = LOOPBACK) -> dns.message.Message:
        query = dns.message.make_query(name, rdtype, id=5).to_wire()
        return dns.message.from_wire(await exchange(self.address(ip), query, tcp=tcp, timeout=20, marked=False))


@pytest.fixture
def system(nursery: trio.Nursery) -> System:
    return System(nursery)


def free_port() -> int:
    """Free for UDP and TCP on loopback just now."""
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.bind(("127.0.0.1", 0))
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
                try:
                    tcp.bind(udp.getsockname())
                except OSError:
                    continue
                return int(udp.getsockname()[1])


async def test_who_is_cancelled_while_the_server_ends_is_just_cancelled() -> None:
    """A gateway may be told to stop while its device is configured in a thread, which comes to an end first."""
    server = TunnelDnsServer(Nameservers(()))
    with trio.CancelScope() as stopped:
        stopped.cancel()
        await server.serve((LOOPBACK,))
    assert stopped.cancelled_caught
    with pytest.raises(RuntimeError, match="the server must run before it can serve"):
        await server.serve((LOOPBACK,))
