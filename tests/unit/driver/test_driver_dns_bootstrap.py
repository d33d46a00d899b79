"""Names of portal and DoH servers, the hosts file, and the fastest name server (spec/tunnel.md 17, 18 and 23)."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import dns.rdata
import pytest
import trio
import trio.testing
from driver_dns_peers import Asked, Behaviour, Peer, reply, response, zone

from fz_core.driver.names.bootstrap import MAX_KNOWN_TYPES, parse_untrusted, resolve_host
from fz_core.driver.names.dns_client import DnsFailed
from fz_core.driver.names.hosts_file import HostsFile
from fz_core.driver.names.nameservers import Nameservers, read_resolv_conf
from fz_core.linux import HostError
from fz_core.packet import Address

GOOD = zone({("portal.example", "A"): ["192.0.2.9", "192.0.2.1"], ("portal.example", "AAAA"): ["2001:db8::1"]})
ADDRESSES = ("192.0.2.1", "192.0.2.9", "2001:db8::1")
NO_NAMES = zone({})
KNOWN = zone({("firezone.dev", "A"): ["192.0.2.1"]})
IPS = (bytes([127, 0, 0, 1]), bytes([127, 0, 0, 2]))


def lame(asked: Asked) -> list[bytes]:
    """Refuses by UDP, answers by TCP."""
    return [reply(asked, rcode="REFUSED")] if asked.transport == "udp" else GOOD(asked) or []


@pytest.mark.shows("tunnel", 59)
class TestResolveHost:
    async def test_no_servers_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(DnsFailed, match="no name server"):
            await resolve_host("portal.example", (), tmp_path / "hosts")

    async def test_good_udp_means_no_tcp(self, nursery: trio.Nursery, no_hosts: Path) -> None:
        peers = start(nursery, GOOD)
        assert await resolve(peers, no_hosts) == ADDRESSES
        assert sorted((a.transport, a.rdtype) for a in peers[0].asked) == [("udp", "A"), ("udp", "AAAA")]

    async def test_lame_udp_and_good_tcp(self, nursery: trio.Nursery, no_hosts: Path) -> None:
        peers = start(nursery, lame)
        assert await resolve(peers, no_hosts) == ADDRESSES
        assert sorted(peers[0].transports()) == ["tcp", "tcp", "udp", "udp"]

    async def test_when_everybody_denies_the_name_tcp_is_not_tried(self, nursery: trio.Nursery, no_hosts: Path) -> None:
        peers = start(nursery, NO_NAMES, NO_NAMES)
        assert await resolve(peers, no_hosts) == ()
        assert [set(p.transports()) for p in peers] == [{"udp"}, {"udp"}]

    async def test_one_denial_among_two_does_not_stop_tcp(self, nursery: trio.Nursery, no_hosts: Path) -> None:
        peers = start(nursery, NO_NAMES, lame)
        assert await resolve(peers, no_hosts) == ADDRESSES
        assert [p.transports().count("tcp") for p in peers] == [2, 2]

    async def test_the_union_of_all_servers(self, nursery: trio.Nursery, no_hosts: Path) -> None:
        peers = start(nursery, GOOD, zone({("portal.example", "A"): ["192.0.2.5", "192.0.2.9"]}))
        assert await resolve(peers, no_hosts) == ("192.0.2.1", "192.0.2.5", "192.0.2.9", "2001:db8::1")

    async def test_silence_and_garbage_cost_two_seconds_per_transport(
        self, nursery: trio.Nursery, no_hosts: Path, autojump_clock: trio.testing.MockClock
    ) -> None:
        autojump_clock.autojump_threshold = 0.05
        peers = start(nursery, lambda asked: None, lambda asked: [response(asked).to_wire()[:-3] + b"\xff\xff\xff"])
        started = trio.current_time()
        assert await resolve(peers, no_hosts) == ()
        assert trio.current_time() - started == pytest.approx(4.0, abs=0.2)

    @pytest.mark.parametrize(("other", "seconds"), [(GOOD, 0.1), (lame, 2.0), (NO_NAMES, 2.0)])
    async def test_a_dead_server_is_waited_for_only_if_no_other_knows_the_name(
        self,
        nursery: trio.Nursery,
        no_hosts: Path,
        autojump_clock: trio.testing.MockClock,
        other: Behaviour,
        seconds: float,
    ) -> None:
        autojump_clock.autojump_threshold = 0.05
        peers = start(nursery, lambda asked: None if asked.transport == "udp" else GOOD(asked), other)
        started = trio.current_time()
        assert await resolve(peers, no_hosts) == ADDRESSES
        assert trio.current_time() - started == pytest.approx(seconds, abs=0.15)

    async def test_ip_literals_ask_nobody(self, no_hosts: Path) -> None:
        assert await resolve_host("192.0.2.1", (), no_hosts) == ("192.0.2.1",)
        assert await resolve_host("[2001:db8::1]", (), no_hosts) == ("2001:db8::1",)

    async def test_hosts_file_matches_come_last(self, nursery: trio.Nursery, tmp_path: Path) -> None:
        hosts = tmp_path / "hosts"
        hosts.write_text("192.0.2.9 portal.example\n192.0.2.200 other PORTAL.example # remark\n")
        peers = start(nursery, GOOD)
        assert await resolve(peers, hosts) == (*ADDRESSES, "192.0.2.200")
        assert await resolve_host("portal.example", (), hosts) == ("192.0.2.9", "192.0.2.200")

    @pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".example", "." * 3])
    async def test_an_invalid_name_resolves_to_nothing(self, nursery: trio.Nursery, no_hosts: Path, host: str) -> None:
        peers = start(nursery, GOOD)
        assert await resolve_host(host, IPS[:1], no_hosts, port=peers[0].port, marked=False) == ()


class TestHostsFile:
    async def test_is_read_again_when_it_changed(self, tmp_path: Path) -> None:
        path = tmp_path / "hosts"
        hosts = HostsFile(path, look_interval=0.0)
        assert await hosts.lookup("a") == ()
        path.write_text("192.0.2.1 a b.\nfe80::1%eth0\ta\nnonsense c\n192.0.2.3\n192.0.2.1 A\n")
        assert await hosts.lookup("A.") == (bytes([192, 0, 2, 1]), b"\xfe\x80" + bytes(13) + b"\x01")
        assert await hosts.lookup("b") == (bytes([192, 0, 2, 1]),)
        assert await hosts.lookup("c") == ()
        path.write_text("192.0.2.2 a\n")
        os.utime(path, ns=(1, 1))
        assert await hosts.lookup("a") == (bytes([192, 0, 2, 2]),)
        path.unlink()
        assert await hosts.lookup("a") == ()

    async def test_is_looked_at_once_per_interval(self, tmp_path: Path) -> None:
        path, clock = tmp_path / "hosts", [100.0]
        hosts = HostsFile(path, look_interval=1.0, now=lambda: clock[0])
        assert await hosts.lookup("a") == ()
        path.write_text("192.0.2.1 a\n")
        assert await hosts.lookup("a") == ()
        clock[0] = 101.0
        assert await hosts.lookup("a") == (bytes([192, 0, 2, 1]),)


class TestNameservers:
    @pytest.mark.shows("io", 29)
    async def test_the_fastest_changes_when_it_dies(
        self, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
    ) -> None:
        """spec/io.md 14, item 29: the reference keeps a dead server for ever."""
        autojump_clock.autojump_threshold = 0.05
        slow, fast = start(nursery, KNOWN, KNOWN)
        slow.delay, fast.delay = 0.5, 0.1
        nameservers = Nameservers(IPS, port=slow.port, marked=False, now=trio.current_time)
        await nameservers.probe()
        assert nameservers.fastest == IPS[1]
        assert sorted(fast.transports()) == ["tcp", "udp"]
        fast.answer = lambda asked: None
        await nameservers.probe()
        assert nameservers.fastest == IPS[0]
        slow.answer = lambda asked: [b"garbage"]
        await nameservers.probe()
        assert nameservers.fastest is None

    async def test_a_server_that_knows_the_name_is_preferred(
        self, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
    ) -> None:
        autojump_clock.autojump_threshold = 0.05
        ignorant, slow = start(nursery, lambda asked: [reply(asked, rcode="SERVFAIL")], KNOWN)
        slow.delay = 0.9
        nameservers = Nameservers(IPS, port=slow.port, marked=False, now=trio.current_time)
        await nameservers.probe()
        assert nameservers.fastest == IPS[1]
        slow.answer = lambda asked: None
        await nameservers.probe()
        assert nameservers.fastest == IPS[0]
        assert {asked.name for asked in ignorant.asked} == {"firezone.dev"}

    async def test_without_servers_there_is_none(self) -> None:
        nameservers = Nameservers(())
        await nameservers.probe()
        assert nameservers.fastest is None

    async def test_a_reset_probes_again(self, nursery: trio.Nursery) -> None:
        nameservers = Nameservers(())
        nursery.start_soon(nameservers.run)
        await trio.testing.wait_all_tasks_blocked()
        nameservers.reset()
        await trio.testing.wait_all_tasks_blocked()
        assert nameservers.rounds == 2

    @pytest.mark.parametrize("content", [None, b"nameserver nowhere\n", b"\xff\n"])
    def test_an_unusable_resolv_conf_is_one_line(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "resolv.conf"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(HostError, match=r"resolv\.conf") as caught:
            read_resolv_conf(path)
        assert "\n" not in str(caught.value)

    def test_servers_are_read_once_each(self, tmp_path: Path) -> None:
        path = tmp_path / "resolv.conf"
        path.write_text("nameserver 127.0.0.2\nnameserver 127.0.0.1\nnameserver 127.0.0.2\nsearch x\n")
        assert read_resolv_conf(path) == (IPS[1], IPS[0])


@pytest.fixture
def no_hosts(tmp_path: Path) -> Path:
    return tmp_path / "hosts"


def start(nursery: trio.Nursery, *behaviours: Behaviour) -> list[Peer]:
    """A peer for each behaviour on 127.0.0.1, .2, …, all on the same port."""
    peers = [Peer(behaviours[0])]
    peers += [Peer(b, f"127.0.0.{n}", peers[0].port) for n, b in enumerate(behaviours[1:], 2)]
    for peer in peers:
        nursery.start_soon(peer.run)
    return peers


async def resolve(peers: list[Peer], hosts: Path) -> tuple[str, ...]:
    return await resolve_host("portal.example", IPS[: len(peers)], hosts, port=peers[0].port, marked=False)


def test_strange_types_of_many_replies_do_not_add_up() -> None:
    """dnspython keeps a class per record class and type it has met; a hostile server may invent them all."""
    for number in range(3000):
        record = b"\xc0\x0c" + struct.pack("!HHIH", 1000 + number, 2 + number, 60, 0)
        reply = struct.pack("!HHHHHH", 1, 0x8180, 1, 1, 0, 0) + b"\x01a\0" + struct.pack("!HH", 1, 1) + record
        assert len(parse_untrusted(reply, Address(bytes(4), 53)).answer) == 1
    assert len(dns.rdata._rdata_classes) <= MAX_KNOWN_TYPES + 1
