"""A gateway's node with many idle peers: memory, processor time at rest, per packet and per handshake.

    python -m tests.bench.bench_peers [--counts 100,1000,10000] [--seconds 25] [--iceless]

Every count runs in a process of its own, in virtual time: nodes on a network with 5 ms one way, nobody behind a NAT,
two relays. Only the processor time of the gateway's node counts: no socket, policy or event loop. Who has connected is
put to rest at once. A client of a relay has 4,096 channels, so where there are more peers some have no relayed path.
`idle_cpu_percent` is of one core; above a hundred they cannot be served. `packet_us` is sealing alone, `turn_us` a turn
of the node that seals a packet: the datagram is taken and the next deadline asked for. A handshake is a client's
initiation and its first packet; there are 25 a second, so that nobody is asked for a cookie. Ten thousand take two
minutes or three.

JSON on stdout, progress on stderr.
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
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

from fz_core.crypto import PrivateKey
from fz_core.ice import Credentials
from fz_core.node import Node, Parameters
from fz_core.node.connection import MAX_IDLE, Profiles
from fz_core.node.events import CandidateAdded, ConnectionEstablished
from fz_core.node.node import CLIENT_PROFILES, GATEWAY_PROFILES
from fz_core.packet import Address, Transmit, build_udp
from fz_core.portal.types import Relay, merge_relays
from fz_core.turn import RelayServer, SendToClient, SendToPeer, relay_credentials, relay_id

EPOCH, EXPIRES_AT = 1_700_000_000.0, 2_000_000_000
LATENCY = 0.005
CONNECT_GAP = 0.0125  # below the hundred handshake messages a second from which on cookies are asked for
SETTLE = 5.0
PORT, RELAY_PORT = 52625, 3478
RELAYS = {Address.parse(f"198.51.100.{n}:{RELAY_PORT}"): f"{n}e" * 32 for n in (1, 2)}
GATEWAY = "gateway"
RANDOM = Random(1)
SAMPLES = 200
GIVE_UP = 900.0  # real seconds for one count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", default="100,1000,10000", help="of peers, with commas between")
    parser.add_argument("--seconds", type=float, default=25.0, help="of rest, in virtual time")
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
    before, began_at = resident(), time.process_time()
    for number, client in enumerate(clients):
        connect(client, gateway, number, iceless)
        net.run_for(CONNECT_GAP)
    net.run_for(SETTLE)
    ready = sum(gateway.node.is_ready(client.name) for client in clients)
    assert ready == count, f"{ready} of {count} connected"
    gc.collect()
    result: dict[str, Any] = {
        # both ends of each connection are in this process
        "kib_per_connection_of_two": round((resident() - before) / count / 1024, 1),
        "set_up_ms_of_two": round((time.process_time() - began_at) / count * 1000, 2),
    }
    gateway.busy, gateway.wakes, gateway.sent = 0.0, 0, 0
    net.run_for(seconds)
    resting = sum(not gateway.node.is_busy(client.name) for client in clients)
    assert resting == count, f"{resting} of {count} at rest"
    result["idle_cpu_percent"] = round(gateway.busy / seconds * 100, 2)
    result["wakes_per_s"] = round(gateway.wakes / seconds, 1)
    result["datagrams_sent_per_s"] = round(gateway.sent / seconds, 1)
    result |= packets(net, gateway, clients[-1]) | handshakes(net, gateway, clients)
    return result


def packets(net: Network, gateway: End, client: End) -> dict[str, Any]:
    """Sealing for one of many, alone and as a turn; the best of five rounds each."""
    packet = build_udp(bytes((100, 64, 0, 1)), bytes((100, 64, 0, 2)), 1, 2, bytes(1200)).data

    def seal() -> None:
        sent = gateway.node.encapsulate(client.name, packet, 0, net.now)
        assert isinstance(sent, Transmit), sent

    def turn() -> None:
        seal()
        while gateway.node.poll_transmit() is not None:
            pass
        gateway.node.poll_timeout()

    return {"packet_us": round(best_of(seal) * 1e6, 2), "turn_us": round(best_of(turn) * 1e6, 2)}


def best_of(work: Callable[[], None]) -> float:
    """Seconds that it takes."""
    best = float("inf")
    for _ in range(5):
        began_at = time.process_time()
        for _ in range(SAMPLES):
            work()
        best = min(best, (time.process_time() - began_at) / SAMPLES)
    return best


def handshakes(net: Network, gateway: End, clients: list[End]) -> dict[str, Any]:
    """What a new session costs the gateway: the middle one, without what timers take."""
    costs = []
    packet = build_udp(bytes((100, 64, 0, 2)), bytes((100, 64, 0, 1)), 1, 2, b"x").data
    for client in itertools.islice(itertools.cycle(clients), min(SAMPLES, 20 * len(clients))):
        net.run_for(LATENCY * 4)
        before = gateway.received_busy[client.address]
        connection = client.node._connections.by_peer[GATEWAY]
        connection.tunnel.start_handshake(net.now, force=True)
        client.node._settle(connection, net.now)
        client.drain()
        net.run_for(LATENCY * 2.5)
        sent = client.node.encapsulate(GATEWAY, packet, 0, net.now)
        assert isinstance(sent, Transmit), sent
        net.send(client, sent)
        net.run_for(LATENCY * 1.5)
        costs.append(gateway.received_busy[client.address] - before)
    middle = sorted(costs)[len(costs) // 2]
    return {"handshake_us": round(middle * 1e6), "handshakes_per_s": round(1 / middle)}


class Network:
    """Nodes and relays by address, in virtual time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ends: dict[Address, End] = {}
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._relays = {
            address.ip: RelayServer(
                stamp_secret=secret,
                public_ip4=address.ip,
                public_ip6=None,
                random_bytes=RANDOM.randbytes,
                unix_epoch=EPOCH,
            )
            for address, secret in RELAYS.items()
        }

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
            return
        relay = self._relays[to.ip]
        if to.port == RELAY_PORT:
            relay.handle_client_input(source, payload, self.now)
        else:
            relay.handle_peer_input(to.port, source, payload, self.now)
        while (command := relay.poll_command()) is not None:
            match command:
                case SendToClient(client, data):
                    self._carry(Address(to.ip, RELAY_PORT), client, data)
                case SendToPeer(port, peer, data):
                    self._carry(Address(to.ip, port), peer, data)


