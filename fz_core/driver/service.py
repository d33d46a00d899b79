"""Running one tunnel as a process: signals, readiness, and the ways out."""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import structlog
import trio

from fz_core.driver.config import Role, TunnelConfig
from fz_core.driver.tunnel import Tunnel

if TYPE_CHECKING:
    from fz_core.driver.health import HealthServer

log = structlog.get_logger("tunnel")


def serve(config: TunnelConfig, health: HealthServer | None = None) -> None:
    """Run until SIGINT or SIGTERM. TunnelFailed, ConfigError or HostError if it ends otherwise."""
    # Code lives as long as the process: no collection needs to look at it, those at the exit (50 ms) neither.
    gc.freeze()
    trio.run(_serve, config, health)


async def _serve(config: TunnelConfig, health: HealthServer | None) -> None:
    tunnel = Tunnel(config)
    failures: list[Exception] = []
    with trio.open_signal_receiver(*_signals_of(config.role)) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_on_signal, signals, tunnel)
            nursery.start_soon(_notify_when_ready, tunnel)
            if health is not None:
                nursery.start_soon(health.run, lambda: tunnel.is_ready)
            try:
                await tunnel.run()
            except Exception as error:
                failures.append(error)
            nursery.cancel_scope.cancel()
    if failures:
        raise failures[0]


async def _stop_on_signal(signals: AsyncIterator[int], tunnel: Tunnel) -> None:
    async for number in signals:
        if number == signal.SIGHUP:
            tunnel.reset("SIGHUP")
            continue
        log.info("Shutting down", signal=signal.Signals(number).name)
        tunnel.stop()


def _signals_of(role: Role) -> tuple[signal.Signals, ...]:
    """A client lives through SIGHUP; a gateway dies of it, as the official one does."""
    ends = (signal.SIGINT, signal.SIGTERM)
    return (*ends, signal.SIGHUP) if role is Role.CLIENT else ends


async def _notify_when_ready(tunnel: Tunnel) -> None:
    """Drain events, and tell systemd once the first configuration stands."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_drain, tunnel)
        await tunnel.wait_configured()
        notify_systemd("READY=1")


async def _drain(tunnel: Tunnel) -> None:
    async for _ in tunnel.events:
        pass


def notify_systemd(state: str) -> None:
    """sd_notify: one datagram to the service manager, if there is one."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            notify.sendto(state.encode(), address)
    except OSError as error:
        log.debug("cannot notify the service manager", error=error.strerror)
