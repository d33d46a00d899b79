"""The embedded portal's core and the peers' channels in the simulation: texts, joins and policy as in production."""

from __future__ import annotations

import base64
import gc
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from fz_core.crypto import PrivateKey
from fz_core.embedded.policy import AccessRule, ClientAccount, GatewayAccount, Policy, ResourceRule, Site, name_id
from fz_core.embedded.portal_derivation import token_hash
from fz_core.embedded.portal_state import Close, Knock, PortalState, Send
from fz_core.embedded.store import Store
from fz_core.packet import Packet, build_udp
from fz_core.portal import (
    Channel,
    Connect,
    Connected,
    Fatal,
    Hiccup,
    MessageDropped,
    MessageReceived,
    client_channel,
    gateway_channel,
    relay_channel,
)
from fz_core.tunnel import ClientTunnel, GatewayTunnel
from tests.sim.system import EPOCH, PORT, Peer, SimRelay
from tests.sim.underlay import Faults, Nat, Underlay, World

SITE = Site(name_id("site", "hq"), "hq")
NET = ResourceRule(name_id("resource", "net"), "net", "cidr", ip_network("10.0.0.0/24"), "hq")
SERVER = ip_address("10.0.0.80").packed
TOKENS = {role: f"{role}-token-of-the-simulation" for role in ("client", "gateway", "relay")}
AGENTS = {"client": "headless-client/1.5.12", "gateway": "gateway/1.6.1", "relay": "relay/1.6.1"}


def policy(*rules: AccessRule) -> Policy:
    return Policy(
        account="sim",
        sites={"hq": SITE},
        gateways=(GatewayAccount("g", "hq", frozenset({token_hash(TOKENS["gateway"])})),),
        clients={"c": ClientAccount("c", frozenset(), frozenset({token_hash(TOKENS["client"])}))},
        resources={"net": NET},
        rules=rules,
        relay_tokens=frozenset({token_hash(TOKENS["relay"])}),
    )


OPEN = policy(AccessRule("everyone", "net"))


class Link:
    """A channel and the portal, with latency between and breaks in it."""

    def __init__(self, world: World, portal: Portal, role: str, channel: Channel, params: dict[str, str]) -> None:
        self.world, self.portal, self.role, self.channel, self.params = world, portal, role, channel, params
        self.session: int | None = None
        self.peer: Peer | None = None
        self.events: list[Any] = []
        self.wake_at: float | None = None
        self.settle()

    def settle(self) -> None:
        while (event := self.channel.poll_event()) is not None:
            self.events.append(event)
            match event:
                case Connect(delay):
                    self.drop()
                    self.world.after(delay + 0.001, self.dial)
                case Connected() if self.peer is not None:
                    self.peer.state.handle_portal_connected(self.world.now)
                    self.peer.drain()
                case MessageReceived(message) if self.peer is not None:
                    self.peer.tell(message)
                case Hiccup() if self.peer is not None:
                    self.peer.state.handle_portal_disconnected(self.world.now)
                case MessageDropped() | Fatal():
                    raise AssertionError(event)
        while (text := self.channel.poll_transmit()) is not None:
            self.world.after(self.portal.latency, lambda s=self.session, t=text: self.portal.text(s, t))
        deadline = self.channel.poll_timeout()
        if deadline is not None and self.wake_at != deadline:
            self.wake_at = deadline
            self.world.at(deadline, self.wake)

    def wake(self) -> None:
        self.channel.handle_timeout(self.world.now)
        self.settle()

    def dial(self) -> None:
        if not self.portal.is_up:
            self.channel.handle_closed("connection refused", self.world.now)
        else:
            knock = Knock(self.role, False, self.params, TOKENS[self.role], AGENTS[self.role], "203.0.113.30")
            opened = self.portal.state.open(knock, self.world.now)
            assert isinstance(opened, int), opened
            self.session = opened
            self.portal.links[opened] = self
            self.channel.handle_connected(self.world.now)
            self.portal.drain()
        self.settle()

    def drop(self) -> None:
        if self.session is not None and self.portal.links.pop(self.session, None) is not None:
            self.portal.state.handle_closed(self.session, self.world.now)
            self.portal.drain()
        self.session = None

    def text(self, session: int, text: str) -> None:
        if session == self.session:
            self.channel.handle_text(text, self.world.now)
            self.settle()

    def closed(self, session: int) -> None:
        if session == self.session:
            self.session = None
            self.channel.handle_closed("closed by the portal", self.world.now)
            self.settle()