class End:
    """A node on a host, with the time its calls take."""

    def __init__(self, net: Network, name: str, address: Address, profiles: Profiles) -> None:
        self.net, self.name, self.address, self.profiles = net, name, address, profiles
        key = PrivateKey(RANDOM.randbytes(32))
        self.node = Node(key, net.now, EPOCH, RANDOM.randbytes)
        self.other: dict[str, End] = {}
        self.busy = 0.0
        self.received_busy: Counter[Address] = Counter()
        self.wakes = self.sent = 0
        self._wake_at: float | None = None
        net.ends[address] = self
        entries = [
            Relay(relay_id(secret), address, *relay_credentials(EXPIRES_AT, name, secret), EXPIRES_AT)
            for address, secret in RELAYS.items()
        ]
        self.node.update_relays((), merge_relays(entries), net.now)
        self.drain()

    def receive(self, source: Address, payload: bytes) -> None:
        began_at = time.process_time()
        self.node.handle_network_input(self.address, source, payload, self.net.now)
        took = time.process_time() - began_at
        self.received_busy[source] += took  # type: ignore[assignment]
        self.busy += took
        self.drain()

    def drain(self) -> None:
        while (event := self.node.poll_event()) is not None:
            if isinstance(event, CandidateAdded):
                self.tell(self.other[event.peer_id], event.candidate)
            elif isinstance(event, ConnectionEstablished):
                self.rest(event.peer_id)
        began_at = time.process_time()
        transmits = []
        while (transmit := self.node.poll_transmit()) is not None:
            transmits.append(transmit)
        due = self.node.poll_timeout()
        self.busy += time.process_time() - began_at
        self.sent += len(transmits)
        for transmit in transmits:
            self.net.send(self, transmit)
        if due is not None and (self._wake_at is None or due < self._wake_at or self._wake_at <= self.net.now):
            self._wake_at = due
            self.net.at(due, lambda: self._wake(due))

    def rest(self, peer_id: str) -> None:
        """No packets have come for as long as it takes."""
        connection = self.node._connections.by_peer[peer_id]
        connection._last_activity -= MAX_IDLE
        self.node._deadlines.note(connection)

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
        began_at = time.process_time()
        self.node.handle_timeout(self.net.now)
        self.busy += time.process_time() - began_at
        self.wakes += 1
        self.drain()


def connect(client: End, gateway: End, number: int, iceless: bool) -> None:
    """What the portal hands to both, the gateway first."""
    secret = RANDOM.randbytes(32)
    ours, theirs = (Credentials(f"{side}{number:05}", f"{number:022}") for side in ("c", "g"))
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
