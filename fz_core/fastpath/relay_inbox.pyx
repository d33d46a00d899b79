"""Receiving for a relay: `recvmmsg` with UDP_GRO, up to 32 × 64 datagrams per system call, from any of its sockets."""

from libc.errno cimport EINTR, errno
from libc.stdint cimport int32_t, uint8_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from fz_core.fastpath.system cimport (
    AF_INET,
    CMSG_DATA,
    CMSG_FIRSTHDR,
    CMSG_NXTHDR,
    MSG_DONTWAIT,
    SOL_UDP,
    UDP_GRO,
    cmsghdr,
    msghdr,
    recvmmsg,
    sockaddr_in6,
)


cdef Inbox *inbox_new() noexcept nogil:
    """NULL without memory. Only pages that datagrams have reached take any: 2 MiB at most."""
    cdef Inbox *inbox = <Inbox *>calloc(1, sizeof(Inbox))
    if inbox != NULL:
        inbox.buffers = <uint8_t *>malloc(MESSAGES * BUFFER_SIZE)
        if inbox.buffers == NULL:
            free(inbox)
            inbox = NULL
    return inbox


cdef void inbox_free(Inbox *inbox) noexcept nogil:
    if inbox != NULL:
        free(inbox.buffers)
    free(inbox)


cdef int inbox_receive(Inbox *inbox, int fd, int limit) noexcept nogil:
    """The number of messages, `limit` (1 to 32) at most; nothing is left if there are fewer."""
    cdef int i, count
    cdef msghdr *header
    for i in range(limit):
        inbox.vectors[i].iov_base = inbox.buffers + <Py_ssize_t>i * BUFFER_SIZE
        inbox.vectors[i].iov_len = BUFFER_SIZE
        header = &inbox.messages[i].msg_hdr
        header.msg_name = &inbox.sources[i]
        header.msg_namelen = sizeof(sockaddr_in6)
        header.msg_iov = &inbox.vectors[i]
        header.msg_iovlen = 1
        header.msg_control = inbox.control[i]
        header.msg_controllen = CONTROL_WORDS * 8
        header.msg_flags = 0
    count = recvmmsg(fd, inbox.messages, <unsigned int>limit, MSG_DONTWAIT, NULL)
    while count < 0 and errno == EINTR:
        count = recvmmsg(fd, inbox.messages, <unsigned int>limit, MSG_DONTWAIT, NULL)
    return max(count, 0)


cdef SocketAddress *inbox_source(Inbox *inbox, int i) noexcept nogil:
    cdef SocketAddress *source = &inbox.sources[i]
    if source.v4.sin_family == AF_INET:  # the kernel leaves what an IPv6 source put behind it
        source.words[2] = source.words[3] = 0
    return source


cdef size_t inbox_segment(Inbox *inbox, int i) noexcept nogil:
    """Bytes of each datagram in a message, at least 1; the last may be shorter."""
    cdef msghdr *header = &inbox.messages[i].msg_hdr
    cdef cmsghdr *item = CMSG_FIRSTHDR(header)
    cdef int32_t number
    while item != NULL:
        if item.cmsg_level == SOL_UDP and item.cmsg_type == UDP_GRO:
            memcpy(&number, CMSG_DATA(item), 4)
            if number > 0:
                return <size_t>number
        item = CMSG_NXTHDR(header, item)
    return max(<size_t>inbox.messages[i].msg_len, <size_t>1)
