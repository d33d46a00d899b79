"""The TCP server behind the sentinels against the kernel's TCP: routes to a TUN device, real sockets, dig."""

from __future__ import annotations

import random
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from ipaddress import ip_address

import dns.message
import dns.rcode
import pytest

from fz_core.dns import Query, StubTcpServer, TcpToken, build_addresses, build_answer, build_error
from fz_core.lab import Host, Lab
from fz_core.linux import TunDevice
from fz_core.packet import DropReason, Packet
from tests.readiness import readable

pytestmark = pytest.mark.root

SENTINELS = {4: "100.100.111.1", 6: "fd00:2021:1111:8000:100:100:111:0"}
OWN = {4: "100.64.0.1", 6: "fd00:2021:1111::1"}
OFFLOAD_HEADER = bytes(10)
BIG_REPLY = 60_000
SLOW = 0.3


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Lab() as lab:
        yield lab.public_host("client", 10)


@pytest.fixture
def server(host: Host) -> Iterator[Pump]:
    with Pump(host) as pump:
        yield pump


@pytest.fixture(params=[4, 6], ids=["v4", "v6"])
def sentinel(request: pytest.FixtureRequest) -> str:
    return SENTINELS[request.param]


@pytest.mark.peer("dig")
def test_dig(host: Host, server: Pump, sentinel: str) -> None:
    result = host.run("dig", "+tcp", "+short", "+tries=1", f"@{sentinel}", "foo.example.com", "A")
    assert result.stdout.split() == ["192.0.2.1"]
    result = host.run("dig", "+tcp", "+tries=1", f"@{sentinel}", "big.example.com", "TXT", "+noall", "+stats")
    assert f"MSG SIZE  rcvd: {len(big_reply())}" in result.stdout


@pytest.mark.peer("dig")
@pytest.mark.shows("tunnel", 51)
def test_dig_keeps_a_connection_open(host: Host, server: Pump, sentinel: str) -> None:
    names = [f"{n}.example.com" for n in range(5)]
    questions = [word for name in names for word in (name, "A")]
    result = host.run("dig", "+tcp", "+keepopen", "+short", "+tries=1", f"@{sentinel}", *questions)
    assert result.stdout.split() == ["192.0.2.1"] * 5
    assert len(server.peers) == 1


@pytest.mark.shows("tunnel", 51)
def test_queries_on_one_connection(host: Host, server: Pump, sentinel: str) -> None:
    with connect(host, sentinel) as client:
        client.sendall(b"".join(frame(make_query(f"{n}.example.com", message_id=1)) for n in range(5)))
        for n in range(5):
            reply = dns.message.from_wire(read_message(client))
            assert (reply.id, str(reply.question[0].name)) == (1, f"{n}.example.com.")


@pytest.mark.parametrize("loss", [0.0, 0.02], ids=["clean", "lossy"])
def test_large_messages_both_ways(host: Host, server: Pump, sentinel: str, loss: float) -> None:
    server.loss = loss
    with connect(host, sentinel) as client:
        for _ in range(3):
            client.sendall(frame(make_query("big.example.com") + bytes(60_000)))
            assert read_message(client) == big_reply()


def test_a_slow_reader_gets_everything(host: Host, server: Pump, sentinel: str) -> None:
    with connect(host, sentinel, receive_buffer=4096) as client:
        client.sendall(b"".join(frame(make_query("big.example.com")) for _ in range(4)))
        time.sleep(1.0)  # the kernel's window is shut by now
        for _ in range(4):
            assert read_message(client) == big_reply()


def test_a_fast_writer_waits(host: Host, server: Pump, sentinel: str) -> None:
    """Several messages of the largest size while the first query is still under way: our window shuts and opens."""
    largest = make_query("foo.example.com").ljust(65_535, b"\0")
    with connect(host, sentinel) as client, ThreadPoolExecutor(1) as pool:
        sent = pool.submit(client.sendall, frame(make_query("0.slow.example.com")) + frame(largest) * 5)
        for _ in range(6):
            assert read_message(client)[3] & 0xF == 0
        sent.result()


