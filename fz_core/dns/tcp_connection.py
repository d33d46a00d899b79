"""One TCP connection of a server on a link that neither reorders nor, usually, loses (RFC 9293).

No options but MSS, no window scaling, no congestion control: the peer is this host's own kernel. Segments out of
order are refused and lost ones repeated by a timer. Not here: ports, the handshake (`stub_tcp.py`).
"""

from __future__ import annotations

from typing import NamedTuple

FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
MAX_WINDOW = 65_535
FIRST_RTO = 0.3
MAX_RETRIES = 6  # 0.3 s, doubled each time: given up after 38 s
MODULUS = 1 << 32


class Segment(NamedTuple):
    """What of a TCP segment matters here, in either direction."""

    seq: int
    ack: int
    flags: int
    window: int
    payload: bytes = b""

    @property
    def sequence_length(self) -> int:
        """Sequence numbers it takes: bytes, SYN and FIN."""
        return len(self.payload) + bool(self.flags & SYN) + bool(self.flags & FIN)


class Connection:
    """An established connection. Bytes gather in `received`, at most `capacity`; segments to send in `outgoing`."""

    def __init__(self, first: Segment, mss: int, capacity: int, now: float) -> None:
        self._mss, self._capacity = mss, capacity
        self._receive_next = first.seq
        self._unacked = self._send_next = self._send_max = first.ack
        self._window = first.window
        self._unsent_from_unacked = bytearray()
        self._closing = self._fin_sent = self._owes_ack = False
        self._advertised = MAX_WINDOW
        self._rto = FIRST_RTO
        self._retries = 0
        self._repeat_at: float | None = None
        self.received = bytearray()
        self.outgoing: list[Segment] = []
        self.peer_closed = self.is_dead = False
        self.progress_at = now

    @property
    def unsent(self) -> int:
        """Bytes the peer has not confirmed."""
        return len(self._unsent_from_unacked)

    @property
    def is_closing(self) -> bool:
        """Whether `close` was called."""
        return self._closing

    @property
    def is_over(self) -> bool:
        """Reset, given up, or closed by both sides with everything confirmed."""
        return self.is_dead or (self._closing and self.peer_closed and self._is_fin_acked)

    def handle_segment(self, segment: Segment, now: float) -> None:
        """Take a segment of this connection, in any order and with any content."""
        ahead = _difference(segment.seq, self._receive_next)
        if segment.flags & RST:
            self.is_dead = self.is_dead or 0 <= ahead <= MAX_WINDOW
            return
        if not segment.flags & ACK:
            return
        if not self._handle_ack(segment, now):
            self._owes_ack = True
        else:
            self._handle_data(segment, -ahead, now)
        self._send(now)

    def write(self, data: bytes, now: float) -> None:
        """Send bytes."""
        self._unsent_from_unacked += data
        self.progress_at = now
        self._send(now)

    def consume(self, size: int, now: float) -> bytes:
        """Take bytes out of `received`; the peer is told when that makes room it waits for."""
        taken = bytes(self.received[:size])
        del self.received[:size]
        if self._advertised < self._mss <= self._room:
            self._owes_ack = True
            self._send(now)
        return taken

    def close(self, now: float) -> None:
        """Send FIN after everything written."""
        if not self._closing:
            self._closing = True
            self.progress_at = now
            self._send(now)

    def reset(self) -> None:
        """End it at once and tell the peer."""
        if not self.is_dead:
            self.is_dead = True
            self.outgoing.append(Segment(self._send_next, self._receive_next, RST | ACK, 0))

    def handle_timeout(self, now: float) -> None:
        """Repeat what was not confirmed in time, or ask a closed window for its state."""
        if self._repeat_at is None or now < self._repeat_at or self.is_dead:
            return
        if self._retries == MAX_RETRIES:
            self.reset()
            return
        self._retries += 1
        self._rto *= 2
        self._send_next = self._unacked
        self._send_segment(max(1, min(self._window, self._mss)))
        self._repeat_at = now + self._rto

    def poll_timeout(self) -> float | None:
        """When `handle_timeout` is next due."""
        return None if self.is_dead else self._repeat_at

    def _handle_ack(self, segment: Segment, now: float) -> bool:
        """Confirmations and the peer's window. False: it confirms what was never sent."""
        confirmed = _difference(segment.ack, self._unacked)
        if confirmed > _difference(self._send_max, self._unacked):
            return False
        if confirmed < 0:
            return True
        self._window = segment.window
        if confirmed:
            del self._unsent_from_unacked[:confirmed]  # one number more than bytes where it confirms our FIN
            self._unacked = segment.ack
            if _difference(self._send_next, self._unacked) < 0:
                self._send_next = self._unacked
            self._rto, self._retries, self._repeat_at = FIRST_RTO, 0, None
            self.progress_at = now
        return True

    def _handle_data(self, segment: Segment, behind: int, now: float) -> None:
        """Payload and FIN; `behind` is how much of it was received before, negative if there is a gap."""
        if segment.sequence_length == 0:
            self._owes_ack = self._owes_ack or behind != 0  # a probe, or an old segment
            return
        self._owes_ack = True
        if behind < 0 or behind > len(segment.payload) or self.peer_closed:
            return
        new = segment.payload[behind:]
        accepted = new[: self._room]
        self.received += accepted
        self._receive_next = (self._receive_next + len(accepted)) % MODULUS
        if accepted:
            self.progress_at = now
        if segment.flags & FIN and len(accepted) == len(new):
            self._receive_next = (self._receive_next + 1) % MODULUS
            self.peer_closed = True

    def _send(self, now: float) -> None:
        """Send what the peer's window allows, and a bare acknowledgement where that is owed besides."""
        if self.is_dead:
            return
        while self._send_segment(self._allowance()):
            pass
        if self._owes_ack:
            self._emit(ACK, self._send_next)
        is_waiting = self._send_max != self._unacked or self._unsent_from_unacked
        self._repeat_at = (self._repeat_at or now + self._rto) if is_waiting else None

    def _allowance(self) -> int:
        """Bytes that may be sent in one segment. No dribs: a full one, the last one, or the only one under way."""
        in_flight = _difference(self._send_next, self._unacked)
        allowed = min(self._mss, self._window - in_flight)
        is_drib = allowed < min(self._mss, self.unsent - in_flight) and in_flight > 0
        return 0 if is_drib else max(0, allowed)

    def _send_segment(self, allowed: int) -> bool:
        start = _difference(self._send_next, self._unacked)
        payload = bytes(self._unsent_from_unacked[start : start + allowed])
        is_last = start + len(payload) == self.unsent
        fin = FIN if self._closing and is_last and not self._is_fin_acked else 0
        if start > self.unsent or not (payload or fin):
            return False
        self._emit(ACK | fin | (PSH if payload and is_last else 0), self._send_next, payload)
        self._fin_sent = self._fin_sent or bool(fin)
        self._send_next = (self._send_next + len(payload) + fin) % MODULUS
        if _difference(self._send_next, self._send_max) > 0:
            self._send_max = self._send_next
        return True

    def _emit(self, flags: int, seq: int, payload: bytes = b"") -> None:
        self._owes_ack = False
        self._advertised = self._room
        self.outgoing.append(Segment(seq, self._receive_next, flags, self._advertised, payload))

    @property
    def _room(self) -> int:
        return min(MAX_WINDOW, self._capacity - len(self.received))

    @property
    def _is_fin_acked(self) -> bool:
        return self._fin_sent and self._unacked == self._send_max


def _difference(a: int, b: int) -> int:
    """`a - b` of sequence numbers, which wrap around: negative where a is the earlier."""
    return (a - b + (MODULUS >> 1)) % MODULUS - (MODULUS >> 1)
