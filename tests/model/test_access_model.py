"""A gateway's access list against the plainest possible reading of its rules (spec/tunnel.md §5, §14)."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fz_core.packet import build_udp
from fz_core.portal.types import CidrResource, Filter, InternetResource
from fz_core.tunnel.client_access import ClientAccess, Decision

CLIENT = tuple(ip_address(i).packed for i in ("100.64.0.9", "fd00:2021:1111::9"))
GATEWAY = tuple(ip_address(i).packed for i in ("100.64.0.1", "fd00:2021:1111::1"))
NETWORKS = [
    ip_network(n) for n in ("10.0.0.0/8", "10.0.0.0/24", "10.0.0.5/32", "192.0.2.0/24", "2001:db8::/64", "0.0.0.0/0")
]
PROBES = ["10.0.0.5", "10.0.0.6", "10.9.9.9", "192.0.2.1", "2001:db8::5", "1.1.1.1", "100.96.0.1", "100.64.0.1"]
PORTS = [79, 80, 81]

ids = st.sampled_from(["a", "b", "c", "d"])
filters = st.lists(
    st.sampled_from([Filter("udp", 80, 80), Filter("udp", 81, 90), Filter("tcp", 80, 81), Filter("icmp")]), max_size=2
).map(tuple)
networks = st.sampled_from(NETWORKS)
expiries = st.none() | st.integers(0, 30)


@dataclass
class Granted:
    """`network` is None for the internet resource."""

    network: IPv4Network | IPv6Network | None
    filters: tuple[Filter, ...]
    expires_at: float | None


class AccessMachine(RuleBasedStateMachine):
    """Grants come and go; after every step each probe must be decided as the model decides it."""

    @initialize()
    def start(self) -> None:
        self.access = ClientAccess((CLIENT[0], CLIENT[1]), (GATEWAY[0], GATEWAY[1]))
        self.model: dict[str, Granted] = {}
        self.now = 0.0

    @rule(identity=ids, network=networks, allowed=filters, expires_in=expiries)
    def grant(
        self,
        identity: str,
        network: IPv4Network | IPv6Network,
        allowed: tuple[Filter, ...],
        expires_in: int | None,
    ) -> None:
        expires_at = None if expires_in is None else self.now + expires_in
        known = self.model.get(identity)
        is_internet = known is not None and known.network is None
        assert self.access.grant(CidrResource(identity, network, "net", allowed), expires_at) is not is_internet
        if known is None:
            self.model[identity] = Granted(network, allowed, expires_at)
        elif not is_internet:
            known.filters, known.expires_at = allowed, expires_at

    @rule(identity=ids, expires_in=expiries)
    def grant_internet(self, identity: str, expires_in: int | None) -> None:
        expires_at = None if expires_in is None else self.now + expires_in
        known = self.model.get(identity)
        is_cidr = known is not None and known.network is not None
        assert self.access.grant(InternetResource(identity), expires_at) is not is_cidr
        if known is None:
            self.model[identity] = Granted(None, (), expires_at)
        elif not is_cidr:
            known.expires_at = expires_at

    @rule(identity=ids, network=networks, allowed=filters)
    def update_filters(self, identity: str, network: IPv4Network | IPv6Network, allowed: tuple[Filter, ...]) -> None:
        self.access.update_filters(CidrResource(identity, network, "net", allowed))
        known = self.model.get(identity)
        if known is not None and known.network is not None:
            known.filters = allowed

    @rule(identity=ids)
    def revoke(self, identity: str) -> None:
        assert self.access.revoke(identity) == (self.model.pop(identity, None) is not None)

    @rule(identity=ids, expires_in=expiries)
    def move_deadline(self, identity: str, expires_in: int | None) -> None:
        expires_at = None if expires_in is None else self.now + expires_in
        self.access.set_expiry(identity, expires_at)
        if identity in self.model:
            self.model[identity].expires_at = expires_at

    @rule(seconds=st.integers(0, 20))
    def tick(self, seconds: int) -> None:
        self.now += seconds
        due = {i for i, g in self.model.items() if g.expires_at is not None and g.expires_at <= self.now}
        assert set(self.access.expire(self.now)) == due
        for identity in due:
            del self.model[identity]

    @invariant()
    def every_probe_is_decided_alike(self) -> None:
        if not hasattr(self, "model"):
            return
        for text in PROBES:
            dst = ip_address(text)
            own = CLIENT[0 if dst.version == 4 else 1]
            for port in PORTS:
                question = build_udp(own, dst.packed, 1000, port, b"")
                assert self.access.decide(question) is self.expected(text, port), (text, port, self.model)
                answer = build_udp(dst.packed, own, port, 1000, b"")
                admitted = self.access.admit(answer, 0.0) is answer
                assert admitted == (self.expected(text, port) is Decision.PASS), (text, port)

    @invariant()
    def bookkeeping_agrees(self) -> None:
        if hasattr(self, "model"):
            assert self.access.resource_ids == set(self.model)
            assert self.access.is_empty == (not self.model)
            deadlines = [g.expires_at for g in self.model.values() if g.expires_at is not None]
            assert self.access.next_expiry() == min(deadlines, default=None)
            assert len(self.access._routes.networks()) <= len(self.model)

    def expected(self, text: str, port: int) -> Decision:
        if text == "100.64.0.1":
            return Decision.PASS
        is_proxy = text == "100.96.0.1"
        if any(g.network is None for g in self.model.values()) and not is_proxy:
            return Decision.UNREACHABLE if text.startswith("10.") else Decision.PASS
        for granted in self.model.values():
            if granted.network is not None and ip_address(text) in granted.network and passes(granted.filters, port):
                return Decision.UNREACHABLE if is_proxy else Decision.PASS  # no name was announced for it
        return Decision.PROHIBITED


def passes(allowed: tuple[Filter, ...], port: int) -> bool:
    ranges = [(f.port_range_start, f.port_range_end) for f in allowed if f.protocol == "udp"]
    return not allowed or any(start <= port <= end for start, end in ranges)


AccessMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestAccess = AccessMachine.TestCase
