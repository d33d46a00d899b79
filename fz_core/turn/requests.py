"""Requests in flight to a relay: when each is repeated, when it is given up.

Schedule (spec/connectivity.md section 3.4): after 1 s, then each gap 1.5 times the last, for 8 s in all. Once the
relay's round-trip time is known the first gap is three of those, if that is shorter: a lost datagram then costs no
second. A proactive refresh is sent once and given up after 1 s.
"""

from __future__ import annotations

from fz_core.packet import Address

REQUEST_TIMEOUT = 1.0
MIN_TIMEOUT = 0.2
ROUND_TRIPS = 3
MULTIPLIER = 1.5
MAX_ELAPSED = 8.0
LAST_DEADLINE = 8.125  # where the gaps from 1 s end
# A relay that answers every signed request with a new challenge must not keep us busy for ever.
MAX_CHALLENGES = 5


class Backoff:
    """The clock of one request, its repetitions included."""

    def __init__(self, now: float, max_elapsed: float = MAX_ELAPSED, rtt: float | None = None) -> None:
        first = REQUEST_TIMEOUT if rtt is None else min(max(ROUND_TRIPS * rtt, MIN_TIMEOUT), REQUEST_TIMEOUT)
        self.started_at = now
        self.due_at: float = now + first
        self._interval = first
        self._max_elapsed = max_elapsed

    def is_exhausted(self, now: float) -> bool:
        """Whether nothing is to be sent any more."""
        return now - self.started_at >= self._max_elapsed

    def advance(self, now: float) -> None:
        """Count one repetition."""
        self._interval *= MULTIPLIER
        self.due_at = min(now + self._interval, max(self.started_at + LAST_DEADLINE, now))


class Request:
    """One question to the relay, under the transaction id it was last sent with."""

    def __init__(
        self, method: int, attributes: list[tuple[int, bytes]], destination: Address, backoff: Backoff
    ) -> None:
        self.method = method
        self.attributes = attributes
        self.destination = destination
        self.backoff = backoff
        self.transaction_id = b""
        self.datagram = b""
        self.had_nonce = False
        self.challenges = 0
        self.unsigned_challenge_used = False
        self.peer: Address | None = None
        self.channel: int | None = None
        self.is_delete = False


class Requests:
    """All requests in flight, by transaction id."""

    def __init__(self) -> None:
        self._by_id: dict[bytes, Request] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, request: Request) -> None:
        """Remember under the request's transaction id."""
        self._by_id[request.transaction_id] = request

    def get(self, transaction_id: bytes) -> Request | None:
        """The request of that id, which stays in flight."""
        return self._by_id.get(transaction_id)

    def remove(self, request: Request) -> None:
        """Answered, or about to be sent with a new id."""
        self._by_id.pop(request.transaction_id, None)

    def clear(self) -> None:
        """Forget all."""
        self._by_id.clear()

    def has(self, method: int) -> bool:
        """Whether one of that method is in flight."""
        return any(request.method == method for request in self._by_id.values())

    def has_to(self, method: int, destination: Address) -> bool:
        """Whether one of that method to that address is in flight."""
        return any(r.method == method and r.destination == destination for r in self._by_id.values())

    def due(self, now: float) -> list[Request]:
        """Those to repeat or to give up now."""
        return [request for request in self._by_id.values() if request.backoff.due_at <= now]

    def next_at(self) -> float | None:
        """The earliest deadline."""
        return min((request.backoff.due_at for request in self._by_id.values()), default=None)
