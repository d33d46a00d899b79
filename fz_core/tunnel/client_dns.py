"""The client's name server: what happens to a query that reached a sentinel (`spec/tunnel.md` §8 to §10).

An answer comes from the cache, from a device pool, from the resources' names, or from an upstream
server: outside the tunnel, through it, or in the resource's site. Upstream exchanges are the driver's;
it takes a `ForwardQuery` and gives back the reply.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from fz_core.dns import (
    DeviceNames,
    NameEntry,
    ProxyNames,
    Query,
    ReplyCache,
    ResourceStub,
    Sentinels,
    SiteQuery,
    StubTcpServer,
    TcpToken,
    Upstream,
    build_error,
    effective_upstreams,
    is_reply_to,
    truncate,
    with_id,
)
from fz_core.packet import DropCounter, DropReason, Packet, build_udp
from fz_core.portal.types import Interface
from fz_core.tunnel.events import DnsDecision, ForwardQuery, TunnelEvent

DNS_PORT = 53
SITE_DNS_PORT = 53535
UDP, TCP = 17, 6
MAX_UDP_REPLY = 1212
MAX_FORWARDED = 1000
MAX_REMEMBERED_DECISIONS = 4096
SERVFAIL = 2


class Asker(NamedTuple):
    """Who waits for a reply: an address and port that asked a sentinel, or one of its TCP connections."""

    sentinel: bytes
    ip: bytes
    port: int
    connection: TcpToken | None = None


class SiteAsker(NamedTuple):
    """A query that must be resolved in a resource's site, while access to the resource is asked for."""

    asker: Asker
    query: Query


class Policy(Protocol):
    """What the name server must know of the tunnel."""

    def is_name_in_use(self, name: str, now: float) -> bool:
        """Whether a name's addresses must not be given to another one."""

    def handle_name_answered(self, entry: NameEntry, now: float) -> None:
        """Somebody was told the proxy addresses of a name."""

    def is_tunnelled(self, server: bytes) -> bool:
        """Whether a name server is reached through the tunnel."""

    def resolve_in_site(self, resource_id: str, waiting: SiteAsker, now: float) -> None:
        """A query must go to the gateway of this resource."""