class Portal:
    """The embedded portal's core."""

    def __init__(self, world: World, rules: Policy, latency: float = 0.005) -> None:
        self.world, self.latency, self.is_up = world, latency, True
        self.store = Store(":memory:", world.bytes)
        self.state = PortalState(rules, self.store, unix_epoch=EPOCH, random_bytes=world.bytes, now=world.now)
        self.links: dict[int, Link] = {}
        self.wake_at: float | None = None
        self.drain()

    def text(self, session: int | None, text: str) -> None:
        if session in self.links and self.is_up:
            self.state.handle_text(session, text, self.world.now)
            self.drain()

    def drain(self) -> None:
        while (output := self.state.poll_output()) is not None:
            match output:
                case Send(session, text) if session in self.links:
                    link = self.links[session]
                    self.world.after(self.latency, lambda li=link, s=session, t=text: li.text(s, t))
                case Close(session) if session in self.links:
                    link = self.links.pop(session)
                    self.world.after(self.latency, lambda li=link, s=session: li.closed(s))
        deadline = self.state.poll_timeout()
        if deadline is not None and (self.wake_at is None or deadline < self.wake_at or self.wake_at <= self.world.now):
            self.wake_at = deadline
            self.world.at(deadline, self.wake)

    def wake(self) -> None:
        self.state.handle_timeout(self.world.now)
        self.drain()

    def set_policy(self, rules: Policy) -> None:
        self.state.set_policy(rules, self.world.now)
        self.drain()

    def fail(self) -> None:
        self.is_up = False
        for link in list(self.links.values()):
            session = link.session
            assert session is not None
            self.links.pop(session)
            self.state.handle_closed(session, self.world.now)
            link.closed(session)
        self.drain()


class Whole:
    """Client, gateway, relay and portal, nothing simplified but the wires."""

    def __init__(self, seed: int, rules: Policy = OPEN, faults: Faults | None = None, nat: str = "cone") -> None:
        self.world = World(seed)
        self.net = Underlay(self.world, faults)
        self.portal = Portal(self.world, rules)
        relay = SimRelay(self.world, self.net, "203.0.113.101", None)
        relay_params = {"ipv4": "203.0.113.101", "port": "3478"}
        self.relay = Link(self.world, self.portal, "relay", relay_channel(self.world.bytes, relay.secret), relay_params)
        self.world.run_for(0.1)
        self.gateway = self._peer("gateway", GatewayTunnel, gateway_channel(self.world.bytes), 31, nat)
        self.client = self._peer("client", ClientTunnel, client_channel(self.world.bytes), 30, nat)
        self.gateway.on_packet = self._echo
        self.world.run_for(1.0)

    def _peer(self, role: str, kind: Any, channel: Channel, net: int, nat: str) -> Peer:
        router = Nat(nat, public={4: ip_address(f"203.0.113.{net}").packed})
        host = self.net.add(role, {4: ip_address(f"172.{net}.0.100").packed}, router)
        key = PrivateKey(self.world.bytes(32))
        params = {"external_id": role, "name": role, "public_key": base64.b64encode(key.public).decode()}
        link = Link(self.world, self.portal, role, channel, params)

        def send(message: Any) -> None:
            channel.send(message, self.world.now)
            link.settle()

        peer = Peer(self.world, self.net, host, kind(key, self.world.now, EPOCH, self.world.bytes), send)
        link.peer = peer
        peer.listen()
        setattr(self, f"{role}_link", link)
        assert PORT in {port for _, port in host.ports}
        return peer

    def _echo(self, packet: Packet) -> None:
        if packet.dst == SERVER and packet.protocol == 17:
            self.gateway.send(build_udp(packet.dst, packet.src, packet.dst_port, packet.src_port, packet.payload))

    def ask(self, payload: bytes) -> None:
        source = self.client.state._own_ips[0]
        self.client.send(build_udp(source, SERVER, 7000, 7, payload))

    @property
    def answers(self) -> list[bytes]:
        return [p.payload for p in self.client.packets if p.protocol == 17]

    def asks_until_answered(self, payload: bytes, limit: float) -> bool:
        """As an application does: ask again every half second."""
        end = self.world.now + limit
        while self.world.now < end:
            self.ask(payload)
            if self.world.run_until(lambda: payload in self.answers, 0.5):
                return True
        return False


