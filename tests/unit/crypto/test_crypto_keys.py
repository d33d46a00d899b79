"""Key handling and misuse: what never shows a key, what is refused, and the message without libsodium."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from fz_core.crypto import PrivateKey, aead_open, aead_seal, public_key, x25519, xaead_open, xaead_seal

ROOT = Path(__file__).resolve().parents[3]
SECRET = bytes(range(1, 33))


def test_text_never_shows_the_key() -> None:
    key = PrivateKey(SECRET)
    for text in (repr(key), str(key), f"{key}"):
        assert text == "PrivateKey(redacted)"


def test_a_private_key_gives_its_bytes_only_on_purpose() -> None:
    key = PrivateKey(SECRET)
    assert bytes(key) == SECRET
    with pytest.raises(TypeError, match="not picklable"):
        pickle.dumps(key)


def test_private_keys_compare_by_value() -> None:
    assert PrivateKey(SECRET) == PrivateKey(bytearray(SECRET))
    assert PrivateKey(SECRET) != PrivateKey(SECRET[::-1])
    assert PrivateKey(SECRET) != SECRET
    assert len({PrivateKey(SECRET), PrivateKey(SECRET)}) == 1


def test_functions_take_bytes_or_a_key() -> None:
    other = public_key(SECRET[::-1])
    assert public_key(PrivateKey(SECRET)) == public_key(SECRET) == PrivateKey(SECRET).public
    assert x25519(PrivateKey(SECRET), other) == x25519(SECRET, other)


@pytest.mark.parametrize("low_order", [bytes(32), b"\x01" + bytes(31), b"\xec" + b"\xff" * 30 + b"\x7f"])
def test_low_order_public_keys_are_refused(low_order: bytes) -> None:
    with pytest.raises(ValueError, match="low order"):
        x25519(SECRET, low_order)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_wrong_lengths_are_the_callers_mistake(length: int) -> None:
    wrong = bytes(length)
    with pytest.raises(ValueError, match="32 bytes"):
        PrivateKey(wrong)
    with pytest.raises(ValueError, match="32 bytes"):
        x25519(SECRET, wrong)
    with pytest.raises(ValueError, match="key is"):
        aead_seal(wrong, 0, b"")
    with pytest.raises(ValueError, match="key is"):
        aead_open(wrong, 0, bytes(16))
    with pytest.raises(ValueError, match="nonce is"):
        xaead_seal(SECRET, wrong, b"")
    with pytest.raises(ValueError, match="nonce is"):
        xaead_open(SECRET, wrong, bytes(16))


@pytest.mark.parametrize("length", range(16))
def test_what_is_shorter_than_a_tag_does_not_open(length: int) -> None:
    assert aead_open(SECRET, 0, bytes(length)) is None
    assert xaead_open(SECRET, bytes(24), bytes(length)) is None


def test_every_flipped_bit_is_noticed() -> None:
    sealed = aead_seal(SECRET, 5, b"four", b"ad")
    for bit in range(len(sealed) * 8):
        forged = bytearray(sealed)
        forged[bit // 8] ^= 1 << bit % 8
        assert aead_open(SECRET, 5, forged, b"ad") is None
    assert aead_open(SECRET, 5, memoryview(sealed), b"ad") == b"four"
    assert aead_open(SECRET, 6, sealed, b"ad") is None
    assert aead_open(SECRET, 5, sealed, b"AD") is None


def test_the_counter_is_64_bits_wide() -> None:
    highest = 2**64 - 1
    assert aead_open(SECRET, highest, aead_seal(SECRET, highest, b"x")) == b"x"
    with pytest.raises(OverflowError):
        aead_seal(SECRET, highest + 1, b"x")


def test_a_missing_libsodium_is_one_clear_line(tmp_path: Path) -> None:
    for version in range(18, 40):  # whichever this build is linked with
        (tmp_path / f"libsodium.so.{version}").write_bytes(b"")
    run = subprocess.run(
        [sys.executable, "-c", "import fz_core.crypto"],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: libsodium cannot be loaded")
    assert "apt-get install libsodium23" in last
