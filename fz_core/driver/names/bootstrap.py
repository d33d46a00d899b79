"""Names we need before, and while, the tunnel answers the host's questions: portal and DoH servers.

The host's resolver would ask the tunnel, so its servers are asked directly, past the tunnel.
Source: `spec/tunnel.md` §18, `spec/io.md` §4, `spec/binaries.md` §3.6.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import dns.exception
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdatatype
import trio

from fz_core.driver.names.dns_client import DNS_PORT, DnsFailed, exchange
from fz_core.driver.names.hosts_file import HostsFile
from fz_core.linux import SocketFactory
from fz_core.packet import Address

QUERY_TIMEOUT = 2.0
LATECOMERS = 0.1  # seconds for the others once one server has answered
MAX_ADDRESSES = 64
MAX_KNOWN_TYPES = 1024
TYPES = (dns.rdatatype.A, dns.rdatatype.AAAA)


async def resolve_host(
    host: str,
    servers: Sequence[bytes],
    hosts: Path = Path("/etc/hosts"),
    *,
    port: int = DNS_PORT,
    marked: bool = True,
    sockets: SocketFactory | None = None,
) -> tuple[str, ...]:
    """IPs of a host, sorted, then those of the hosts file; maybe none. DnsFailed if there is nobody to ask.

    Every server is asked for both families at once, over UDP and, if no address came and not everybody
    said that the name does not exist, over TCP; 2 s each. Once a server that knows the name has answered for
    both families, nobody waits for a dead one: the others get 0.1 s.
    """
    with suppress(ValueError):
        return (str(ipaddress.ip_address(host.strip("[]"))),)
    local = tuple(str(ipaddress.ip_address(ip)) for ip in await HostsFile(hosts).lookup(host))
    if not servers:
        if local:
            return local
        raise DnsFailed(f"cannot resolve {host}: no name server is known")
    found = await _ask_all(host, [Address(ip, port) for ip in servers], marked, sockets)
    ordered = sorted(found, key=lambda ip: (len(ip), ip))[:MAX_ADDRESSES]
    return tuple(dict.fromkeys((*(str(ipaddress.ip_address(ip)) for ip in ordered), *local)))


async def _ask_all(host: str, servers: Sequence[Address], marked: bool, sockets: SocketFactory | None) -> set[bytes]:
    found, is_denied = await _round(host, servers, tcp=False, marked=marked, sockets=sockets)
    if not found and not is_denied:
        found, _ = await _round(host, servers, tcp=True, marked=marked, sockets=sockets)
    return found


async def _round(
    host: str, servers: Sequence[Address], *, tcp: bool, marked: bool, sockets: SocketFactory | None
) -> tuple[set[bytes], bool]:
    """All addresses the servers know, and whether each of them denied the name."""
    found: set[bytes] = set()
    denials: list[bool] = []

    async def ask(server: Address, rdtype: dns.rdatatype.RdataType, answered: list[int]) -> None:
        is_denied = False
        with suppress(DnsFailed):
            response = await ask_server(
                server, host, rdtype, tcp=tcp, timeout=QUERY_TIMEOUT, marked=marked, sockets=sockets
            )
            is_denied = response.rcode() == dns.rcode.NXDOMAIN
            if response.rcode() == dns.rcode.NOERROR:
                answered.append(rdtype)
                found.update(addresses_in(response))
        denials.append(is_denied)

    async def ask_for_both(server: Address, scope: trio.CancelScope) -> None:
        answered: list[int] = []
        async with trio.open_nursery() as nursery:
            for rdtype in TYPES:
                nursery.start_soon(ask, server, rdtype, answered)
        if found and len(answered) == len(TYPES):
            scope.deadline = min(scope.deadline, trio.current_time() + LATECOMERS)

    async with trio.open_nursery() as nursery:
        for server in servers:
            nursery.start_soon(ask_for_both, server, nursery.cancel_scope)
    return found, all(denials)


async def ask_server(
    server: Address,
    name: str,
    rdtype: dns.rdatatype.RdataType,
    *,
    tcp: bool,
    timeout: float,
    marked: bool,
    sockets: SocketFactory | None = None,
) -> dns.message.Message:
    """One question of our own. DnsFailed also for a reply that does not decode."""
    try:
        query = dns.message.make_query(name, rdtype, id=secrets.randbelow(65_536)).to_wire()
    except dns.exception.DNSException:
        raise DnsFailed(f"cannot resolve {name!r}: it is no valid name") from None
    reply = await exchange(server, query, tcp=tcp, timeout=timeout, marked=marked, sockets=sockets)
    return parse_untrusted(reply, server)


def parse_untrusted(reply: bytes, server: Address) -> dns.message.Message:
    """A reply as an object. DnsFailed if it does not decode."""
    try:
        return dns.message.from_wire(reply, ignore_trailing=True)
    except (dns.exception.DNSException, ValueError, IndexError):
        raise DnsFailed(f"{server}: the reply does not decode") from None
    finally:
        # dnspython remembers every class and type it ever met, and there are billions
        known = getattr(dns.rdata, "_rdata_classes", {})
        if len(known) > MAX_KNOWN_TYPES:
            known.clear()


def addresses_in(response: dns.message.Message) -> list[bytes]:
    """Packed addresses of the answer section, whatever name they belong to."""
    return [
        ipaddress.ip_address(record.address).packed
        for rrset in response.answer
        if rrset.rdtype in TYPES and rrset.rdclass == dns.rdataclass.IN
        for record in rrset
    ]
