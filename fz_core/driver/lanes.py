"""Datagrams on their way out: a queue and a socket for each IP family, so that neither waits for the other.

Not here: batching (`fastpath/gso`), system calls (`linux/udp`). Source: `spec/io.md` §1.4, §3.4, §3.5.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fz_core.fastpath import GsoQueue
from fz_core.linux import UdpSocket
from fz_core.packet import DropReason, Transmit

MAX_BATCHES = 256
CROWDED_BATCHES = 128
PATIENCE = 0.1


class Lane:
    """One family. What the socket does not take waits in order; what the queue does not take is lost."""

    def __init__(self, is_ipv4: bool) -> None:
        self.is_ipv4 = is_ipv4
        self.socket: UdpSocket | None = None
        self.queue = GsoQueue(MAX_BATCHES)
        self._blocked_at: float | None = None

    def __len__(self) -> int:
        """Batches that wait."""
        return len(self.queue)

    @property
    def is_blocked(self) -> bool:
        """Whether the socket was full when last tried."""
        return self._blocked_at is not None

    def patience_ends_at(self) -> float | None:
        """Until when the device should not be read, because this lane has more than enough; None: it may be.

        A socket that takes nothing for longer must not stall the other family: from then on, packets that
        find the queue full are lost.
        """
        if self._blocked_at is None or len(self.queue) < CROWDED_BATCHES:
            return None
        return self._blocked_at + PATIENCE

    def flush(self, now: float) -> None:
        """Send until the queue is empty or the socket is full."""
        udp, queue = self.socket, self.queue
        if udp is None:
            return
        for buffer, segment, remote, local, ecn in queue.drain():
            sent = udp.send_batch(buffer, segment, remote, local, ecn)
            if sent is not None:
                queue.consume(sent)
                if sent or self._blocked_at is None:
                    self._blocked_at = now
                return
        self._blocked_at = None

    def replace(self, udp: UdpSocket | None) -> None:
        """Another socket, or none; what waited for the old one belongs to a network that is gone."""
        if self.socket is not None:
            self.socket.close()
        self.socket = udp
        self.queue.clear()
        self._blocked_at = None


class Lanes:
    """Both families."""

    def __init__(self, sockets: Iterable[UdpSocket]) -> None:
        self._v4, self._v6 = Lane(True), Lane(False)
        self.adopt(sockets)

    def __iter__(self) -> Iterator[Lane]:
        return iter((self._v4, self._v6))

    @property
    def sockets(self) -> list[UdpSocket]:
        """Those there are, IPv4 first."""
        return [lane.socket for lane in self if lane.socket is not None]

    @property
    def is_blocked(self) -> bool:
        """Whether a socket is full."""
        return self._v4.is_blocked or self._v6.is_blocked

    def patience_ends_at(self, now: float) -> float | None:
        """Until when the device should not be read; None: it may be."""
        ends = [at for at in (self._v4.patience_ends_at(), self._v6.patience_ends_at()) if at is not None and at > now]
        return min(ends, default=None)

    def append(self, transmit: Transmit) -> DropReason | None:
        """Queue a datagram for its family, or say why not."""
        lane = self._v4 if len(transmit[1][0]) == 4 else self._v6
        if lane.socket is None:
            return DropReason.NOT_CONNECTED
        return None if lane.queue.append_transmit(transmit) else DropReason.BUFFER_FULL

    def flush(self, now: float) -> None:
        """Send what the sockets take."""
        for lane in self:
            if len(lane):
                lane.flush(now)

    def close(self) -> None:
        """Close both sockets, forget what waits."""
        for lane in self:
            lane.replace(None)

    def adopt(self, sockets: Iterable[UdpSocket]) -> None:
        """Take over new sockets, at most one for each family, after `close`."""
        for udp in sockets:
            (self._v4 if udp.is_ipv4 else self._v6).replace(udp)
