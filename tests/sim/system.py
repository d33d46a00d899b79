"""Client, gateway, relay and portal cores on a simulated network.

`SimPortal` hands out access like a portal does (receiver first, candidates forwarded in order, JSON on
the wire both ways) without any rule of its own: every client may use every resource.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

from fz_core.crypto import PrivateKey
from fz_core.packet import Address, Packet, build_udp
from fz_core.portal import client as c
from fz_core.portal import client_wire
from fz_core.portal import gateway as g
from fz_core.portal.types import (
    INGEST_CLAIMS,
    Authorization,
    CidrResource,
    DnsResource,
    GatewayInterface,
    IceCredentials,
    Interface,
    InternetResource,
    Relay,
    Resource,
    Site,
)
from fz_core.tunnel import ClientTunnel, GatewayTunnel
from fz_core.tunnel.events import ForwardQuery, ResolveName, SendToPortal
from fz_core.turn.server import PortFreed, RelayServer, SendToClient, SendToPeer
from fz_core.turn.server_auth import relay_credentials, relay_id
from tests.sim.underlay import Faults, Host, Nat, Underlay, World

PORT = 52625
MAX_DATAGRAM = 1316
LOOKUP_TIME = 0.002
EPOCH = 1_700_000_000.0
FAR_FUTURE = 2_145_916_800
SITE = Site("00000000-0000-4000-8000-000000000001", "site")
RESOURCE = CidrResource("00000000-0000-4000-8000-0000000000aa", ip_network("10.0.0.0/24"), "net", (), (SITE,))
SERVER = ip_address("10.0.0.80").packed


def uuid_of(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{digest[:8]}-{digest[8:12]}-4{digest[13:16]}-8{digest[17:20]}-{digest[20:32]}"


class SimRelay:
    """The relay's core on a public host."""

    def __init__(self, world: World, net: Underlay, v4: str | None, v6: str | None, latency: float = 0.005) -> None:
        self.world, self.net = world, net
        ips = {len(p): p for p in (ip_address(i).packed for i in (v4, v6) if i is not None)}
        self.host = net.add(f"relay {v4} {v6}", ips, latency=latency)
        self.secret = world.bytes(32).hex()
        self.id = relay_id(self.secret)
        self.server = RelayServer(
            stamp_secret=self.secret,
            public_ip4=ips.get(4),
            public_ip6=ips.get(16),
            random_bytes=world.bytes,
            unix_epoch=EPOCH,
            open_port=self._open,
        )
        self._wake_at: float | None = None
        for family in ips:
            self.host.listen(family, 3478, self._from_client)

    def entries(self, public_key: bytes) -> tuple[Relay, ...]:
        salt = hashlib.sha256(public_key).hexdigest()
        username, password = relay_credentials(FAR_FUTURE, salt, self.secret)
        return tuple(Relay(self.id, Address(ip, 3478), username, password, FAR_FUTURE) for ip in self.host.ips.values())

    def die(self) -> None:
        self.host.ports.clear()

    def _open(self, port: int, families: tuple[int, ...]) -> bool:
        for family in families:
            self.host.listen(family, port, lambda to, source, data, _ecn: self._from_peer(to.port, source, data))
        return True

    def _from_client(self, _to: Address, source: Address, data: bytes, _ecn: int) -> None:
        self.server.handle_client_input(source, data, self.world.now)
        self._drain()

    def _from_peer(self, port: int, source: Address, data: bytes) -> None:
        self.server.handle_peer_input(port, source, data, self.world.now)
        self._drain()

    def _drain(self) -> None:
        while (command := self.server.poll_command()) is not None:
            match command:
                case SendToClient(client, payload):
                    self.net.send(self.host, 3478, client, payload)
                case SendToPeer(port, peer, payload):
                    self.net.send(self.host, port, peer, payload)
                case PortFreed(port):
                    for family in (4, 16):
                        self.host.close(family, port)
        due = self.server.poll_timeout()
        if due is not None and (self._wake_at is None or due < self._wake_at or self._wake_at <= self.world.now):
            self._wake_at = due
            self.world.at(due, self._wake)

    def _wake(self) -> None:
        self.server.handle_timeout(self.world.now)
        self._drain()


