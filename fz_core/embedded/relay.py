"""The relay as a service: sockets and clock around `turn.RelayServer`.

    async with trio.open_nursery() as nursery:
        relay = await nursery.start(run_relay, RelayConfig(public_ip4="127.0.0.1", ...))

One task serves all sockets: it waits once, then `fastpath.RelayPath` takes datagrams in batches from every ready
socket in turn, each up to a budget, so that no busy client starves another. Data never reaches the protocol core.
Source: spec/relay.md sections 9 to 11 and 13.
"""

from __future__ import annotations

import ipaddress
import logging
import random
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from fz_core.embedded.relay_sockets import bind_port
from fz_core.fastpath.relay_path import RelayPath
from fz_core.packet import Address, DropCounter, DropReason
from fz_core.turn import ChannelBound, ChannelUnbound, PortFreed, RelayCommand, RelayServer, SendToClient, relay_id

STATISTICS_INTERVAL = 10.0
TURN_MS = 10
LINGER_MS = 1
log = logging.getLogger("firezone_relay")


class PortalLink(Protocol):
    """The connection to a portal: joins with the secret, tells whether it is joined, ends only when it must."""

    async def __call__(self, stamp_secret: str, set_ready: Callable[[bool], None]) -> None: ...


@dataclass(frozen=True, slots=True)
class RelayConfig:
    """What a relay needs to know. At least one public address; `stamp_secret` is made up if None."""

    public_ip4: str | None = None
    public_ip6: str | None = None
    bind_ip4: str = "0.0.0.0"
    bind_ip6: str = "::"
    listen_port: int = 3478
    lowest_port: int = 49152
    highest_port: int = 65535
    stamp_secret: str | None = None
    rng_seed: int | None = None
    allocations_per_source: int = 1024

    def __repr__(self) -> str:
        return f"<RelayConfig port={self.listen_port} (redacted)>"


