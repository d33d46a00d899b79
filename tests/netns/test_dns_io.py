"""DNS in a network: unbound as name server, sockets in and out of the tunnel (spec/io.md 14, items 13, 27, 28)."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import NamedTuple

import dns.message
import dns.rcode
import pytest
import trio

from fz_core.driver.marked_http import connect_marked
from fz_core.driver.names.bootstrap import resolve_host
from fz_core.driver.names.dns_client import DnsFailed, exchange
from fz_core.driver.names.dns_server import TunnelDnsServer
from fz_core.driver.names.nameservers import Nameservers
from fz_core.driver.names.resolver import NameResolver, Resolved, ResolveTimeout
from fz_core.fastpath import split_super_packet
from fz_core.lab import Host, Lab
from fz_core.lab.processes import Process
from fz_core.linux import TunDevice
from fz_core.linux.netlink import Interface
from fz_core.packet import Address, DropReason, Packet, build_icmp_prohibited, build_icmp_unreachable

pytestmark = [pytest.mark.root, pytest.mark.peer("unbound")]

V4, V6 = IPv4Address("100.64.0.7"), IPv6Address("fd00:2021:1111::7")
VIRTIO_HEADER = 10
MANY = [f"192.0.2.{n}" for n in range(1, 101)]
ZONE = f"""\
$ORIGIN site.example.
$TTL 300
@ IN SOA ns.site.example. admin.site.example. 1 3600 600 86400 60
@ IN NS ns.site.example.
ns IN A 203.0.113.10
four IN A 192.0.2.4
six IN AAAA 2001:db8::6
both IN A 192.0.2.40
both IN AAAA 2001:db8::40
alias IN CNAME both
fleeting 0 IN A 192.0.2.5
text IN TXT "hello"
_sip._tcp IN SRV 1 2 5060 both
{chr(10).join(f"many IN A {ip}" for ip in MANY)}
"""


class Net(NamedTuple):
    """A host, whose namespace this thread is in, and the name server's host."""

    host: Host
    server: Host
    unbound: Process
    hosts: Path

    @property
    def servers(self) -> list[bytes]:
        """Both addresses of the name server."""
        return [packed(self.server.ipv4), packed(self.server.ipv6)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("four", ["192.0.2.4"]),
        ("six", ["2001:db8::6"]),
        ("both", ["192.0.2.40", "2001:db8::40"]),
        ("alias", ["192.0.2.40", "2001:db8::40"]),
        ("text", []),
        ("nothing", []),
    ],
)
@pytest.mark.parametrize("family", [0, 1])
async def test_names_of_a_zone(net: Net, nursery: trio.Nursery, name: str, expected: list[str], family: int) -> None:
    resolver = await start(net, nursery, family)
    assert await resolver.resolve(f"{name}.site.example") == ips(*expected)


async def test_an_answer_too_large_for_udp(net: Net, nursery: trio.Nursery) -> None:
    """100 addresses are 1600 bytes and come by TCP; 64 of them are kept."""
    query = dns.message.make_query("many.site.example", "A", use_edns=0, payload=1232).to_wire()
    short = await exchange(address(net), query, tcp=False, timeout=20.0)
    assert dns.message.from_wire(short).flags & dns.flags.TC
    resolver = await start(net, nursery)
    found = await resolver.resolve("many.site.example")
    assert len(found.v4) == 64
    assert set(found.v4) <= {packed(ip) for ip in MANY}


async def test_what_is_remembered_when_the_server_dies(net: Net, nursery: trio.Nursery) -> None:
    resolver = await start(net, nursery)
    names = ("both", "nothing", "six", "fleeting")
    first = [await resolver.resolve(f"{name}.site.example") for name in names]
    net.unbound.kill()
    for name, known in zip(names[:3], first, strict=False):
        assert await resolver.resolve(f"{name}.site.example") == known
    with pytest.raises(ResolveTimeout):
        await resolver.resolve("fresh.site.example")


async def test_ttl_zero_is_asked_again(net: Net, nursery: trio.Nursery) -> None:
    resolver = await start(net, nursery)
    assert await resolver.resolve("fleeting.site.example") == ips("192.0.2.5")
    net.unbound.kill()
    assert await resolver.resolve("fleeting.site.example") == ips(), "the denial of AAAA is remembered, the A is not"


