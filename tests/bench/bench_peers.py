"""A gateway's node with many idle peers: memory, processor time at rest, per packet and per handshake.

    python -m tests.bench.bench_peers [--counts 1,100,300] [--seconds 30] [--iceless]

Every count runs in a process of its own, in virtual time: nodes on a network with 5 ms one way, nobody behind a NAT,
one relay. Only calls of the gateway's node are timed: there is no socket, policy or event loop. `idle_cpu_percent` is
of one core, 30 s after everybody connected; above a hundred they cannot be served. A handshake is a
client's initiation and its first packet; there is one each 0.1 s, so that nobody is asked for a cookie. JSON on
stdout, progress on stderr. More take minutes.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from random import Random
from typing import Any

from fz_core.crypto import PrivateKey
from fz_core.ice import Credentials
from fz_core.node import Node, Parameters
from fz_core.node.connection import Profiles
from fz_core.node.events import CandidateAdded
from fz_core.node.node import CLIENT_PROFILES, GATEWAY_PROFILES
from fz_core.packet import Address, Transmit, build_udp
from fz_core.portal.types import Relay, merge_relays
from fz_core.turn import RelayServer, SendToClient, SendToPeer, relay_credentials, relay_id

EPOCH, EXPIRES_AT = 1_700_000_000.0, 2_000_000_000
LATENCY = 0.005
SETTLE = 30.0
PORT, RELAY_PORT = 52625, 3478
SECRET = "5e" * 32
RELAY = Address.parse(f"198.51.100.1:{RELAY_PORT}")
GATEWAY = "gateway"
RANDOM = Random(1)
SAMPLES = 200
GIVE_UP = 900.0  # real seconds for one count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", default="1,100,300", help="of peers, with commas between")
    parser.add_argument("--seconds", type=float, default=30.0, help="of rest, in virtual time")
    parser.add_argument("--iceless", action="store_true", help="connections that do without ICE")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone is not None:
        json.dump(measure(options.alone, options.seconds, options.iceless), sys.stdout)
        return
    results: dict[str, Any] = {"iceless": options.iceless}
    for count in options.counts.split(","):
        print(f"{count} peers", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", __spec__.name, "--alone", count, "--seconds", str(options.seconds)]
        try:
            run = subprocess.run(
                [*command, *["--iceless"] * options.iceless], stdout=subprocess.PIPE, check=True, timeout=GIVE_UP
            )
            results[count] = json.loads(run.stdout)
        except subprocess.TimeoutExpired:
            results[count] = {"error": f"not done after {GIVE_UP:.0f} s"}
    print(json.dumps(results, indent=2))


def measure(count: int, seconds: float, iceless: bool) -> dict[str, Any]:
    """Everything about a gateway with so many peers."""
    net = Network()
    gateway = End(net, GATEWAY, Address(bytes((203, 0, 113, 1)), PORT), GATEWAY_PROFILES)
    net.run_for(1.0)
    clients = [End(net, f"client{n}", address_of(n), CLIENT_PROFILES) for n in range(count)]
    net.run_for(1.0)
    gc.collect()
    before, began_at = resident(), time.perf_counter()
    for number, client in enumerate(clients):
        connect(client, gateway, number, iceless)
        net.run_for(0.05)
    net.run_for(SETTLE)
    ready = sum(gateway.node.is_ready(client.name) for client in clients)
    assert ready == count, f"{ready} of {count} connected"
    gc.collect()
    result: dict[str, Any] = {
        # both ends of each connection are in this process
        "kib_per_connection_of_two": round((resident() - before) / count / 1024, 1),
        "set_up_ms_of_two": round((time.perf_counter() - began_at) / count * 1000, 2),
    }
    gateway.busy, gateway.wakes, gateway.sent = 0.0, 0, 0
    net.run_for(seconds)
    result["idle_cpu_percent"] = round(gateway.busy / seconds * 100, 2)
    result["wakes_per_s"] = round(gateway.wakes / seconds, 1)
    result["datagrams_sent_per_s"] = round(gateway.sent / seconds, 1)
    result |= packets(net, gateway, clients[-1]) | handshakes(net, gateway, clients)
    return result


def packets(net: Network, gateway: End, client: End) -> dict[str, Any]:
    """Sealing for one of many, the best of five rounds."""
    packet = build_udp(bytes((100, 64, 0, 1)), bytes((100, 64, 0, 2)), 1, 2, bytes(1200)).data
    best = float("inf")
    for _ in range(5):
        began_at = time.perf_counter()
        for _ in range(SAMPLES):
            sent = gateway.node.encapsulate(client.name, packet, 0, net.now)
            assert isinstance(sent, Transmit), sent
        best = min(best, (time.perf_counter() - began_at) / SAMPLES)
    return {"packet_us": round(best * 1e6, 2)}


def handshakes(net: Network, gateway: End, clients: list[End]) -> dict[str, Any]:
    """What a new session costs the gateway: the middle one, without what timers take."""
    costs = []
    packet = build_udp(bytes((100, 64, 0, 2)), bytes((100, 64, 0, 1)), 1, 2, b"x").data
    for client in itertools.islice(itertools.cycle(clients), min(SAMPLES, 20 * len(clients))):
        net.run_for(0.1)
        before = gateway.received_busy
        connection = client.node._connections.by_peer[GATEWAY]
        connection.tunnel.start_handshake(net.now, force=True)
        client.node._settle(connection, net.now)
        client.drain()
        net.run_for(LATENCY * 2.5)
        sent = client.node.encapsulate(GATEWAY, packet, 0, net.now)
        assert isinstance(sent, Transmit), sent
        net.send(client, sent)
        net.run_for(LATENCY * 1.5)
        costs.append(gateway.received_busy - before)
    middle = sorted(costs)[len(costs) // 2]
    return {"handshake_us": round(middle * 1e6), "handshakes_per_s": round(1 / middle)}


class Network:
    """Nodes and a relay by address, in virtual time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ends: dict[Address, End] = {}
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._relay = RelayServer(
            stamp_secret=SECRET, public_ip4=RELAY.ip, public_ip6=None, random_bytes=RANDOM.randbytes, unix_epoch=EPOCH
        )

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(when, self.now), next(self._order), action))

    def run_for(self, seconds: float) -> None:
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = end

    def send(self, sender: End, transmit: Transmit) -> None:
        self._carry(sender.address, transmit.remote, transmit.payload)

    def _carry(self, source: Address, to: Address, payload: bytes) -> None:
        self.at(self.now + LATENCY, lambda: self._arrive(source, to, payload))

    def _arrive(self, source: Address, to: Address, payload: bytes) -> None:
        end = self.ends.get(to)
        if end is not None:
            end.receive(source, payload)
        elif to == RELAY:
            self._relay.handle_client_input(source, payload, self.now)
        elif to.ip == RELAY.ip:
            self._relay.handle_peer_input(to.port, source, payload, self.now)
        while (command := self._relay.poll_command()) is not None:
            match command:
                case SendToClient(client, data):
                    self._carry(RELAY, client, data)
                case SendToPeer(port, peer, data):
                    self._carry(Address(RELAY.ip, port), peer, data)


