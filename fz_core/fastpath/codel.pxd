# When to tell a sender to slow down: CoDel (RFC 8289) for queues that only a processor can build up.

ctypedef struct Codel:
    double above_since         # since when the delay has been above the target; 0: it is not
    double next_at             # of the next signal, while there is too much
    unsigned int count         # signals since there is too much


cdef extern from "math.h" nogil:
    double sqrt(double)

cdef enum:
    TARGET_US = 1000
    INTERVAL_US = 40000


cdef inline bint codel_signals(Codel *codel, double delay, double now) noexcept nogil:
    """Whether one packet of what is taken from the queue now is to be dropped or marked.

    `delay` is how long it waited, in seconds. Signals come ever faster until the delay was below the target once.
    """
    if delay * 1e6 < TARGET_US:
        codel.above_since = 0
        codel.count = 0
        return False
    if codel.above_since == 0:
        codel.above_since = now
        return False
    if codel.count == 0:
        if (now - codel.above_since) * 1e6 < INTERVAL_US:
            return False
    elif now < codel.next_at:
        return False
    codel.count += 1
    codel.next_at = now + INTERVAL_US * 1e-6 / sqrt(codel.count)
    return True
