"""Packets through both libraries: the same bytes, forgeries refused and wiped, threads, and which library is chosen.

The published vectors run through both in test_crypto_vectors.py and test_wycheproof.py.
"""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fz_core.crypto import aead_open, aead_seal
from fz_core.crypto.cipher import PacketCipher, cipher_libraries, cipher_name, measure_cipher

ROOT = Path(__file__).resolve().parents[3]
LIBRARIES = ("libsodium", "libcrypto")
KEY = bytes(range(32))
TAG = 16
GUARD = b"\xa5" * 32
LENGTHS = (*range(0, 300), *range(300, 1401, 7), 1400)
SHORTEST_FOR_LIBCRYPTO = 192


@pytest.fixture(params=[*LIBRARIES, None])
def library(request: pytest.FixtureRequest) -> str | None:
    """Each library alone, and the two as packets use them."""
    name: str | None = request.param
    if name is not None and name not in cipher_libraries():
        pytest.skip(f"no {name} on this system")
    return name


def test_seals_and_opens_as_libsodium_does(library: str | None) -> None:
    draw = random.Random(1)
    for length in LENGTHS:
        key, counter, plaintext = draw.randbytes(32), draw.getrandbits(64), draw.randbytes(length)
        cipher = PacketCipher(key, library)
        sealed = aead_seal(key, counter, plaintext)
        assert seal(cipher, plaintext, counter) == sealed, length
        assert open_(cipher, sealed, counter) == plaintext, length


def test_seals_and_opens_in_place(library: str | None) -> None:
    draw = random.Random(2)
    cipher = PacketCipher(KEY, library)
    for counter, length in enumerate(LENGTHS):
        plaintext = draw.randbytes(length)
        packet = bytearray(plaintext + bytes(TAG) + GUARD)
        view = memoryview(packet)
        cipher.seal_into(view, view[:length], counter)
        assert packet == aead_seal(KEY, counter, plaintext) + GUARD, length
        tag = bytes(packet[length : length + TAG])
        assert cipher.open_into(view, view[: length + TAG], counter), length
        assert packet == plaintext + tag + GUARD, length


def test_one_key_serves_any_order_of_lengths_and_counters(library: str | None) -> None:
    draw = random.Random(3)
    sealing, opening = PacketCipher(KEY, library), PacketCipher(KEY, library)
    for _ in range(2000):
        counter, plaintext = draw.getrandbits(64), draw.randbytes(draw.choice((0, 1, 60, 191, 192, 193, 1280)))
        sealed = seal(sealing, plaintext, counter)
        assert aead_open(KEY, counter, sealed) == plaintext
        assert open_(opening, sealed, counter) == plaintext


