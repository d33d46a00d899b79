"""What our TURN client must manage with any relay, over real sockets.

Time is real while datagrams arrive; when none comes for a moment, it jumps to the client's next deadline, so
that waiting for retransmissions costs nothing.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from typing import Any

from fz_core.packet import Address, Transmit
from fz_core.turn import Allocation
from tests.readiness import readable

QUIET = 0.3
MAX_STEPS = 60


def sockaddr(address: Address) -> tuple[str, int]:
    return (address.host, address.port)


def address_of(sockaddr: Any) -> Address:
    family = socket.AF_INET6 if ":" in sockaddr[0] else socket.AF_INET
    return Address(socket.inet_pton(family, sockaddr[0]), sockaddr[1])


def udp(host: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, 0))
    sock.settimeout(5)
    return sock


class TurnPeer:
    """A client with one socket, to a relay over one family."""

    def __init__(self, relay: Address, credentials: tuple[str, str], **switches: Any) -> None:
        self.now = 1000.0
        self.sock = udp(relay.host)
        self.received: list[tuple[Address, bytes]] = []
        addresses = (relay, None) if relay.is_ipv4 else (None, relay)
        self.allocation = Allocation(
            "relay", addresses, *credentials, "firezone", self.now, secrets.token_bytes, **switches
        )
        self.step()

    def close(self) -> None:
        self.sock.close()

    def step(self) -> None:
        """Send all, then take one datagram or let the next deadline come."""
        while (transmit := self.allocation.poll_transmit()) is not None:
            self.send(transmit)
        if readable(self.sock, within=QUIET):
            data, source = self.sock.recvfrom(65536)
            self.now += 0.001
            self.take(data, address_of(source))
        else:
            at = self.allocation.poll_timeout()
            self.now = max(self.now, at if at is not None else self.now + 1)
            self.allocation.handle_timeout(self.now)

    def take(self, data: bytes, source: Address) -> None:
        if self.allocation.handle_input(address_of(self.sock.getsockname()), source, data, self.now):
            return
        opened = self.allocation.decapsulate(source, data, self.now)
        assert isinstance(opened, tuple), opened
        self.received.append((opened[0], bytes(opened[1])))

    def send(self, transmit: Transmit) -> None:
        self.sock.sendto(transmit.payload, sockaddr(transmit.remote))

    def until(self, condition: Callable[[], object]) -> None:
        for _ in range(MAX_STEPS):
            if condition():
                return
            self.step()
        raise AssertionError("did not come about")

    def relayed(self, family: int = 4) -> Address | None:
        return self.allocation.relayed_v4 if family == 4 else self.allocation.relayed_v6

    def allocate(self, family: int = 4) -> Address:
        self.until(lambda: self.relayed(family))
        relayed = self.relayed(family)
        assert relayed is not None
        return relayed

    def bind(self, peer: Address) -> None:
        self.allocation.bind_channel(peer, self.now)
        self.until(lambda: not self.is_busy)

    @property
    def is_busy(self) -> bool:
        return len(self.allocation._requests) > 0 or len(self.allocation._transmits) > 0

    def send_data(self, peer: Address, payload: bytes) -> None:
        transmit = self.allocation.encapsulate(peer, payload, self.now)
        assert isinstance(transmit, Transmit), transmit
        self.send(transmit)


def allocate_and_talk(client: TurnPeer, peer_host: str) -> None:
    """Allocate, bind, data both ways."""
    relayed = client.allocate(16 if ":" in peer_host else 4)
    peer = udp(peer_host)
    try:
        address = address_of(peer.getsockname())
        client.bind(address)
        for payload in (b"ping", b"x" * 1312, b""):
            client.send_data(address, payload)
            data, source = peer.recvfrom(65536)
            assert (data, address_of(source)) == (payload, relayed)
        for payload in (b"pong", b"y" * 1312):
            peer.sendto(payload, sockaddr(relayed))
            client.until(lambda payload=payload: (address, payload) in client.received)  # type: ignore[misc]
    finally:
        peer.close()


def refresh(client: TurnPeer) -> None:
    """The relay extends the lifetime."""
    client.allocate()
    client.until(lambda: not client.is_busy)
    before = client.allocation.expires_at
    assert before is not None
    client.now += 5
    client.allocation.refresh(client.now)
    client.until(lambda: not client.is_busy)
    assert client.allocation.free_reason is None
    after = client.allocation.expires_at
    assert after is not None
    assert after >= before + 5


def renew_nonce(client: TurnPeer) -> None:
    """A nonce the relay does not know is replaced, and the request repeated."""
    client.allocate()
    client.until(lambda: not client.is_busy)
    credentials = client.allocation._credentials
    assert credentials is not None
    credentials.nonce = stale = secrets.token_hex(16)
    client.allocation.refresh(client.now)
    client.until(lambda: not client.is_busy)
    assert credentials.nonce != stale
    assert client.allocation.relayed_v4 is not None
    assert client.allocation.free_reason is None


def wrong_password(client: TurnPeer) -> None:
    """No allocation, and the relay is given up."""
    client.until(lambda: client.allocation.free_reason)
    assert client.allocation.relayed_v4 is None


def two_clients_on_one_relay(first: TurnPeer, second: TurnPeer, family: int = 4) -> None:
    """Relayed address to relayed address."""
    here, there = first.allocate(family), second.allocate(family)
    first.bind(there)
    second.bind(here)
    first.send_data(there, b"hello")
    second.until(lambda: (here, b"hello") in second.received)
    second.send_data(here, b"world")
    first.until(lambda: (there, b"world") in first.received)
