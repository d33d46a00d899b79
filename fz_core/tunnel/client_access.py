"""One client on a gateway: what it was granted, and whether a packet of it may pass (`spec/tunnel.md` §14 to §16)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import lru_cache
from typing import Any

from fz_core.dns import Pattern
from fz_core.packet import DropReason, Packet, TooBig
from fz_core.portal.types import CidrResource, DnsResource, InternetResource
from fz_core.tunnel.filters import FilterSet
from fz_core.tunnel.nat import NatTable
from fz_core.tunnel.proxies import ProxiedName, Proxies
from fz_core.tunnel.ranges import INTERNET_REJECTED_RANGE, PEER_RANGE, PROXY_RANGE, is_multicast
from fz_core.tunnel.routing import Route, RoutingTable
from fz_core.tunnel.traffic import inbound, is_classifiable, outbound
from fz_core.tunnel.verdict import FOREVER, Verdict

SHARED_TERMS = 8192
MAX_SETTLED = 1024

Attribution = tuple[str, str | None]


class Decision(Enum):
    """What happens to a packet of a client."""

    PASS = auto()
    TRANSLATE = auto()
    CONTROL = auto()
    PROHIBITED = auto()
    UNREACHABLE = auto()
    IGNORE = auto()


@dataclass(frozen=True, slots=True)
class Terms:
    """A resource and what follows from it; clients with equal resources share one."""

    resource: Any
    filters: FilterSet
    pattern: Pattern | None
    route: Route | None


@lru_cache(maxsize=SHARED_TERMS)
def terms_of(resource: Any) -> Terms:
    """Everything a grant of this resource needs."""
    filters = FilterSet(getattr(resource, "filters", ()))
    pattern = Pattern.parse(resource.address) if isinstance(resource, DnsResource) else None
    route = Route(resource.address, resource.id, filters) if isinstance(resource, CidrResource) else None
    return Terms(resource, filters, pattern, route)


@dataclass(slots=True)
class Grant:
    """One resource; `expires_at` is monotonic seconds, None for ever."""

    terms: Terms
    expires_at: float | None


class ClientAccess:
    """The access list of one client. It outlives connections; only revocation, expiry or goodbye end it.

    Verdicts that stood on a translated flow go to `revoked` when it ends. Of all else the owner knows when it changes.
    """

    def __init__(
        self, client_ips: tuple[bytes, bytes], own_ips: tuple[bytes, bytes], revoked: list[Verdict] | None = None
    ) -> None:
        self.client_ips = client_ips
        self.own_ips = own_ips
        self._grants: dict[str, Grant] = {}
        self._routes = RoutingTable()
        self._proxies = Proxies()
        self._nat: NatTable | None = None
        self._revoked = revoked
        self._has_internet = False
        self._first_expiry: float | None = None
        self._settled: set[tuple[bytes, int, int]] = set()  # traffic by network that passes; for packet rates

    @property
    def is_empty(self) -> bool:
        """Whether nothing is granted."""
        return not self._grants

    @property
    def resource_ids(self) -> set[str]:
        """Ids of all granted resources."""
        return set(self._grants)

    # grants

    def grant(self, resource: Any, expires_at: float | None) -> bool:
        """Upsert a grant; of a known resource only filters and expiry change. False: refused, type differs."""
        known = self._grants.get(resource.id)
        if known is None:
            self._grants[resource.id] = known = Grant(terms_of(resource), expires_at)
            self._install(known)
        elif not self._update(known, resource):
            return False
        known.expires_at = expires_at
        self._note_expiries()
        return True

    def update_filters(self, resource: Any) -> None:
        """The resource's filters changed at the portal."""
        known = self._grants.get(resource.id)
        if known is not None:
            self._update(known, resource)

    def set_expiry(self, resource_id: str, expires_at: float | None) -> None:
        """Move the deadline of a grant either way."""
        if resource_id in self._grants:
            self._grants[resource_id].expires_at = expires_at
            self._note_expiries()

    def revoke(self, resource_id: str) -> bool:
        """End a grant; whether it existed."""
        if self._grants.pop(resource_id, None) is None:
            return False
        self._routes.remove_resource(resource_id)
        self._settled.clear()
        self._has_internet = any(isinstance(g.terms.resource, InternetResource) for g in self._grants.values())
        self._note_expiries()
        return True

    def expire(self, now: float) -> list[str]:
        """End every grant whose time has come; their ids. Translations that nobody uses end too."""
        if self._nat is not None:
            self._nat.handle_timeout(now)
        if self._first_expiry is None or self._first_expiry > now:
            return []
        due = [i for i, g in self._grants.items() if g.expires_at is not None and g.expires_at <= now]
        for resource_id in due:
            self.revoke(resource_id)
        return due

    def next_expiry(self) -> float | None:
        """The earliest deadline of a grant or translation."""
        due = (self._first_expiry, None if self._nat is None else self._nat.poll_timeout())
        return min((at for at in due if at is not None), default=None)

    def _note_expiries(self) -> None:
        deadlines = (g.expires_at for g in self._grants.values() if g.expires_at is not None)
        self._first_expiry = min(deadlines, default=None)

    # names

    def may_resolve(self, resource_id: str, name: str) -> bool:
        """Whether the client may use this name through this resource."""
        grant = self._grants.get(resource_id)
        return grant is not None and grant.terms.pattern is not None and grant.terms.pattern.matches(name)

    def set_up_name(
        self,
        resource_id: str,
        name: str,
        proxy_ips: Sequence[bytes],
        real: Iterable[bytes],
        *,
        mix: bool,
        renew_at: float | None = None,
    ) -> None:
        """From now on, new flows to these proxy addresses go to the name's real ones; see `Proxies.assign`.

        With `renew_at` the gateway looks the name up again by itself, when a flow begins after that time.
        """
        if self._proxies.assign(resource_id, name, proxy_ips, real, mix=mix) and self._nat is not None:
            self._nat.clear()
        if self._nat is None:
            self._nat = NatTable(self.client_ips, revoked=self._revoked)
        if renew_at is not None and proxy_ips and (proxy := self._proxies.get(proxy_ips[0])) is not None:
            proxy.renew_at = renew_at

    def is_announced(self, ip: bytes) -> bool:
        """Whether this proxy address stands for a name."""
        return self._proxies.get(ip) is not None

    def take_due_name(self, ip: bytes, now: float, interval: float) -> ProxiedName | None:
        """The name behind a proxy address if it is time to look it up again; it is due next after `interval`."""
        proxy = self._proxies.get(ip)
        if proxy is None or proxy.renew_at is None or now < proxy.renew_at:
            return None
        proxy.renew_at = now + interval
        return proxy

    @property
    def opened_sessions(self) -> int:
        """How many translated flows there ever were."""
        return 0 if self._nat is None else self._nat.opened

    # packets

    def decide(self, packet: Packet) -> Decision | DropReason:
        """A packet from the client, in the order of §14."""
        dst = packet.dst
        if (dst, packet.protocol, packet.dst_port) in self._settled and packet.src in self.client_ips:
            return Decision.PASS
        if is_multicast(dst):
            return Decision.IGNORE
        if packet.is_fz_control:
            return Decision.CONTROL
        if packet.is_icmp_error:
            return DropReason.OUTBOUND_ICMP_ERROR
        if packet.src not in self.client_ips:
            return Decision.PROHIBITED
        if dst in self.own_ips:
            return Decision.PASS
        if dst in PEER_RANGE:
            return Decision.PROHIBITED
        if dst in PROXY_RANGE:
            return self._decide_name(dst, *outbound(packet))
        if self._has_internet:
            return Decision.UNREACHABLE if dst in INTERNET_REJECTED_RANGE else Decision.PASS
        verdict = self._routes.lookup(dst, *outbound(packet))
        if verdict is None or not verdict.allowed:
            return Decision.PROHIBITED
        self._settle(dst, packet.protocol, packet.dst_port)
        return Decision.PASS

    def _settle(self, ip: bytes, protocol: int, port: int) -> None:
        if port >= 0:
            if len(self._settled) >= MAX_SETTLED:
                self._settled.clear()
            self._settled.add((ip, protocol, port))

    def _decide_name(self, ip: bytes, protocol: int, port: int) -> Decision:
        proxy = self._proxies.get(ip)
        if proxy is None or not self._name_allows(proxy.resource_ids, protocol, port):
            verdict = self._routes.lookup(ip, protocol, port)  # a network so wide that it covers the proxies
            if verdict is None or not verdict.allowed:
                return Decision.PROHIBITED
        return Decision.UNREACHABLE if proxy is None or proxy.real(ip) is None else Decision.TRANSLATE

    def _name_allows(self, resource_ids: Iterable[str], protocol: int, port: int) -> bool:
        grants = (self._grants.get(resource_id) for resource_id in resource_ids)
        return any(grant is not None and grant.terms.filters.allows(protocol, port) for grant in grants)

    def translate(self, packet: Packet, now: float) -> Packet | TooBig | DropReason:
        """A packet that `decide` wants translated, as the resource shall see it."""
        proxy = self._proxies.get(packet.dst)
        real = None if proxy is None else proxy.real(packet.dst)
        assert self._nat is not None
        assert real is not None
        return self._nat.translate_outgoing(packet, real, now)

    def attribute(self, packet: Packet) -> Attribution | None:
        """The resource, and its name if it has one, that a packet which passes is for; asked before translation.

        None for this gateway's own addresses. As in routing, a network beats the internet, and then the higher id.
        """
        dst, traffic = packet.dst, outbound(packet)
        if dst in self.own_ips:
            return None
        proxy = self._proxies.get(dst) if dst in PROXY_RANGE else None
        if proxy is not None:
            allowing = (i for i in proxy.resource_ids if self._name_allows((i,), *traffic))
            resource_id = max(allowing, default=None)
            return None if resource_id is None else (resource_id, proxy.name)
        verdict = self._routes.lookup(dst, *traffic)
        if verdict is not None and verdict.allowed:
            return verdict.route.resource_id, None
        internet = (i for i, g in self._grants.items() if isinstance(g.terms.resource, InternetResource))
        return next(((i, None) for i in internet), None)

    @property
    def lasts_until(self) -> float:
        """Until when everything granted now stays granted, by what is known now."""
        return FOREVER if self._first_expiry is None else self._first_expiry

    def support(self, verdict: Verdict) -> bool:
        """Whether packets like one that just passed need not be seen here; see `NatTable.support`."""
        before = verdict.before
        if self._nat is None:
            return True
        if verdict.is_inbound:
            return verdict.after == before or self._nat.support(verdict)
        return before.src in self.own_ips or self._nat.support(verdict)

    def admit(self, packet: Packet, now: float) -> Packet | TooBig | DropReason:
        """A packet from this host or its network, as the client shall see it, or why it may not (§14, from TUN)."""
        if packet.src in self.own_ips:
            return packet
        if self._nat is not None:
            translated = self._nat.translate_incoming(packet, now)
            if isinstance(translated, (DropReason, TooBig)):
                return translated
            packet = packet if translated is None else translated
        return packet if self._admits(packet) else DropReason.NOT_ALLOWED

    def _admits(self, packet: Packet) -> bool:
        src = packet.src
        if (src, packet.protocol, packet.src_port) in self._settled and packet.dst in self.client_ips:
            return True
        if packet.dst not in self.client_ips or src in PEER_RANGE:
            return False
        if packet.is_icmp_error:
            return True
        if not is_classifiable(packet):
            return False
        if src in PROXY_RANGE:
            proxy = self._proxies.get(src)
            return proxy is not None and self._name_allows(proxy.resource_ids, *inbound(packet))
        if self._has_internet:
            return src not in INTERNET_REJECTED_RANGE
        verdict = self._routes.lookup(src, *inbound(packet))
        return verdict is not None and verdict.allowed

    def _update(self, grant: Grant, resource: Any) -> bool:
        """New filters, nothing else, for a granted resource; False if its type differs."""
        known = grant.terms.resource
        if type(known) is not type(resource):
            return False
        if not isinstance(known, InternetResource) and known.filters != resource.filters:
            grant.terms = terms_of(replace(known, filters=resource.filters))
            self._install(grant)
        return True

    def _install(self, grant: Grant) -> None:
        self._settled.clear()
        if grant.terms.route is not None:
            self._routes.add(grant.terms.route)
        elif isinstance(grant.terms.resource, InternetResource):
            self._has_internet = True
