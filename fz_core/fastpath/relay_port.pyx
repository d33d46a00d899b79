# cython: cdivision=True
"""Sending for a relay: many datagrams per system call, and a bounded queue for what must wait.

A destination that refuses segments (no checksum offload, a path narrower than a segment) gets single datagrams from
then on. Not here: receiving and forwarding (`relay_path`). Source: spec/relay.md section 9.
"""

from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, EMSGSIZE, ENOBUFS, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from fz_core.fastpath.system cimport (
    AF_INET,
    CMSG_DATA,
    CMSG_LEN,
    CMSG_SPACE,
    EPOLL_CTL_MOD,
    EPOLLIN,
    EPOLLOUT,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SOL_UDP,
    UDP_SEGMENT,
    cmsghdr,
    epoll_ctl,
    epoll_event,
    iovec,
    msghdr,
    sendmsg,
    sockaddr_in,
    sockaddr_in6,
)
from fz_core.fastpath.relay_address cimport SocketAddress


cdef bint burst_has_room(const Burst *burst, size_t size) noexcept nogil:
    """Whether one more datagram of `size` bytes fits into the same system call. An empty one goes alone."""
    return (
        not burst.is_closed
        and 0 < size <= burst.segment
        and burst.count < MAX_SEGMENTS
        and burst.bytes + size <= MAX_DATAGRAM
    )


cdef void burst_send(Burst *burst) noexcept nogil:
    """What the kernel does not take at once waits in order; beyond the bounds it is dropped."""
    cdef int error
    if burst.port.first != NULL:
        enqueue(burst, 0)
        return
    if burst.count > 1 and not burst.is_plain[0]:
        error = send_vectors(
            burst.port.fd, burst.to, burst.vectors, <size_t>(burst.count * burst.parts), burst.segment
        )
        if error == 0:
            return
        if is_blocked(error):
            enqueue(burst, 0)
            return
        if not is_of_segments(error):
            burst.port.traffic.refused += <uint64_t>burst.count
            return
    send_singly(burst)


cdef void port_flush(Port *port) noexcept nogil:
    """Send what waits, as far as the kernel takes it."""
    cdef Pending *pending
    while port.first != NULL:
        pending = port.first
        if not send_pending(port, pending):
            return
        pop(port)
    watch(port, EPOLLIN)


cdef void port_drop_queue(Port *port) noexcept nogil:
    """What is queued is lost."""
    while port.first != NULL:
        pop(port)


cdef void send_singly(Burst *burst) noexcept nogil:
    cdef int i, error
    for i in range(burst.count):
        error = send_vectors(burst.port.fd, burst.to, &burst.vectors[i * burst.parts], <size_t>burst.parts, 0)
        if error == 0:
            if burst.count > 1:  # only if a single datagram passes are segments to blame
                burst.is_plain[0] = 1
        elif is_blocked(error):
            enqueue(burst, i)
            return
        else:
            burst.port.traffic.refused += 1


cdef void enqueue(Burst *burst, int start) noexcept nogil:
    """Keep a copy of the datagrams from `start` on."""
    cdef Port *port = burst.port
    cdef int i, end = burst.count * burst.parts
    cdef size_t length = 0
    cdef Pending *pending
    for i in range(start * burst.parts, end):
        length += burst.vectors[i].iov_len
    pending = new_pending(port, length)
    if pending == NULL:
        port.traffic.overflowed += <uint64_t>(burst.count - start)
        return
    pending.to = burst.to[0]
    pending.segment = burst.segment
    pending.is_plain = burst.is_plain[0]
    length = 0
    for i in range(start * burst.parts, end):
        memcpy(<uint8_t *>(pending + 1) + length, burst.vectors[i].iov_base, burst.vectors[i].iov_len)
        length += burst.vectors[i].iov_len
    push(port, pending)


