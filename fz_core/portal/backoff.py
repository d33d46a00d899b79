"""When to try the portal again (`spec/portal-protocol.md` §3).

A strategy is made at the first failure, so its budget runs from there, and thrown away on success.
The budget is the sum of the delays handed out.
"""

from __future__ import annotations

from collections.abc import Callable


class Backoff:
    """Delays until the budget (seconds; None: for ever) is spent."""

    def __init__(
        self, first: float, factor: float, cap: float, budget: float | None, jitter: Callable[[], float]
    ) -> None:
        self._interval, self._factor, self._cap = first, factor, cap
        self._budget, self._spent, self._jitter = budget, 0.0, jitter

    @classmethod
    def initial(cls) -> Backoff:
        """Before the first join ever: every second, 15 s in all."""
        return cls(1.0, 1.0, 1.0, 15.0, lambda: 0.0)

    @classmethod
    def reconnect(cls, budget: float | None, jitter: Callable[[], float]) -> Backoff:
        """After it: 0.5 s growing to 60 s, each plus 0 to 100 % (`jitter` gives 0 to 1)."""
        return cls(0.5, 1.5, 60.0, budget, jitter)

    @property
    def budget(self) -> float | None:
        """Seconds of delay this strategy hands out in all."""
        return self._budget

    def next_delay(self) -> float | None:
        """Seconds to wait, or None when the budget is spent."""
        delay = self._interval * (1.0 + self._jitter())
        self._interval = min(self._interval * self._factor, self._cap)
        if self._budget is not None and self._spent + delay > self._budget:
            return None
        self._spent += delay
        return delay
