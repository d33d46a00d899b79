"""What a pump's thread waits on."""

from libc.stdint cimport uint32_t
from libc.string cimport memset
from posix.unistd cimport close

from fz_core.fastpath.system cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLLIN, epoll_create1, epoll_ctl, epoll_event,
    epoll_wait, eventfd, fz_unsignal,
)

cdef enum:
    EVENTS = 4
    DENSE = 32                 # of a millisecond

# A pause costs a stream of single packets nothing, and a conversation, which never has so many, has none.
cdef double DENSITY_TIME = 0.001


cdef int poll_open(Poll *poll) noexcept nogil:
    poll.kick = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
    poll.fd = epoll_create1(EPOLL_CLOEXEC)
    if poll.kick < 0 or poll.fd < 0:
        return -1
    poll_watch(poll, EPOLL_CTL_ADD, poll.kick, EPOLLIN, KICKED)
    return 0


cdef void poll_close(Poll *poll) noexcept nogil:
    if poll.kick >= 0:
        close(poll.kick)
    if poll.fd >= 0:
        close(poll.fd)
    poll.kick = poll.fd = -1


cdef void poll_watch(Poll *poll, int operation, int fd, uint32_t events, uint32_t what) noexcept nogil:
    cdef epoll_event event
    memset(&event, 0, sizeof(event))
    event.events = events
    event.data.u32 = what
    epoll_ctl(poll.fd, operation, fd, &event)


cdef int poll_wait(Poll *poll, int timeout_ms) noexcept nogil:
    cdef epoll_event events[EVENTS]
    cdef int i, ready = 0
    cdef int count = epoll_wait(poll.fd, events, EVENTS, timeout_ms)
    for i in range(count):
        ready |= <int>events[i].data.u32
    if ready & KICKED:
        fz_unsignal(poll.kick)
        return EVERYTHING
    return ready if count else EVERYTHING


cdef bint is_dense(Density *density, int done, double now) noexcept nogil:
    if now - density.began_at > DENSITY_TIME:
        density.was_dense = density.count >= DENSE and now - density.began_at < 2 * DENSITY_TIME
        density.began_at, density.count = now, 0
    density.count += done
    return density.was_dense
