"""Our tunnel against wireguard-go in a network namespace of its own, in both roles.

Time of our side is injected: the real clock plus an offset the test may push forward. The peer runs in real time.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import os
import secrets
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from hashlib import blake2s
from pathlib import Path

import pytest

from fz_core.crypto import PrivateKey
from fz_core.packet import DropReason
from fz_core.wireguard import RateLimiter, SessionEstablished, Tunnel, receiver_index
from tests.readiness import readable

pytestmark = [
    pytest.mark.root,
    pytest.mark.peer("wireguard-go"),
    pytest.mark.peer("wg"),
    pytest.mark.peer("ip"),
]

OUR_OUTER, PEER_OUTER = "192.0.2.1", "192.0.2.2"
OUR_INNER, PEER_INNER = "10.77.0.1", "10.77.0.2"
PEER_PORT = 51820
PATIENCE = 20.0
CLONE_NEWNET = 0x40000000


def test_we_initiate_and_data_flows_both_ways(peer: Peer) -> None:
    with Local(peer) as us:
        peer.configure(us)
        us.tunnel.start_handshake(us.now())
        us.echo(b"first")
        assert us.tunnel.is_initiator_of_session
        us.exchange_udp(peer, b"over the initiator's session")
        assert peer.latest_handshake(us) > 0


def test_they_initiate_and_data_flows_both_ways(peer: Peer) -> None:
    with Local(peer) as us:
        peer.configure(us, endpoint=True)
        us.exchange_udp(peer, b"their data starts it")
        assert us.tunnel.has_session
        assert not us.tunnel.is_initiator_of_session
        us.echo(b"over the responder's session")


def test_another_preshared_key_never_connects(peer: Peer) -> None:
    with Local(peer) as us:
        peer.configure(us, preshared_key=secrets.token_bytes(32))
        us.tunnel.start_handshake(us.now())
        us.run(lambda: DropReason.WG_BAD_HANDSHAKE in us.drops)
        assert not us.tunnel.has_session


def test_our_timer_renews_the_session(peer: Peer) -> None:
    with Local(peer) as us:
        peer.configure(us)
        us.tunnel.start_handshake(us.now())
        us.echo(b"before")
        old = us.last_index
        us.offset += 121.0
        us.run(lambda: len(us.established) == 2)
        us.echo(b"after")
        assert us.last_index != old
        us.exchange_udp(peer, b"and back")
        assert [event.initiator for event in us.established] == [True, True]


def test_they_renew_the_session(peer: Peer) -> None:
    with Local(peer) as us:
        peer.configure(us, endpoint=True)
        us.exchange_udp(peer, b"before")
        peer.forget(us)
        peer.configure(us, endpoint=True)
        us.exchange_udp(peer, b"after")
        assert [event.initiator for event in us.established] == [False, False]
        us.echo(b"over the second session")


def test_roles_may_change_between_sessions(peer: Peer) -> None:
    with Local(peer) as us:
        peer.configure(us, endpoint=True)
        us.exchange_udp(peer, b"theirs")
        us.tunnel.start_handshake(us.now())
        us.run(lambda: len(us.established) == 2)
        us.echo(b"ours")
        assert [event.initiator for event in us.established] == [False, True]


def test_the_peer_follows_our_new_port(peer: Peer) -> None:
    with Local(peer) as us:
        peer.configure(us)
        us.tunnel.start_handshake(us.now())
        us.echo(b"from the first port")
        us.rebind()
        us.echo(b"from the second port")
        us.exchange_udp(peer, b"to the second port")
        assert len(us.established) == 1


def test_we_follow_the_peers_new_port(peer: Peer) -> None:
    with Local(peer) as us:
        peer.configure(us)
        us.tunnel.start_handshake(us.now())
        us.echo(b"to the first port")
        peer.wg("set", peer.interface, "listen-port", str(PEER_PORT + 1))
        us.exchange_udp(peer, b"from the second port")
        assert us.remote == (PEER_OUTER, PEER_PORT + 1)
        us.echo(b"to the second port")
        assert len(us.established) == 1


def test_the_peer_takes_our_cookie(peer: Peer) -> None:
    """We are under load from the first message; the peer's second initiation carries mac2."""
    with Local(peer, handshake_limit=0) as us:
        peer.configure(us, endpoint=True)
        us.exchange_udp(peer, b"at last")
        assert DropReason.WG_UNDER_LOAD in us.drops
        assert us.initiations[0][132:] == bytes(16)
        assert us.initiations[-1][132:] != bytes(16)


def test_we_take_the_peers_cookie(peer: Peer) -> None:
    """A flood of initiations with valid mac1 puts the peer under load for a second."""
    with Local(peer) as us:
        peer.configure(us)
        for _ in range(10):
            us.flood(1500)
            us.drain()
            sessions = len(us.established)
            us.tunnel.start_handshake(us.now(), force=True)
            us.run(lambda sessions=sessions: us.cookies > 0 or len(us.established) > sessions)  # type: ignore[misc]
            if us.cookies:
                break
        assert us.cookies == 1
        us.tunnel.start_handshake(us.now(), force=True)
        us.echo(b"let in by the cookie")


