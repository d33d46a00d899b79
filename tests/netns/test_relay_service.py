"""Our relay over real sockets: the scenarios every relay must pass, and what is its own."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import trio

from fz_core.embedded.open_files import allow_open_files
from fz_core.embedded.relay import Relay, RelayConfig, format_rate, run_relay
from fz_core.turn import relay_credentials, relay_id
from tests.netns.turn_scenarios import (
    TurnPeer,
    address_of,
    allocate_and_talk,
    refresh,
    renew_nonce,
    sockaddr,
    two_clients_on_one_relay,
    udp,
    wrong_password,
)

EXPIRY = 4_000_000_000
SOL_UDP, UDP_SEGMENT = 17, 103


class RelayThread:
    """A relay on loopback in a thread of its own, and its clients."""

    def __init__(self) -> None:
        self.relay: Relay
        self._clients: list[TurnPeer] = []
        self._started = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,))

    async def _main(self) -> None:
        config = RelayConfig(public_ip4="127.0.0.1", public_ip6="::1", listen_port=0)
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            self._token = trio.lowlevel.current_trio_token()
            self.relay = await nursery.start(run_relay, config)
            self._started.set()

    def start(self) -> RelayThread:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def stop(self) -> None:
        self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(10)
        for client in self._clients:
            client.close()

    def client(self, family: int = 4, salt: str = "s", *, password: str = "", **switches: bool) -> TurnPeer:
        listen = next(a for a in self.relay.listen_addresses if len(a.ip) == family)
        username, right = relay_credentials(EXPIRY, salt, self.relay.stamp_secret)
        self._clients.append(TurnPeer(listen, (username, password or right), **switches))
        return self._clients[-1]


@pytest.fixture
def running() -> Iterator[RelayThread]:
    thread = RelayThread().start()
    yield thread
    thread.stop()


@pytest.mark.parametrize(("family", "host"), [(4, "127.0.0.1"), (16, "::1"), (4, "::1"), (16, "127.0.0.1")])
def test_allocate_and_talk(running: RelayThread, family: int, host: str) -> None:
    allocate_and_talk(running.client(family), host)


def test_the_dialect_for_coturn_works_here_too(running: RelayThread) -> None:
    allocate_and_talk(running.client(accept_unsigned_challenge=True), "127.0.0.1")


def test_refresh(running: RelayThread) -> None:
    refresh(running.client())


def test_nonce_renewal(running: RelayThread) -> None:
    renew_nonce(running.client())


def test_wrong_password(running: RelayThread) -> None:
    client = running.client(password="wrong")
    wrong_password(client)
    assert client.allocation.free_reason == "no response received"


def test_expired_credentials_are_known_to_be_dead(running: RelayThread) -> None:
    listen = running.relay.listen_addresses[0]
    client = TurnPeer(listen, relay_credentials(1, "s", running.relay.stamp_secret))
    client.until(lambda: client.allocation.free_reason)
    assert client.allocation.free_reason == "authentication error"


@pytest.mark.parametrize("family", [4, 16])
def test_hairpin(running: RelayThread, family: int) -> None:
    two_clients_on_one_relay(running.client(family, "a"), running.client(family, "b"), family)
    assert running.relay.allocation_count == 2
    assert running.relay.channel_count == 2


def test_freed_ports_are_closed(running: RelayThread) -> None:
    client = running.client()
    relayed = client.allocate()
    second = running.client()  # same user from another socket: the first allocation ends
    second.allocate()
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    probe.bind(sockaddr(relayed))
    probe.close()


def test_batches_keep_order_and_boundaries(running: RelayThread) -> None:
    """A burst sent with one system call arrives as single datagrams, in order, both ways."""
    client, peer = running.client(), udp("127.0.0.1")
    relayed = client.allocate()
    address = address_of(peer.getsockname())
    client.bind(address)
    payloads = [bytes([n]) * 1200 for n in range(40)] + [b"end"]
    number = client.allocation.channel_to(address, client.now)
    assert number is not None
    framed = [struct.pack("!HH", number, len(p)) + p for p in payloads]
    segment = [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", 1204))]
    client.sock.sendmsg(framed, segment, 0, sockaddr(running.relay.listen_addresses[0]))
    assert [peer.recv(65536) for _ in payloads] == payloads
    peer.sendmsg(payloads, [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", 1200))], 0, sockaddr(relayed))
    client.until(lambda: len(client.received) == len(payloads))
    assert client.received == [(address, p) for p in payloads]


def test_a_burst_over_two_channels_and_a_request(running: RelayThread) -> None:
    """What the kernel merges on arrival may belong to different channels."""
    client, one, two = running.client(), udp("127.0.0.1"), udp("127.0.0.1")
    client.allocate()
    numbers = []
    for peer in (one, two):
        address = address_of(peer.getsockname())
        client.bind(address)
        numbers.append(client.allocation.channel_to(address, client.now))
    parts = [struct.pack("!HH", numbers[n % 2], 28) + bytes([n]) * 28 for n in range(8)]
    parts.insert(4, b"\x00\x01\x00\x0c\x21\x12\xa4\x42" + bytes(12) + b"\x80\x22\x00\x08" + b"12345678")
    segment = [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", 32))]
    client.sock.sendmsg(parts, segment, 0, sockaddr(running.relay.listen_addresses[0]))
    assert [one.recv(100)[0] for _ in range(4)] == [0, 2, 4, 6]
    assert [two.recv(100)[0] for _ in range(4)] == [1, 3, 5, 7]
    reply = client.sock.recv(2000)
    assert reply[:2] == b"\x01\x01"


def test_strangers_get_nothing_through(running: RelayThread) -> None:
    client, peer, stranger = running.client(), udp("127.0.0.1"), udp("127.0.0.1")
    relayed = client.allocate()
    address = address_of(peer.getsockname())
    client.bind(address)
    stranger.sendto(b"evil", sockaddr(relayed))
    peer.sendto(b"good", sockaddr(relayed))
    client.until(lambda: client.received)
    assert client.received == [(address, b"good")]


def test_what_is_dropped_is_counted(running: RelayThread) -> None:
    client, peer, stranger = running.client(), udp("127.0.0.1"), udp("127.0.0.1")
    relayed = client.allocate()
    client.bind(address_of(peer.getsockname()))
    stranger.sendto(b"evil", sockaddr(relayed))
    peer.sendto(b"good", sockaddr(relayed))
    client.until(lambda: client.received)
    listen = sockaddr(next(a for a in running.relay.listen_addresses if len(a.ip) == 4))
    stranger.sendto(b"\xffnoise", listen)
    stranger.sendto(b"\x40\x00\x00\x01x", listen)
    running.client(salt="another").allocate()  # answered after all that came before
    assert running.relay.drops["unknown_datagram"] == 1
    assert running.relay.drops["unknown_channel"] == 2


def test_a_thousand_clients_at_once(running: RelayThread) -> None:
    allow_open_files()
    clients = [running.client(salt=str(n)) for n in range(1000)]
    ports = {client.allocate().port for client in clients}
    assert len(ports) == running.relay.allocation_count == 1000
    peer = udp("127.0.0.1")
    for client in (clients[0], clients[500], clients[999]):
        client.bind(address_of(peer.getsockname()))
    assert running.relay.channel_count == 3


def test_the_limit_of_open_files_is_raised() -> None:
    code = (
        "import resource as r; hard = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (64, hard));"
        "from fz_core.embedded.open_files import allow_open_files as a;"
        "assert a() == r.getrlimit(r.RLIMIT_NOFILE)[0] == hard"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_readiness_follows_the_portal_link() -> None:
    joined = trio.Event()
    secrets: list[str] = []

    async def link(stamp_secret: str, set_ready: object) -> None:
        secrets.append(stamp_secret)
        await joined.wait()
        set_ready(True)  # type: ignore[operator]

    async with trio.open_nursery() as nursery:
        relay = await nursery.start(run_relay, RelayConfig(public_ip4="127.0.0.1", listen_port=0), link)
        assert not relay.is_ready
        joined.set()
        await trio.testing.wait_all_tasks_blocked()
        assert relay.is_ready
        assert secrets == [relay.stamp_secret]
        assert relay.id == relay_id(relay.stamp_secret)
        nursery.cancel_scope.cancel()


async def test_a_taken_listening_port_is_an_error() -> None:
    with udp("127.0.0.1") as sock, pytest.raises(OSError, match="in use"):
        await run_relay(RelayConfig(public_ip4="127.0.0.1", bind_ip4="127.0.0.1", listen_port=sock.getsockname()[1]))


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0, "0.00 B/s"), (1500, "1.50 kB/s"), (2.5e6, "2.50 MB/s"), (1e9, "1.00 GB/s"), (5e12, "5.00 TB/s")],
)
def test_rates(rate: float, text: str) -> None:
    assert format_rate(rate) == text


# The command


def command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FIREZONE", "PUBLIC", "LOG"))}
    return subprocess.Popen(
        [sys.executable, "-m", "fz_core.commands.relay", *arguments],
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


GOOD = ("--api-url", "ws://portal.invalid:8081/", "--public-ip4-addr", "127.0.0.1", "--listen-port", "0")


@pytest.mark.parametrize(
    ("arguments", "environment", "code"),
    [
        (("--help",), {}, 0),
        (("--nonsense",), {}, 2),
        ((*GOOD[:2],), {}, 2),
        (("--public-ip4-addr", "127.0.0.1", "token"), {}, 2),
        ((*GOOD, "--listen-port", "70000", "token"), {}, 2),
        ((*GOOD, "--log-format", "JSON", "token"), {}, 2),
        ((*GOOD, "token"), {"PUBLIC_IP6_ADDR": ""}, 2),
        (("--api-url", "not a url", "token"), {}, 2),
        (("--api-url", "ftp://x/", "--public-ip4-addr", "127.0.0.1", "token"), {}, 1),
        (("--api-url", "ws://x/", "token"), {}, 1),
    ],
)
def test_exit_codes(arguments: tuple[str, ...], environment: dict[str, str], code: int) -> None:
    process = command(*arguments, **environment)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == code, output + errors
    assert (code == 2) == bool(errors)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_well(number: int) -> None:
    process = command(*GOOD, "--health-check-addr", "127.0.0.1:0", FIREZONE_TOKEN="secret-token")
    assert process.stdout is not None
    for line in process.stdout:
        if "Listening" in line:
            break
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "secret-token" not in output + errors


def test_help_shows_no_values() -> None:
    output, _ = command("--help", FIREZONE_TOKEN="secret-token").communicate(timeout=30)
    assert "FIREZONE_TOKEN" in output
    assert "secret-token" not in output
