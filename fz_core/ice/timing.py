"""How often pairs are checked and when one is given up (spec/connectivity.md section 5.4)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TimingProfile:
    """Gaps double from `initial_rto` to `max_rto` (seconds); `max_retrans` unanswered checks end a pair."""

    name: str
    max_retrans: int
    initial_rto: float
    max_rto: float

    @property
    def is_idle(self) -> bool:
        """Whether this is for connections without traffic."""
        return self.initial_rto >= self.max_rto

    def delay_after(self, attempts: int) -> float:
        """Seconds from attempt number `attempts` (1 is the first) to the next."""
        doublings = min(max(attempts - 1, 0), self.max_retrans)
        return min(self.initial_rto * 2.0**doublings, self.max_rto)

    @property
    def timeout(self) -> float:
        """Seconds from the first unanswered check on a settled pair to its failure."""
        return self.max_rto + sum(self.delay_after(n) for n in range(2, self.max_retrans + 1))


CLIENT_DEFAULT = TimingProfile("client_default", 12, 0.25, 1.5)
CLIENT_IDLE = TimingProfile("client_idle", 4, 25.0, 25.0)
SERVER_DEFAULT = TimingProfile("server_default", 45, 0.25, 15.0)
SERVER_IDLE = TimingProfile("server_idle", 40, 25.0, 25.0)
