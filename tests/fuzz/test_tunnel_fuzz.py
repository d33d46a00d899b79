"""Random and mutated datagrams, packets and portal messages: nothing raises, all is counted, nothing grows."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_network
from random import Random
from typing import Any

from fz_core.packet import Address, Packet, build_control, build_udp
from fz_core.portal import client as c
from fz_core.portal import client_wire
from fz_core.portal import gateway as g
from fz_core.portal.codec import ParseFailure
from fz_core.portal.types import (
    Authorization,
    CidrResource,
    DnsResource,
    DynamicDevicePool,
    Filter,
    IceCredentials,
    InternetResource,
    PoolDevice,
    Site,
    StaticDevicePool,
)
from fz_core.tunnel import control
from tests.sim.properties import check_tables, footprint
from tests.sim.raw_client import RawClient
from tests.sim.system import INGEST_TOKEN, PORT, SERVER, Peer, Scenario, System, uuid_of

SITE = Site(uuid_of("site"), "site")


def recorded(seed: int) -> tuple[System, list[tuple[Peer, Address, Address, bytes]]]:
    """A system at work, and every datagram client and gateway received so far."""
    system = System(seed, Scenario(client_nat="symmetric", gateway_nat="symmetric"))
    heard: list[tuple[Peer, Address, Address, bytes]] = []
    for peer in (system.client, system.gateway):
        tap(peer, heard)
    system.portal.reconnect(system.client_id)
    system.portal.replace_relay_credentials("again")
    for n in range(20):
        system.ask(b"%d" % n)
        system.world.run_for(0.5)
    assert system.answers
    return system, heard


def tap(peer: Peer, heard: list[tuple[Peer, Address, Address, bytes]]) -> None:
    def receive(to: Address, source: Address, data: bytes, ecn: int) -> None:
        heard.append((peer, to, source, data))
        peer._receive(to, source, data, ecn)

    peer.host.listen(4, PORT, receive)


def mutated(random: Random, data: bytes) -> bytes:
    """A near relative of a genuine datagram, or something made up."""
    kind = random.randrange(6)
    if kind == 0:
        return random.randbytes(random.choice((0, 1, 3, 4, 19, 20, 31, 32, 64, 92, 148, 600, 1500)))
    result = bytearray(data)
    if kind == 1:
        for _ in range(random.randrange(1, 6)):
            result[random.randrange(len(result))] = random.randrange(256)
    elif kind == 2:
        del result[random.randrange(len(result)) :]
    elif kind == 3:
        result += random.randbytes(random.randrange(1, 40))
    elif kind == 4:
        result[random.randrange(min(len(result), 24))] ^= 1 << random.randrange(8)
    return bytes(result)  # kind 5: a repetition


def drops(peer: Peer) -> int:
    return sum(peer.state.drops.values())


def test_datagrams() -> None:
    for seed in range(4):
        system, heard = recorded(seed)
        random = system.world.random
        strangers = [Address(bytes([198, 51, 100, n]), random.choice((3478, 4000))) for n in range(8)]
        sizes: list[int] = []
        for _ in range(4):
            for _ in range(1500):
                peer, to, source, data = random.choice(heard[:400])
                source = random.choice((source, source, *strangers[:2]))
                before = drops(peer)
                error = peer.state.handle_network_input(to, source, mutated(random, data), 0, system.world.now)
                assert drops(peer) - before == (error is not None)
                peer.drain()
            system.world.run_for(20.0)
            for peer in (system.client, system.gateway):
                check_tables(peer, f"seed {seed}")
                peer.packets.clear()
                peer.events.clear()
            sizes.append(footprint(system.client.state) + footprint(system.gateway.state))
        assert max(sizes[2:]) <= max(sizes[:2]) * 1.2 + 200, f"seed {seed}: {sizes}"


def test_inner_packets_from_a_peer_with_valid_keys() -> None:
    random = Random(5)
    system = System(5, Scenario(client_nat="public", gateway_nat="public"), RawClient)
    system.portal._request(system.client_id, system.portal.resources[0].id)
    system.world.run_for(1.0)
    own = system.client_ip
    seeds = [
        build_udp(own, SERVER, 1, 2, b"payload").data,
        build_control(0, b'{"resource":"%s","domain":"a.b","proxy_ips":["100.96.0.1"]}' % SITE.id.encode()).data,
        build_control(1, b'{"resource":"%s","domain":"a.b","status":"Active"}' % SITE.id.encode()).data,
        build_control(7, bytes(40)).data,
    ]
    size = footprint(system.gateway.state)
    for _ in range(6000):
        plain = mutated(random, random.choice(seeds))[:1280]
        sent = system.client.state.node.encapsulate(system.gateway_id, plain, 0, system.world.now)
        to = Address(system.gateway.host.ips[4], PORT)
        source = Address(system.client.host.ips[4], PORT)
        system.gateway.state.handle_network_input(to, source, sent.payload, random.randrange(4), system.world.now)
        drain_quietly(system.gateway)
    assert footprint(system.gateway.state) <= size + 4200  # remembered answers are bounded
    assert sum(system.gateway.state.drops.values()) > 1000


def drain_quietly(peer: Peer) -> None:
    for poll in (peer.state.poll_transmit, peer.state.poll_packet, peer.state.poll_event):
        while poll() is not None:
            pass


def test_packets_from_tun() -> None:
    system, _ = recorded(9)
    random = Random(9)
    data = build_udp(system.client_ip, SERVER, 7000, 7, b"payload").data
    for peer in (system.client, system.gateway):
        for _ in range(3000):
            before = drops(peer)
            error = peer.state.handle_tun_input(mutated(random, data), system.world.now)
            assert error is None or drops(peer) == before + 1
            drain_quietly(peer)


# portal messages


def to_client() -> list[Any]:
    credentials = IceCredentials("aaaa", "b" * 22), IceCredentials("cccc", "d" * 22)
    resources = (
        CidrResource(uuid_of("1"), ip_network("10.0.0.0/24"), "net", (Filter("tcp", 1, 2), Filter("icmp")), (SITE,)),
        DnsResource(uuid_of("2"), "*.example.com", "dns", (), (SITE,)),
        InternetResource(uuid_of("3"), sites=(SITE,)),
        DynamicDevicePool(uuid_of("4"), "pool", "*.pool"),
        StaticDevicePool(
            uuid_of("5"), "pool", (PoolDevice(uuid_of("d"), ip_network("100.64.0.7/32"), ip_network("fd00::7/128")),)
        ),
    )
    lines = ("candidate:1 1 udp 100 192.0.2.1 5 typ host", "candidate:2 1 udp 9 192.0.2.2 5 typ relay")
    return [
        *(c.ResourceCreatedOrUpdated(resource) for resource in resources),
        c.ResourceDeleted(uuid_of("1")),
        c.AuthorizationCreated(
            uuid_of("1"), uuid_of("gw"), SITE.id, b"k" * 32, IPv4Address("100.64.0.3"), IPv6Address("fd00::3"),
            b"p" * 32, *credentials, False, INGEST_TOKEN,
        ),
        c.AuthorizationCreationFailed(uuid_of("1"), c.FailReason.OFFLINE),
        c.GatewayIceCandidates(uuid_of("gateway g"), lines),
        c.InvalidateGatewayIceCandidates(uuid_of("gateway g"), lines),
        c.ClientIceCandidates(uuid_of("gateway g"), lines),
        c.RejectAccess(uuid_of("x"), uuid_of("1")),
    ]  # fmt: skip


def to_gateway(system: System) -> list[Any]:
    credentials = IceCredentials("aaaa", "b" * 22), IceCredentials("cccc", "d" * 22)
    client = g.Client(uuid_of("cl"), b"k" * 32, b"p" * 32, IPv4Address("100.64.0.8"), IPv6Address("fd00::8"))
    resources = (
        CidrResource(uuid_of("1"), ip_network("10.0.0.0/24"), "net", (Filter("tcp", 1, 2),)),
        DnsResource(uuid_of("2"), "*.example.com", "dns"),
        InternetResource(uuid_of("3")),
    )
    interface = system.portal.init(system.gateway_id).interface
    lines = ("candidate:1 1 udp 100 192.0.2.1 5 typ host",)
    return [
        g.Init(interface, (), (Authorization(uuid_of("cl"), uuid_of("1"), 5),)),
        *(g.CreateAuthorization("r", client, r, *credentials, 99, False, INGEST_TOKEN) for r in resources),
        *(g.ResourceUpdated(resource) for resource in resources),
        c.RejectAccess(uuid_of("cl"), uuid_of("1")),
        g.IceCandidates(uuid_of("cl"), lines),
        g.InvalidateIceCandidates(uuid_of("cl"), lines),
    ]


ODD = (None, True, -1, 0, 1 << 70, 1.5, "", "x", "::", "1.2.3.4", "0.0.0.0/0", [], {}, [[]], "é" * 300)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def mutated_json(random: Random, payload: Any) -> Any:
    payload = copy.deepcopy(payload)
    for _ in range(random.randrange(1, 4)):
        found = list(places(payload))
        if not found:
            return copy.deepcopy(random.choice(ODD))
        container, key = random.choice(found)
        what = random.randrange(4)
        if what == 0:
            container[key] = copy.deepcopy(random.choice(ODD))
        elif what == 1 and isinstance(container, dict):
            del container[key]
        elif what == 2 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            other, other_key = random.choice(found)
            container[key] = copy.deepcopy(other[other_key])
    return payload


def test_portal_messages() -> None:
    for seed in range(3):
        system, _ = recorded(seed)
        random = system.world.random
        for peer, codec, messages in (
            (system.client, client_wire.TO_CLIENT, [*to_client(), system.portal.init(system.client_id)]),
            (system.gateway, g.TO_GATEWAY, [*to_gateway(system), system.portal.init(system.gateway_id)]),
        ):
            built = [codec.build(message) for message in messages]
            understood = 0
            for _ in range(1500):
                event, payload = random.choice(built)
                broken = mutated_json(random, payload) if random.random() < 0.8 else payload
                message = codec.parse(event, json.loads(json.dumps(broken)))
                if isinstance(message, ParseFailure):
                    continue
                understood += 1
                peer.state.handle_portal_message(message, system.world.now)
                if random.random() < 0.2:
                    peer.state.handle_timeout(system.world.now)
                drain_quietly(peer)
                peer.state.handle_tun_input(build_udp(system.client_ip, SERVER, 7000, 7, b"x"), system.world.now)
            assert understood > 300
            assert len(peer.state.node.peers) < 200
            assert footprint(peer.state) < 60_000


def test_control_bodies_never_break_an_answer() -> None:
    """Whatever a client names, the answer that repeats it fits in a packet."""
    random = Random(3)

    for _ in range(3000):
        domain = "".join(random.choice('a.\\"\x00\x7fé🙂\ud800') for _ in range(random.randrange(400)))
        body = json.dumps({"resource": SITE.id, "domain": domain, "proxy_ips": []}).encode()[:1232]
        event = control.parse_untrusted(control.ASSIGNED_IPS, body)
        if isinstance(event, control.AssignedIps):
            answer = control.DomainStatus(event.resource_id, event.domain, active=False).build()
            assert isinstance(Packet.parse_untrusted(answer.data), Packet)