def test_a_query_byte_by_byte(host: Host, server: Pump, sentinel: str) -> None:
    with connect(host, sentinel) as client:
        for byte in frame(make_query("foo.example.com")):
            client.sendall(bytes([byte]))
        assert read_message(client)[3] & 0xF == 0


def test_twelve_at_once_are_all_served(host: Host, server: Pump, sentinel: str) -> None:
    """The ten connections are busy for a while; who comes later waits, and none is refused."""

    def ask(number: int) -> bytes:
        with connect(host, sentinel) as client:
            client.sendall(frame(make_query(f"{number}.slow.example.com")))
            return read_message(client)

    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(ask, range(12)))
    assert [str(dns.message.from_wire(reply).question[0].name) for reply in replies] == [
        f"{n}.slow.example.com." for n in range(12)
    ]
    assert server.most_at_once == 10


def test_idle_connections_make_room(host: Host, server: Pump, sentinel: str) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(host, sentinel)) for _ in range(10)]
        for client in idle:
            client.sendall(frame(make_query("foo.example.com")))
            read_message(client)
        with connect(host, sentinel) as client:
            client.sendall(frame(make_query("foo.example.com")))
            assert read_message(client)[3] & 0xF == 0
        (evicted,) = readable(*idle, within=1.0)
        assert evicted is idle[0]
        assert is_reset(evicted)


def test_half_closed_connections_get_their_replies(host: Host, server: Pump, sentinel: str) -> None:
    with connect(host, sentinel) as client:
        client.sendall(frame(make_query("0.slow.example.com")) + frame(make_query("big.example.com")))
        client.shutdown(socket.SHUT_WR)
        assert read_message(client)[3] & 0xF == 0
        assert read_message(client) == big_reply()
        assert client.recv(1) == b""
    server.wait_until_idle()


def test_an_orderly_end_leaves_nothing(host: Host, server: Pump, sentinel: str) -> None:
    with connect(host, sentinel) as client:
        client.sendall(frame(make_query("foo.example.com")))
        read_message(client)
    server.wait_until_idle()


def test_aborted_connections_leave_nothing(host: Host, server: Pump, sentinel: str) -> None:
    for name in ("0.slow.example.com", "big.example.com"):
        client = connect(host, sentinel)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sendall(frame(make_query(name)))
        time.sleep(0.05)
        client.close()
    server.wait_until_idle()
    test_an_orderly_end_leaves_nothing(host, server, sentinel)


@pytest.mark.parametrize(
    "garbage",
    [b"\0\0", b"\0\x0c" + bytes(12), b"GET / HTTP/1.1\r\n\r\n" + bytes(20_000), b"\0\x20" + b"\xff" * 32],
    ids=["empty", "header", "http", "noise"],
)
def test_garbage_ends_the_connection(host: Host, server: Pump, sentinel: str, garbage: bytes) -> None:
    with connect(host, sentinel) as client:
        client.sendall(garbage)
        assert is_reset(client)
    server.wait_until_idle()


def test_other_ports_are_refused(host: Host, server: Pump, sentinel: str) -> None:
    with pytest.raises(ConnectionRefusedError):
        connect(host, sentinel, port=80)


@pytest.mark.shows("tunnel", 54)
def test_other_addresses_end_all_connections(host: Host, server: Pump, sentinel: str) -> None:
    with connect(host, sentinel) as client:
        client.sendall(frame(make_query("0.slow.example.com")))
        time.sleep(0.05)
        server.set_addresses([ip_address("100.100.111.9").packed])
        assert is_reset(client)
        time.sleep(SLOW)  # the reply has come meanwhile
    server.set_addresses([ip_address(ip).packed for ip in SENTINELS.values()])
    test_an_orderly_end_leaves_nothing(host, server, sentinel)


