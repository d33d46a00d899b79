"""The event loop of a tunnel: batches from all ready sources, one budget per source, no starvation.

Each turn takes what the portal, the timer, the TUN device and both UDP sockets have ready, presents it
to the state machine, and writes what came out. With a pump (`carrier.py`) that one reads device and sockets, and
hands over what it cannot decide. Write before read: while the device takes nothing, nothing
is read; while a socket takes nothing, the device is not read, but only for a moment (`lanes.py`). No await
per packet. An idle loop has nothing armed but the state's own next deadline, on a clock that goes on during
suspend. Source: `design.md` §5, `spec/io.md` §1.4, §2.
"""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Callable, Sequence

import structlog
import trio

from fz_core.driver import clock
from fz_core.driver.carrier import Carrier
from fz_core.driver.lanes import Lanes
from fz_core.driver.path_mtu import take_refusals
from fz_core.fastpath import Coalescer, split_super_packet
from fz_core.linux import Alarm, HostError, TunDevice, UdpSocket
from fz_core.packet import DropReason
from fz_core.tunnel import PacketError, TunnelErrors, TunnelRole

TUN_BUDGET = 16
UDP_BUDGET = 16
SHUTDOWN_FLUSH = 1.0
DEADLINE_GRANULARITY = 0.01
SHORTEST_SUSPEND = 1.0
READ, WRITE = select.EPOLLIN, select.EPOLLOUT

log = structlog.get_logger("io")


