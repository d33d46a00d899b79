"""Accelerations can be switched off one by one."""

from __future__ import annotations

import socket

import pytest

from fz_core.driver.carrier import wanted_threads
from fz_core.linux import HostError, UdpSocket, switches

SOL_UDP, UDP_GRO = 17, 104


@pytest.mark.parametrize("value", ["off", "OFF", " off ", "0", "false", "no"])
def test_off(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FZ_FASTPATH", value)
    assert not switches.is_on(switches.FASTPATH)
    assert wanted_threads() == 0


@pytest.mark.parametrize("value", [None, "", "on", "1", "true"])
def test_on(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("FZ_FASTPATH", raising=False)
    monkeypatch.delenv("FZ_FASTPATH_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("FZ_FASTPATH", value)
    assert wanted_threads() in (1, 2)


@pytest.mark.parametrize(
    ("cores", "told", "threads"),
    [(1, "", 1), (2, "", 1), (3, " ", 1), (4, "", 2), (64, None, 2), (64, "1", 1), (1, "2", 2), (8, " 1 ", 1)],
)
def test_threads(monkeypatch: pytest.MonkeyPatch, cores: int, told: str | None, threads: int) -> None:
    monkeypatch.delenv("FZ_FASTPATH", raising=False)
    monkeypatch.delenv("FZ_FASTPATH_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    if told is not None:
        monkeypatch.setenv("FZ_FASTPATH_THREADS", told)
    assert wanted_threads() == threads


@pytest.mark.parametrize("told", ["0", "3", "two", "-1"])
def test_no_number_of_threads(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    monkeypatch.setenv("FZ_FASTPATH_THREADS", told)
    with pytest.raises(HostError, match=rf"^FZ_FASTPATH_THREADS is '{told}': use 1 or 2, or unset it$"):
        wanted_threads()


def test_datagrams_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with UdpSocket.bind(socket.AF_INET, 0, None) as udp:
        assert udp.gso_segments == 64
    monkeypatch.setenv("FZ_UDP_GSO", "off")
    monkeypatch.setenv("FZ_UDP_GRO", "off")
    with UdpSocket.bind(socket.AF_INET, 0, None) as udp:
        assert udp.gso_segments == 1
        probe = socket.socket(fileno=udp.fileno())
        try:
            assert probe.getsockopt(SOL_UDP, UDP_GRO) == 0
        finally:
            probe.detach()