class Pump:
    """A TUN device with the server behind it, in a thread. Answers by name: foo, big, slow."""

    def __init__(self, host: Host) -> None:
        with host.entered():
            self._tun = TunDevice.open("fzdns", offloads=False)
        try:
            bring_up(host)
        except BaseException:
            self._tun.close()
            raise
        self._server = StubTcpServer(secrets.token_bytes)
        self._server.set_addresses([ip_address(ip).packed for ip in SENTINELS.values()])
        self._lock = threading.Lock()
        self._slow: list[tuple[float, TcpToken, bytes]] = []
        self._rng = random.Random(1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.loss = 0.0
        self.peers: set[int] = set()
        self.most_at_once = 0

    def __enter__(self) -> Pump:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._tun.close()

    def set_addresses(self, ips: list[bytes]) -> None:
        with self._lock:
            self._server.set_addresses(ips)

    def wait_until_idle(self) -> None:
        """Without a connection the server has no timer."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with self._lock:
                if self._server.poll_timeout() is None:
                    return
            time.sleep(0.01)
        raise AssertionError("a connection was left behind")

    def _run(self) -> None:
        while not self._stop.is_set():
            readable(self._tun, within=0.01)
            with self._lock:
                for data in self._tun.read_batch(64):
                    self._take(data[len(OFFLOAD_HEADER) :])
                due = self._server.poll_timeout()
                if due is not None and due <= time.monotonic():
                    self._server.handle_timeout(time.monotonic())
                    after = self._server.poll_timeout()
                    assert after is None or after > due
                self._answer()

    def _take(self, data: bytes) -> None:
        packet = Packet.parse_untrusted(data)
        if isinstance(packet, DropReason) or self._rng.random() < self.loss:
            return
        self._server.handle_packet(packet, time.monotonic())
        self._answer()

    def _answer(self) -> None:
        now = time.monotonic()
        while (received := self._server.poll_query()) is not None:
            token, message = received
            self.peers.add(token.port)
            query = Query.parse_untrusted(message)
            if query is None:
                self._server.abort(token, now)
            elif query.name.endswith("slow.example.com"):
                self._slow.append((now + SLOW, token, build_error(query, dns.rcode.NOERROR)))
            else:
                self._server.send_reply(token, reply_to(query), now)
        self.most_at_once = max(self.most_at_once, len(self._slow))
        for item in [item for item in self._slow if item[0] <= now]:
            self._slow.remove(item)
            self._server.send_reply(item[1], item[2], now)
        while (packet := self._server.poll_packet()) is not None:
            if self._rng.random() >= self.loss:
                self._tun.write(OFFLOAD_HEADER + packet.data)


def bring_up(host: Host) -> None:
    host.ip("link", "set", "fzdns", "mtu", "1280", "multicast", "off", "up")
    for version, own in OWN.items():
        prefix = 32 if version == 4 else 128
        host.ip("address", "add", f"{own}/{prefix}", "dev", "fzdns")
        host.ip("route", "add", f"{SENTINELS[version]}/{prefix}", "dev", "fzdns")


def reply_to(query: Query) -> bytes:
    if query.name == "big.example.com":
        return big_reply(query.id)
    return build_addresses(query, [ip_address("192.0.2.1").packed])


def big_reply(message_id: int | None = None) -> bytes:
    query = Query.parse_untrusted(make_query("big.example.com", "TXT", 1 if message_id is None else message_id))
    assert query is not None
    return build_answer(query, [(16, b"\xf0" + bytes(240))] * (BIG_REPLY // 253))


def make_query(name: str, rdtype: str = "A", message_id: int = 1) -> bytes:
    if name == "big.example.com":
        rdtype = "TXT"
    return dns.message.make_query(name, rdtype, id=message_id).to_wire()


def frame(message: bytes) -> bytes:
    return len(message).to_bytes(2, "big") + message


def connect(host: Host, sentinel: str, port: int = 53, receive_buffer: int | None = None) -> socket.socket:
    client = host.socket(socket.AF_INET6 if ":" in sentinel else socket.AF_INET, socket.SOCK_STREAM)
    client.settimeout(20)
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        client.connect((sentinel, port))
    except OSError:
        client.close()
        raise
    return client


def read_message(client: socket.socket) -> bytes:
    return read_exactly(client, int.from_bytes(read_exactly(client, 2), "big"))


def read_exactly(client: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = client.recv(size - len(data))
        assert piece, f"the connection ended after {len(data)} of {size} bytes"
        data += piece
    return bytes(data)


def is_reset(client: socket.socket) -> bool:
    client.settimeout(1)
    try:
        client.recv(1)
    except (ConnectionResetError, BrokenPipeError):
        return True
    except TimeoutError:
        pass
    return False
