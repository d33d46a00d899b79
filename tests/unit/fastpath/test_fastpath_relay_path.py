"""The relay's path of data over real loopback sockets: what goes where, in which order, and what is dropped."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from fz_core.fastpath.relay_path import RelayPath
from fz_core.packet import Address

SOL_UDP, UDP_SEGMENT, UDP_GRO = 17, 103, 104
HOSTS = {4: "127.0.0.1", 16: "::1"}
NUMBER = 0x4001
Request = tuple[bytes, Address]


def udp(family: int = 4, *, gro: bool = False) -> socket.socket:
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    sock = socket.socket(kind, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    sock.bind((HOSTS[family], 0))
    sock.setblocking(False)
    if gro:
        sock.setsockopt(SOL_UDP, UDP_GRO, 1)
    return sock


def address_of(sock: socket.socket) -> Address:
    host, port = sock.getsockname()[:2]
    return Address(socket.inet_pton(sock.family, host), port)


def framed(payload: bytes, number: int = NUMBER, padding: bytes = b"") -> bytes:
    return struct.pack("!HH", number, len(payload)) + payload + padding


def waiting(sock: socket.socket) -> list[bytes]:
    """All that has arrived."""
    found = []
    while True:
        try:
            found.append(sock.recv(65536))
        except BlockingIOError:
            return found


class Bench:
    """A path with one listening port per family, and clients and peers around it."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.act: Callable[[bytes, Address], None] = lambda datagram, source: None
        self.path = RelayPath(self._take)
        self.sockets: list[socket.socket] = []
        self.listen = {family: self._add_port(family, is_listening=True) for family in HOSTS}

    def _take(self, datagram: bytes, source: Address) -> None:
        self.requests.append((datagram, source))
        self.act(datagram, source)

    def _add_port(self, family: int, *, is_listening: bool = False) -> Address:
        sock = udp(family, gro=True)
        address = address_of(sock)
        self.path.add_port(sock.detach(), family == 4, address.port, is_listening)
        return address

    def port(self, family: int = 4) -> Address:
        """A new allocation."""
        return self._add_port(family)

    def socket(self, family: int = 4, *, gro: bool = False) -> socket.socket:
        """A new client or peer."""
        self.sockets.append(udp(family, gro=gro))
        return self.sockets[-1]

    def channel(self, family: int = 4, peer_family: int = 4, number: int = NUMBER) -> Channel:
        client, peer = self.socket(family), self.socket(peer_family)
        return Channel(self, client, peer, self.port(peer_family), number)

    def turn(self) -> None:
        self.path.turn(1000, 0)

    def close(self) -> None:
        self.path.close()
        for sock in self.sockets:
            sock.close()


class Channel:
    """A bound channel and the sockets at its ends."""

    def __init__(self, bench: Bench, client: socket.socket, peer: socket.socket, port: Address, number: int) -> None:
        self.bench, self.client, self.peer, self.port, self.number = bench, client, peer, port, number
        self.listen = bench.listen[len(address_of(client).ip)]
        bench.path.open_route(address_of(client), number, port.port, address_of(peer))

    def send_outward(self, datagram: bytes) -> None:
        self.client.sendto(datagram, (self.listen.host, self.listen.port))

    def send_inward(self, datagram: bytes) -> None:
        self.peer.sendto(datagram, (self.port.host, self.port.port))


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def test_the_header_is_taken_away_and_put_before(bench: Bench) -> None:
    channel = bench.channel()
    channel.send_outward(framed(b"ping"))
    channel.send_inward(b"pong")
    bench.turn()
    assert channel.peer.recvfrom(100) == (b"ping", (channel.port.host, channel.port.port))
    assert channel.client.recvfrom(100) == (framed(b"pong"), (channel.listen.host, channel.listen.port))
    assert bench.path.relayed_bytes == 8
    assert (bench.path.unknown, bench.path.overflowed, bench.path.refused) == (0, 0, 0)


