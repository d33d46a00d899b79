"""TLS between our own link and the embedded portal: a trusted certificate works, any other is a hiccup."""

from __future__ import annotations

import base64
import secrets
import subprocess
from pathlib import Path

import pytest
import trio
from embedded_portal_world import GATEWAY_AGENT, TOKENS, policy_of

from fz_core.commands.portal import load_tls
from fz_core.driver.portal import PortalLink
from fz_core.embedded.portal_server import PortalServer
from fz_core.embedded.portal_state import PortalState
from fz_core.embedded.store import Store
from fz_core.portal import Connected, Hiccup, Login, gateway_channel

pytestmark = pytest.mark.peer("openssl")


def make_certificate(folder: Path) -> tuple[Path, Path]:
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.mark.parametrize("is_trusted", [True, False])
async def test_certificates_are_checked(tmp_path: Path, is_trusted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = make_certificate(tmp_path)
    if is_trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    context = load_tls(cert, key)
    assert context is not None
    now = trio.current_time()
    state = PortalState(
        policy_of(tmp_path), Store(":memory:", secrets.token_bytes), unix_epoch=0.0, random_bytes=bytes, now=now
    )
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    url = f"wss://localhost:{listener.socket.getsockname()[1]}"
    login = Login("gateway", url, GATEWAY_AGENT, {"external_id": "g", "name": "g"}, TOKENS["gateway"])
    key_text = base64.b64encode(b"k" * 32).decode()
    link = PortalLink(login, gateway_channel(secrets.token_bytes), public_key=lambda: key_text, mark=None)
    async with trio.open_nursery() as nursery:
        await nursery.start(PortalServer(state).serve, [trio.SSLListener(listener, context)])
        nursery.start_soon(link.run)
        event = await link.events.receive()
        if is_trusted:
            assert event == Connected()
        else:
            assert isinstance(event, Hiccup)
            assert "certificate" in event.error.lower()
        nursery.cancel_scope.cancel()


def test_a_bad_certificate_is_one_line(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    key.write_text("nonsense")
    with pytest.raises(OSError, match=r"TLS certificate .*cert\.pem with key .*key\.pem"):
        load_tls(cert, key)