@dataclass
class Peer:
    """What client and gateway have in common: a state machine on a host, a portal link, a TUN."""

    world: World
    net: Underlay
    host: Host
    state: Any
    send_to_portal: Callable[[Any], None]
    name: str = ""
    packets: list[Packet] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    on_packet: Callable[[Packet], None] | None = None
    is_dead: bool = False
    wake_at: float | None = None
    zone: dict[str, tuple[str, ...] | None] = field(default_factory=dict)
    upstream: Callable[[ForwardQuery], bytes | None] | None = None

    def listen(self) -> None:
        for family in self.host.ips:
            self.host.listen(family, PORT, self._receive)

    def _receive(self, to: Address, source: Address, data: bytes, ecn: int) -> None:
        if self.is_dead:
            return
        self._note(self.state.handle_network_input(to, source, data, ecn, self.world.now))
        self.drain()

    def send(self, packet: Packet) -> None:
        self._note(self.state.handle_tun_input(packet, self.world.now))
        self.drain()

    def tell(self, message: Any) -> None:
        if not self.is_dead:
            self.state.handle_portal_message(message, self.world.now)
            self.drain()

    def drain(self) -> None:
        while (transmit := self.state.poll_transmit()) is not None:
            assert transmit.local is None or transmit.local.ip in self.host.ips.values(), f"not our address: {transmit}"
            assert len(transmit.payload) <= MAX_DATAGRAM
            self.net.send(self.host, PORT, transmit.remote, transmit.payload, transmit.ecn)
        while (packet := self.state.poll_packet()) is not None:
            self.packets.append(packet)
            if self.on_packet is not None:
                self.on_packet(packet)
        while (event := self.state.poll_event()) is not None:
            self.events.append(event)
            match event:
                case SendToPortal(message):
                    self.send_to_portal(message)
                case ResolveName():
                    self.world.after(LOOKUP_TIME, partial(self._resolve, self.state, event))
                case ForwardQuery() if self.upstream is not None:
                    self.world.after(LOOKUP_TIME, partial(self._answer, self.state, event))
        deadline = self.state.poll_timeout()
        # Sending on an old session makes its rekey due at once, so a deadline may lie in the past here.
        if deadline is not None and (
            self.wake_at is None or deadline[0] < self.wake_at or self.wake_at <= self.world.now
        ):
            self.wake_at = deadline[0]
            self.world.at(deadline[0], lambda: self._wake(deadline[0]))

    def _resolve(self, state: Any, event: ResolveName) -> None:
        """A name of the zone; what is unknown has no addresses, and None never answers in time."""
        if state is self.state and not self.is_dead:
            found = self.zone.get(event.name, ())
            addresses = None if found is None else tuple(ip_address(ip).packed for ip in found)
            state.handle_name_resolved(event.token, addresses, self.world.now)
            self.drain()

    def _answer(self, state: Any, event: ForwardQuery) -> None:
        if state is self.state and self.upstream is not None:
            state.handle_dns_result(event.token, self.upstream(event), self.world.now)
            self.drain()

    def _wake(self, due: float) -> None:
        if not self.is_dead and self.wake_at == due:
            self.wake_at = None
            self.state.handle_timeout(self.world.now)
            deadline = self.state.poll_timeout()
            assert deadline is None or deadline[0] > self.world.now, f"the same deadline again: {deadline}"
            self.drain()

    def _note(self, error: Exception | None) -> None:
        if error is not None:
            self.errors.append(error)


