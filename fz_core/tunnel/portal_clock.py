"""The portal's unix time on our monotonic clock (`spec/tunnel.md` §7)."""

from __future__ import annotations

OVERFLOWING_EXPIRY = 86_400.0
LAST_UNIX_TIME = 253_402_300_799  # the end of the year 9999


class PortalClock:
    """`unix_epoch` is the unix time at monotonic 0, `started_at` our start in monotonic seconds."""

    def __init__(self, unix_epoch: float, started_at: float) -> None:
        self._unix_epoch, self._started_at = unix_epoch, started_at

    def monotonic(self, unix_time: float | None, now: float) -> float | None:
        """None stays None; before our start counts as passed, beyond reason as a day from now."""
        if unix_time is None:
            return None
        if unix_time > LAST_UNIX_TIME:
            return now + OVERFLOWING_EXPIRY
        return max(unix_time - self._unix_epoch, self._started_at)
