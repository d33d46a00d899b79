"""The gateway's resolver for the names of DNS resources: all addresses of a name (`spec/tunnel.md` §17).

    resolver = NameResolver(read_resolv_conf(), Path("/etc/hosts"))
    nursery.start_soon(resolver.run)
    resolved = await resolver.resolve("db.example")

The hosts file comes first, and answers for both families, as in libc. Then the servers are asked in turn,
2 s per try and two rounds, by TCP where an answer was cut off. The search list of resolv.conf is not used.
Sockets are unmarked: a gateway has no route into the tunnel but to its clients.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import dns.message
import dns.rdatatype
import trio

from fz_core.dns import AddressCache
from fz_core.dns.wire import write_name
from fz_core.driver import clock
from fz_core.driver.names.bootstrap import parse_untrusted
from fz_core.driver.names.dns_batch import DnsBatch
from fz_core.driver.names.dns_client import DNS_PORT, DnsFailed, TooBusy, exchange
from fz_core.driver.names.hosts_file import HostsFile
from fz_core.linux import SocketFactory
from fz_core.packet import Address

__all__ = ["NameResolver", "ResolveTimeout", "Resolved", "TooBusy"]

NAME_TIMEOUT = 10.0
MAX_IN_FLIGHT = 1000
MAX_NAMES = 4096
MAX_ADDRESSES = 64
ROUNDS = 2
TCP_TIMEOUT = 5.0
DISTRUST_TIME = 30.0
LIBC_CACHE_TIME = 30.0
MAX_LIBC_THREADS = 32
A, AAAA = dns.rdatatype.A, dns.rdatatype.AAAA
NOERROR, FORMERR, NXDOMAIN = 0, 1, 3
TC = 0x02
RD_AND_ONE_QUESTION = b"\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00"


class Resolved(NamedTuple):
    """All addresses of a name, packed; none where it has none or a look-up failed."""

    v4: tuple[bytes, ...]
    v6: tuple[bytes, ...]


class ResolveTimeout(Exception):
    """No server said anything about the name in time."""


class NameResolver:
    """Resolves up to 1000 names at once. With `userspace` False, libc does it, remembered for 30 s.

    Answers are kept by their TTL, "no such name" and "no such address" by the zone's SOA record; 4096 names
    of each family at most. Equal questions asked at the same time are one question.
    """

    def __init__(
        self,
        servers: Sequence[bytes],
        hosts: Path = Path("/etc/hosts"),
        *,
        userspace: bool = True,
        port: int = DNS_PORT,
        marked: bool = False,
        now: Callable[[], float] = clock.now,
        sockets: SocketFactory | None = None,
    ) -> None:
        self._servers = tuple(Address(ip, port) for ip in servers)
        self._hosts = HostsFile(hosts, now=now)
        self._userspace, self._marked, self._now = userspace, marked, now
        self._sockets = sockets
        self._batch = DnsBatch(marked=marked, now=now, sockets=sockets)
        self._cache = AddressCache(2 * MAX_NAMES)
        self._libc = LibcResolver(now)
        self._lookups: dict[tuple[str, int], _Lookup] = {}
        self._distrusted_until: dict[Address, float] = {}
        self._nursery: trio.Nursery | None = None
        self.in_flight = 0

    async def run(self) -> None:
        """Exchange queries until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                await self._batch.run()
        finally:
            self._nursery = None

    async def resolve(self, name: str) -> Resolved:
        """Addresses of `name`; a family whose look-up failed has none.

        TooBusy above the limit, ResolveTimeout when no server answered, at most 10 s later.
        """
        if self.in_flight >= MAX_IN_FLIGHT:
            raise TooBusy(f"{MAX_IN_FLIGHT} names are being resolved already")
        self.in_flight += 1
        try:
            if self._userspace:
                return await self._resolve(name.lower().rstrip("."))
            with trio.move_on_after(NAME_TIMEOUT):
                return _by_family(await self._libc.resolve(name))
        finally:
            self.in_flight -= 1
        raise ResolveTimeout(f"no answer within {NAME_TIMEOUT:.0f} s")

    async def _resolve(self, name: str) -> Resolved:
        local = await self._hosts.lookup(name)
        wire = write_name(name)
        if local or wire is None:
            return _by_family(local)
        lookups = self._lookup(name, wire, A), self._lookup(name, wire, AAAA)
        with trio.move_on_after(NAME_TIMEOUT):
            for lookup in lookups:
                await lookup.done.wait()
        if not any(lookup.was_answered for lookup in lookups):
            raise ResolveTimeout("no name server answered")
        return Resolved(lookups[0].addresses, lookups[1].addresses)

    def _lookup(self, name: str, wire: bytes, rdtype: int) -> _Lookup:
        """The look-up under way, or a new one; from the cache if possible."""
        key = (name, rdtype)
        lookup = self._lookups.get(key)
        if lookup is not None:
            return lookup
        lookup = _Lookup(self, key, wire + rdtype.to_bytes(2, "big") + b"\x00\x01")
        cached = self._cache.lookup(name, rdtype, self._now())
        if cached is not None:
            lookup.finish(cached, was_answered=True)
        else:
            self._lookups[key] = lookup
            lookup.start(self._in_order(), self._now() + NAME_TIMEOUT)
        return lookup

    def _in_order(self) -> list[Address]:
        """The servers as configured, but those that were silent just now last."""
        if not self._distrusted_until:
            return [*self._servers]
        now = self._now()
        return sorted(self._servers, key=lambda server: self._distrusted_until.get(server, 0.0) > now)

    # for look-ups

    def ask(self, server: Address, lookup: _Lookup) -> None:
        """Send its question."""
        self._batch.ask(server, lookup.question, lookup.handle_reply)

    def ask_by_tcp(self, server: Address, lookup: _Lookup) -> None:
        """Send it again, for the whole answer."""
        if self._nursery is not None:
            self._nursery.start_soon(self._exchange, server, lookup)

    def store(self, lookup: _Lookup, response: dns.message.Message) -> tuple[bytes, ...]:
        """Remember an answer; its addresses."""
        return self._cache.store(*lookup.key, response, self._now())[:MAX_ADDRESSES]

    def distrust(self, server: Address) -> None:
        """A server did not answer."""
        self._distrusted_until[server] = self._now() + DISTRUST_TIME

    def forget(self, lookup: _Lookup) -> None:
        """A look-up is done."""
        self._lookups.pop(lookup.key, None)

    def is_over(self, deadline: float) -> bool:
        """Whether a look-up must give up."""
        return self._now() >= deadline

    async def _exchange(self, server: Address, lookup: _Lookup) -> None:
        reply = None
        query = secrets.token_bytes(2) + RD_AND_ONE_QUESTION + lookup.question
        with suppress(DnsFailed):
            reply = await exchange(
                server, query, tcp=True, timeout=TCP_TIMEOUT, marked=self._marked, sockets=self._sockets
            )
        lookup.handle_tcp_reply(reply)


