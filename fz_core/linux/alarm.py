"""A timer for an epoll set that goes on during suspend, and that tells at once when the machine wakes up.

Two descriptors: a timer on CLOCK_BOOTTIME, and one on CLOCK_REALTIME that never ends but is cancelled by the
kernel (TFD_TIMER_CANCEL_ON_SET) when wall-clock time jumps, as it does on resume. Python has timerfd from
3.13 on only. Source: timerfd_create(2).
"""

from __future__ import annotations

import ctypes
import os
import time

TFD_NONBLOCK, TFD_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET = 1, 2
NEVER = 1 << 40
SHORTEST_NS = 1000  # zero would disarm it

_libc = ctypes.CDLL(None, use_errno=True)


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))


class Alarm:
    """`set`, wait until one of `filenos` is readable, `clear`."""

    def __init__(self) -> None:
        self._spec = _TimerSpec()
        self._timer = _create(time.CLOCK_BOOTTIME)
        self._jumps = _create(time.CLOCK_REALTIME)
        self._settime(self._jumps, TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, NEVER, 0)

    def filenos(self) -> tuple[int, int]:
        """The descriptors to wait for."""
        return self._timer, self._jumps

    def set(self, seconds: float | None) -> None:
        """Ring in so many seconds, suspend included; None: not at all. Replaces what was set."""
        if seconds is None:
            self._settime(self._timer, 0, 0, 0)
            return
        whole, rest = divmod(max(int(seconds * 1e9) + 1, SHORTEST_NS), 1_000_000_000)
        self._settime(self._timer, 0, min(whole, NEVER), rest)

    def clear(self) -> None:
        """Be silent until `set`, or the next jump."""
        for fd in (self._timer, self._jumps):
            try:
                os.read(fd, 8)
            except OSError:  # EAGAIN: not this one; ECANCELED: time has jumped
                pass

    def close(self) -> None:
        """Close both descriptors, once."""
        os.close(self._timer)
        os.close(self._jumps)

    def _settime(self, fd: int, flags: int, seconds: int, nanoseconds: int) -> None:
        self._spec.value.seconds, self._spec.value.nanoseconds = seconds, nanoseconds
        if _libc.timerfd_settime(fd, flags, ctypes.byref(self._spec), None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")


def _create(clock: int) -> int:
    fd: int = _libc.timerfd_create(clock, TFD_NONBLOCK | TFD_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create")
    return fd
