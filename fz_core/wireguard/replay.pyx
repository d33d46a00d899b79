# cython: auto_pickle=False
"""The anti-replay window (WireGuard paper section 5.4.6, RFC 6479): the last 8192 counters.

The work is done by the inline functions of `replay.pxd`; this is their Python face, for tests and tools.
"""

cimport cython
from libc.stdint cimport uint64_t
from libc.string cimport memset


@cython.final
cdef class Window:
    """A replay window on its own."""

    cdef ReplayWindow window

    def __cinit__(self):
        memset(&self.window, 0, sizeof(self.window))

    def accept(self, uint64_t counter):
        """Whether the counter is new and inside the window; it is then marked."""
        if not replay_is_fresh(&self.window, counter):
            return False
        replay_mark(&self.window, counter)
        return True