@pytest.mark.parametrize(("family", "peer_family"), [(4, 16), (16, 4), (16, 16)])
def test_families_may_differ(bench: Bench, family: int, peer_family: int) -> None:
    bench.channel()  # leaves an address of the other family in every buffer
    channel = bench.channel(family, peer_family)
    for n in range(40):
        bench.channel().send_outward(framed(b"other"))
        channel.send_outward(framed(bytes([n])))
        channel.send_inward(bytes([n]))
    bench.turn()
    assert waiting(channel.peer) == [bytes([n]) for n in range(40)]
    assert waiting(channel.client) == [framed(bytes([n])) for n in range(40)]


def test_bytes_beyond_the_length_are_ignored(bench: Bench) -> None:
    channel = bench.channel()
    channel.send_outward(framed(b"abc", padding=b"\0"))
    channel.send_outward(framed(b"", padding=bytes(200)))
    bench.turn()
    assert waiting(channel.peer) == [b"abc", b""]


def test_padded_batches_keep_their_payloads(bench: Bench) -> None:
    channel = bench.channel()
    parts = [framed(bytes([n]) * 101, padding=b"pad") for n in range(30)]
    channel.client.sendmsg(parts, gso(108), 0, (channel.listen.host, channel.listen.port))
    bench.turn()
    assert waiting(channel.peer) == [bytes([n]) * 101 for n in range(30)]


def test_empty_datagrams_pass_both_ways_one_by_one(bench: Bench) -> None:
    channel = bench.channel()
    parts = [framed(b"")] * 5
    channel.client.sendmsg(parts, gso(4), 0, (channel.listen.host, channel.listen.port))
    for _ in range(5):
        channel.send_inward(b"")
    bench.turn()
    assert waiting(channel.peer) == [b""] * 5
    assert waiting(channel.client) == [framed(b"")] * 5


@pytest.mark.parametrize(
    "datagram",
    [
        b"\x40", b"\x40\x01\x00", struct.pack("!HH", NUMBER, 5) + b"four", struct.pack("!HH", NUMBER, 0xFFFF),
        framed(b"x", NUMBER + 1), framed(b"x", 0x4F01),
    ],
)  # fmt: skip
def test_what_fits_no_channel_is_dropped_and_counted(bench: Bench, datagram: bytes) -> None:
    channel = bench.channel()
    channel.send_outward(datagram)
    channel.send_outward(framed(b"good"))
    bench.turn()
    assert waiting(channel.peer) == [b"good"]
    assert bench.path.unknown == 1
    assert bench.requests == []


def test_strangers_get_nothing_through(bench: Bench) -> None:
    channel, stranger = bench.channel(), bench.socket()
    stranger.sendto(framed(b"x"), (channel.listen.host, channel.listen.port))
    stranger.sendto(b"", (channel.port.host, channel.port.port))
    parts = [bytes(100)] * 7
    stranger.sendmsg(parts, gso(100), 0, (channel.port.host, channel.port.port))
    bench.turn()
    assert waiting(channel.peer) == waiting(channel.client) == []
    assert bench.path.unknown == 9


def test_a_longest_datagram_passes_outward_and_is_refused_inward(bench: Bench) -> None:
    """4 bytes more than fit a packet: only the kernel knows, and its refusal is counted."""
    channel = bench.channel()
    longest = random.Random(1).randbytes(65503)
    channel.send_outward(framed(longest))
    channel.send_inward(longest)
    channel.send_inward(bytes(65507))
    bench.turn()
    assert waiting(channel.peer) == [longest]
    assert waiting(channel.client) == [framed(longest)]
    assert bench.path.refused == 1


# Batches