async def test_a_dead_first_server_costs_nothing_lasting(net: Net, nursery: trio.Nursery) -> None:
    resolver = NameResolver([packed("203.0.113.10"), *net.servers[1:]], net.hosts)
    nursery.start_soon(resolver.run)
    await trio.lowlevel.checkpoint()
    net.server.ip("addr", "del", "203.0.113.10/24", "dev", "eth0")
    with trio.fail_after(9):
        assert await resolver.resolve("both.site.example") == ips("192.0.2.40", "2001:db8::40")


async def test_bootstrap_on_port_53(net: Net) -> None:
    assert await resolve_host("alias.site.example", net.servers, net.hosts) == ("192.0.2.40", "2001:db8::40")
    assert await resolve_host("nothing.site.example", net.servers, net.hosts) == ()


@pytest.mark.peer("dig")
class TestTunnelServer:
    async def test_dig_gets_answers(self, net: Net, tun: TunDevice, nursery: trio.Nursery) -> None:
        await self.serve(net, nursery)
        for at in (str(V4), str(V6)):
            for transport in ("+notcp", "+tcp"):
                assert await dig(net, at, transport, "_sip._tcp.site.example", "SRV") == "1 2 5060 both.site.example."
                assert await dig(net, at, transport, "text.site.example", "TXT") == '"hello"'
                assert await dig(net, at, transport, "four.site.example", "A") == "192.0.2.4"

    async def test_dig_repeats_by_tcp_what_was_cut_off(self, net: Net, tun: TunDevice, nursery: trio.Nursery) -> None:
        await self.serve(net, nursery)
        assert sorted((await dig(net, str(V4), "+bufsize=4096", "many.site.example", "A")).split()) == sorted(MANY)
        assert await dig(net, str(V4), "+ignore", "many.site.example", "A") == ""

    async def test_addresses_may_change(self, net: Net, tun: TunDevice, nursery: trio.Nursery) -> None:
        server = await self.serve(net, nursery)
        new = IPv4Address("100.64.0.8")
        Interface(tun.name).set_addresses(new, V6)
        await server.serve([new.packed, V6.packed])
        assert await dig(net, str(new), "+notcp", "text.site.example", "TXT") == '"hello"'

    async def serve(self, net: Net, nursery: trio.Nursery) -> TunnelDnsServer:
        nameservers = Nameservers(net.servers)
        nameservers.fastest = net.servers[0]
        server = TunnelDnsServer(nameservers)
        nursery.start_soon(server.run)
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        await server.serve([V4.packed, V6.packed])
        return server


class TestUnderADefaultRouteIntoTheTunnel:
    """What is marked leaves by the wire; the rest arrives in the TUN device."""

    @pytest.mark.shows("io", 13)
    @pytest.mark.parametrize("family", [0, 1])
    @pytest.mark.parametrize("tcp", [False, True])
    async def test_a_marked_query_stays_outside(self, net: Net, routed: TunDevice, family: int, tcp: bool) -> None:
        query = dns.message.make_query("text.site.example", "TXT").to_wire()
        reply = await exchange(address(net, family), query, tcp=tcp, timeout=20.0)
        assert dns.message.from_wire(reply).answer
        assert packets(routed) == []

    @pytest.mark.shows("io", 13)
    async def test_a_marked_connection_stays_outside_from_its_first_packet(self, net: Net, routed: TunDevice) -> None:
        """Options that are set once a connection stands would be too late."""
        with net.server.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind(("203.0.113.10", 8443))
            listener.listen()
            stream = await connect_marked(["203.0.113.10"], 8443, True, 20.0)
            await stream.aclose()
        assert packets(routed) == []

    @pytest.mark.shows("tunnel", 50)
    @pytest.mark.parametrize("family", [0, 1])
    @pytest.mark.parametrize("build", [build_icmp_prohibited, build_icmp_unreachable])
    async def test_an_unmarked_query_enters_the_tunnel_and_fails_with_its_icmp_error(
        self,
        net: Net,
        routed: TunDevice,
        family: int,
        build,  # type: ignore[no-untyped-def]
    ) -> None:
        query = dns.message.make_query("text.site.example", "TXT").to_wire()
        server = Address([packed("198.51.100.1"), packed("2001:db8:99::1")][family], 53)
        local = [V4.packed, V6.packed][family]
        failed: list[str] = []

        async def ask() -> None:
            try:
                await exchange(server, query, tcp=False, timeout=20.0, local_ip=local, marked=False)
            except DnsFailed as error:
                failed.append(str(error))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            packet = await next_packet(routed, server)
            assert (packet.src, packet.dst_port, packet.protocol) == (local, 53, 17)
            error = build(packet)
            assert isinstance(error, Packet)
            assert routed.write(bytes(VIRTIO_HEADER) + error.data)
        assert len(failed) == 1
        assert "within" not in failed[0], "an ICMP error is no timeout"


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    with Lab() as lab:
        host, server = lab.public_host("host", 11), lab.public_host("dns", 10)
        (lab.folder / "zone").write_text(ZONE)
        config = lab.folder / "unbound.conf"
        config.write_text(CONFIG.format(folder=lab.folder))
        unbound = server.spawn("unbound", ["unbound", "-d", "-d", "-p", "-c", str(config)])
        unbound.wait_for_line("start of service")
        with host.entered():
            yield Net(host, server, unbound, tmp_path / "hosts")


