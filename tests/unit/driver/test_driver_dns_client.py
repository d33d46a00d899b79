"""One question to one server (spec/tunnel.md 10, 23 and 24; spec/io.md 14, item 27)."""

from __future__ import annotations

import socket

import dns.message
import pytest
import trio
import trio.testing
from driver_dns_peers import LOOPBACK, Asked, Peer, reply, zone

from fz_core.driver.names.dns_client import DnsClient, DnsFailed, DnsTimeout, TooBusy, exchange
from fz_core.packet import Address

QUERY = dns.message.make_query("www.example", "A", id=0x1234).to_wire()


@pytest.mark.parametrize("tcp", [False, True])
async def test_brings_the_reply(nursery: trio.Nursery, tcp: bool) -> None:
    peer = start(nursery, Peer(zone({("www.example", "A"): ["192.0.2.7"]})))
    found = dns.message.from_wire(await ask(peer, tcp=tcp))
    assert found.id == 0x1234
    assert found.answer[0][0].address == "192.0.2.7"
    assert peer.transports() == ["tcp" if tcp else "udp"]


@pytest.mark.parametrize("tcp", [False, True])
async def test_ignores_what_does_not_match_until_the_reply_comes(nursery: trio.Nursery, tcp: bool) -> None:
    def answer(asked: Asked) -> list[bytes]:
        good = reply(asked, "192.0.2.7")
        other_question = dns.message.make_query("evil.example", "A", id=0x1234)
        other_type = dns.message.make_query("www.example", "AAAA", id=0x1234)
        return [
            b"",
            b"\x12",
            good[:12],
            bytes([good[0] ^ 1]) + good[1:],
            asked.message.to_wire(),
            dns.message.make_response(other_question).to_wire(),
            dns.message.make_response(other_type).to_wire(),
            good,
        ]

    peer = start(nursery, Peer(answer))
    assert dns.message.from_wire(await ask(peer, tcp=tcp)).answer[0][0].address == "192.0.2.7"


@pytest.mark.shows("io", 27)
async def test_a_forged_reply_from_another_address_is_no_answer(nursery: trio.Nursery) -> None:
    """It arrives first, and has the right id and question."""
    forger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    forger.bind(("127.0.0.1", 0))

    def answer(asked: Asked) -> list[bytes]:
        forger.sendto(reply(asked, "192.0.2.66"), ("127.0.0.1", asked.port))
        return [reply(asked, "192.0.2.7")]

    with forger:
        peer = start(nursery, Peer(answer))
        assert dns.message.from_wire(await ask(peer)).answer[0][0].address == "192.0.2.7"


@pytest.mark.shows("io", 27)
@pytest.mark.parametrize("tcp", [False, True])
async def test_a_silent_server_ends_in_a_timeout(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, tcp: bool
) -> None:
    autojump_clock.autojump_threshold = 0.05  # loopback is faster
    peer = start(nursery, Peer(lambda asked: None))
    started = trio.current_time()
    with pytest.raises(DnsTimeout, match="within 5 s") as caught:
        await ask(peer, tcp=tcp, timeout=5.0)
    assert trio.current_time() - started == pytest.approx(5.0, abs=0.1)
    assert "\n" not in str(caught.value)
    assert len(peer.asked) == 1


@pytest.mark.parametrize("tcp", [False, True])
async def test_a_closed_port_fails_at_once(tcp: bool) -> None:
    with pytest.raises(DnsFailed, match="refused"):
        await exchange(closed_port(), QUERY, tcp=tcp, timeout=30.0, marked=False)


async def test_a_connection_closed_without_an_answer(nursery: trio.Nursery) -> None:
    listeners = await nursery.start(trio.serve_tcp, _close, 0)
    address = Address(LOOPBACK, listeners[0].socket.getsockname()[1])
    with pytest.raises(DnsFailed, match=r"closed|reset"):
        await exchange(address, QUERY, tcp=True, timeout=30.0, marked=False)


@pytest.mark.parametrize("server", ["fe80::1", "203.0.113.1"])
async def test_an_unusable_local_address_or_server_is_one_line(server: str) -> None:
    """Neither a link-local server without a link nor an address that is not ours raises anything else."""
    address = Address.parse(f"[{server}]:53" if ":" in server else f"{server}:53")
    local = socket.inet_pton(socket.AF_INET6 if ":" in server else socket.AF_INET, "2001:db8::1"
                             if ":" in server else "192.0.2.1")  # fmt: skip
    with pytest.raises(DnsFailed) as caught:
        await exchange(address, QUERY, tcp=False, timeout=30.0, local_ip=local, marked=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "query", [b"", b"\x00" * 12, dns.message.make_response(dns.message.from_wire(QUERY)).to_wire()]
)
async def test_what_is_no_query_is_not_sent(query: bytes) -> None:
    with pytest.raises(DnsFailed, match="not a DNS query"):
        await exchange(closed_port(), query, tcp=False, timeout=1.0, marked=False)


async def test_largest_message_over_tcp(nursery: trio.Nursery) -> None:
    peer = start(nursery, Peer(lambda asked: [reply(asked, "192.0.2.7").ljust(65_535, b"\0")]))
    assert len(await ask(peer, tcp=True)) == 65_535


@pytest.mark.shows("io", 27)
async def test_every_query_has_its_own_port(nursery: trio.Nursery) -> None:
    """Sockets open at the same time cannot share one, so this shows that none is reused."""
    client = DnsClient()
    peer = start(nursery, Peer(lambda asked: None))
    async with trio.open_nursery() as inner:
        with trio.fail_after(30):
            for count in range(1, 1001):
                inner.start_soon(_ask_until, client, peer)
                while count % 50 == 0 and len(peer.asked) < count:  # no more at once than its socket holds
                    await trio.lowlevel.checkpoint()
        assert client.in_flight == 1000
        client.reset()
    assert len({asked.port for asked in peer.asked}) == len(peer.asked) == 1000


async def test_above_the_limit_and_after_a_reset(nursery: trio.Nursery) -> None:
    client = DnsClient(limit=2)
    peer = start(nursery, Peer(lambda asked: None))
    failed: list[str] = []

    async def ask_one() -> None:
        try:
            await client.exchange(peer.address, QUERY, tcp=False, timeout=60.0, marked=False)
        except DnsFailed as error:
            failed.append(str(error))

    async with trio.open_nursery() as inner:
        inner.start_soon(ask_one)
        inner.start_soon(ask_one)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(TooBusy):
            await client.exchange(peer.address, QUERY, tcp=False, timeout=60.0, marked=False)
        client.reset()
    assert failed == ["the network was reset"] * 2
    assert client.in_flight == 0


def start(nursery: trio.Nursery, peer: Peer) -> Peer:
    nursery.start_soon(peer.run)
    return peer


async def ask(peer: Peer, *, tcp: bool = False, timeout: float = 60.0) -> bytes:
    return await exchange(peer.address, QUERY, tcp=tcp, timeout=timeout, marked=False)


async def _ask_until(client: DnsClient, peer: Peer) -> None:
    with pytest.raises(DnsFailed, match="reset"):
        await client.exchange(peer.address, QUERY, tcp=False, timeout=60.0, marked=False)


async def _close(stream: trio.SocketStream) -> None:
    await stream.receive_some()


def closed_port() -> Address:
    """A port of ours nobody listens on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return Address(LOOPBACK, sock.getsockname()[1])
