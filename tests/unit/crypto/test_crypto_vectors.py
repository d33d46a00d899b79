"""The published vectors of RFC 8439, RFC 7693, RFC 7748, the XChaCha draft, and of `cryptography-vectors`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cryptography_vectors
import pytest

from fz_core.crypto import (
    aead_open,
    aead_seal,
    blake2s,
    hmac_blake2s,
    public_key,
    x25519,
    xaead_open,
    xaead_seal,
)
from fz_core.crypto.cipher import PacketCipher, cipher_libraries

VECTORS: dict[str, Any] = json.loads((Path(__file__).resolve().parents[2] / "vectors" / "crypto_rfc.json").read_text())
PACKAGE = Path(cryptography_vectors.__file__).parent


def test_rfc8439_aead() -> None:
    v = {name: bytes.fromhex(text) for name, text in VECTORS["rfc8439_a5"].items()}
    counter = int.from_bytes(v["nonce"][4:], "little")
    sealed = aead_seal(v["key"], counter, v["plaintext"], v["ad"])
    assert sealed == v["ciphertext"] + v["tag"]
    assert aead_open(v["key"], counter, sealed, v["ad"]) == v["plaintext"]


@pytest.mark.parametrize("library", cipher_libraries())
def test_rfc8439_packet(library: str) -> None:
    v = {name: bytes.fromhex(text) for name, text in VECTORS["rfc8439_a5"].items()}
    cipher = PacketCipher(v["key"], library)
    sealed = cipher.seal(v["nonce"], v["plaintext"], v["ad"])
    assert sealed == v["ciphertext"] + v["tag"]
    assert cipher.open(v["nonce"], sealed, v["ad"]) == v["plaintext"]


def test_xchacha_draft() -> None:
    v = {name: bytes.fromhex(text) for name, text in VECTORS["xchacha_a3"].items()}
    sealed = xaead_seal(v["key"], v["nonce"], v["plaintext"], v["ad"])
    assert sealed == v["ciphertext"] + v["tag"]
    assert xaead_open(v["key"], v["nonce"], sealed, v["ad"]) == v["plaintext"]


def test_rfc7693_abc() -> None:
    v = VECTORS["rfc7693_b"]
    assert blake2s(bytes.fromhex(v["message"])).hex() == v["digest"]


def test_rfc7693_self_test() -> None:
    grand = b""
    for size in (16, 20, 28, 32):
        for length in (0, 3, 64, 65, 255, 1024):
            message = rfc7693_sequence(length, length)
            grand += blake2s(message, size=size)
            grand += blake2s(message, rfc7693_sequence(size, size), size)
    assert blake2s(grand).hex() == VECTORS["rfc7693_e"]["digest"]


@pytest.mark.parametrize("v", VECTORS["rfc7748_5_2"])
def test_rfc7748_function(v: dict[str, str]) -> None:
    assert x25519(bytes.fromhex(v["scalar"]), bytes.fromhex(v["u"])).hex() == v["out"]


def test_rfc7748_iterated() -> None:
    k = u = bytes([9]) + bytes(31)
    for count in range(1, 1001):
        k, u = x25519(k, u), k
        if str(count) in VECTORS["rfc7748_5_2_iterated"]:
            assert k.hex() == VECTORS["rfc7748_5_2_iterated"][str(count)]


def test_rfc7748_diffie_hellman() -> None:
    v = {name: bytes.fromhex(text) for name, text in VECTORS["rfc7748_6_1"].items()}
    assert public_key(v["alice_private"]) == v["alice_public"]
    assert public_key(v["bob_private"]) == v["bob_public"]
    assert x25519(v["alice_private"], v["bob_public"]) == v["shared"]
    assert x25519(v["bob_private"], v["alice_public"]) == v["shared"]


def test_package_chacha20_poly1305() -> None:
    path = PACKAGE / "ciphers" / "ChaCha20Poly1305" / "boringssl.txt"
    usable = [v for v in records(path) if v["NONCE"].startswith("00000000")]
    assert len(usable) > 50
    for v in usable:
        key, ad, plaintext = value(v["KEY"]), value(v.get("AD", "")), value(v.get("IN", ""))
        counter = int.from_bytes(value(v["NONCE"])[4:], "little")
        sealed = value(v.get("CT", "")) + value(v["TAG"])
        if "NO_SEAL" not in v:
            assert aead_seal(key, counter, plaintext, ad) == sealed
        expected = None if "FAILS" in v else plaintext
        assert aead_open(key, counter, sealed, ad) == expected


@pytest.mark.parametrize("library", cipher_libraries())
def test_package_chacha20_poly1305_of_packets(library: str) -> None:
    used = 0
    for v in records(PACKAGE / "ciphers" / "ChaCha20Poly1305" / "boringssl.txt"):
        nonce, ad, plaintext = value(v["NONCE"]), value(v.get("AD", "")), value(v.get("IN", ""))
        sealed = value(v.get("CT", "")) + value(v["TAG"])
        if len(nonce) != 12 or len(sealed) < 16:
            continue
        cipher = PacketCipher(value(v["KEY"]), library)
        if "NO_SEAL" not in v:
            assert cipher.seal(nonce, plaintext, ad) == sealed
        assert cipher.open(nonce, sealed, ad) == (None if "FAILS" in v else plaintext)
        used += 1
    assert used > 50


def test_package_x25519() -> None:
    vectors = list(records(PACKAGE / "asymmetric" / "X25519" / "rfc7748.txt"))
    assert len(vectors) == 3
    for v in vectors:
        assert x25519(value(v["INPUT_SCALAR"]), value(v["INPUT_U"])).hex() == v["OUTPUT_U"]


def test_package_blake2s() -> None:
    vectors = list(records(PACKAGE / "hashes" / "blake2" / "blake2s.txt"))
    assert len(vectors) > 5
    for v in vectors:
        assert blake2s(value(v["Msg"])[: int(v["Len"]) // 8]).hex() == v["MD"]


@pytest.mark.parametrize("key", [b"", b"k" * 31, b"k" * 64])
@pytest.mark.parametrize("data", [b"", b"abc", b"x" * 200])
def test_hmac_is_rfc2104_over_blake2s(key: bytes, data: bytes) -> None:
    block = key.ljust(64, b"\0")
    inner = blake2s(bytes(b ^ 0x36 for b in block) + data)
    assert hmac_blake2s(key, data) == blake2s(bytes(b ^ 0x5C for b in block) + inner)


def rfc7693_sequence(length: int, seed: int) -> bytes:
    """The deterministic bytes of RFC 7693 appendix E."""
    a, b, out = (0xDEAD4BAD * seed) & 0xFFFFFFFF, 1, bytearray()
    for _ in range(length):
        a, b = b, (a + b) & 0xFFFFFFFF
        out.append(b >> 24)
    return bytes(out)


def records(path: Path) -> Iterator[dict[str, str]]:
    """The blocks of `NAME = value` lines of a vector file."""
    for block in path.read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        if lines:
            yield {name.strip(): text.strip() for name, _, text in (line.partition("=") for line in lines)}


def value(text: str) -> bytes:
    """Hex, or a quoted string."""
    return text[1:-1].encode() if text.startswith('"') else bytes.fromhex(text)