@pytest.fixture
def tun(net: Net) -> Iterator[TunDevice]:
    with TunDevice.open("tun-firezone") as device:
        Interface(device.name).set_addresses(V4, V6)
        yield device


@pytest.fixture
def routed(tun: TunDevice) -> TunDevice:
    interface = Interface(tun.name)
    interface.set_addresses(V4, V6)
    interface.set_routes([ip_network("0.0.0.0/0"), ip_network("::/0"), ip_network("203.0.113.10/32"),
                          ip_network("203:0:113::10/128")])  # fmt: skip
    packets(tun)
    return tun


async def start(net: Net, nursery: trio.Nursery, family: int = 0) -> NameResolver:
    resolver = NameResolver(net.servers[family : family + 1], net.hosts)
    nursery.start_soon(resolver.run)
    await trio.lowlevel.checkpoint()
    await trio.lowlevel.checkpoint()
    return resolver


async def dig(net: Net, at: str, *arguments: str) -> str:
    """The short answer; the server runs on our own loop, so dig runs in a thread."""
    command = ["dig", f"@{at}", "-p", "53535", "+short", "+tries=1", *arguments]
    result = await trio.to_thread.run_sync(lambda: net.host.run(*command))
    return result.stdout.strip()


def address(net: Net, family: int = 0) -> Address:
    return Address(net.servers[family], 53)


async def next_packet(tun: TunDevice, server: Address) -> Packet:
    """The first packet to this server; the kernel sends others too."""
    with trio.fail_after(20):
        while True:
            await trio.lowlevel.wait_readable(tun.fileno())
            for packet in packets(tun):
                if packet.dst == server.ip:
                    return packet


def packets(tun: TunDevice) -> list[Packet]:
    """UDP and TCP packets waiting in the device."""
    found: list[Packet] = []
    for raw in tun.read_batch(64):
        split = split_super_packet(raw)
        assert not isinstance(split, DropReason)
        found += [packet for packet in split if packet.protocol in (6, 17)]
    return found


def packed(text: str | None) -> bytes:
    assert text is not None
    return ipaddress.ip_address(text).packed


def ips(*texts: str) -> Resolved:
    both = [packed(text) for text in texts]
    return Resolved(tuple(ip for ip in both if len(ip) == 4), tuple(ip for ip in both if len(ip) == 16))


CONFIG = """\
server:
  interface: 203.0.113.10
  interface: 203:0:113::10
  access-control: 0.0.0.0/0 allow
  access-control: ::/0 allow
  username: ""
  chroot: ""
  directory: "{folder}"
  use-syslog: no
  logfile: ""
  verbosity: 1
  do-daemonize: no
  module-config: "iterator"
  num-threads: 1
  local-zone: "example." nodefault
auth-zone:
  name: "site.example"
  zonefile: "{folder}/zone"
  for-downstream: yes
  for-upstream: no
remote-control:
  control-enable: no
"""
