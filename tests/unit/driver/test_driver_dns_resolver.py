"""The gateway's resolver for names of DNS resources (spec/tunnel.md 17)."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from random import Random

import dns.flags
import dns.message
import dns.rrset
import pytest
import trio
import trio.testing
from driver_dns_peers import Asked, Behaviour, Peer, reply, response, zone

from fz_core.driver.names.resolver import LibcResolver, NameResolver, Resolved, ResolveTimeout, TooBusy

IPS = (bytes([127, 0, 0, 1]), bytes([127, 0, 0, 2]))
BOTH = zone({("both.example", "A"): ["192.0.2.1", "192.0.2.2"], ("both.example", "AAAA"): ["2001:db8::1"]})


async def test_both_families(system: System) -> None:
    resolver, peer = await system.start(BOTH)
    assert await resolve(resolver, "both.example") == ips("192.0.2.1", "192.0.2.2", "2001:db8::1")
    assert sorted((a.transport, a.rdtype) for a in peer.asked) == [("udp", "A"), ("udp", "AAAA")]


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ({("x.example", "A"): ["192.0.2.1"]}, ["192.0.2.1"]),
        ({("x.example", "AAAA"): ["2001:db8::1"]}, ["2001:db8::1"]),
        ({("other.example", "A"): ["192.0.2.1"]}, []),
        ({("x.example", "A"): [f"10.0.{n // 250}.{n % 250}" for n in range(70)]}, 64),
    ],
    ids=["A only", "AAAA only", "no such name", "too many"],
)
async def test_what_a_name_has(system: System, records: dict, expected: list[str] | int) -> None:  # type: ignore[type-arg]
    resolver, _ = await system.start(zone(records))
    found = await resolve(resolver, "X.example.")
    if isinstance(expected, int):
        assert len(found.v4) == expected
    else:
        assert found == ips(*expected)


async def test_aliases_are_followed(system: System) -> None:
    def answer(asked: Asked) -> list[bytes]:
        message = dns.message.make_response(asked.message)
        message.answer.append(dns.rrset.from_text("www.example.", 60, "IN", "CNAME", "host.example."))
        if asked.rdtype == "A":
            message.answer.append(dns.rrset.from_text("host.example.", 60, "IN", "A", "192.0.2.4"))
        message.answer.append(dns.rrset.from_text("stranger.example.", 60, "IN", asked.rdtype, *EXTRA[asked.rdtype]))
        return [message.to_wire()]

    resolver, _ = await system.start(answer)
    assert await resolve(resolver, "www.example") == ips("192.0.2.4")


async def test_equal_questions_at_the_same_time_are_one(system: System) -> None:
    resolver, peer = await system.start(BOTH)
    peer.delay = 0.01
    found: list[Resolved] = []
    async with trio.open_nursery() as nursery:
        for name in ("both.example", "BOTH.example", "both.example."):
            nursery.start_soon(_resolve_into, resolver, name, found)
    assert found == [ips("192.0.2.1", "192.0.2.2", "2001:db8::1")] * 3
    assert len(peer.asked) == 2


class TestMemory:
    async def test_by_ttl(self, system: System) -> None:
        resolver, peer = await system.start(zone({("x.example", "A"): ["192.0.2.1"], ("x.example", "AAAA"): []}, 60))
        await resolve(resolver, "x.example")
        system.now += 59.0
        await resolve(resolver, "x.example")
        assert asked(peer, "A") == 1
        system.now += 2.0
        await resolve(resolver, "x.example")
        assert asked(peer, "A") == 2

    async def test_ttl_zero_is_not_kept(self, system: System) -> None:
        resolver, peer = await system.start(zone({("x.example", "A"): ["192.0.2.1"]}, ttl=0))
        for _ in range(2):
            assert (await resolve(resolver, "x.example")).v4
        assert asked(peer, "A") == 2

    async def test_denials_by_the_soa_record(self, system: System) -> None:
        def deny(asked: Asked) -> list[bytes]:
            message = response(asked, exists=False)
            soa = "ns.example. admin.example. 1 2 3 4 30"
            message.authority.append(dns.rrset.from_text("example.", 600, "IN", "SOA", soa))
            return [message.to_wire()]

        resolver, peer = await system.start(deny)
        for later, expected in ((0.0, 1), (29.0, 1), (2.0, 2)):
            system.now += later
            assert await resolve(resolver, "x.example") == ips()
            assert asked(peer, "A") == expected

    async def test_failures_are_not_kept(self, system: System) -> None:
        resolver, peer = await system.start(lambda asked: [reply(asked, rcode="SERVFAIL")])
        assert await resolve(resolver, "both.example") == ips()
        peer.answer = BOTH
        assert (await resolve(resolver, "both.example")).v4


class TestHosts:
    async def test_come_first_and_for_both_families(self, system: System) -> None:
        system.hosts.write_text("192.0.2.50 both.example\n")
        resolver, peer = await system.start(BOTH)
        assert await resolve(resolver, "both.example") == ips("192.0.2.50")
        assert peer.asked == []

    async def test_are_read_again_when_changed(self, system: System) -> None:
        resolver, _ = await system.start(BOTH)
        assert len((await resolve(resolver, "both.example")).v4) == 2
        system.hosts.write_text("192.0.2.50 both.example\n")
        system.now += 1.5
        assert await resolve(resolver, "both.example") == ips("192.0.2.50")
        system.hosts.write_text("192.0.2.51 both.example\n")
        os.utime(system.hosts, ns=(5, 5))
        system.now += 1.5
        assert await resolve(resolver, "both.example") == ips("192.0.2.51")


class TestServers:
    async def test_a_cut_off_answer_is_asked_for_by_tcp(self, system: System) -> None:
        def answer(asked: Asked) -> list[bytes]:
            if asked.transport == "tcp":
                return BOTH(asked) or []
            message = dns.message.make_response(asked.message)
            message.flags |= dns.flags.TC
            return [message.to_wire()]

        resolver, peer = await system.start(answer)
        assert await resolve(resolver, "both.example") == ips("192.0.2.1", "192.0.2.2", "2001:db8::1")
        assert sorted(peer.transports()) == ["tcp", "tcp", "udp", "udp"]

    async def test_a_server_without_edns_is_asked_without(self, system: System) -> None:
        def answer(asked: Asked) -> list[bytes]:
            return [reply(asked, rcode="FORMERR")] if asked.message.edns >= 0 else BOTH(asked) or []

        resolver, _ = await system.start(answer)
        assert len((await resolve(resolver, "both.example")).v4) == 2

    async def test_an_unhelpful_server_gives_way_to_the_next(self, system: System) -> None:
        resolver, first, second = await system.start_two(lambda asked: [reply(asked, rcode="REFUSED")], BOTH)
        assert len((await resolve(resolver, "both.example")).v4) == 2
        assert (len(first.asked), len(second.asked)) == (2, 2)

    async def test_a_silent_server_gives_way_and_is_asked_last_for_a_while(
        self, system: System, autojump_clock: trio.testing.MockClock
    ) -> None:
        autojump_clock.autojump_threshold = 0.05
        system.follow_trio = True
        resolver, first, second = await system.start_two(lambda asked: None, BOTH)
        started = trio.current_time()
        assert len((await resolve(resolver, "both.example")).v4) == 2
        assert trio.current_time() - started == pytest.approx(2.0, abs=0.2)
        await resolve(resolver, "other.example")
        assert (len(first.asked), len(second.asked)) == (2, 4)
        await trio.sleep(31.0)
        await resolve(resolver, "third.example")
        assert len(first.asked) == 4

    async def test_nobody_answers(self, system: System, autojump_clock: trio.testing.MockClock) -> None:
        """Two servers, two rounds, two seconds each."""
        autojump_clock.autojump_threshold = 0.05
        system.follow_trio = True
        resolver, first, second = await system.start_two(lambda asked: None, lambda asked: [b"garbage"])
        started = trio.current_time()
        with pytest.raises(ResolveTimeout, match="no name server answered"):
            await resolve(resolver, "both.example")
        assert trio.current_time() - started == pytest.approx(8.0, abs=0.5)
        assert (len(first.asked), len(second.asked)) == (4, 4)
        assert resolver.in_flight == 0

    async def test_one_family_is_better_than_none(self, system: System, autojump_clock: trio.testing.MockClock) -> None:
        autojump_clock.autojump_threshold = 0.05
        system.follow_trio = True
        resolver, _ = await system.start(lambda asked: BOTH(asked) if asked.rdtype == "A" else None)
        assert await resolve(resolver, "both.example") == ips("192.0.2.1", "192.0.2.2")

    async def test_a_closed_port_fails_at_once(self, system: System) -> None:
        resolver, _ = await system.start(BOTH, serve=False)
        with pytest.raises(ResolveTimeout):
            await resolve(resolver, "both.example")

    async def test_without_servers(self, nursery: trio.Nursery, tmp_path: Path) -> None:
        resolver = NameResolver((), tmp_path / "hosts")
        nursery.start_soon(resolver.run)
        with pytest.raises(ResolveTimeout):
            await resolve(resolver, "both.example")

    async def test_forged_replies_do_not_count(self, system: System) -> None:
        """The port is right; id, question or direction are not."""

        def answer(asked: Asked) -> list[bytes]:
            good = reply(asked, *BAD[asked.rdtype])
            other = dns.message.make_query("other.example", asked.rdtype, id=asked.message.id)
            forged = [bytes([good[0] ^ 255]) + good[1:], dns.message.make_response(other).to_wire(), good[:2] + b"\0"]
            return [*forged, good[:2] + b"\x01\x20" + good[4:], *(BOTH(asked) or [])]

        resolver, _ = await system.start(answer)
        assert await resolve(resolver, "both.example") == ips("192.0.2.1", "192.0.2.2", "2001:db8::1")

    async def test_a_reply_that_does_not_decode_counts_as_a_failure(self, system: System) -> None:
        def answer(asked: Asked) -> list[bytes]:
            return [reply(asked, *BAD[asked.rdtype])[:-2] + b"\xff"]

        resolver, _ = await system.start(answer)
        assert await resolve(resolver, "both.example") == ips()


@pytest.mark.parametrize("seed", range(4))
async def test_garbage_never_raises_anything_else(
    system: System, autojump_clock: trio.testing.MockClock, seed: int
) -> None:
    """Replies with bytes changed, cut or added behind the question, over both transports."""
    autojump_clock.autojump_threshold = 0.02
    system.follow_trio = True
    random = Random(seed)

    def answer(asked: Asked) -> list[bytes]:
        start = 12 + len(asked.name) + 6
        data = bytearray(reply(asked, *BAD[asked.rdtype]))
        for _ in range(random.randint(1, 5)):
            data[random.choice((2, 3, 7, 9, 11, *range(start, len(data))))] = random.randrange(256)
        return [bytes(data[: random.randint(start, len(data))] + random.randbytes(random.randint(0, 3)))]

    resolver, peer = await system.start(answer)
    for n in range(30):
        try:
            found = await resolver.resolve(f"n{n}.example")
        except ResolveTimeout:
            continue
        assert all(len(ip) == 4 for ip in found.v4)
        assert all(len(ip) == 16 for ip in found.v6)
    assert len(peer.asked) >= 60


@pytest.mark.parametrize("name", ["a..b", "x" * 64, ".", "ä.example"])
async def test_an_invalid_name_has_no_addresses(system: System, name: str) -> None:
    resolver, _ = await system.start(BOTH)
    assert await resolve(resolver, name) == ips()


async def test_ports_change(system: System) -> None:
    """No socket carries more than 64 questions."""
    resolver, peer = await system.start(zone({}))
    async with trio.open_nursery() as nursery:
        for n in range(90):
            nursery.start_soon(resolver.resolve, f"n{n}.example")
    by_port: dict[int, int] = {}
    for question in peer.asked:
        by_port[question.port] = by_port.get(question.port, 0) + 1
    assert len(peer.asked) == 180
    assert max(by_port.values()) <= 64


async def test_above_a_thousand_names(system: System) -> None:
    resolver, _ = await system.start(lambda asked: None)
    async with trio.open_nursery() as nursery:
        for n in range(1000):
            nursery.start_soon(_resolve_quietly, resolver, f"n{n}.example")
        await trio.testing.wait_all_tasks_blocked()
        assert resolver.in_flight == 1000
        with pytest.raises(TooBusy):
            await resolve(resolver, "one-more.example")
        nursery.cancel_scope.cancel()
    assert resolver.in_flight == 0


class TestLibc:
    async def test_resolves_through_the_hosts_file_of_the_system(self, tmp_path: Path) -> None:
        resolver = NameResolver((), tmp_path / "hosts", userspace=False)
        assert bytes([127, 0, 0, 1]) in (await resolve(resolver, "localhost")).v4

    async def test_remembers_for_30_seconds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls, now = [], [0.0]

        def look_up(name: str) -> tuple[bytes, ...]:
            calls.append(name)
            return (bytes([192, 0, 2, len(calls)]),)

        monkeypatch.setattr("fz_core.driver.names.resolver._getaddrinfo", look_up)
        resolver = LibcResolver(lambda: now[0])
        found: list[tuple[bytes, ...]] = []

        async def resolve() -> None:
            found.append(await resolver.resolve("x"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(resolve)
            nursery.start_soon(resolve)
        now[0] = 29.0
        await resolve()
        now[0] = 31.0
        await resolve()
        assert [ip[0][3] for ip in found] == [1, 1, 1, 2]


EXTRA = {"A": ["192.0.2.99"], "AAAA": ["2001:db8::99"]}
BAD = {"A": ["192.0.2.66"], "AAAA": ["2001:db8::66"]}


class System:
    """A resolver and its servers."""

    def __init__(self, nursery: trio.Nursery, hosts: Path) -> None:
        self._nursery, self.hosts = nursery, hosts
        self.now = 1000.0
        self.follow_trio = False

    async def start(self, behaviour: Behaviour, *, serve: bool = True) -> tuple[NameResolver, Peer]:
        peer = Peer(behaviour)
        if serve:
            self._nursery.start_soon(peer.run)
        else:
            peer.close()
        return await self._resolver(IPS[:1], peer.port), peer

    async def start_two(self, first: Behaviour, second: Behaviour) -> tuple[NameResolver, Peer, Peer]:
        one = Peer(first)
        two = Peer(second, "127.0.0.2", one.port)
        self._nursery.start_soon(one.run)
        self._nursery.start_soon(two.run)
        return await self._resolver(IPS, one.port), one, two

    async def _resolver(self, servers: tuple[bytes, ...], port: int) -> NameResolver:
        resolver = NameResolver(servers, self.hosts, port=port, now=self._clock)
        self._nursery.start_soon(resolver.run)
        await trio.testing.wait_all_tasks_blocked()
        return resolver

    def _clock(self) -> float:
        return trio.current_time() if self.follow_trio else self.now


@pytest.fixture
def system(nursery: trio.Nursery, tmp_path: Path) -> System:
    return System(nursery, tmp_path / "hosts")


def ips(*texts: str) -> Resolved:
    packed = [ipaddress.ip_address(text).packed for text in texts]
    return Resolved(tuple(ip for ip in packed if len(ip) == 4), tuple(ip for ip in packed if len(ip) == 16))


async def resolve(resolver: NameResolver, name: str) -> Resolved:
    """Its addresses in ascending order: servers shuffle them."""
    found = await resolver.resolve(name)
    return Resolved(tuple(sorted(found.v4)), tuple(sorted(found.v6)))


def asked(peer: Peer, rdtype: str) -> int:
    return sum(question.rdtype == rdtype for question in peer.asked)


async def _resolve_into(resolver: NameResolver, name: str, found: list[Resolved]) -> None:
    found.append(await resolve(resolver, name))


async def _resolve_quietly(resolver: NameResolver, name: str) -> None:
    try:
        await resolve(resolver, name)
    except ResolveTimeout:
        pass