class SimPortal:
    """Access for everybody, with the ordering a portal owes its peers."""

    def __init__(self, world: World, relays: list[SimRelay], latency: float = 0.005, *, iceless: bool = False) -> None:
        self.world, self.relays, self.latency, self.iceless = world, relays, latency, iceless
        self.grants: dict[tuple[str, str], None] = {}
        self.offline: set[str] = set()
        self.denied: set[str] = set()
        self.relay_round = ""
        self.resources: list[Resource] = [RESOURCE]
        self.peers: dict[str, tuple[str, Peer, bytes, tuple[IPv4Address, IPv6Address]]] = {}
        self.pending: dict[str, tuple[str, str, str]] = {}
        self.expires_at: int | None = None
        self.is_up = True
        self.log: list[tuple[float, str, str]] = []
        self.turn = 0
        self._next_ip = 0

    def connect(self, role: str, name: str, peer: Peer, public_key: bytes) -> str:
        identity = uuid_of(f"{role} {name}")
        known = self.peers.get(identity)
        if known is None:
            self._next_ip += 1
            ips = (IPv4Address("100.64.0.0") + self._next_ip, IPv6Address("fd00:2021:1111::") + self._next_ip)
        else:
            ips = known[3]
        self.peers[identity] = (role, peer, public_key, ips)
        self.reconnect(identity)
        return identity

    def disconnect(self, identity: str) -> None:
        """The peer's link to the portal breaks; what is under way in either direction is lost."""
        self.offline.add(identity)
        peer = self.peers[identity][1]
        peer.state.handle_portal_disconnected(self.world.now)
        peer.drain()

    def reconnect(self, identity: str) -> None:
        self.offline.discard(identity)
        peer = self.peers[identity][1]
        peer.state.handle_portal_connected(self.world.now)
        self.to(identity, self.init(identity))
        peer.drain()

    def init(self, identity: str) -> Any:
        role, _, _, (v4, v6) = self.peers[identity]
        relays = self.relay_entries(identity)
        if role == "client":
            return c.Init(Interface(v4, v6), tuple(self.resources), relays)
        grants = [Authorization(client, resource, self.expires_at) for client, resource in self.grants]
        return g.Init(GatewayInterface(v4, v6), relays, tuple(grants))

    def relay_entries(self, identity: str) -> tuple[Relay, ...]:
        key = self.peers[identity][2] + self.relay_round.encode()
        return tuple(e for relay in self.relays for e in relay.entries(key))

    def replace_relay_credentials(self, text: str) -> None:
        """Everybody gets other credentials for the same relays."""
        self.relay_round = text
        for identity, (role, *_) in self.peers.items():
            kind = c.RelaysPresence if role == "client" else g.RelaysPresence
            self.to(identity, kind((), self.relay_entries(identity)))

    def revoke(self, client: str, resource_id: str) -> None:
        self.grants.pop((client, resource_id), None)
        for identity, (role, *_) in self.peers.items():
            if role == "gateway":
                self.to(identity, c.RejectAccess(client, resource_id))

    def to(self, identity: str, message: Any) -> None:
        """Portal to peer, through JSON."""
        role, peer, *_ = self.peers[identity]
        codec = client_wire.TO_CLIENT if role == "client" else g.TO_GATEWAY
        event, payload = codec.build(message)
        decoded = codec.parse(event, json.loads(json.dumps(payload)))
        assert decoded == message, (decoded, message)
        self.log.append((self.world.now, f"to {role}", event))
        self.world.after(self.latency, lambda: peer.tell(decoded) if self._is_linked(identity) else None)

    def _is_linked(self, identity: str) -> bool:
        return self.is_up and identity not in self.offline

    def sender(self, identity_of: Callable[[], str]) -> Callable[[Any], None]:
        def send(message: Any) -> None:
            identity = identity_of()
            self.world.after(
                self.latency, lambda: self._handle(identity, message) if self._is_linked(identity) else None
            )

        return send

    def _handle(self, identity: str, message: Any) -> None:
        role = self.peers[identity][0]
        codec = client_wire.TO_PORTAL if role == "client" else g.TO_PORTAL
        event, payload = codec.build(message)
        message = codec.parse(event, json.loads(json.dumps(payload)))
        self.log.append((self.world.now, f"from {role}", event))
        match message:
            case c.RequestAuthorization(resource_id, preferred):
                self._request(identity, resource_id, preferred)
            case g.AuthorizationCreated(ref):
                self._created(ref)
            case c.NewGatewayIceCandidates(gateway_id, candidates):
                self.to(gateway_id, g.IceCandidates(identity, candidates))
            case c.WithdrawGatewayIceCandidates(gateway_id, candidates):
                self.to(gateway_id, g.InvalidateIceCandidates(identity, candidates))
            case g.BroadcastIceCandidates(clients, candidates):
                for client in clients:
                    self.to(client, c.GatewayIceCandidates(identity, candidates))
            case g.BroadcastInvalidatedIceCandidates(clients, candidates):
                for client in clients:
                    self.to(client, c.InvalidateGatewayIceCandidates(identity, candidates))
            case c.NoRelays():
                self.to(identity, c.RelaysPresence((), self.relay_entries(identity)))

    def _request(self, client: str, resource_id: str, preferred: tuple[str, ...] = ()) -> None:
        gateways = [
            i
            for i, (role, peer, *_) in self.peers.items()
            if role == "gateway" and not peer.is_dead and i not in self.offline
        ]
        if not gateways:
            self.to(client, c.AuthorizationCreationFailed(resource_id, c.FailReason.OFFLINE))
            return
        if client in self.denied:
            self.to(client, c.AuthorizationCreationFailed(resource_id, c.FailReason.FORBIDDEN))
            return
        known = [gateway for gateway in preferred if gateway in gateways]
        gateway = known[0] if known else gateways[self.turn % len(gateways)]
        self.turn += 1
        ref = str(len(self.log))
        self.pending[ref] = (client, gateway, resource_id)
        self.grants[client, resource_id] = None
        keys = self.peers[client][2] + self.peers[gateway][2]
        resource = next(r for r in self.resources if r.id == resource_id)
        _, _, key, (v4, v6) = self.peers[client]
        self.to(
            gateway,
            g.CreateAuthorization(
                ref,
                g.Client(client, key, preshared_key(keys), v4, v6),
                as_seen_by_gateway(resource),
                *credentials(keys),
                self.expires_at,
                self.iceless,
                INGEST_TOKEN,
            ),
        )

    def _created(self, ref: str) -> None:
        if ref not in self.pending:
            return
        client, gateway, resource_id = self.pending.pop(ref)
        if self.peers[gateway][1].is_dead:
            return
        keys = self.peers[client][2] + self.peers[gateway][2]
        _, _, key, (v4, v6) = self.peers[gateway]
        psk = preshared_key(keys)
        self.to(
            client,
            c.AuthorizationCreated(
                resource_id, gateway, SITE.id, key, v4, v6, psk, *credentials(keys), self.iceless, INGEST_TOKEN
            ),
        )


