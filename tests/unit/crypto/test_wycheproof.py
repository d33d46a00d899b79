"""Wycheproof's attacks on AEAD and X25519, where its files lie beside the repository."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fz_core.crypto import aead_open, aead_seal, x25519, xaead_open, xaead_seal
from fz_core.crypto.cipher import PacketCipher, cipher_libraries

FOLDER = Path(__file__).resolve().parents[4] / "shared" / "vectors" / "wycheproof"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no Wycheproof vectors in {FOLDER}")


def test_chacha20_poly1305() -> None:
    """Only nonces with a zero prefix and of 12 bytes can be expressed as a counter."""
    used = 0
    for group, t in cases("chacha20_poly1305_test.json"):
        nonce = bytes.fromhex(t["iv"])
        if group["ivSize"] != 96 or nonce[:4] != bytes(4):
            continue
        key, ad, plaintext, sealed = aead_fields(t)
        counter = int.from_bytes(nonce[4:], "little")
        opened = aead_open(key, counter, sealed, ad)
        assert opened == (plaintext if t["result"] == "valid" else None), t["tcId"]
        if t["result"] == "valid":
            assert aead_seal(key, counter, plaintext, ad) == sealed, t["tcId"]
        used += 1
    assert used == 10


@pytest.mark.parametrize("library", cipher_libraries())
def test_chacha20_poly1305_of_packets(library: str) -> None:
    """With any nonce; each library that packets may go through."""
    used = 0
    for group, t in cases("chacha20_poly1305_test.json"):
        key, ad, plaintext, sealed = aead_fields(t)
        nonce, cipher = bytes.fromhex(t["iv"]), PacketCipher(key, library)
        if group["ivSize"] != 96:
            with pytest.raises(ValueError, match="nonce"):
                cipher.open(nonce, sealed, ad)
            continue
        assert cipher.open(nonce, sealed, ad) == (plaintext if t["result"] == "valid" else None), t["tcId"]
        if t["result"] == "valid":
            assert cipher.seal(nonce, plaintext, ad) == sealed, t["tcId"]
            assert cipher.has_context == (library == "libcrypto")
        used += 1
    assert used > 300


def test_xchacha20_poly1305() -> None:
    used = 0
    for group, t in cases("xchacha20_poly1305_test.json"):
        key, ad, plaintext, sealed = aead_fields(t)
        nonce = bytes.fromhex(t["iv"])
        if group["ivSize"] != 192:
            with pytest.raises(ValueError, match="nonce"):
                xaead_open(key, nonce, sealed, ad)
            continue
        opened = xaead_open(key, nonce, sealed, ad)
        assert opened == (plaintext if t["result"] == "valid" else None), t["tcId"]
        if t["result"] == "valid":
            assert xaead_seal(key, nonce, plaintext, ad) == sealed, t["tcId"]
        used += 1
    assert used > 250


def test_x25519() -> None:
    used = refused = 0
    for _, t in cases("x25519_test.json"):
        private, public = bytes.fromhex(t["private"]), bytes.fromhex(t["public"])
        if t["shared"] == "00" * 32:
            with pytest.raises(ValueError, match="low order"):
                x25519(private, public)
            refused += 1
        else:
            assert x25519(private, public).hex() == t["shared"], t["tcId"]
        used += 1
    assert used > 500
    assert refused > 10


def cases(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every test with its group."""
    for group in json.loads((FOLDER / name).read_text())["testGroups"]:
        for test in group["tests"]:
            yield group, test


def aead_fields(t: dict[str, Any]) -> tuple[bytes, bytes, bytes, bytes]:
    """Key, associated data, plaintext, ciphertext with tag."""
    return (
        bytes.fromhex(t["key"]),
        bytes.fromhex(t["aad"]),
        bytes.fromhex(t["msg"]),
        bytes.fromhex(t["ct"]) + bytes.fromhex(t["tag"]),
    )
