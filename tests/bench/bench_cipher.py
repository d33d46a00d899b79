"""ChaCha20-Poly1305 per packet in each library, without Python in between; JSON on stdout.

Run: python -m tests.bench.bench_cipher. Each number is the best of several rounds in which the libraries take turns,
in nanoseconds per packet; `chosen` is what the data path uses for packets of 192 bytes and more, on this machine.
"""

from __future__ import annotations

import json

from fz_core.crypto.cipher import cipher_libraries, cipher_name, measure_cipher

LENGTHS = (64, 512, 1280)
PACKETS = 500
ROUNDS = 60


def main() -> None:
    print(json.dumps(measure(), indent=2))


def measure() -> dict[str, str | float]:
    """Best nanoseconds to seal and to open a packet, by library and length."""
    best: dict[str, float] = {}
    for _ in range(ROUNDS):
        for length in LENGTHS:
            for library in cipher_libraries():
                costs = measure_cipher(library, length, PACKETS)
                for operation, cost in zip(("seal", "open"), costs, strict=True):
                    name = f"{library}_{operation}_{length}_ns"
                    best[name] = min(cost, best.get(name, cost))
    return {"chosen": cipher_name(), **{name: round(cost, 1) for name, cost in best.items()}}


if __name__ == "__main__":
    main()