cdef Pending *new_pending(Port *port, size_t length) noexcept nogil:
    """NULL where that would be too much waiting."""
    cdef Pending *pending
    if (
        port.queued >= MAX_QUEUE
        or port.queued_bytes + length > MAX_QUEUED_BYTES
        or port.traffic.queued_bytes + length > MAX_QUEUED_BYTES_OF_ALL
    ):
        return NULL
    pending = <Pending *>malloc(sizeof(Pending) + length)
    if pending != NULL:
        pending.next = NULL
        pending.length = length
        pending.sent = 0
    return pending


cdef void push(Port *port, Pending *pending) noexcept nogil:
    if port.first == NULL:
        port.first = pending
        watch(port, EPOLLIN | EPOLLOUT)
    else:
        port.last.next = pending
    port.last = pending
    port.queued += 1
    port.queued_bytes += pending.length
    port.traffic.queued_bytes += pending.length


cdef void pop(Port *port) noexcept nogil:
    cdef Pending *pending = port.first
    port.first = pending.next
    port.queued -= 1
    port.queued_bytes -= pending.length
    port.traffic.queued_bytes -= pending.length
    free(pending)


cdef bint send_pending(Port *port, Pending *pending) noexcept nogil:
    """False if the kernel has no room for the rest of it yet."""
    cdef iovec vector
    cdef size_t left, segment
    cdef int error
    while True:
        left = pending.length - pending.sent
        segment = pending.segment if left > pending.segment else 0
        vector.iov_base = <uint8_t *>(pending + 1) + pending.sent
        vector.iov_len = left
        if pending.is_plain and segment:
            vector.iov_len, segment = segment, 0
        error = send_vectors(port.fd, &pending.to, &vector, 1, segment)
        if is_blocked(error):
            return False
        if error and segment and is_of_segments(error):
            pending.is_plain = True
            continue
        if error:
            port.traffic.refused += (vector.iov_len + segment - 1) // segment if segment else 1
        pending.sent += vector.iov_len
        if pending.sent >= pending.length:
            return True


cdef int send_vectors(int fd, SocketAddress *to, iovec *vectors, size_t count, size_t segment) noexcept nogil:
    """One system call; 0 or the errno. `segment` 0: a single datagram."""
    cdef msghdr header
    cdef uint64_t control[4]   # CMSG_SPACE(2) is 24
    cdef cmsghdr *item = <cmsghdr *>control
    cdef uint16_t size = <uint16_t>segment
    cdef Py_ssize_t result
    header.msg_name = to
    header.msg_namelen = sizeof(sockaddr_in) if to.v4.sin_family == AF_INET else sizeof(sockaddr_in6)
    header.msg_iov = vectors
    header.msg_iovlen = count
    header.msg_control = NULL
    header.msg_controllen = 0
    header.msg_flags = 0
    if segment:
        item.cmsg_len = CMSG_LEN(2)
        item.cmsg_level = SOL_UDP
        item.cmsg_type = UDP_SEGMENT
        memcpy(CMSG_DATA(item), &size, 2)
        header.msg_control = control
        header.msg_controllen = CMSG_SPACE(2)
    result = sendmsg(fd, &header, MSG_DONTWAIT | MSG_NOSIGNAL)
    while result < 0 and errno == EINTR:
        result = sendmsg(fd, &header, MSG_DONTWAIT | MSG_NOSIGNAL)
    return errno if result < 0 else 0


cdef bint is_blocked(int error) noexcept nogil:
    return error == EAGAIN or error == ENOBUFS


cdef bint is_of_segments(int error) noexcept nogil:
    """What segmentation alone may be the reason of: EMSGSIZE for a segment above the MTU, since Linux 6.14."""
    return error == EIO or error == EINVAL or error == EMSGSIZE


cdef void watch(Port *port, uint32_t events) noexcept nogil:
    """Cannot fail for a descriptor that is in the set already."""
    cdef epoll_event event
    event.events = events
    event.data.ptr = port
    epoll_ctl(port.epoll, EPOLL_CTL_MOD, port.fd, &event)