class ClientDns:
    """Sans-IO name server behind the sentinels."""

    def __init__(self, names: ProxyNames, policy: Policy, drops: DropCounter, random_bytes: Callable[[int], bytes]):
        self._names, self._policy, self._drops = names, policy, drops
        self._stub = ResourceStub(names)
        self._cache = ReplyCache()
        self._sentinels = Sentinels()
        self.devices = DeviceNames()
        self._tcp = StubTcpServer(random_bytes)
        self._system: tuple[bytes, ...] = ()
        self._portal_do53: tuple[bytes, ...] = ()
        self._portal_doh: tuple[str, ...] = ()
        self._is_configured = False
        self._forwarded: dict[int, tuple[Asker, Query, bool]] = {}
        self._next_token = 0
        self._packets: deque[Packet] = deque()
        self.events: deque[TunnelEvent] = deque()
        self._decided: set[tuple[str, int]] = set()

    # configuration

    def configure(self, interface: Interface) -> bool:
        """Take the portal's servers; whether the sentinels changed."""
        self._portal_do53 = tuple(ip.packed for ip in interface.upstream_do53)
        self._portal_doh = interface.upstream_doh
        self._is_configured = True
        return self._update()

    def set_system_resolvers(self, ips: Iterable[bytes]) -> bool:
        """Take the host's own name servers; whether the sentinels changed."""
        ips = tuple(ips)
        if ips == self._system:
            return False
        self._system = ips
        self._cache.flush()
        return self._update()

    def _update(self) -> bool:
        if not self._is_configured:
            return False
        changed = self._sentinels.update(effective_upstreams(self._portal_do53, self._portal_doh, self._system))
        if changed:
            self._cache.flush()
            self._tcp.set_addresses([sentinel for sentinel, _ in self._sentinels.mapping])
        return changed

    @property
    def mapping(self) -> tuple[tuple[bytes, Upstream], ...]:
        """Sentinels with the server behind each, in the order of the servers."""
        return self._sentinels.mapping

    def handle_resources_changed(self) -> None:
        """Answers of before may be wrong now."""
        self._cache.flush()
        self._decided.clear()

    def reset(self) -> None:
        """The network changed: exchanges under way are void, askers ask again."""
        self._forwarded.clear()

    # queries

    def is_sentinel(self, ip: bytes) -> bool:
        """Whether a server stands behind this address."""
        return self._sentinels.upstream_of(ip) is not None

    def is_upstream(self, ip: bytes) -> bool:
        """Whether this is a name server that we ask."""
        return any(upstream.ip == ip for _, upstream in self._sentinels.mapping)

    def handle_packet(self, packet: Packet, now: float) -> DropReason | None:
        """Take a packet to a sentinel."""
        if packet.dst_port != DNS_PORT or packet.protocol not in (UDP, TCP):
            return DropReason.UNMAPPED_SENTINEL
        if packet.protocol == TCP:
            self._tcp.handle_packet(packet, now)
            self._serve_tcp(now)
            return None
        asker = Asker(packet.dst, packet.src, packet.src_port)
        query = Query.parse_untrusted(packet.data[packet.l4_offset + 8 :])
        if query is None:
            return DropReason.MALFORMED_DNS
        self._handle_query(asker, query, now)
        return None

    def _serve_tcp(self, now: float) -> None:
        while (received := self._tcp.poll_query()) is not None:
            token, data = received
            query = Query.parse_untrusted(data)
            if query is None:
                self._drops.add(DropReason.MALFORMED_DNS)
                self._tcp.abort(token, now)
            else:
                self._handle_query(Asker(token.sentinel, b"", 0, token), query, now)

    def _handle_query(self, asker: Asker, query: Query, now: float) -> None:
        reply = self._cache.lookup(query, now)
        if reply is not None:
            self._reply(asker, reply, now)
            return
        answer = self.devices.handle_query(query, asker, now)
        if answer is not None:
            self._decide(query, "device")
            if isinstance(answer, bytes):
                self._reply(asker, answer, now)
            return
        stub = self._stub.resolve(query, lambda name: self._policy.is_name_in_use(name, now))
        if isinstance(stub, SiteQuery):
            self._decide(query, "site", stub.resource_id)
            self._policy.resolve_in_site(stub.resource_id, SiteAsker(asker, query), now)
        elif stub is not None:
            self._decide(query, "resource", stub.entry.matches[0].resource_id if stub.entry else None)
            if stub.entry is not None:
                self._policy.handle_name_answered(stub.entry, now)
            self._reply(asker, stub.reply, now)
        else:
            self._recurse(asker, query)

    def _recurse(self, asker: Asker, query: Query) -> None:
        upstream = self._sentinels.upstream_of(asker.sentinel)
        if upstream is None:
            return
        via_tunnel = upstream.ip is not None and not upstream.is_system and self._policy.is_tunnelled(upstream.ip)
        self._decide(query, "tunnel" if via_tunnel else "local")
        self._forward(asker, query, upstream.ip, DNS_PORT, upstream.url, via_tunnel)

    def forward_to_site(self, waiting: SiteAsker, gateway_ips: tuple[bytes, bytes]) -> None:
        """Access was given: send the query to the gateway's own name server, in the sentinel's family."""
        asker, query = waiting
        server = gateway_ips[0] if len(asker.sentinel) == 4 else gateway_ips[1]
        self._forward(asker, query, server, SITE_DNS_PORT, None, True)

    def _forward(
        self, asker: Asker, query: Query, server: bytes | None, port: int, url: str | None, via_tunnel: bool
    ) -> None:
        if len(self._forwarded) >= MAX_FORWARDED:
            self._drops.add(DropReason.DNS_BUSY)
            return
        token = self._next_token = self._next_token + 1
        self._forwarded[token] = asker, query, via_tunnel
        is_tcp = asker.connection is not None
        self.events.append(ForwardQuery(token, server, port, url, is_tcp, via_tunnel, query.data))

    def handle_result(self, token: int, reply: bytes | None, now: float, *, timed_out: bool = False) -> None:
        """The end of a `ForwardQuery`: the server's reply, or None. A local UDP time-out is passed over in silence."""
        entry = self._forwarded.pop(token, None)
        if entry is not None:
            self._finish(*entry, reply, now, timed_out)
            self._serve_tcp(now)

    def _finish(
        self, asker: Asker, query: Query, via_tunnel: bool, reply: bytes | None, now: float, timed_out: bool
    ) -> None:
        if reply is not None:
            reply = with_id(reply, query.id)
            if is_reply_to(query, reply):
                self._cache.store(query, reply, now)
                self._reply(asker, reply, now)
                return
            self._drops.add(DropReason.MALFORMED_DNS)
        if not timed_out or via_tunnel or asker.connection is not None:
            self._reply(asker, build_error(query, SERVFAIL), now)

    def _reply(self, asker: Asker, reply: bytes, now: float) -> None:
        if asker.connection is not None:
            self._tcp.send_reply(asker.connection, reply, now)
            return
        payload = truncate(reply, MAX_UDP_REPLY)
        self._packets.append(build_udp(asker.sentinel, asker.ip, DNS_PORT, asker.port, payload))

    def _decide(self, query: Query, decision: str, resource_id: str | None = None) -> None:
        """Report how a kind of question is answered, once until the resources change."""
        key = (query.name, query.rdtype)
        if key not in self._decided:
            if len(self._decided) >= MAX_REMEMBERED_DECISIONS:
                self._decided.clear()
            self._decided.add(key)
            self.events.append(DnsDecision(query.name, query.rdtype, decision, resource_id))

    # time and output

    def handle_timeout(self, now: float) -> None:
        """Run every timer that is due."""
        self.devices.handle_timeout(now)
        self._tcp.handle_timeout(now)

    def settle(self, now: float) -> None:
        """Bring the answers of device pools to those who asked."""
        while (answered := self.devices.poll_reply()) is not None:
            asker, reply = answered
            assert isinstance(asker, Asker)
            self._reply(asker, reply, now)
        self._serve_tcp(now)

    def poll_timeout(self) -> float | None:
        """When `handle_timeout` is next due."""
        due = (self.devices.poll_timeout(), self._tcp.poll_timeout())
        return min((d for d in due if d is not None), default=None)

    def poll_packet(self) -> Packet | None:
        """A packet for the TUN device."""
        return self._packets.popleft() if self._packets else self._tcp.poll_packet()
