"""Our TURN client against coturn, in a network namespace of its own (relay sheet section 12).

coturn 4.6.1 does not honour ADDITIONAL-ADDRESS-FAMILY (0x8000): it allocates one family, here that of the client.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import hmac
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fz_core.packet import Address
from tests.netns.turn_scenarios import (
    TurnPeer,
    allocate_and_talk,
    refresh,
    renew_nonce,
    two_clients_on_one_relay,
    wrong_password,
)

pytestmark = [pytest.mark.root, pytest.mark.peer("turnserver", "ip")]

SECRET = "s3cret"
EXPIRY = 2_000_000_000  # coturn reads a signed 32-bit number
RELAY4, RELAY6 = Address.parse("127.0.0.1:3478"), Address.parse("[::1]:3478")
CLONE_NEWNET = 0x40000000
STARTUP_SECONDS = 10


def credentials(salt: str = "relaytest", secret: str = SECRET) -> tuple[str, str]:
    """As coturn's `use-auth-secret` wants them."""
    username = f"{EXPIRY}:{salt}"
    mac = hmac.digest(secret.encode(), username.encode(), hashlib.sha1)
    return username, base64.b64encode(mac).decode()


def test_credentials_of_the_sheet() -> None:
    mac = hmac.digest(SECRET.encode(), b"2000000000:relaytest", hashlib.sha1)
    assert base64.b64encode(mac).decode() == "6ATU6YRFXSEUBQxaoe10mrpT6sM="


@pytest.fixture(scope="module")
def coturn() -> Iterator[str]:
    name = f"coturn-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        with tempfile.TemporaryDirectory() as folder, running_coturn(name, Path(folder)):
            yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@contextmanager
def running_coturn(name: str, folder: Path) -> Iterator[None]:
    log = folder / "log"
    process = subprocess.Popen(
        [
            *("ip", "netns", "exec", name, "turnserver", "-n", "--no-cli", "--no-tls", "--no-dtls"),
            *("--use-auth-secret", f"--static-auth-secret={SECRET}", "--realm=firezone"),
            *("--listening-ip=127.0.0.1", "--listening-ip=::1", "--relay-ip=127.0.0.1", "--relay-ip=::1"),
            *("--listening-port=3478", "--min-port=50000", "--max-port=50100", "--allow-loopback-peers"),
            "--allocation-default-address-family=keep",
            *(f"--userdb={folder}/db", f"--pidfile={folder}/pid", f"--log-file={log}", "--simple-log"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_listening(name, process)
        yield
    finally:
        process.terminate()
        process.wait(10)


def wait_until_listening(name: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, "turnserver ended"
        listing = subprocess.run(
            ["ip", "netns", "exec", name, "ss", "-ulnH"], capture_output=True, text=True, check=True
        )
        if "127.0.0.1:3478" in listing.stdout and "[::1]:3478" in listing.stdout:
            return
        time.sleep(0.05)
    raise AssertionError("turnserver does not listen")


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Sockets made here belong to the namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as outer, open(f"/run/netns/{name}") as inner:
        assert libc.setns(inner.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(outer.fileno(), CLONE_NEWNET) == 0


def client(relay: Address = RELAY4, salt: str = "relaytest", secret: str = SECRET) -> TurnPeer:
    return TurnPeer(relay, credentials(salt, secret), accept_unsigned_challenge=True)


@pytest.mark.parametrize(("relay", "host"), [(RELAY4, "127.0.0.1"), (RELAY6, "::1")])
def test_allocate_and_talk(coturn: str, relay: Address, host: str) -> None:
    with inside(coturn):
        allocate_and_talk(client(relay, salt="talk"), host)


def test_refresh(coturn: str) -> None:
    with inside(coturn):
        refresh(client())


def test_nonce_renewal(coturn: str) -> None:
    with inside(coturn):
        renew_nonce(client())


def test_wrong_password(coturn: str) -> None:
    with inside(coturn):
        subject = client(secret="other")
        wrong_password(subject)
        assert subject.allocation.free_reason == "no response received"


def test_two_clients_on_one_relay(coturn: str) -> None:
    with inside(coturn):
        two_clients_on_one_relay(client(salt="a"), client(salt="b"))


def test_the_official_dialect_is_not_understood(coturn: str) -> None:
    """Pins why the switch exists: a signed request without a nonce gets no challenge from coturn."""
    with inside(coturn):
        subject = TurnPeer(RELAY4, credentials())
        wrong_password(subject)
