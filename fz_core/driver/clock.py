"""The one clock of the drivers: monotonic seconds that go on during suspend."""

from __future__ import annotations

import time

_clock_gettime, _BOOTTIME = time.clock_gettime, time.CLOCK_BOOTTIME


def now() -> float:
    """Seconds since boot, suspend included."""
    return _clock_gettime(_BOOTTIME)


def unix_epoch() -> float:
    """Unix time when the clock stood at zero."""
    return time.time() - now()