class _Lookup:
    """One name and one type, asked of the servers in turn until one of them knows."""

    def __init__(self, resolver: NameResolver, key: tuple[str, int], question: bytes) -> None:
        self._resolver, self.key, self.question = resolver, key, question
        self.done = trio.Event()
        self.addresses: tuple[bytes, ...] = ()
        self.was_answered = False
        self._tries: list[Address] = []
        self._server: Address | None = None
        self._deadline = 0.0

    def start(self, servers: Sequence[Address], deadline: float) -> None:
        """Ask the first of them."""
        self._tries, self._deadline = [*servers] * ROUNDS, deadline
        self._next()

    def handle_reply(self, reply: bytes | None) -> None:
        """What became of the last try. By TCP again: what was cut off, and what EDNS was too new for."""
        assert self._server is not None
        if reply is None:
            self._resolver.distrust(self._server)
            self._next()
        elif reply[2] & TC or reply[3] & 0x0F == FORMERR:
            self._resolver.ask_by_tcp(self._server, self)
        else:
            self._judge(reply, self._server)

    def handle_tcp_reply(self, reply: bytes | None) -> None:
        """As above; TCP is not tried again."""
        if reply is not None and self._server is not None:
            self._judge(reply, self._server)
        else:
            self._next()

    def finish(self, addresses: tuple[bytes, ...], *, was_answered: bool) -> None:
        """Tell everybody who waits."""
        self.addresses, self.was_answered = addresses, was_answered or self.was_answered
        self._resolver.forget(self)
        self.done.set()

    def _judge(self, reply: bytes, server: Address) -> None:
        """An answer, or the news that there is none, ends it; an error of the server does not."""
        self.was_answered = True
        if reply[3] & 0x0F not in (NOERROR, NXDOMAIN):
            self._tries = [s for s in self._tries if s != server]
            self._next()
            return
        try:
            response = parse_untrusted(reply, server)
        except DnsFailed:
            self._next()
            return
        self.finish(self._resolver.store(self, response), was_answered=True)

    def _next(self) -> None:
        while self._tries and not self._resolver.is_over(self._deadline):
            self._server = self._tries.pop(0)
            try:
                self._resolver.ask(self._server, self)
            except OSError:
                continue
            return
        self.finish((), was_answered=False)


class LibcResolver:
    """getaddrinfo in threads, remembered for 30 s; equal questions at the same time are one."""

    def __init__(self, now: Callable[[], float] = clock.now) -> None:
        self._now = now
        self._known: OrderedDict[str, tuple[float, tuple[bytes, ...]]] = OrderedDict()
        self._under_way: dict[str, trio.Event] = {}
        self._threads = trio.CapacityLimiter(MAX_LIBC_THREADS)

    async def resolve(self, name: str) -> tuple[bytes, ...]:
        """Packed addresses; none if libc knows none."""
        while True:
            known = self._known.get(name)
            if known is not None and known[0] > self._now():
                return known[1]
            if name not in self._under_way:
                return await self._look_up(name)
            await self._under_way[name].wait()

    async def _look_up(self, name: str) -> tuple[bytes, ...]:
        done = self._under_way[name] = trio.Event()
        try:
            found = await trio.to_thread.run_sync(_getaddrinfo, name, abandon_on_cancel=True, limiter=self._threads)
            self._known[name] = (self._now() + LIBC_CACHE_TIME, found)
            self._known.move_to_end(name)
            if len(self._known) > MAX_NAMES:
                self._known.popitem(last=False)
            return found
        finally:
            del self._under_way[name]
            done.set()


def _getaddrinfo(name: str) -> tuple[bytes, ...]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    texts = dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found)
    return tuple(ipaddress.ip_address(text).packed for text in texts)


def _by_family(ips: Sequence[bytes]) -> Resolved:
    return Resolved(tuple(ip for ip in ips if len(ip) == 4), tuple(ip for ip in ips if len(ip) == 16))
