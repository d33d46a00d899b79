# What a pump's thread waits on: epoll, and an eventfd by which the driver gets its attention.

from libc.stdint cimport uint32_t

cdef enum:
    # What may be ready. It is what epoll gives back, so that nobody asks whose a descriptor is.
    FROM_TUN = 1
    FROM_V4 = 2
    FROM_V6 = 4
    EVERYTHING = 7
    KICKED = 8

# One for each thread: who reads the eventfd takes the attention from all others.
ctypedef struct Poll:
    int fd                     # -1: none
    int kick

# How many events there were lately, in one thread.
ctypedef struct Density:
    double began_at            # of the millisecond that is counted
    int count
    bint was_dense

cdef int poll_open(Poll *poll) noexcept nogil
cdef void poll_close(Poll *poll) noexcept nogil

# `operation` is epoll's, `what` of the above is told when it is ready. Harmless where it is not watched (EPOLL_CTL_DEL).
cdef void poll_watch(Poll *poll, int operation, int fd, uint32_t events, uint32_t what) noexcept nogil

# What is ready, EVERYTHING when kicked or after the timeout (-1 for none).
cdef int poll_wait(Poll *poll, int timeout_ms) noexcept nogil

# Whether so much comes one by one that waiting a moment for more costs less than it gains.
cdef bint is_dense(Density *density, int done, double now) noexcept nogil
