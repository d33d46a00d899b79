"""Two tunnels joined by a virtual wire; time jumps to the next announced deadline and nowhere else."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

from fz_core.crypto import PrivateKey
from fz_core.packet import DropReason
from fz_core.wireguard import Expired, RateLimiter, SessionEstablished, Tunnel

UNIX_EPOCH = 1_700_000_000.0
PSK = b"\x33" * 32
SEED = 20240607


class End:
    """One tunnel and everything that came out of it."""

    def __init__(self, name: str, tunnel: Tunnel, source_ip: bytes) -> None:
        self.name = name
        self.tunnel = tunnel
        self.source_ip = source_ip
        self.received: list[bytes] = []
        self.drops: list[DropReason] = []
        self.events: list[SessionEstablished | Expired] = []
        self.sent: list[tuple[float, bytes]] = []
        self.inbox: deque[bytes] = deque()

    def sent_kinds(self) -> list[int]:
        """The message types sent so far."""
        return [datagram[0] for _, datagram in self.sent]

    def sent_at(self, kind: int) -> list[float]:
        """When messages of a type were sent."""
        return [at for at, datagram in self.sent if datagram[0] == kind]


class Pair:
    """`a` and `b`, and a wire between them that `lossy` may cut."""

    def __init__(self, start: float = 1000.0, psk_b: bytes = PSK, limit: int = 100, **options: object) -> None:
        self.now = start
        self.lossy: Callable[[End, bytes], bool] = lambda sender, datagram: False
        self.random = random.Random(SEED)
        self.keys = (PrivateKey(self.random.randbytes(32)), PrivateKey(self.random.randbytes(32)))
        self.a = self.end("a", 0, 0xAAAAAA, PSK, limit, options)
        self.b = self.end("b", 1, 0xBBBBBB, psk_b, limit, options)

    def end(self, name: str, own: int, index: int, psk: bytes, limit: int, options: dict[str, object]) -> End:
        limiter = RateLimiter(self.keys[own], self.now, self.random.randbytes, limit)
        tunnel = Tunnel(
            self.keys[own],
            self.keys[1 - own].public,
            psk,
            index,
            self.now,
            UNIX_EPOCH,
            self.random.randbytes,
            rate_limiter=limiter,
            **options,  # type: ignore[arg-type]
        )
        return End(name, tunnel, bytes((10, 0, 0, own + 1)))

    def other(self, end: End) -> End:
        return self.b if end is self.a else self.a

    def collect(self, end: End) -> None:
        """Move what an end wants to send onto the wire."""
        while (datagram := end.tunnel.poll_datagram()) is not None:
            self.transmit(end, datagram)
        while (event := end.tunnel.poll_event()) is not None:
            end.events.append(event)

    def transmit(self, end: End, datagram: bytes) -> None:
        end.sent.append((self.now, datagram))
        if not self.lossy(end, datagram):
            self.other(end).inbox.append(datagram)

    def exchange(self) -> None:
        """Deliver until both ends are quiet; no time passes."""
        self.collect(self.a)
        self.collect(self.b)
        while self.a.inbox or self.b.inbox:
            for end in (self.a, self.b):
                if end.inbox:
                    self.deliver(end, end.inbox.popleft())

    def deliver(self, end: End, datagram: bytes) -> bytes | DropReason | None:
        got = end.tunnel.handle_untrusted(datagram, self.other(end).source_ip, self.now)
        if isinstance(got, DropReason):
            end.drops.append(got)
        elif got:
            end.received.append(got)
        self.collect(end)
        return got

    def send(self, end: End, packet: bytes) -> DropReason | None:
        """Seal a packet and put it onto the wire."""
        sealed = end.tunnel.seal(packet, self.now)
        if isinstance(sealed, DropReason):
            self.collect(end)
            return sealed
        if sealed:
            self.transmit(end, sealed)
        self.exchange()
        return None

    def next_deadline(self) -> float | None:
        return min((at for end in (self.a, self.b) if (at := end.tunnel.poll_timeout()) is not None), default=None)

    def step(self) -> bool:
        """Jump to the next deadline, if there is one."""
        at = self.next_deadline()
        if at is None:
            return False
        self.now = max(self.now, at)
        for end in (self.a, self.b):
            end.tunnel.handle_timeout(self.now)
            after = end.tunnel.poll_timeout()
            assert after is None or after > self.now, f"{end.name} announces {after} at {self.now}"
        self.exchange()
        return True

    def run_until(self, at: float) -> None:
        """Jump from deadline to deadline, and end at `at`."""
        while (due := self.next_deadline()) is not None and due <= at:
            self.step()
        self.now = at

    def connect(self) -> Pair:
        """`a` initiates, and both have a session."""
        self.a.tunnel.start_handshake(self.now)
        self.exchange()
        assert self.a.tunnel.has_session
        assert self.b.tunnel.has_session
        return self


def ipv4(payload: bytes = b"", padding: int = 0) -> bytes:
    """A minimal IPv4 packet, optionally followed by zeros."""
    length = 20 + len(payload)
    header = bytes((0x45, 0)) + length.to_bytes(2, "big") + bytes(4) + bytes((64, 17)) + bytes(10)
    return header + payload + bytes(padding)


def ipv6(payload: bytes = b"", padding: int = 0) -> bytes:
    """A minimal IPv6 packet, optionally followed by zeros."""
    header = bytes((0x60, 0, 0, 0)) + len(payload).to_bytes(2, "big") + bytes((17, 64)) + bytes(32)
    return header + payload + bytes(padding)