class Relay:
    """A running relay."""

    def __init__(self, config: RelayConfig) -> None:
        self.config = config
        self.stamp_secret = config.stamp_secret or secrets.token_hex(32)
        self.is_ready = False
        self._drops = DropCounter()
        self._path = RelayPath(self._handle_request)
        public = {4: config.public_ip4, 16: config.public_ip6}
        self._own_hosts = {family: host for family, host in public.items() if host is not None}
        self._bind_hosts = {4: config.bind_ip4, 16: config.bind_ip6}
        self._core = RelayServer(
            stamp_secret=self.stamp_secret,
            public_ip4=packed_ip(config.public_ip4),
            public_ip6=packed_ip(config.public_ip6),
            random_bytes=random_source(config.rng_seed),
            unix_epoch=time.time() - trio.current_time(),
            lowest_port=config.lowest_port,
            highest_port=config.highest_port,
            listen_port=config.listen_port,
            open_port=self._open_port,
            allocations_per_source=config.allocations_per_source,
        )
        try:
            self._listen_ports = {family: self._listen(family, config.listen_port) for family in self._own_hosts}
        except OSError:
            self._path.close()
            raise

    @property
    def id(self) -> str:
        """The relay's id at the portal."""
        return relay_id(self.stamp_secret)

    @property
    def listen_addresses(self) -> tuple[Address, ...]:
        """Where clients find this relay."""
        own = self._own_hosts.items()
        return tuple(Address(packed_ip(host) or b"", self._listen_ports[family]) for family, host in own)

    @property
    def allocation_count(self) -> int:
        """Allocations now."""
        return self._core.allocation_count

    @property
    def channel_count(self) -> int:
        """Bound channels now."""
        return self._core.channel_count

    @property
    def relayed_bytes(self) -> int:
        """Payload carried so far, both ways."""
        return self._path.relayed_bytes

    @property
    def drops(self) -> dict[str, int]:
        """What was not answered or carried so far, by reason."""
        path = self._path
        data = {
            DropReason.UNKNOWN_CHANNEL: path.unknown,
            DropReason.BUFFER_FULL: path.overflowed,
            DropReason.SEND_REFUSED: path.refused,
        }
        return {reason.value: count for reason, count in (*self._drops.items(), *data.items()) if count}

    def set_ready(self, is_ready: bool) -> None:
        """What `/readyz` tells."""
        self.is_ready = is_ready

    async def serve(self) -> None:
        """Until cancelled; closes all sockets then."""
        try:
            while True:
                deadline = self._core.poll_timeout()
                with trio.move_on_at(float("inf") if deadline is None else deadline):
                    await trio.lowlevel.wait_readable(self._path)
                self._path.turn(TURN_MS, LINGER_MS)
                self._core.handle_timeout(trio.current_time())
                self._obey()
        finally:
            self._path.close()

    def _handle_request(self, datagram: bytes, client: Address) -> None:
        reason = self._core.handle_client_input(client, datagram, trio.current_time())
        if reason is not None:
            self._drops.add(reason)
        self._obey()

    # What the core wants

    def _obey(self) -> None:
        while (command := self._core.poll_command()) is not None:
            self._execute(command)

    def _execute(self, command: RelayCommand) -> None:
        if isinstance(command, SendToClient):
            self._path.send(command.client, command.payload)
        elif isinstance(command, ChannelBound):
            is_own_ip = self._core.is_own_ip(command.peer)
            self._path.open_route(command.client, command.number, command.port, command.peer, is_own_ip)
        elif isinstance(command, ChannelUnbound):
            self._path.close_route(command.client, command.number)
        elif isinstance(command, PortFreed):
            self._path.remove_port(command.port)

    # Sockets

    def _listen(self, family: int, number: int) -> int:
        """The port it is."""
        sock = bind_port(family, self._bind_hosts[family], number)
        return self._hand_over(sock, is_listening=True)

    def _open_port(self, number: int, families: tuple[int, ...]) -> bool:
        opened: list[socket.socket] = []
        try:
            for family in families:
                opened.append(bind_port(family, self._bind_hosts[family], number))
        except OSError as error:
            log.debug("Allocation port is not available port=%d error=%s", number, error)
            for sock in opened:
                sock.close()
            return False
        for sock in opened:
            self._hand_over(sock, is_listening=False)
        return True

    def _hand_over(self, sock: socket.socket, *, is_listening: bool) -> int:
        number: int = sock.getsockname()[1]
        with sock:
            self._path.add_port(sock.fileno(), sock.family == socket.AF_INET, number, is_listening)
            sock.detach()
        return number


async def run_relay(
    config: RelayConfig,
    portal_link: PortalLink | None = None,
    *,
    task_status: trio.TaskStatus[Relay] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run until cancelled, or until the portal link fails for good.

    Without a link the relay is ready at once; whoever knows `stamp_secret` can make credentials for it.
    OSError if the listening port is taken.
    """
    relay = Relay(config)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(relay.serve)
        nursery.start_soon(report_statistics, relay)
        if portal_link is None:
            relay.set_ready(True)
        else:
            nursery.start_soon(portal_link, relay.stamp_secret, relay.set_ready)
        log.info("Listening port=%d", config.listen_port)
        task_status.started(relay)


async def report_statistics(relay: Relay) -> None:
    """One line every ten seconds."""
    before = relay.relayed_bytes
    while True:
        await trio.sleep(STATISTICS_INTERVAL)
        rate = (relay.relayed_bytes - before) / STATISTICS_INTERVAL
        before = relay.relayed_bytes
        log.info(
            "Relay statistics allocations=%d channels=%d throughput=%s dropped=%d",
            relay.allocation_count,
            relay.channel_count,
            format_rate(rate).replace(" ", ""),
            sum(relay.drops.values()),
        )


def format_rate(rate: float) -> str:
    """Bytes per second in powers of 1000."""
    for unit in ("B/s", "kB/s", "MB/s", "GB/s"):
        if rate < 1000:
            return f"{rate:.2f} {unit}"
        rate /= 1000
    return f"{rate:.2f} TB/s"


def packed_ip(host: str | None) -> bytes | None:
    """The bytes of an IP."""
    return None if host is None else ipaddress.ip_address(host).packed


def random_source(seed: int | None) -> Callable[[int], bytes]:
    """Unpredictable, unless a test wants otherwise."""
    return secrets.token_bytes if seed is None else random.Random(seed).randbytes
