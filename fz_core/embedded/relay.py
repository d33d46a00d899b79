"""The relay as a service: sockets and clock around `turn.RelayServer`.

    async with trio.open_nursery() as nursery:
        relay = await nursery.start(run_relay, RelayConfig(public_ip4="127.0.0.1", ...))

One task serves all sockets: it waits once, then takes datagrams in batches from every ready socket in turn,
each up to a budget, so that no busy client starves another. Data never reaches the protocol core; see
`relay_forwarding`.
Source: spec/relay.md sections 9 to 11 and 13.
"""

from __future__ import annotations

import ipaddress
import logging
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from fz_core.embedded.relay_forwarding import Forwarder, Route
from fz_core.embedded.relay_sockets import Poller, SockAddr, UdpPort
from fz_core.packet import Address, DropCounter, DropReason
from fz_core.turn import (
    ChannelBound,
    ChannelUnbound,
    PortFreed,
    RelayCommand,
    RelayServer,
    SendToClient,
    SendToPeer,
    relay_id,
)

STATISTICS_INTERVAL = 10.0
BATCHES_PER_SOCKET = 32
ROUNDS_PER_WAKEUP = 16
HEADROOM = 4
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
        self._poller = Poller()
        self._forwarder = Forwarder(self._handle_request)
        public = {4: config.public_ip4, 16: config.public_ip6}
        self._own_hosts = {family: host for family, host in public.items() if host is not None}
        self._bind_hosts = {4: config.bind_ip4, 16: config.bind_ip6}
        self._buffer = memoryview(bytearray(65536))
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
            self._listen = {family: self._bind(family, config.listen_port) for family in self._own_hosts}
        except OSError:
            self._poller.close()
            raise

    @property
    def id(self) -> str:
        """The relay's id at the portal."""
        return relay_id(self.stamp_secret)

    @property
    def listen_addresses(self) -> tuple[Address, ...]:
        """Where clients find this relay."""
        own = self._own_hosts.items()
        return tuple(Address(packed_ip(host) or b"", self._listen[family].number) for family, host in own)

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
        return self._forwarder.relayed_bytes

    @property
    def drops(self) -> dict[str, int]:
        """What was not answered or carried so far, by reason."""
        data = {DropReason.UNKNOWN_CHANNEL.value: self._forwarder.dropped} if self._forwarder.dropped else {}
        return data | {reason.value: count for reason, count in self._drops.items()}

    def set_ready(self, is_ready: bool) -> None:
        """What `/readyz` tells."""
        self.is_ready = is_ready

    async def serve(self) -> None:
        """Until cancelled; closes all sockets then."""
        try:
            while True:
                deadline = self._core.poll_timeout()
                with trio.move_on_at(float("inf") if deadline is None else deadline):
                    await trio.lowlevel.wait_readable(self._poller)
                self._turn()
        finally:
            self._poller.close()

    def _turn(self) -> None:
        """Some rounds over all ready sockets, then what is due."""
        for _ in range(ROUNDS_PER_WAKEUP):
            ready = self._poller.ready()
            if not ready:
                break
            for port in ready:
                self._drain(port)
        self._core.handle_timeout(trio.current_time())
        self._obey()

    def _drain(self, port: UdpPort) -> None:
        view = self._buffer
        is_listening = port is self._listen[port.family]
        for _ in range(BATCHES_PER_SOCKET):
            received = port.receive(view)
            if received is None:
                return
            size, segment, source = received
            if not is_listening:
                self._forwarder.from_peer(port, view, size, segment, source)
            elif size:
                self._forwarder.from_client(view, size, segment, source)

    def _handle_request(self, datagram: bytes, source: SockAddr) -> None:
        client = Address(ipaddress.ip_address(source[0].partition("%")[0]).packed, source[1])
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
            listen = self._listen[len(command.client.ip)]
            listen.send([command.payload], 1, len(command.payload), sockaddr(command.client))
        elif isinstance(command, ChannelBound):
            self._open_route(command)
        elif isinstance(command, ChannelUnbound):
            self._close_route(command)
        elif isinstance(command, PortFreed):
            self._close_port(command.port)
        elif isinstance(command, SendToPeer):
            port = self._forwarder.ports[len(command.peer.ip), command.port]
            port.send([command.payload], 1, len(command.payload), sockaddr(command.peer))

    def _open_route(self, bound: ChannelBound) -> None:
        family = len(bound.peer.ip)
        port = self._forwarder.ports[family, bound.port]
        client, peer = sockaddr(bound.client), sockaddr(bound.peer)
        hairpin = None
        if self._core.is_own_ip(bound.peer):
            hairpin = (family, bound.peer.port, sockaddr(Address(bound.peer.ip, bound.port)))
        self._forwarder.outward[client, bound.number] = Route(port, peer, hairpin)
        port.routes[peer] = (self._listen[len(bound.client.ip)], client, bound.number)

    def _close_route(self, unbound: ChannelUnbound) -> None:
        port = self._forwarder.ports[len(unbound.peer.ip), unbound.port]
        self._forwarder.outward.pop((sockaddr(unbound.client), unbound.number), None)
        port.routes.pop(sockaddr(unbound.peer), None)

    # Sockets

    def _bind(self, family: int, number: int) -> UdpPort:
        port = UdpPort(family, self._bind_hosts[family], number, self._poller.watch_queue)
        self._poller.add(port)
        return port

    def _open_port(self, number: int, families: tuple[int, ...]) -> bool:
        opened: list[UdpPort] = []
        for family in families:
            if (family, number) in self._forwarder.ports:
                return False
        try:
            for family in families:
                opened.append(self._bind(family, number))
        except OSError as error:
            log.debug("Allocation port is not available port=%d error=%s", number, error)
            for port in opened:
                self._poller.remove(port)
                port.close()
            return False
        for port in opened:
            self._forwarder.ports[port.family, number] = port
        return True

    def _close_port(self, number: int) -> None:
        for family in (4, 16):
            port = self._forwarder.ports.pop((family, number), None)
            if port is not None:
                self._poller.remove(port)
                port.close()


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


def sockaddr(address: Address) -> SockAddr:
    """As the kernel reports it, so that it can be a key."""
    host = str(ipaddress.ip_address(address.ip))
    return (host, address.port) if len(address.ip) == 4 else (host, address.port, 0, 0)


def packed_ip(host: str | None) -> bytes | None:
    """The bytes of an IP."""
    return None if host is None else ipaddress.ip_address(host).packed


def random_source(seed: int | None) -> Callable[[int], bytes]:
    """Unpredictable, unless a test wants otherwise."""
    return secrets.token_bytes if seed is None else random.Random(seed).randbytes
