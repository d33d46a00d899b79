"""`firezone-portal` as a process in one namespace, a peer with marked sockets in another."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

pytestmark = pytest.mark.root
PORTAL, PEER = f"fz-portal-{os.getpid()}", f"fz-peer-{os.getpid()}"
ADDRESS = "192.0.2.1"
ROOT = Path(__file__).resolve().parents[2]

POLICY = """
[[sites]]
name = "office"
[[gateways]]
site = "office"
token = "gateway-token-office"
"""

LINK = """
import base64, secrets, sys, trio
from fz_core.driver.portal import PortalLink
from fz_core.portal import Login, gateway_channel
params = {"external_id": "gw", "name": "gw"}
login = Login("gateway", sys.argv[1], "Linux/6 gateway/1.6.0 (x86_64)", params, "gateway-token-office")
link = PortalLink(login, gateway_channel(secrets.token_bytes), public_key=lambda: base64.b64encode(b"k" * 32).decode())
async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        async for event in link.events:
            message = getattr(event, "message", None)
            print(type(event).__name__, type(message).__name__ if message else "", flush=True)
trio.run(main)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def namespaces() -> Iterator[None]:
    """Two namespaces with a cable; the peer knows the portal's name from its hosts file."""
    hosts = Path("/etc/netns") / PEER / "hosts"
    try:
        for name in (PORTAL, PEER):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", PORTAL, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", PEER)
        for name, address in ((PORTAL, ADDRESS), (PEER, "192.0.2.2")):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        hosts.parent.mkdir(parents=True)
        hosts.write_text(f"{ADDRESS} portal.example\n")
        yield
    finally:
        for name in (PORTAL, PEER):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        hosts.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            hosts.parent.rmdir()


@contextlib.contextmanager
def running(namespace: str, *arguments: str, **streams: Any) -> Iterator[subprocess.Popen[str]]:
    """A Python process in a namespace, ended whatever happens."""
    command = ["ip", "netns", "exec", namespace, sys.executable, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, text=True, **streams)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)


def portal_arguments(folder: Path) -> tuple[str, ...]:
    return (
        "-m", "fz_core.commands.portal", "--policy", str(folder / "portal.toml"),
        "--state", str(folder / "state.sqlite3"), "--listen", f"{ADDRESS}:8081",
    )  # fmt: skip


def wait_for(stream: IO[str] | None, *texts: str) -> str:
    """Read lines until one contains a text; the test's time-out bounds it."""
    assert stream is not None
    for line in stream:
        if any(text in line for text in texts):
            return line
    raise AssertionError(f"the process ended before saying any of {texts}")


def test_the_whole_life_of_a_portal(namespaces: None, tmp_path: Path) -> None:
    policy = tmp_path / "portal.toml"
    policy.write_text(POLICY)
    policy.chmod(0o600)
    url = "ws://portal.example:8081"
    with (
        running(PORTAL, *portal_arguments(tmp_path), stdout=subprocess.PIPE) as portal,
        running(PEER, "-c", LINK, url, stdout=subprocess.PIPE) as peer,
    ):
        wait_for(portal.stdout, "Listening")
        assert wait_for(peer.stdout, "Connected")
        assert wait_for(peer.stdout, "MessageReceived Init")

        policy.write_text("nonsense")
        portal.send_signal(signal.SIGHUP)
        assert "portal.toml:1: not TOML" in wait_for(portal.stdout, "ERROR")
        wait_for(portal.stdout, "the old one stays in force")

        policy.write_text('account = "renamed"\n' + POLICY)
        portal.send_signal(signal.SIGHUP)
        wait_for(portal.stdout, "The new policy is in force")
        assert wait_for(peer.stdout, "MessageReceived Init")

        policy.write_text("")
        portal.send_signal(signal.SIGHUP)
        assert wait_for(peer.stdout, "Fatal")
        assert peer.wait(20) == 0

        assert stat.S_IMODE((tmp_path / "state.sqlite3").stat().st_mode) == 0o600
        portal.send_signal(signal.SIGTERM)
        assert portal.wait(20) == 0
        rest = portal.stdout.read() if portal.stdout else ""
        assert "Goodbye!" in rest
        assert "gateway-token" not in rest


def test_a_peer_returns_after_the_portal_was_killed(namespaces: None, tmp_path: Path) -> None:
    (tmp_path / "portal.toml").write_text(POLICY)
    with running(PEER, "-c", LINK, "ws://portal.example:8081", stdout=subprocess.PIPE) as peer:
        for life in range(2):
            with running(PORTAL, *portal_arguments(tmp_path), stdout=subprocess.PIPE) as portal:
                wait_for(portal.stdout, "Listening")
                assert wait_for(peer.stdout, "Connected")
                if life == 0:
                    portal.send_signal(signal.SIGKILL)
                    assert portal.wait(20) == -signal.SIGKILL
                    assert wait_for(peer.stdout, "Hiccup")
                else:
                    portal.send_signal(signal.SIGINT)
                    assert portal.wait(20) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "SIGHUP"),
        (["--policy", "{ok}", "--check"], 0, "ok, 0 resources"),
        (["--policy", "{bad}", "--check"], 1, "bad.toml:1: "),
        (["--policy", "{none}"], 1, "Cannot read the policy"),
        ([], 2, "--policy is required"),
        (["--policy", "{ok}", "--listen", "80"], 2, "invalid address"),
        (["--policy", "{ok}", "--tls-cert", "x"], 2, "go together"),
        (["--policy", "{ok}", "--state", "{none}/x"], 1, "create its directory"),
        (["--policy", "{ok}", "--state", "{state}", "--listen", "198.51.100.1:8081"], 1, "Cannot serve"),
    ],
)
def test_exit_codes(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    (tmp_path / "ok.toml").write_text(POLICY)
    (tmp_path / "bad.toml").write_text("a = 1")
    names = {n: str(tmp_path / f) for n, f in (("ok", "ok.toml"), ("bad", "bad.toml"), ("none", "no"), ("state", "s"))}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FIREZONE")}
    done = subprocess.run(
        [sys.executable, "-m", "fz_core.commands.portal", *(a.format(**names) for a in arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stderr
