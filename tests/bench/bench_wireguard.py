"""Cost of sealing and opening one 1280-byte packet in a tunnel, beside the bare cipher; JSON on stdout.

Run: python tests/bench/bench_wireguard.py. Each number is the best of several rounds, in nanoseconds per packet.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable

from fz_core.crypto import PrivateKey
from fz_core.crypto.cipher import PacketCipher
from fz_core.wireguard import Tunnel

PACKET = b"\x45\x00\x05\x00" + bytes(1276)
PACKETS = 2000
ROUNDS = 15


def main() -> None:
    print(json.dumps(measure(), indent=2))


def measure() -> dict[str, float]:
    """Best nanoseconds per packet for each operation, and the tunnel's share on top of the AEAD."""
    initiator, responder = connected()
    cipher, out = PacketCipher(bytes(32)), bytearray(PACKETS * (len(PACKET) + 32))
    nonces = [n.to_bytes(12, "big") for n in range(PACKETS)]
    best: dict[str, float] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        start = time.perf_counter_ns()
        work()
        cost = (time.perf_counter_ns() - start) / PACKETS
        best[name] = min(cost, best.get(name, cost))

    sealed: list[bytes] = []

    def seal() -> None:
        sealed[:] = [s for _ in range(PACKETS) if isinstance(s := initiator.seal(PACKET, 1.0), bytes)]

    seal()
    assert all(responder.handle_untrusted(datagram, None, 1.0) == PACKET for datagram in sealed)
    for _ in range(ROUNDS):
        timed("aead_seal_ns", lambda: [cipher.seal(n, PACKET) for n in nonces])
        timed("tunnel_seal_ns", seal)
        timed(
            "tunnel_seal_into_ns",
            lambda: [initiator.seal_into(PACKET, out, n * 1312, 1.0) for n in range(PACKETS)],
        )
        bare = [cipher.seal(n, PACKET) for n in nonces]
        timed("aead_open_ns", lambda bare=bare: [cipher.open(n, c) for n, c in zip(nonces, bare, strict=True)])  # type: ignore[misc]
        timed("tunnel_open_ns", lambda: [responder.handle_untrusted(d, None, 1.0) for d in sealed])
    best["tunnel_over_aead_seal"] = best["tunnel_seal_ns"] / best["aead_seal_ns"]
    best["tunnel_over_aead_open"] = best["tunnel_open_ns"] / best["aead_open_ns"]
    return {name: round(number, 3) for name, number in best.items()}


def connected() -> tuple[Tunnel, Tunnel]:
    """Two tunnels with a session between them."""
    draw = random.Random(1).randbytes
    keys = PrivateKey(draw(32)), PrivateKey(draw(32))
    a = Tunnel(keys[0], keys[1].public, bytes(32), 1, 0.0, 1.7e9, draw)
    b = Tunnel(keys[1], keys[0].public, bytes(32), 2, 0.0, 1.7e9, draw)
    a.start_handshake(0.0)
    for sender, receiver in ((a, b), (b, a), (a, b)):
        datagram = sender.poll_datagram()
        assert datagram is not None
        receiver.handle_untrusted(datagram, None, 0.0)
    return a, b


if __name__ == "__main__":
    main()
