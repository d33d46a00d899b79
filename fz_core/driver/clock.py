"""The one clock of the drivers: monotonic seconds that go on during suspend."""

from __future__ import annotations

import time

_clock_gettime, _BOOTTIME, _MONOTONIC = time.clock_gettime, time.CLOCK_BOOTTIME, time.CLOCK_MONOTONIC


def now() -> float:
    """Seconds since boot, suspend included."""
    return _clock_gettime(_BOOTTIME)


def suspended() -> float:
    """Seconds since boot that the machine was suspended for, to within microseconds."""
    return _clock_gettime(_BOOTTIME) - _clock_gettime(_MONOTONIC)


def unix_epoch() -> float:
    """Unix time when the clock stood at zero."""
    return time.time() - now()
