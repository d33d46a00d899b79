"""What names, clients and grants cost in memory and per look-up: `python -m tests.bench.bench_state`.

Every case runs in a process of its own. Memory is the growth of the process's resident set, divided. A look-up is
timed at a small and at a large state: the two should not differ. `floods` are random names, random proxy
addresses, fragments and control garbage; memory must stop growing and drops must be counted. JSON on stdout.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from random import Random
from typing import Any

import dns.message

from fz_core.crypto import PrivateKey
from fz_core.packet import Packet, build_control, build_udp
from fz_core.portal import client as c
from fz_core.portal import gateway as g
from fz_core.portal.types import CidrResource, DnsResource, Filter, GatewayInterface, IceCredentials, Interface, Site
from fz_core.tunnel import ClientTunnel, GatewayTunnel, control
from fz_core.tunnel.client_access import ClientAccess, Decision

OWN4, OWN6 = IPv4Address("100.64.0.9"), IPv6Address("fd00:2021:1111::9")
SENTINEL = ip_address("100.100.111.1").packed
SITE = Site("00000000-0000-4000-8000-000000000001", "s")
WILDCARD = DnsResource("00000000-0000-4000-8000-0000000000aa", "*.corp.example", "d", (), (SITE,))
CREDENTIALS = IceCredentials("ufrag", "password")
EPOCH = 1_700_000_000
RANDOM = Random(1)


def main() -> None:
    if len(sys.argv) > 1:
        json.dump(CASES[sys.argv[1]](), sys.stdout)
        return
    results = {}
    for case in CASES:
        run = subprocess.run([sys.executable, "-m", __spec__.name, case], capture_output=True, text=True, check=True)
        results[case] = json.loads(run.stdout)
    print(json.dumps(results, indent=2))


def resident() -> int:
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def nanoseconds(act: Callable[[], object], times: int = 20_000) -> int:
    """Of one call, the best of five rounds."""
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(times // 5):
            act()
        best = min(best, (time.perf_counter() - started) / (times // 5))
    return round(best * 1e9)


def new_client() -> ClientTunnel:
    state = ClientTunnel(PrivateKey(b"\x01" * 32), 0.0, EPOCH, RANDOM.randbytes)
    state.set_system_resolvers([bytes([192, 0, 2, 53])], 0.0)
    state.handle_portal_message(c.Init(Interface(OWN4, OWN6), (WILDCARD,)), 0.0)
    return state


def query(name: str) -> Packet:
    wire = dns.message.make_query(name, "A").to_wire()
    return build_udp(OWN4.packed, SENTINEL, 5000, 53, wire)


def drain(state: ClientTunnel) -> int:
    packets = 0
    while state.poll_packet() is not None:
        packets += 1
    while state.poll_event() is not None:
        pass
    return packets


def client_names() -> dict[str, Any]:
    """10,000 names under one wildcard."""
    state = new_client()
    results: dict[str, Any] = {}
    before, known = resident(), 0
    for size in (100, 10_000):
        for number in range(known, size):
            state.handle_tun_input(query(f"host{number}.corp.example"), 0.0)
            drain(state)
        known = size
        address = (0x64600001).to_bytes(4, "big")
        results[f"route_ns_at_{size}_names"] = nanoseconds(lambda a=address: state.resources.route(a, 17, 80))  # type: ignore[misc]
    results["bytes_per_name"] = round((resident() - before) / known)
    return results


def gateway_clients() -> dict[str, Any]:
    """1,000 clients with 100 grants each: half networks, half names with four addresses set up."""
    results: dict[str, Any] = {}
    before = resident()
    clients: list[ClientAccess] = []
    own = (bytes([100, 64, 0, 1]), OWN6.packed)
    for size in (1, 1000):
        for number in range(len(clients), size):
            ips = ((0x64400010 + number).to_bytes(4, "big"), (int(OWN6) + number).to_bytes(16, "big"))
            access = ClientAccess(ips, own)
            for grant in range(50):
                network = ip_network(f"10.{grant}.0.0/16")
                identity = f"00000000-0000-4000-8000-{grant:012}"
                access.grant(CidrResource(identity, network, "n", (Filter("tcp", 80, 80),)), 1e9)
                named = f"00000000-0000-4000-9000-{grant:012}"
                access.grant(DnsResource(named, f"*.zone{grant}.example", "d"), 1e9)
                proxies = [(0x64600000 + 4 * grant + n).to_bytes(4, "big") for n in range(1, 5)]
                access.set_up_name(named, f"a.zone{grant}.example", proxies, [bytes([10, 0, 0, grant])], mix=True)
            clients.append(access)
        packet = build_udp(clients[0].client_ips[0], bytes([10, 3, 0, 1]), 1000, 80)
        results[f"decide_ns_with_{size}_clients"] = nanoseconds(lambda p=packet: clients[0].decide(p))  # type: ignore[misc]
    results["kib_per_client"] = round((resident() - before) / len(clients) / 1024, 1)
    return results


def gateway_endings() -> dict[str, Any]:
    """A grant of one client ends, while 100 or 10,000 have grants that end later, and names with four addresses."""
    results: dict[str, Any] = {}
    for size in (100, 10_000):
        state = GatewayTunnel(PrivateKey(b"\x01" * 32), 0.0, EPOCH, RANDOM.randbytes)
        state.node.upsert_connection = lambda *_: True  # type: ignore[method-assign]  # only grants are wanted
        state.handle_portal_message(g.Init(GatewayInterface(IPv4Address("100.64.0.1"), OWN6)), 0.0)
        for number in range(size):
            ips = IPv4Address("100.64.0.16") + number, OWN6 + 16 + number
            client = g.Client(f"c{number}", b"k" * 32, bytes(32), *ips)
            message = g.CreateAuthorization("", client, WILDCARD, CREDENTIALS, CREDENTIALS, EPOCH + 1000 + 10 * number)
            state.handle_portal_message(message, 0.0)
            proxies, real = [(0x64600001 + n).to_bytes(4, "big") for n in range(4)], [bytes([10, 0, 0, 1])]
            state._clients[client.id].set_up_name(WILDCARD.id, "a.corp.example", proxies, real, mix=True)
        best = float("inf")
        for number in range(20):
            started = time.perf_counter()
            state.handle_timeout(1001.0 + 10 * number)
            state.poll_timeout()
            best = min(best, time.perf_counter() - started)
        assert len(state._clients) == size - 20
        results[f"us_with_{size}_clients"] = round(best * 1e6)
    return results


def gateway_names() -> dict[str, Any]:
    """10,000 names of one client on a gateway, with eight addresses each."""
    access = ClientAccess((OWN4.packed, OWN6.packed), (bytes([100, 64, 0, 1]), OWN6.packed))
    access.grant(WILDCARD, None)
    before = resident()
    results: dict[str, Any] = {}
    known = 0
    for size in (100, 10_000):
        for number in range(known, size):
            v4 = [(0x64600000 + 4 * number + n).to_bytes(4, "big") for n in range(1, 5)]
            v6 = [ip_address(f"fd00:2021:1111:8000::{4 * number + n:x}").packed for n in range(4)]
            real = [(0x0A000000 + number).to_bytes(4, "big")]
            access.set_up_name(WILDCARD.id, f"host{number}.corp.example", v4 + v6, real, mix=True)
        known = size
        packet = build_udp(OWN4.packed, (0x64600001).to_bytes(4, "big"), 1000, 80)
        assert access.decide(packet) is Decision.TRANSLATE
        results[f"decide_ns_at_{size}_names"] = nanoseconds(lambda p=packet: access.decide(p))  # type: ignore[misc]
    results["bytes_per_name"] = round((resident() - before) / known)
    return results


def floods() -> dict[str, Any]:
    """Growth of the process in MiB over two equal floods: the second must add next to nothing."""
    state = new_client()

    def names(count: int) -> None:
        for _ in range(count):
            state.handle_tun_input(query(f"{RANDOM.getrandbits(64):x}.corp.example"), 0.0)
            drain(state)

    def garbage(count: int) -> None:
        fragment = bytearray(build_udp(OWN4.packed, bytes([10, 0, 0, 1]), 1, 2, b"x" * 64).data)
        fragment[6] |= 0x20
        for _ in range(count):
            proxy = (0x64600000 + RANDOM.getrandbits(20)).to_bytes(4, "big")
            state.handle_tun_input(build_udp(OWN4.packed, proxy, RANDOM.getrandbits(16), 80), 0.0)
            state.handle_tun_input(bytes(fragment), 0.0)
            state.handle_tun_input(build_udp(OWN4.packed, SENTINEL, 1, 53, RANDOM.randbytes(40)), 0.0)
            control.parse_untrusted(RANDOM.getrandbits(2), RANDOM.randbytes(60))
            state.handle_tun_input(build_control(RANDOM.getrandbits(2), RANDOM.randbytes(60)), 0.0)
            drain(state)

    results: dict[str, Any] = {}
    for title, flood, count in (("random names", names, 70_000), ("garbage", garbage, 70_000)):
        growth = []
        for _ in range(3):
            before = resident()
            flood(count)
            growth.append(round((resident() - before) / 2**20, 1))
        results[title] = {"packets_each": count, "growth_mib": growth}
    results["drops"] = {reason.value: number for reason, number in sorted(state.drops.items())}
    return results


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "client_names": client_names,
    "gateway_clients": gateway_clients,
    "gateway_endings": gateway_endings,
    "gateway_names": gateway_names,
    "floods": floods,
}

if __name__ == "__main__":
    main()