class Local:
    """Our side: a tunnel, a socket in our namespace, and passive roaming of the peer's endpoint."""

    def __init__(self, peer: Peer, handshake_limit: int = 100) -> None:
        self.peer = peer
        self.offset = 0.0
        self.remote = (PEER_OUTER, PEER_PORT)
        self.key = PrivateKey(secrets.token_bytes(32))
        self.preshared_key = secrets.token_bytes(32)
        self.received: list[bytes] = []
        self.drops: list[DropReason] = []
        self.initiations: list[bytes] = []
        self.established: list[SessionEstablished] = []
        self.cookies = 0
        self.last_index: int | None = None
        self._echo_number = 0
        now = self.now()
        self.tunnel = Tunnel(
            self.key,
            peer.key.public,
            self.preshared_key,
            0x123456,
            now,
            time.time() - now,
            secrets.token_bytes,
            rate_limiter=RateLimiter(self.key, now, secrets.token_bytes, handshake_limit),
        )

    def __enter__(self) -> Local:
        self.socket = self.peer.our_socket((OUR_OUTER, 0))
        return self

    def __exit__(self, *exception: object) -> None:
        self.socket.close()

    def now(self) -> float:
        return time.monotonic() + self.offset

    def flood(self, count: int) -> None:
        """Send initiations that are nonsense but for their mac1."""
        key = blake2s(b"mac1----" + self.peer.key.public).digest()
        for _ in range(count):
            body = b"\x01\0\0\0" + secrets.token_bytes(112)
            mac1 = blake2s(body, key=key, digest_size=16).digest()
            self.socket.sendto(body + mac1 + bytes(16), self.remote)

    def drain(self) -> None:
        """Read until nothing comes for a moment."""
        while readable(self.socket, within=0.1):
            self.receive(*self.socket.recvfrom(2048))

    def rebind(self) -> None:
        """Continue from another UDP port."""
        self.socket.close()
        self.socket = self.peer.our_socket((OUR_OUTER, 0))

    def run(self, is_done: Callable[[], bool]) -> None:
        """Serve socket and timers until the condition holds."""
        give_up_at = time.monotonic() + PATIENCE
        while True:
            self.tunnel.handle_timeout(self.now())
            self.flush()
            if is_done():
                return
            assert time.monotonic() < give_up_at, f"nothing happened; drops: {self.drops[-5:]}"
            due = self.tunnel.poll_timeout()
            wait = 0.1 if due is None else min(max(due - self.now(), 0.0), 0.1)
            if readable(self.socket, within=wait):
                self.receive(*self.socket.recvfrom(2048))

    def receive(self, datagram: bytes, source: tuple[str, int]) -> None:
        if datagram[0] == 1:
            self.initiations.append(datagram)
        index = receiver_index(datagram)
        if index is not None and index >> 8 != 0x123456:
            self.drops.append(DropReason.WG_UNKNOWN_SESSION)
            return
        got = self.tunnel.handle_untrusted(datagram, socket.inet_aton(source[0]), self.now())
        if isinstance(got, DropReason):
            self.drops.append(got)
            if got is DropReason.WG_UNDER_LOAD:
                self.remote = source
            return
        self.cookies += datagram[0] == 3
        self.remote = source
        if got is not None:
            self.last_index = index
        if got:
            self.received.append(got)

    def flush(self) -> None:
        while (datagram := self.tunnel.poll_datagram()) is not None:
            self.socket.sendto(datagram, self.remote)
        while (event := self.tunnel.poll_event()) is not None:
            assert isinstance(event, SessionEstablished), event
            self.established.append(event)

    def send(self, packet: bytes) -> None:
        sealed = self.tunnel.seal(packet, self.now())
        assert isinstance(sealed, bytes), sealed
        self.socket.sendto(sealed, self.remote)

    def echo(self, payload: bytes) -> None:
        """Ping the peer's inner address and wait for the answer."""
        self.run(lambda: self.tunnel.has_session)
        self._echo_number += 1
        self.send(icmp_echo(8, self._echo_number, payload))
        wanted = icmp_echo(0, self._echo_number, payload)[20:]
        self.run(lambda: any(packet[9] == 1 and packet[20:] == wanted for packet in self.received))

    def exchange_udp(self, peer: Peer, payload: bytes) -> None:
        """The peer's host sends a datagram through its WireGuard interface, and gets one back."""
        with peer.inner_socket() as inner:
            port = inner.getsockname()[1]
            inner.sendto(payload, (OUR_INNER, 9))
            self.run(lambda: any(p[9] == 17 and p[28:] == payload for p in self.received))
            self.run(lambda: self.tunnel.has_session)
            answer = payload[::-1]
            self.send(udp(9, port, answer))
            assert inner.recvfrom(2048) == (answer, (OUR_INNER, 9))


