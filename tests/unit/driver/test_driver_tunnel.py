"""What a tunnel tells people of its errors."""

from __future__ import annotations

import errno
import os

import pytest
from structlog.testing import capture_logs

from fz_core.driver import Role, Tunnel, TunnelConfig
from fz_core.tunnel import TunnelErrors


@pytest.fixture
def tunnel() -> Tunnel:
    return Tunnel(TunnelConfig(Role.CLIENT, "wss://portal.example", "id", "name", "1.5.12", "token"))


@pytest.mark.shows("io", 10)
def test_a_firewall_that_refuses_our_datagrams_is_one_hint(tunnel: Tunnel) -> None:
    with capture_logs() as lines:
        for code in (errno.EPERM, errno.EACCES, errno.EPERM, errno.ENETUNREACH):
            tunnel._report(TunnelErrors("packets were dropped", [OSError(code, os.strerror(code))] * 3))
    hints = [line for line in lines if line["log_level"] == "info"]
    assert len(hints) == 1
    assert "firewall" in hints[0]["event"]
    assert {line["log_level"] for line in lines} == {"info", "debug"}


def test_an_error_is_worth_a_line_a_minute(tunnel: Tunnel) -> None:
    with capture_logs() as lines:
        for _ in range(100):
            tunnel._report(TunnelErrors("packets were dropped", [OSError(errno.ENOBUFS, "no room")]))
    assert len(lines) == 1


def test_a_reset_without_a_session_is_nothing(tunnel: Tunnel) -> None:
    with capture_logs() as lines:
        tunnel.reset("too early")
    assert lines == []