@pytest.mark.parametrize("nat", ["cone", "symmetric"])
def test_the_whole_system_carries_packets(nat: str) -> None:
    whole = Whole(1, nat=nat)
    whole.ask(b"hello")
    assert whole.world.run_until(lambda: whole.answers == [b"hello"], 2.0)
    assert whole.portal.state.counts() == {"client": 1, "gateway": 1, "relay": 1}


def test_thousands_of_seeds() -> None:
    for seed in range(1000):
        whole = Whole(seed)
        whole.ask(b"hello")
        assert whole.world.run_until(lambda w=whole: bool(w.answers), 2.0), f"seed {seed}"  # type: ignore[misc]


def test_seeds_with_loss_duplication_and_reordering() -> None:
    for seed in range(150):
        whole = Whole(seed, faults=Faults(0.1, 0.1, 0.02), nat=("cone", "symmetric")[seed % 2])
        assert whole.asks_until_answered(b"%d" % seed, 20.0), f"seed {seed}"


def test_revocation_by_a_new_policy_and_back() -> None:
    whole = Whole(2)
    assert whole.asks_until_answered(b"a", 2.0)
    whole.portal.set_policy(policy())
    whole.world.run_for(0.5)
    assert not whole.asks_until_answered(b"b", 3.0)
    whole.portal.set_policy(OPEN)
    whole.world.run_for(0.5)
    assert whole.asks_until_answered(b"c", 3.0)


def test_grants_end_and_are_renewed_by_traffic() -> None:
    whole = Whole(3, policy(AccessRule("everyone", "net", 60)))
    assert whole.asks_until_answered(b"a", 2.0)
    for n in range(10):
        whole.world.run_for(30.0)
        assert whole.asks_until_answered(b"later %d" % n, 4.0), n


def test_a_day_without_portal_disturbs_nothing() -> None:
    whole = Whole(4)
    assert whole.asks_until_answered(b"a", 2.0)
    whole.portal.fail()
    for hour in range(23):
        whole.world.run_for(3600.0)
        assert whole.asks_until_answered(b"hour %d" % hour, 4.0), hour
    whole.portal.is_up = True
    whole.world.run_for(180.0)
    assert whole.portal.state.counts() == {"client": 1, "gateway": 1, "relay": 1}
    assert whole.asks_until_answered(b"back", 4.0)


def test_a_day_without_portal_costs_neither_packets_nor_memory_nor_work() -> None:
    """A flow of a packet a minute, until an hour before gateways give up.

    Work is counted in events of the world: timers that fired and datagrams.
    """
    whole = Whole(6)
    world = whole.world
    assert whole.asks_until_answered(b"a", 2.0)
    world.run_for(60.0)
    whole.portal.fail()
    whole.client.packets.clear()
    world.run_for(30.0)
    work, objects, dials = [], [], []
    links = (whole.client_link, whole.gateway_link, whole.relay)  # type: ignore[attr-defined]
    for hour in range(23):
        before = next(world._order)
        for n in range(60):
            whole.ask(b"%d %d" % (hour, n))
            world.run_for(0.2)
            assert whole.answers == [b"%d %d" % (hour, n)], f"hour {hour}, {n}"
            whole.client.packets.clear()
            whole.gateway.packets.clear()
            world.run_for(59.8)
        work.append(next(world._order) - before)
        dials.append(sum(isinstance(event, Connect) for link in links for event in link.events))
        for link in links:
            link.events.clear()
            assert not link.channel._queue
            assert not link.channel._out
        gc.collect()
        objects.append(len(gc.get_objects()))
    # the first hour's attempts are closer together
    assert max(work[1:]) <= min(work[1:]) * 1.02
    assert all(3 * 30 - 9 <= count <= 3 * 60 + 3 for count in dials[1:]), dials
    assert max(objects[12:]) <= max(objects[:12]) + 200, objects


def test_short_outages_at_any_moment_of_connecting() -> None:
    for step in range(60):
        whole = Whole(step)
        whole.ask(b"x")
        whole.world.run_for(step * 0.001)
        whole.portal.fail()
        whole.world.run_for(0.3)
        whole.portal.is_up = True
        assert whole.asks_until_answered(b"y", 15.0), f"outage after {step} ms"


def test_filters_are_enforced_at_both_ends() -> None:
    from fz_core.portal.types import Filter

    closed = replace(OPEN, resources={"net": replace(NET, filters=(Filter("tcp", 80, 80),))})
    whole = Whole(5, closed)
    whole.ask(b"udp")
    whole.world.run_for(1.0)
    assert whole.answers == []
    error = whole.client.packets[0].icmp_error()
    assert error is not None
    assert whole.gateway.packets == []