def gso(segment: int) -> list[tuple[int, int, bytes]]:
    return [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", segment))]


@pytest.mark.parametrize("seed", range(6))
def test_contents_and_order_of_many_flows(bench: Bench, seed: int) -> None:
    """Mixed sizes, channels, clients and peers, alone and in batches: each flow arrives as it was sent."""
    rng = random.Random(seed)
    clients = [bench.socket(rng.choice((4, 16))) for _ in range(3)]
    channels = []
    for client in clients:
        port = {family: bench.port(family) for family in (4, 16)}
        for number in range(0x4000, 0x4000 + rng.choice((1, 3, 30))):
            family = rng.choice((4, 16))
            channels.append(Channel(bench, client, bench.socket(family), port[family], number))
    outward: dict[Channel, list[bytes]] = {channel: [] for channel in channels}
    inward: dict[socket.socket, dict[int, list[bytes]]] = {client: {} for client in clients}
    found = {client: list[bytes]() for client in clients}
    got: dict[Channel, list[bytes]] = {channel: [] for channel in channels}
    for _ in range(60):
        for _ in range(rng.randrange(1, 12)):
            channel = rng.choice(channels)
            size = rng.choice((0, 1, 60, 100, 1200, 1312, rng.randrange(1, 1400)))
            payloads = [rng.randbytes(size) for _ in range(rng.choice((1, 1, 5, 40)))]
            if size and len(payloads) > 1 and rng.random() < 0.5:
                payloads[-1] = payloads[-1][: rng.randrange(1, size + 1)]
            if rng.random() < 0.5:
                same = [c for c in channels if c.client is channel.client]
                through = [rng.choice(same) if rng.random() < 0.2 else channel for _ in payloads]
                datagrams = [framed(p, c.number) for p, c in zip(payloads, through, strict=True)]
                send(channel.client, datagrams, channel.listen)
                for payload, used in zip(payloads, through, strict=True):
                    outward[used].append(payload)
            else:
                send(channel.peer, payloads, channel.port)
                inward[channel.client].setdefault(channel.number, []).extend(payloads)
        bench.turn()
        for channel in channels:
            got[channel] += waiting(channel.peer)
        for client in clients:
            found[client] += waiting(client)
    assert got == outward, seed
    for client in clients:
        by_number: dict[int, list[bytes]] = {}
        for datagram in found[client]:
            number, length = struct.unpack_from("!HH", datagram)
            assert length == len(datagram) - 4
            by_number.setdefault(number, []).append(datagram[4:])
        assert by_number == inward[client], seed
    assert sum(map(len, outward.values())) > 1000
    assert (bench.path.unknown, bench.path.overflowed, bench.path.refused) == (0, 0, 0)


def send(sock: socket.socket, datagrams: list[bytes], to: Address) -> None:
    """With one system call where that is possible."""
    size = len(datagrams[0])
    if size and len(datagrams) > 1 and all(len(d) == size for d in datagrams[:-1]) and 0 < len(datagrams[-1]) <= size:
        sock.sendmsg(datagrams, gso(size), 0, (to.host, to.port))
        return
    for datagram in datagrams:
        sock.sendto(datagram, (to.host, to.port))


def test_a_batch_that_grows_by_its_headers_is_cut(bench: Bench) -> None:
    """What filled a packet does not fit one any more with a header before each datagram."""
    channel = bench.channel()
    payloads = [bytes([n]) * 1280 for n in range(51)]
    for _ in range(3):
        channel.peer.sendmsg(payloads, gso(1280), 0, (channel.port.host, channel.port.port))
    bench.turn()
    assert waiting(channel.client) == [framed(p) for p in payloads] * 3


def test_single_datagrams_leave_as_batches(bench: Bench) -> None:
    """Whatever the other end's kernel merges was one system call of ours."""
    client, peer = bench.socket(gro=True), bench.socket(gro=True)
    channel = Channel(bench, client, peer, bench.port(), NUMBER)
    for n in range(20):
        channel.send_outward(framed(bytes([n]) * 100))
        channel.send_inward(bytes([n]) * 100)
    bench.turn()
    for found, part in ((waiting(peer), bytes), (waiting(client), framed)):
        assert b"".join(found) == b"".join(part(bytes([n]) * 100) for n in range(20))
        assert len(found) <= 3


# Anything at all


def test_random_datagrams(bench: Bench) -> None:
    """Each datagram on the listening port is a request, data of a channel, or dropped, as its first bytes say."""
    rng = random.Random(7)
    client, peers = bench.socket(), {number: bench.socket() for number in range(0x4000, 0x4004)}
    port = bench.port()
    for number, peer in peers.items():
        bench.path.open_route(address_of(client), number, port.port, address_of(peer))
    requests: list[bytes] = []
    data: dict[int, list[bytes]] = {number: [] for number in peers}
    dropped = 0
    for _ in range(200):
        batch = [random_datagram(rng) for _ in range(rng.randrange(1, 20))]
        for datagram in batch:
            client.sendto(datagram, (bench.listen[4].host, bench.listen[4].port))
            if datagram[:1] and datagram[0] >> 4 != 4:
                requests.append(datagram)
            elif datagram:
                number, length = struct.unpack("!HH", datagram[:4]) if len(datagram) >= 4 else (0, 0)
                if number in data and length <= len(datagram) - 4:
                    data[number].append(datagram[4 : 4 + length])
                else:
                    dropped += 1
        bench.turn()
        for number, peer in peers.items():
            expected, data[number] = data[number], []
            assert waiting(peer) == expected
    assert [datagram for datagram, _ in bench.requests] == requests
    assert {source for _, source in bench.requests} == {address_of(client)}
    assert bench.path.unknown == dropped > 100
    assert len(requests) > 100
    assert waiting(client) == []


def random_datagram(rng: random.Random) -> bytes:
    payload = rng.randbytes(rng.choice((0, 1, 2, 3, 4, 8, 40, 200, 1400)))
    kind = rng.randrange(6)
    if kind == 0:
        return payload
    if kind == 1:
        return bytes([0x40 | rng.randrange(16)]) + payload
    if kind == 2:
        return bytes([rng.randrange(4)]) + payload
    number = 0x4000 + rng.randrange(6)
    length = len(payload) if kind > 3 else max(0, min(0xFFFF, len(payload) + rng.randrange(-5, 6)))
    return struct.pack("!HH", number, length) + payload


def test_random_datagrams_on_an_allocation(bench: Bench) -> None:
    """There everything of the peer is data, whatever it looks like."""
    rng = random.Random(8)
    channel = bench.channel()
    for _ in range(200):
        datagrams = [random_datagram(rng) for _ in range(rng.randrange(1, 20))]
        for datagram in datagrams:
            channel.send_inward(datagram)
        bench.turn()
        assert waiting(channel.client) == [framed(d) for d in datagrams]
    assert bench.requests == []


# Requests


def test_requests_come_with_their_source(bench: Bench) -> None:
    for family in HOSTS:
        client = bench.socket(family)
        client.sendto(b"\0request", (bench.listen[family].host, bench.listen[family].port))
        client.sendto(b"", (bench.listen[family].host, bench.listen[family].port))
        bench.turn()
        assert bench.requests.pop() == (b"\0request", address_of(client))
        assert bench.requests == []
        bench.path.send(address_of(client), b"reply")
        assert client.recvfrom(100)[0] == b"reply"


def test_data_right_behind_the_request_that_binds_its_channel_passes(bench: Bench) -> None:
    client, peer, port = bench.socket(), bench.socket(), bench.port()
    bench.act = lambda datagram, source: bench.path.open_route(source, NUMBER, port.port, address_of(peer))
    parts = [b"\0" * 32, framed(bytes(28)), framed(b"\1" * 28)]
    client.sendmsg(parts, gso(32), 0, (bench.listen[4].host, bench.listen[4].port))
    bench.turn()
    assert waiting(peer) == [bytes(28), b"\1" * 28]


def test_data_before_the_request_that_ends_its_channel_passes_and_none_behind_it(bench: Bench) -> None:
    channel = bench.channel()

    def end(datagram: bytes, source: Address) -> None:
        bench.path.close_route(source, NUMBER)
        bench.path.remove_port(channel.port.port)

    bench.act = end
    channel.send_inward(b"lost")
    parts = [framed(b"1" * 28), b"\0" * 32, framed(b"2" * 28)]
    channel.client.sendmsg(parts, gso(32), 0, (channel.listen.host, channel.listen.port))
    bench.turn()
    assert waiting(channel.peer) == [b"1" * 28]
    assert bench.path.unknown >= 1
    assert bench.path.route_count == 0


def test_what_a_request_raises_ends_the_turn(bench: Bench) -> None:
    channel = bench.channel()
    bench.act = lambda datagram, source: bench.path.turn(0, 0)
    channel.send_outward(framed(b"before"))
    channel.send_outward(b"\0request")
    with pytest.raises(RuntimeError, match="on_request"):
        bench.turn()
    channel.send_outward(framed(b"after"))
    bench.turn()
    assert waiting(channel.peer) == [b"before", b"after"]


# Peers on this relay


@pytest.mark.parametrize("family", [4, 16])
def test_two_clients_of_one_relay_meet_in_process(bench: Bench, family: int) -> None:
    """Behind addresses nobody has, so nothing can have gone through the kernel."""
    ip = Address.parse("192.0.2.1:0" if family == 4 else "[2001:db8::1]:0").ip
    clients, ports = [bench.socket(), bench.socket(16)], [bench.port(family), bench.port(family)]
    for client, own, other in zip(clients, ports, reversed(ports), strict=True):
        bench.path.open_route(address_of(client), NUMBER, own.port, Address(ip, other.port), True)
    for client in clients:
        listen = bench.listen[len(address_of(client).ip)]
        for n in range(10):
            client.sendto(framed(bytes([n]) * (n + 1)), (listen.host, listen.port))
    bench.turn()
    for client in clients:
        assert waiting(client) == [framed(bytes([n]) * (n + 1)) for n in range(10)]


def test_an_allocation_of_this_relay_without_a_channel_back_gets_nothing(bench: Bench) -> None:
    client, own, other = bench.socket(), bench.port(), bench.port()
    bench.path.open_route(address_of(client), NUMBER, own.port, other, True)
    client.sendto(framed(b"x"), (bench.listen[4].host, bench.listen[4].port))
    bench.turn()
    assert bench.path.unknown == 1
    assert bench.path.relayed_bytes == 0


def test_other_programs_on_the_address_of_the_relay_are_peers(bench: Bench) -> None:
    client, peer, own = bench.socket(), bench.socket(), bench.port()
    bench.path.open_route(address_of(client), NUMBER, own.port, address_of(peer), True)
    client.sendto(framed(b"x"), (bench.listen[4].host, bench.listen[4].port))
    bench.turn()
    assert waiting(peer) == [b"x"]


# Tables


def test_thousands_of_routes_are_found_and_forgotten(bench: Bench) -> None:
    client, peer, port = bench.socket(), bench.socket(), bench.port()
    crowd = [Address(bytes([10, n >> 8, n & 0xFF, 1]), 1000) for n in range(3000)]
    for n, other in enumerate(crowd):
        bench.path.open_route(other, 0x4000 + n % 4096, port.port, Address(other.ip, 7))
    bench.path.open_route(address_of(client), 0x4FFF, port.port, address_of(peer))
    for n, other in enumerate(crowd[::2]):
        bench.path.close_route(other, 0x4000 + 2 * n % 4096)
    assert bench.path.route_count == 1501
    client.sendto(framed(b"x", 0x4FFF), (bench.listen[4].host, bench.listen[4].port))
    bench.turn()
    assert waiting(peer) == [b"x"]
    for n, other in enumerate(crowd):
        bench.path.close_route(other, 0x4000 + n % 4096)  # half of them are gone already
    assert bench.path.route_count == 1


def test_a_closed_channel_carries_nothing_and_its_number_may_have_another_peer(bench: Bench) -> None:
    channel, second = bench.channel(), bench.socket()
    bench.path.close_route(address_of(channel.client), NUMBER)
    channel.send_outward(framed(b"old"))
    channel.send_inward(b"old")
    bench.turn()
    assert bench.path.unknown == 2
    bench.path.open_route(address_of(channel.client), NUMBER, channel.port.port, address_of(second))
    channel.send_outward(framed(b"new"))
    bench.turn()
    assert (waiting(channel.peer), waiting(second), waiting(channel.client)) == ([], [b"new"], [])


def test_mistakes_of_the_caller(bench: Bench) -> None:
    channel = bench.channel()
    client, peer = address_of(channel.client), address_of(channel.peer)
    with pytest.raises(ValueError, match="already"):
        bench.path.open_route(client, NUMBER, channel.port.port, Address(peer.ip, 1))
    with pytest.raises(ValueError, match="already"):
        bench.path.open_route(client, NUMBER + 1, channel.port.port, peer)
    with pytest.raises(ValueError, match="no port"):
        bench.path.open_route(client, NUMBER + 1, 1, peer)
    with pytest.raises(ValueError, match="no port"):
        bench.path.open_route(client, NUMBER + 1, channel.port.port, Address(bytes(16), 1))
    with pytest.raises(ValueError, match="no port"):
        bench.path.open_route(client, NUMBER + 1, bench.listen[4].port, Address(peer.ip, 1))
    with pytest.raises(ValueError, match="4 or 16"):
        bench.path.close_route(Address(b"123", 1), NUMBER)
    with pytest.raises(ValueError, match="1 channels"):
        bench.path.remove_port(channel.port.port)
    with pytest.raises(ValueError, match="here already"):
        bench.path.add_port(0, True, channel.port.port)
    with open(os.devnull) as unpollable, pytest.raises(OSError, match="not permitted"):
        bench.path.add_port(unpollable.fileno(), True, 1)


def test_removed_ports_are_closed_and_the_others_live_on(bench: Bench) -> None:
    channel = bench.channel()
    dual = bench.port(4)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(("::1", dual.port))
        bench.path.add_port(sock.detach(), False, dual.port)
    bench.path.remove_port(dual.port)
    for family, kind in ((4, socket.AF_INET), (16, socket.AF_INET6)):
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.bind((HOSTS[family], dual.port))
    bench.path.remove_port(bench.listen[4].port)  # not an allocation
    channel.send_outward(framed(b"x"))
    bench.turn()
    assert waiting(channel.peer) == [b"x"]


def test_closing_closes_every_socket() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        bench = Bench()
        bench.channel()
        bench.close()
        bench.path.close()
        assert bench.path.fileno() == -1
        bench.path.turn(0, 0)
    assert len(os.listdir("/proc/self/fd")) == before


# Fairness


def test_a_flood_does_not_keep_others_waiting(bench: Bench) -> None:
    """One round serves everybody, though the first has more than its share."""
    busy = [bench.channel(number=0x4000 + n) for n in range(3)]
    for channel in busy:
        for _ in range(30):
            channel.peer.sendmsg([bytes(60_000)], gso(1000), 0, (channel.port.host, channel.port.port))
    quiet = bench.channel()
    quiet.send_inward(b"quiet")
    request = bench.socket()
    request.sendto(b"\0request", (bench.listen[4].host, bench.listen[4].port))
    bench.path.turn(0, 0)
    assert waiting(quiet.client) == [framed(b"quiet")]
    assert [datagram for datagram, _ in bench.requests] == [b"\0request"]
    assert all(0 < len(waiting(channel.client)) < 30 * 60 for channel in busy)