class Peer:
    """wireguard-go in a namespace, joined by a veth pair to an otherwise empty namespace of ours."""

    def __init__(self) -> None:
        self.interface = f"wgt{os.getpid()}"
        self.ours = f"fzwg-{os.getpid()}-us"
        self.theirs = f"fzwg-{os.getpid()}-peer"
        self.key = PrivateKey(secrets.token_bytes(32))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        for name in (self.ours, self.theirs):
            run("ip", "netns", "add", name)
        run("ip", "-n", self.ours, "link", "add", "up0", "type", "veth", "peer", "up0", "netns", self.theirs)
        for name, address in ((self.ours, OUR_OUTER), (self.theirs, PEER_OUTER)):
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "up0")
            run("ip", "-n", name, "link", "set", "up0", "up")
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", self.theirs, "wireguard-go", "-f", self.interface],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.wait_until(Path(f"/var/run/wireguard/{self.interface}.sock").exists)
        run("ip", "-n", self.theirs, "addr", "add", f"{PEER_INNER}/24", "dev", self.interface)
        run("ip", "-n", self.theirs, "link", "set", self.interface, "up")

    def stop(self) -> None:
        """End the process and remove both namespaces, whatever state they are in."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for name in (self.ours, self.theirs):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def wg(self, *arguments: str, given: bytes = b"") -> str:
        """Run `wg` in the peer's namespace; `given` is what it reads at /dev/stdin."""
        return run("ip", "netns", "exec", self.theirs, "wg", *arguments, given=given)

    def configure(self, us: Local, endpoint: bool = False, preshared_key: bytes | None = None) -> None:
        """Make us the peer's peer; with an endpoint it can start by itself."""
        self.wg(
            "set",
            self.interface,
            "listen-port",
            str(PEER_PORT),
            "private-key",
            "/dev/stdin",
            given=base64.b64encode(bytes(self.key)),
        )
        settings = ["peer", text(us.key.public), "preshared-key", "/dev/stdin"]
        settings += ["allowed-ips", f"{OUR_INNER}/32"]
        if endpoint:
            settings += ["endpoint", f"{OUR_OUTER}:{us.socket.getsockname()[1]}"]
        self.wg("set", self.interface, *settings, given=base64.b64encode(preshared_key or us.preshared_key))

    def forget(self, us: Local) -> None:
        self.wg("set", self.interface, "peer", text(us.key.public), "remove")

    def latest_handshake(self, us: Local) -> int:
        shown = dict(line.split("\t") for line in self.wg("show", self.interface, "latest-handshakes").splitlines())
        return int(shown[text(us.key.public)])

    def our_socket(self, address: tuple[str, int]) -> socket.socket:
        return socket_in(self.ours, address)

    def inner_socket(self) -> socket.socket:
        inner = socket_in(self.theirs, (PEER_INNER, 0))
        inner.settimeout(PATIENCE)
        return inner

    def wait_until(self, is_done: Callable[[], bool]) -> None:
        give_up_at = time.monotonic() + PATIENCE
        while not is_done():
            assert self.process is not None
            assert self.process.poll() is None, f"wireguard-go ended with {self.process.returncode}"
            assert time.monotonic() < give_up_at, "wireguard-go did not start"
            time.sleep(0.02)


@pytest.fixture
def peer() -> Iterator[Peer]:
    it = Peer()
    try:
        it.start()
        yield it
    finally:
        it.stop()


def run(*command: str, given: bytes = b"") -> str:
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    assert done.returncode == 0, f"{' '.join(command[:6])}: {done.stderr.decode().strip()}"
    return done.stdout.decode()


def socket_in(namespace: str, address: tuple[str, int]) -> socket.socket:
    """A bound UDP socket inside a namespace; the caller's thread ends where it was."""
    with inside(namespace):
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind(address)
    return made


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{namespace}") as there:
        if libc.setns(there.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter namespace {namespace}")
        try:
            yield
        finally:
            libc.setns(home.fileno(), CLONE_NEWNET)


def text(key: bytes) -> str:
    return base64.b64encode(key).decode()


def icmp_echo(kind: int, number: int, payload: bytes) -> bytes:
    """An ICMP echo request (8) from us, or the reply (0) to it."""
    body = struct.pack("!BBHHH", kind, 0, 0, 0x4655, number) + payload
    body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    return ip_header(1, len(body)) + body


def udp(source_port: int, port: int, payload: bytes) -> bytes:
    """A UDP packet from us; a zero checksum means none."""
    return ip_header(17, 8 + len(payload)) + struct.pack("!HHHH", source_port, port, 8 + len(payload), 0) + payload


def ip_header(protocol: int, length: int) -> bytes:
    addresses = socket.inet_aton(OUR_INNER) + socket.inet_aton(PEER_INNER)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, protocol, 0) + addresses
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:]


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