def as_seen_by_gateway(resource: Resource) -> Any:
    match resource:
        case CidrResource():
            return CidrResource(resource.id, resource.address, resource.name, resource.filters)
        case InternetResource():
            return InternetResource(resource.id)
        case DnsResource():
            return DnsResource(resource.id, resource.address, resource.name, resource.filters)
    raise AssertionError(resource)


def preshared_key(keys: bytes) -> bytes:
    return hashlib.sha256(b"psk" + keys).digest()


def credentials(keys: bytes) -> tuple[IceCredentials, IceCredentials]:
    text = hashlib.sha256(keys).hexdigest()
    return IceCredentials(text[:4], text[4:26]), IceCredentials(text[26:30], text[30:52])


def ingest_token() -> str:
    claims: dict[str, Any] = {name: "x" for name in INGEST_CLAIMS}
    claims |= {"iat": 1, "exp": 2, "uploads_enabled": False}
    parts = [base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in ({"alg": "HS256"}, claims)]
    return ".".join([*parts, "c2ln"])


INGEST_TOKEN = ingest_token()


@dataclass
class Scenario:
    """Where things stand and what the network does."""

    client_nat: str = "cone"
    gateway_nat: str = "cone"
    client_families: tuple[int, ...] = (4,)
    gateway_families: tuple[int, ...] = (4,)
    blocked: bool = False
    relay_v4: bool = True
    relay_v6: bool = False
    relays: int = 1
    clients: int = 1
    gateways: int = 1
    iceless: bool = False
    faults: Faults = field(default_factory=Faults)
    latency: float = 0.005


