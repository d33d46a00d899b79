"""The event loop of a tunnel: batches from all ready sources, one budget per source, no starvation.

Each turn takes what the portal, the timer, the TUN device and both UDP sockets have ready, presents it
to the state machine, and writes what came out. Write before read: while output cannot be flushed,
nothing is read. No await per packet. Source: `design.md` §5, `spec/io.md` §1.4, §2.
"""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Callable, Sequence

import trio

from fz_core.driver import clock
from fz_core.fastpath import Coalescer, GsoQueue, split_super_packet
from fz_core.linux import TunDevice, UdpSocket
from fz_core.packet import Address, DropReason
from fz_core.tunnel import PacketError, TunnelErrors, TunnelRole

TUN_BUDGET = 16
UDP_BUDGET = 16
SHUTDOWN_FLUSH = 1.0
MAX_SLEEP = 3600.0
DEADLINE_GRANULARITY = 0.01
MAX_BATCHES = 256


class Loop:
    """Drives one state machine. Commands from other tasks go through `submit` and run inside a turn."""

    def __init__(
        self,
        state: TunnelRole,
        tun: TunDevice,
        sockets: Sequence[UdpSocket],
        on_turn: Callable[[], None],
        on_errors: Callable[[TunnelErrors], None],
    ) -> None:
        self._state, self._tun, self._sockets = state, tun, tuple(sockets)
        self._on_turn, self._on_errors = on_turn, on_errors
        self._commands: deque[Callable[[float], None]] = deque()
        self._gso = GsoQueue(MAX_BATCHES)
        self._coalescer = Coalescer(enabled=tun.offloads)
        self._tun_backlog: deque[bytes] = deque()
        self._stopping = False
        self._deadline = self._look_again_at = 0.0
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.epoll()
        self._by_fd = {s.fileno(): s for s in self._sockets}
        for fd in (self._wakeup, tun.fileno(), *self._by_fd):
            self._poll.register(fd, select.EPOLLIN)

    def submit(self, command: Callable[[float], None]) -> None:
        """Run a mutation of the state in the next turn; it gets the time."""
        self._commands.append(command)
        os.eventfd_write(self._wakeup, 1)

    def stop(self) -> None:
        """End after saying goodbye to every peer."""
        self._stopping = True
        os.eventfd_write(self._wakeup, 1)

    async def run(self) -> None:
        """Turn until stopped, then flush goodbyes for at most a second."""
        try:
            while not self._stopping:
                await self._turn()
            self._state.shutdown(clock.now())
            self._on_turn()
            with trio.move_on_after(SHUTDOWN_FLUSH):
                self._queue_transmits()
                await self._flush()
        finally:
            self._poll.close()
            os.close(self._wakeup)

    async def _turn(self) -> None:
        await self._flush()
        ready = self._poll.poll(0)
        now = clock.now()
        if not ready or now >= self._look_again_at:
            # The deadline costs a look at every connection, so a busy loop asks for it only now and then.
            deadline = self._state.poll_timeout()
            self._deadline = MAX_SLEEP + now if deadline is None else deadline[0]
            self._look_again_at = now + DEADLINE_GRANULARITY
        if not ready and self._deadline > now:
            await self._sleep(self._deadline - now)
            return
        errors: list[Exception] = [e for udp in self._sockets for e in _errors_of(udp)]
        self._run_commands(errors, now)
        if self._deadline <= now:
            self._state.handle_timeout(now)
            self._look_again_at = now
        ready_fds = {fd for fd, _ in ready}
        if self._tun.fileno() in ready_fds:
            self._read_tun(errors, now)
            self._queue_transmits()
            await self._flush_udp()
        for fd, udp in self._by_fd.items():
            if fd in ready_fds:
                self._read_udp(udp, errors, now)
        self._queue_transmits()
        self._queue_packets()
        self._on_turn()
        if errors:
            self._on_errors(TunnelErrors("packets were dropped", errors))
        await trio.lowlevel.checkpoint()

    async def _sleep(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await trio.lowlevel.wait_readable(self._poll.fileno())

    def _run_commands(self, errors: list[Exception], now: float) -> None:
        try:
            os.eventfd_read(self._wakeup)
        except BlockingIOError:
            return
        for _ in range(len(self._commands)):
            try:
                self._commands.popleft()(now)
            except Exception as error:  # one message that makes us stumble must not cost all the others
                errors.append(error)

    # reading

    def _read_tun(self, errors: list[Exception], now: float) -> None:
        handle = self._state.handle_tun_input
        for raw in self._tun.read_batch(TUN_BUDGET):
            packets = split_super_packet(raw)
            if isinstance(packets, DropReason):
                self._state.drops.add(packets)
                errors.append(PacketError(packets, "tun", None))
                continue
            for packet in packets:
                error = handle(packet, now)
                if error is not None:
                    errors.append(error)

    def _read_udp(self, udp: UdpSocket, errors: list[Exception], now: float) -> None:
        handle = self._state.handle_network_input
        for local, remote, ecn, data, segment in udp.recv_batch(UDP_BUDGET):
            if len(data) <= segment:
                error = handle(local, remote, data, ecn, now)
                if error is not None:
                    errors.append(error)
                continue
            for start in range(0, len(data), segment):
                error = handle(local, remote, data[start : start + segment], ecn, now)
                if error is not None:
                    errors.append(error)

    # writing

    def _queue_transmits(self) -> None:
        poll, append = self._state.poll_transmit, self._gso.append_transmit
        while (transmit := poll()) is not None:
            if not append(transmit):
                self._state.drops.add(DropReason.BUFFER_FULL)

    def _queue_packets(self) -> None:
        poll, add = self._state.poll_packet, self._coalescer.add
        while (packet := poll()) is not None:
            add(packet)
        self._tun_backlog.extend(self._coalescer.drain())

    async def _flush(self) -> None:
        await self._flush_udp()
        while self._tun_backlog:
            if self._tun.write(self._tun_backlog[0]):
                self._tun_backlog.popleft()
                self._coalescer.enabled = self._tun.offloads
            else:
                await trio.lowlevel.wait_writable(self._tun.fileno())

    async def _flush_udp(self) -> None:
        for buffer, segment, remote, local, ecn in self._gso.drain():
            udp = self._socket_for(remote)
            if udp is not None:
                sent = udp.send_batch(buffer, segment, remote, local, ecn)
                while sent is not None and sent < len(buffer):
                    await trio.lowlevel.wait_writable(udp.fileno())
                    rest = memoryview(buffer)[sent:]
                    more = udp.send_batch(rest, segment, remote, local, ecn)
                    sent = None if more is None else sent + more

    def _socket_for(self, remote: Address) -> UdpSocket | None:
        for udp in self._sockets:
            if udp.is_ipv4 == (len(remote.ip) == 4):
                return udp
        self._state.drops.add(DropReason.NOT_CONNECTED)
        return None


def _errors_of(udp: UdpSocket) -> list[OSError]:
    """What the kernel refused to send or receive; those datagrams are lost, the socket goes on."""
    return [OSError(error.errno, str(error)) for error in udp.take_errors()]
