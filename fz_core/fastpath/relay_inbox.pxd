# Receive buffers of a relay.

from libc.stdint cimport uint8_t, uint64_t

from fz_core.fastpath.system cimport iovec, mmsghdr
from fz_core.fastpath.relay_address cimport SocketAddress

cdef enum:
    MESSAGES = 32              # per system call, each up to 64 datagrams of one source
    BUFFER_SIZE = 65536
    CONTROL_WORDS = 8

cdef struct Inbox:
    mmsghdr messages[32]
    iovec vectors[32]
    SocketAddress sources[32]
    uint64_t control[32][8]
    uint8_t *buffers

cdef Inbox *inbox_new() noexcept nogil
cdef void inbox_free(Inbox *inbox) noexcept nogil
cdef int inbox_receive(Inbox *inbox, int fd, int limit) noexcept nogil
cdef SocketAddress *inbox_source(Inbox *inbox, int i) noexcept nogil
cdef size_t inbox_segment(Inbox *inbox, int i) noexcept nogil