class End:
    """A node on a host, with the time its calls take."""

    def __init__(self, net: Network, name: str, address: Address, profiles: Profiles) -> None:
        self.net, self.name, self.address, self.profiles = net, name, address, profiles
        key = PrivateKey(RANDOM.randbytes(32))
        self.node = Node(key, net.now, EPOCH, RANDOM.randbytes)
        self.other: dict[str, End] = {}
        self.busy = self.received_busy = 0.0
        self.wakes = self.sent = 0
        self._wake_at: float | None = None
        net.ends[address] = self
        username, password = relay_credentials(EXPIRES_AT, name, SECRET)
        entry = Relay(relay_id(SECRET), RELAY, username, password, EXPIRES_AT)
        self.node.update_relays((), merge_relays((entry,)), net.now)
        self.drain()

    def receive(self, source: Address, payload: bytes) -> None:
        began_at = time.perf_counter()
        self.node.handle_network_input(self.address, source, payload, self.net.now)
        took = time.perf_counter() - began_at
        self.received_busy += took
        self.busy += took
        self.drain()

    def drain(self) -> None:
        while (event := self.node.poll_event()) is not None:
            if isinstance(event, CandidateAdded):
                self.tell(self.other[event.peer_id], event.candidate)
        began_at = time.perf_counter()
        transmits = []
        while (transmit := self.node.poll_transmit()) is not None:
            transmits.append(transmit)
        due = self.node.poll_timeout()
        self.busy += time.perf_counter() - began_at
        self.sent += len(transmits)
        for transmit in transmits:
            self.net.send(self, transmit)
        if due is not None and (self._wake_at is None or due < self._wake_at or self._wake_at <= self.net.now):
            self._wake_at = due
            self.net.at(due, lambda: self._wake(due))

    def tell(self, other: End, candidate: str) -> None:
        """As the portal does."""

        def arrive() -> None:
            other.node.add_remote_candidate(self.name, candidate, self.net.now)
            other.drain()

        self.net.at(self.net.now + 2 * LATENCY, arrive)

    def _wake(self, due: float) -> None:
        if self._wake_at != due:
            return
        self._wake_at = None
        began_at = time.perf_counter()
        self.node.handle_timeout(self.net.now)
        self.busy += time.perf_counter() - began_at
        self.wakes += 1
        self.drain()


def connect(client: End, gateway: End, number: int, iceless: bool) -> None:
    """What the portal hands to both, the gateway first."""
    secret = RANDOM.randbytes(32)
    ours, theirs = (Credentials(f"{side}{number:03}", f"{number:022}") for side in ("c", "g"))
    client.other[gateway.name], gateway.other[client.name] = gateway, client
    for end, other, local, remote in ((gateway, client, theirs, ours), (client, gateway, ours, theirs)):
        key = other.node.public_key
        parameters = Parameters(key, secret, local, remote, controlling=end is client, iceless=iceless)
        end.node.upsert_connection(other.name, parameters, end.net.now, end.profiles)
        end.drain()


def address_of(number: int) -> Address:
    """Public addresses, one per client."""
    return Address(bytes((198, 18 + (number >> 16), number >> 8 & 255, number & 255)), PORT)


def resident() -> int:
    """Bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


if __name__ == "__main__":
    main()