class Loop:
    """Drives one state machine, and owns the sockets. Commands from elsewhere run inside a turn: `submit`.

    `on_resume` gets the seconds for which the machine was suspended. Without `pump_threads` (1 or 2) every packet
    goes through the state.
    """

    def __init__(
        self,
        state: TunnelRole,
        tun: TunDevice,
        sockets: Sequence[UdpSocket],
        on_turn: Callable[[], None],
        on_errors: Callable[[TunnelErrors], None],
        on_resume: Callable[[float, float], None] = lambda seconds, now: None,
        *,
        pump_threads: int = 0,
        now: Callable[[], float] = clock.now,
        suspended: Callable[[], float] = clock.suspended,
    ) -> None:
        self._state, self._tun, self._lanes = state, tun, Lanes(sockets)
        self._on_turn, self._on_errors, self._on_resume = on_turn, on_errors, on_resume
        self._read_clock, self._read_suspended = now, suspended
        self._commands: deque[Callable[[float], None]] = deque()
        self._coalescer = Coalescer(enabled=tun.offloads)
        self._tun_backlog: deque[bytes] = deque()
        self._stopping = False
        self._now, self._suspended = now(), suspended()
        self._deadline: float | None = None
        self._rings_at: float | None = None
        self._look_again_at = 0.0
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._alarm = Alarm()
        self._poll = select.epoll()
        self._interest: dict[int, int] = {}
        self._carrier = Carrier(state, tun, sockets, threads=pump_threads) if pump_threads else None
        for fd in (self._wakeup, *self._alarm.filenos()):
            self._poll.register(fd, READ)
        self._update_interest()

    @property
    def sockets(self) -> list[UdpSocket]:
        """The data sockets there are, IPv4 first."""
        return self._lanes.sockets

    @property
    def carried(self) -> dict[str, int]:
        """The pump's counters (`docs/fast-path.md`); empty without a pump."""
        return {} if self._carrier is None else self._carrier.counters()

    def submit(self, command: Callable[[float], None]) -> None:
        """Run a mutation of the state in the next turn; it gets the time. From any thread."""
        self._commands.append(command)
        os.eventfd_write(self._wakeup, 1)

    def stop(self) -> None:
        """End after saying goodbye to every peer."""
        self._stopping = True
        os.eventfd_write(self._wakeup, 1)

    def rebind(self, open_sockets: Callable[[], Sequence[UdpSocket]]) -> None:
        """Replace the sockets: the old ones go first, so that their ports are free. Queued datagrams are lost.

        For commands. Without any socket the loop goes on.
        """
        for udp in self._lanes.sockets:
            self._watch(udp.fileno(), 0)
        if self._carrier is not None:
            self._carrier.set_sockets(())
        self._lanes.close()
        self._lanes.adopt(open_sockets())
        if self._carrier is not None:
            self._carrier.set_sockets(self._lanes.sockets)
        self._update_interest()

    async def run(self) -> None:
        """Turn until stopped, then flush goodbyes for at most a second."""
        try:
            if self._carrier is not None:
                self._carrier.start()
            while not self._stopping:
                await self._turn()
            self._end_pump()
            self._state.shutdown(self._tick())
            self._on_turn()
            with trio.move_on_after(SHUTDOWN_FLUSH):
                await self._flush_all()
        finally:
            self.close()

    def close(self) -> None:
        """Free every descriptor but the device's; harmless when repeated."""
        if not self._poll.closed:
            self._end_pump()
            self._poll.close()
            self._alarm.close()
            os.close(self._wakeup)
            self._lanes.close()

    def _end_pump(self) -> None:
        carrier, self._carrier = self._carrier, None
        if carrier is not None:
            self._watch(carrier.fileno(), 0)
            carrier.close()
            carrier.note(self._tick())
            carrier.note_flows()
            log.debug("Fast path ended", **carrier.counters())

    # turns

    async def _turn(self) -> None:
        ready = dict(self._poll.poll(0))
        now = self._tick()
        if not ready or now >= self._look_again_at:
            # The deadline costs a look at every connection, so a busy loop asks for it only now and then.
            self._look(now)
        is_behind = self._carrier is not None and self._carrier.is_behind and not self._lanes.is_blocked
        if not ready and not is_behind and (self._deadline is None or self._deadline > now):
            await self._sleep(now)
            return
        if any(fd in ready for fd in self._alarm.filenos()):
            self._alarm.clear()
            self._rings_at = None
        errors = take_refusals(self._state, self._lanes.sockets, now)
        if self._carrier is not None:
            self._carrier.take_refusals(errors, now)
        if self._wakeup in ready:
            self._run_commands(errors, now)
        if self._deadline is not None and self._deadline <= now:
            self._run_timers(now)
        if self._carrier is not None and (self._carrier.is_behind or self._carrier.fileno() in ready):
            self._carrier.read(errors, now)
        if ready.get(self._tun.fileno(), 0) & ~WRITE:
            self._read_tun(errors, now)
            self._queue_transmits()
            self._lanes.flush(now)
        for udp in self._lanes.sockets:
            if ready.get(udp.fileno(), 0) & ~WRITE:
                self._read_udp(udp, errors, now)
        self._queue_transmits()
        self._queue_packets()
        self._flush(now)
        if self._carrier is not None:
            self._carrier.settle(now, is_flushed=not self._tun_backlog and not self._lanes.is_blocked)
        self._on_turn()
        if errors:
            self._on_errors(TunnelErrors("packets were dropped", errors))
        await trio.lowlevel.checkpoint()

    def _tick(self) -> float:
        """The time, which never goes back."""
        self._now = max(self._now, self._read_clock())
        return self._now

    def _look(self, now: float) -> None:
        """When to turn again if nothing comes, and whether the machine slept."""
        deadline = self._state.poll_timeout()
        self._deadline = None if deadline is None else deadline[0]
        note_at = None if self._carrier is None else self._carrier.poll_timeout()
        if note_at is not None and (self._deadline is None or note_at < self._deadline):
            self._deadline = note_at
        self._look_again_at = now + DEADLINE_GRANULARITY
        suspended = self._read_suspended()
        if suspended - self._suspended >= SHORTEST_SUSPEND:
            self._on_resume(suspended - self._suspended, now)
        self._suspended = suspended

    def _run_timers(self, now: float) -> None:
        """What was carried goes first: it moves the state's deadlines."""
        if self._carrier is not None:
            self._carrier.note(now)
        deadline = self._state.poll_timeout()
        if deadline is not None and deadline[0] <= now:
            self._state.handle_timeout(now)
        self._look_again_at = now

    async def _sleep(self, now: float) -> None:
        ends = [at for at in (self._deadline, self._lanes.patience_ends_at(now)) if at is not None]
        rings_at = min(ends, default=None)
        if rings_at != self._rings_at:
            self._alarm.set(None if rings_at is None else rings_at - now)
            self._rings_at = rings_at
        await trio.lowlevel.wait_readable(self._poll.fileno())

    def _run_commands(self, errors: list[Exception], now: float) -> None:
        os.eventfd_read(self._wakeup)
        for _ in range(len(self._commands)):
            try:
                self._commands.popleft()(now)
            except HostError:
                raise
            except Exception as error:  # one message that makes us stumble must not cost all the others
                errors.append(error)

    # reading

    def _read_tun(self, errors: list[Exception], now: float) -> None:
        handle = self._state.handle_tun_input
        for raw in self._tun.read_batch(TUN_BUDGET):
            packets = split_super_packet(raw, self._state.drops)
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
        poll, append = self._state.poll_transmit, self._lanes.append
        while (transmit := poll()) is not None:
            lost = append(transmit)
            if lost is not None:
                self._state.drops.add(lost)

    def _queue_packets(self) -> None:
        poll, add = self._state.poll_packet, self._coalescer.add
        while (packet := poll()) is not None:
            add(packet)
        self._tun_backlog.extend(self._coalescer.drain())

    def _flush(self, now: float) -> None:
        """Write what the sockets and the device take, and wait for those that are full."""
        self._lanes.flush(now)
        backlog, write = self._tun_backlog, self._tun.write
        while backlog and write(backlog[0]):
            backlog.popleft()
            self._coalescer.enabled = self._may_merge
        self._update_interest()

    @property
    def _may_merge(self) -> bool:
        """Whether the device takes merged packets, as far as anybody has found out."""
        return self._tun.offloads and (self._carrier is None or not self._carrier.refused_merged)

    async def _flush_all(self) -> None:
        """Write everything; cancelled if that takes too long."""
        self._alarm.set(None)
        self._alarm.clear()
        self._poll.unregister(self._wakeup)
        self._queue_transmits()
        self._flush(self._tick())
        while self._tun_backlog or self._lanes.is_blocked:
            for fd in self._interest:
                self._watch(fd, self._interest[fd] & WRITE)
            await trio.lowlevel.wait_readable(self._poll.fileno())
            self._flush(self._tick())

    def _update_interest(self) -> None:
        """What to wait for at the device, the sockets and the pump."""
        is_behind = bool(self._tun_backlog)
        may_read_tun = not is_behind and (
            not self._lanes.is_blocked or self._lanes.patience_ends_at(self._read_clock()) is None
        )
        reads_device, reads_sockets = may_read_tun, not is_behind
        if self._carrier is not None:
            self._watch(self._carrier.fileno(), READ if may_read_tun else 0)
            reads_device = reads_sockets = False
        self._watch(self._tun.fileno(), (READ if reads_device else 0) | (WRITE if is_behind else 0))
        for lane in self._lanes:
            if lane.socket is not None:
                fd = lane.socket.fileno()
                self._watch(fd, (READ if reads_sockets else 0) | (WRITE if lane.is_blocked else 0))

    def _watch(self, fd: int, events: int) -> None:
        """Wait for these; errors count as well, unless there are none to wait for."""
        known = self._interest.get(fd, 0)
        if known == events:
            return
        if known == 0:
            self._poll.register(fd, events)
        elif events:
            self._poll.modify(fd, events)
        else:
            self._poll.unregister(fd)
        self._interest[fd] = events