class System:
    """Clients, gateways whose network holds an echo server at 10.0.0.80, relays, a portal.

    `client` and `gateway` are the first ones.
    """

    peer_kind: Any = Peer
    inner4, outer4 = "172.{}.0.100", "203.0.113.{}"

    def __init__(self, seed: int, scenario: Scenario | None = None, client_kind: Any = ClientTunnel) -> None:
        self.client_kind = client_kind
        self.scenario = s = scenario or Scenario()
        self.world = World(seed)
        self.net = Underlay(self.world, s.faults)
        self.relays = [
            SimRelay(
                self.world,
                self.net,
                self.outer4.format(101 + n) if s.relay_v4 else None,
                f"203:0:113::{101 + n}" if s.relay_v6 else None,
                s.latency,
            )
            for n in range(s.relays)
        ]
        self.portal = SimPortal(self.world, self.relays, s.latency, iceless=s.iceless)
        self.gateways = [
            self._peer("gateway", "g" * (n + 1), s.gateway_nat, s.gateway_families, 31 + 2 * n)
            for n in range(s.gateways)
        ]
        self.clients = [
            self._peer("client", "c" * (n + 1), s.client_nat, s.client_families, 30 + 2 * n) for n in range(s.clients)
        ]
        self.gateway, self.client = self.gateways[0], self.clients[0]
        self.world.run_for(1.0)

    def _peer(self, role: str, name: str, nat: str, families: tuple[int, ...], net: int) -> Peer:
        translation = Nat("none" if nat == "public" else nat)
        inner = {4: self.inner4.format(net), 16: f"172:{net}::100"}
        outer = {4: self.outer4.format(net), 16: f"203:0:113::{net}"}
        used = outer if nat == "public" else inner
        translation.public = {f: ip_address(outer[f]).packed for f in families}
        if self.scenario.blocked:
            relay_ips = {ip for relay in self.relays for ip in relay.host.ips.values()}
            translation.blocked = lambda _inner, remote: remote.ip not in relay_ips
        host = self.net.add(name, {f: ip_address(used[f]).packed for f in families}, translation, self.scenario.latency)
        identity = uuid_of(f"{role} {name}")
        peer: Peer = self.peer_kind(self.world, self.net, host, None, self.portal.sender(lambda: identity), name)
        peer.listen()
        if role == "gateway":
            peer.on_packet = lambda packet: self._echo(peer, packet)
        self.start(role, peer)
        return peer

    def start(self, role: str, peer: Peer) -> None:
        """Start a peer, for the first time or anew: what it knew is gone, its sockets have the same ports."""
        key = PrivateKey(self.world.bytes(32))
        kind: Any = self.client_kind if role == "client" else GatewayTunnel
        peer.state, peer.wake_at, peer.is_dead = kind(key, self.world.now, EPOCH, self.world.bytes), None, False
        self.portal.connect(role, peer.name, peer, key.public)

    @property
    def client_ip(self) -> bytes:
        return self.ip_of(self.client_id)

    def ip_of(self, identity: str, version: int = 4) -> bytes:
        return self.portal.peers[identity][3][0 if version == 4 else 1].packed

    @property
    def client_id(self) -> str:
        return uuid_of("client c")

    @property
    def gateway_id(self) -> str:
        return uuid_of("gateway g")

    def _echo(self, gateway: Peer, packet: Packet) -> None:
        if packet.dst == SERVER and packet.protocol == 17:
            reply = build_udp(packet.dst, packet.src, packet.dst_port, packet.src_port, packet.payload)
            self.world.after(0.0001, lambda: None if gateway.is_dead else gateway.send(reply))

    def ask(self, payload: bytes, port: int = 7000, client: Peer | None = None) -> None:
        client = client or self.client
        client.send(build_udp(self.ip_of(uuid_of(f"client {client.name}")), SERVER, port, 7, payload))

    @property
    def answers(self) -> list[bytes]:
        return [p.payload for p in self.client.packets if p.protocol == 17]