def test_a_forgery_is_refused_and_leaves_zeros(library: str | None) -> None:
    draw = random.Random(4)
    cipher = PacketCipher(KEY, library)
    for counter, length in enumerate(LENGTHS):
        plaintext = draw.randbytes(length)
        sealed = aead_seal(KEY, counter, plaintext)
        forged = bytearray(sealed)
        forged[draw.randrange(length + TAG)] ^= 1 << draw.randrange(8)
        out = bytearray(GUARD * (length // 32 + 2))
        untouched = bytes(out[length:])
        assert not cipher.open_into(out, bytes(forged), counter), length
        assert out == bytes(length) + untouched, length
        view = memoryview(forged)
        assert not cipher.open_into(view, view, counter), length
        assert forged[:length] == bytes(length), length
        assert not cipher.open_into(out, sealed, counter + 1), length
        assert open_(cipher, sealed, counter) == plaintext, length


def test_truncated_packets_are_forgeries(library: str | None) -> None:
    cipher = PacketCipher(KEY, library)
    sealed = aead_seal(KEY, 5, bytes(1280))
    for end in range(TAG, len(sealed), 13):
        assert not cipher.open_into(bytearray(end), sealed[:end], 5)


def test_threads_with_their_own_keys(library: str | None) -> None:
    """They run without the GIL, so at the same time."""
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(carry, range(4), [library] * 4)
    assert list(results) == [0, 0, 0, 0]


def test_short_packets_never_reach_libcrypto() -> None:
    """So a peer that is only kept alive owns no context."""
    cipher = PacketCipher(KEY)
    seal(cipher, bytes(SHORTEST_FOR_LIBCRYPTO - 1), 1)
    assert not cipher.has_context
    seal(cipher, bytes(SHORTEST_FOR_LIBCRYPTO), 2)
    assert cipher.has_context == (cipher_name() == "libcrypto")


def test_a_key_can_be_replaced(library: str | None) -> None:
    cipher = PacketCipher(bytes(32), library)
    seal(cipher, bytes(1280), 1)
    cipher.__init__(KEY, library)
    assert not cipher.has_context
    assert seal(cipher, bytes(1280), 1) == aead_seal(KEY, 1, bytes(1280))


def test_misuse_is_refused(library: str | None) -> None:
    cipher = PacketCipher(KEY, library)
    for key in (b"", bytes(31), bytes(33)):
        with pytest.raises(ValueError, match="key is"):
            PacketCipher(key, library)
    for nonce in (b"", bytes(8), bytes(24)):
        with pytest.raises(ValueError, match="nonce is"):
            cipher.seal(nonce, b"")
    with pytest.raises(ValueError, match="do not fit"):
        cipher.seal_into(bytearray(115), bytes(100), 0)
    with pytest.raises(ValueError, match="cannot be opened"):
        cipher.open_into(bytearray(99), bytes(116), 0)
    with pytest.raises(ValueError, match="cannot be opened"):
        cipher.open_into(bytearray(99), bytes(15), 0)
    with pytest.raises(ValueError, match="no packet"):
        cipher.open(bytes(12), bytes(15))
    with pytest.raises(ValueError, match="not among the libraries"):
        PacketCipher(KEY, "openssl")
    with pytest.raises(ValueError, match="measured is"):
        measure_cipher("libsodium", 1281, 1)
    with pytest.raises(TypeError, match="not picklable"):
        cipher.__reduce__()


def test_freed_keys_give_their_contexts_back(library: str | None) -> None:
    """A context has about 1.1 KB."""
    before = 0
    for i in range(22_000):
        seal(PacketCipher(KEY, library), bytes(SHORTEST_FOR_LIBCRYPTO), i)
        if i == 2000:
            before = resident_bytes()
    assert resident_bytes() - before < 6 << 20


# which library

TELL = "import fz_core.crypto as c; print(c.cipher_name(), c.cipher_error())"


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_variable_forces_a_library(name: str) -> None:
    if name not in cipher_libraries():
        pytest.skip(f"no {name} on this system")
    assert told({"FZ_CIPHER": name}) == f"{name} None"


def test_without_the_variable_one_is_chosen() -> None:
    for value in ({}, {"FZ_CIPHER": ""}):
        name, _, error = told(value).partition(" ")
        assert name in LIBRARIES
        assert error == "None"


def test_another_value_is_an_error_and_changes_nothing() -> None:
    name, _, error = told({"FZ_CIPHER": "openssl"}).partition(" ")
    assert name in LIBRARIES
    assert error == "FZ_CIPHER: 'openssl' is not a library for ciphers, use libsodium or libcrypto"


def test_without_libcrypto_it_is_libsodium(tmp_path: Path) -> None:
    (tmp_path / "libcrypto.so.3").write_bytes(b"")
    missing = {"LD_LIBRARY_PATH": str(tmp_path)}
    assert told(missing) == "libsodium None"
    assert told(missing | {"FZ_CIPHER": "libcrypto"}) == (
        "libsodium FZ_CIPHER: libcrypto.so.3 cannot be used, install libssl3 or unset FZ_CIPHER"
    )


def test_a_libcrypto_without_the_cipher_is_none(tmp_path: Path) -> None:
    """As where the administrator allows nothing but FIPS."""
    config = tmp_path / "openssl.cnf"
    config.write_text(
        "openssl_conf = o\n[o]\nproviders = p\nalg_section = a\n"
        "[p]\nbase = b\n[b]\nactivate = 1\n[a]\ndefault_properties = fips=yes\n"
    )
    strict = {"OPENSSL_CONF": str(config)}
    assert told(strict) == "libsodium None"
    assert "cannot be used" in told(strict | {"FZ_CIPHER": "libcrypto"})


def test_a_libcrypto_with_the_cipher_is_found() -> None:
    """Else what it did wrong would only skip tests."""
    try:
        fetch = ctypes.CDLL("libcrypto.so.3").EVP_CIPHER_fetch
    except OSError:
        pytest.skip("no libcrypto.so.3 on this system")
    fetch.restype = ctypes.c_void_p
    has_cipher = fetch(None, b"ChaCha20-Poly1305", None) is not None
    assert ("libcrypto" in cipher_libraries()) == has_cipher or os.environ.get("FZ_CIPHER") == "libsodium"


@pytest.mark.skipif("libcrypto" not in cipher_libraries(), reason="no libcrypto on this system")
def test_every_library_is_measured() -> None:
    for name in LIBRARIES:
        assert all(0.0 < ns < 1e9 for ns in measure_cipher(name, 1280, 3))


def told(variables: dict[str, str]) -> str:
    """What a new process says of its choice, which is made once."""
    environ = {name: value for name, value in os.environ.items() if name != "FZ_CIPHER"}
    run = subprocess.run(
        [sys.executable, "-c", TELL],
        env={**environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return run.stdout.strip()


def resident_bytes() -> int:
    """Of this process, by /proc/self/statm."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def seal(cipher: PacketCipher, plaintext: bytes, counter: int) -> bytes:
    """Out of place, with a look at what lies behind."""
    out = bytearray(bytes(len(plaintext) + TAG) + GUARD)
    cipher.seal_into(out, plaintext, counter)
    assert out.endswith(GUARD)
    return bytes(out[: -len(GUARD)])


def open_(cipher: PacketCipher, sealed: bytes, counter: int) -> bytes | None:
    """Likewise."""
    out = bytearray(bytes(len(sealed) - TAG) + GUARD)
    opened = cipher.open_into(out, sealed, counter)
    assert out.endswith(GUARD)
    return bytes(out[: -len(GUARD)]) if opened else None


def carry(seed: int, library: str | None) -> int:
    """Seal and open many packets with a key of one's own; how many came out wrong."""
    draw = random.Random(seed)
    key = draw.randbytes(32)
    sealing, opening = PacketCipher(key, library), PacketCipher(key, library)
    plaintexts: Sequence[bytes] = [draw.randbytes(draw.choice((64, 1280, 65000))) for _ in range(50)]
    wrong = 0
    for counter in range(500):
        plaintext = plaintexts[counter % len(plaintexts)]
        sealed = seal(sealing, plaintext, counter)
        wrong += open_(opening, sealed, counter) != plaintext
        wrong += counter < len(plaintexts) and sealed != aead_seal(key, counter, plaintext)
    return wrong
