# cython: cdivision=True
"""The path of data through a relay: channels, without Python per datagram.

    path = RelayPath(on_request)
    path.add_port(fd, is_ipv4, 3478, is_listening=True); path.add_port(fd, is_ipv4, 50000)
    path.open_route(client, 0x4000, 50000, peer)
    path.turn(10, 1)                       whenever `path` is readable

Datagrams come in by `recvmmsg` with UDP_GRO. Those of one channel leave with one `sendmsg` with UDP_SEGMENT, gathered
from where they were received: a header is skipped, or put between them, and nothing is copied. What is not ChannelData
on a listening port goes to `on_request`. A peer that is an allocation of this very relay is reached in process, which
also works where the router has no hairpin NAT. ECN and DSCP are not carried over.

Not here: who may have a channel (`turn.RelayServer`). Source: spec/relay.md sections 6 and 9.
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport close

from fz_core.fastpath.system cimport (
    EPOLL_CLOEXEC,
    EPOLL_CTL_ADD,
    EPOLL_CTL_DEL,
    EPOLLIN,
    EPOLLOUT,
    epoll_create1,
    epoll_ctl,
    epoll_event,
    epoll_wait,
    htons,
    iovec,
    ntohs,
)
from fz_core.fastpath.relay_address cimport SocketAddress, address_of, fill_address
from fz_core.fastpath.relay_inbox cimport (
    MESSAGES,
    Inbox,
    inbox_free,
    inbox_new,
    inbox_receive,
    inbox_segment,
    inbox_source,
)
from fz_core.fastpath.relay_port cimport (
    HEADER,
    Burst,
    Port,
    Traffic,
    burst_has_room,
    burst_send,
    port_drop_queue,
    port_flush,
)
from fz_core.fastpath.relay_routes cimport (
    INWARD,
    OUTWARD,
    Route,
    Routes,
    find_inward,
    find_outward,
    routes_free,
    routes_init,
    routes_insert,
    routes_remove,
)

import os

cdef enum:
    BURSTS = 16                # destinations gathered for at once
    EVENTS = 16                # sockets per round
    VISIT_BYTES = 512 * 1024   # per socket and round
    FEWEST_MESSAGES = 8        # per system call, so many of the largest are one visit
    MESSAGE_COST = 2048        # what the smallest message counts as
    REQUEST_COST = 65536       # what a request does: about 0.1 ms in Python
    BUCKETS = 1024             # of ports; 30,000 of them make chains of 30, off the path of data


@cython.final
@cython.auto_pickle(False)
cdef class RelayPath:
    """Ports and bound channels of one relay. `on_request(datagram, source)` is called within `turn`."""

    cdef int _epoll
    cdef bint _is_turning
    cdef Traffic _traffic
    cdef Routes _routes
    cdef Port **_buckets
    cdef Port *_listen[2]
    cdef Port *_closed
    cdef Inbox *_inbox
    cdef Burst *_bursts
    cdef int _burst_count
    cdef object _on_request

    def __cinit__(self):
        cdef bytes seed = os.urandom(32)
        self._epoll = -1
        memcpy(self._routes.seed, <char *>seed, 32)
        self._buckets = <Port **>calloc(BUCKETS, sizeof(Port *))
        self._bursts = <Burst *>calloc(BURSTS, sizeof(Burst))
        self._inbox = inbox_new()
        if not (self._buckets and self._bursts and self._inbox) or routes_init(&self._routes) < 0:
            raise MemoryError()
        self._epoll = epoll_create1(EPOLL_CLOEXEC)
        if self._epoll < 0:
            raise os_error()

    def __init__(self, on_request):
        self._on_request = on_request

    def __dealloc__(self):
        close_all(self)
        free_closed(self)
        routes_free(&self._routes)
        free(self._buckets)
        free(self._bursts)
        inbox_free(self._inbox)

    @property
    def relayed_bytes(self):
        """Payload carried so far, both ways."""
        return self._traffic.relayed_bytes

    @property
    def unknown(self):
        """Datagrams without a bound channel, and malformed ChannelData."""
        return self._traffic.unknown

    @property
    def overflowed(self):
        """Datagrams that found the queue of their socket full."""
        return self._traffic.overflowed

    @property
    def refused(self):
        """Datagrams that the kernel did not send: no route, too long, a firewall."""
        return self._traffic.refused

    @property
    def queued_bytes(self):
        """What waits for room in the kernel."""
        return self._traffic.queued_bytes

    @property
    def route_count(self):
        """Bound channels."""
        return self._routes.count

    def fileno(self):
        """Readable while any socket is ready; -1 once closed."""
        return self._epoll

    def add_port(self, int fd, bint is_ipv4, uint16_t number, bint is_listening=False):
        """Take over a bound, non-blocking UDP socket: its descriptor is closed from here, unless this raises."""
        cdef epoll_event event
        cdef int ip_size = 4 if is_ipv4 else 16
        cdef Port *port
        if find_port(self, ip_size, number) != NULL or (is_listening and self._listen[is_ipv4] != NULL):
            raise ValueError(f"port {number} is here already")
        port = <Port *>calloc(1, sizeof(Port))
        if port == NULL:
            raise MemoryError()
        port.fd, port.epoll, port.number, port.ip_size = fd, self._epoll, number, <uint8_t>ip_size
        port.is_listening, port.limit = is_listening, FEWEST_MESSAGES
        port.traffic = &self._traffic
        event.events = EPOLLIN
        event.data.ptr = port
        if epoll_ctl(self._epoll, EPOLL_CTL_ADD, fd, &event) < 0:
            free(port)
            raise os_error()
        port.next = self._buckets[number % BUCKETS]
        self._buckets[number % BUCKETS] = port
        if is_listening:
            self._listen[is_ipv4] = port

    def remove_port(self, uint16_t number):
        """Close the sockets of an allocation, both families. ValueError while it has channels."""
        cdef Port **place = &self._buckets[number % BUCKETS]
        cdef Port *port = place[0]
        while port != NULL:
            if port.number == number and port.routes:
                raise ValueError(f"port {number} still has {port.routes} channels, close their routes first")
            port = port.next
        while place[0] != NULL:
            port = place[0]
            if port.number == number and not port.is_listening:
                place[0] = port.next
                close_port(self, port)
            else:
                place = &port.next
        if not self._is_turning:
            free_closed(self)

    def open_route(self, client, uint16_t number, uint16_t port, peer, bint is_own_ip=False):
        """Let data flow between a client's channel `number` and a peer, through the allocation's port.

        `is_own_ip`: the peer has an address of this relay, so its port may be another allocation. ValueError for a
        channel or a peer that has a route already, and where a family has no port.
        """
        cdef Route *route
        cdef Route key
        memset(&key, 0, sizeof(Route))
        fill_address(&key.client, client)
        fill_address(&key.peer, peer)
        key.number, key.is_own_ip = number, is_own_ip
        key.port = find_port(self, len(peer[0]), port)
        key.listen = self._listen[len(client[0]) == 4]
        if key.port == NULL or key.listen == NULL or key.port.is_listening:
            raise ValueError(f"no port {port} for the family of the peer, or none to listen in that of the client")
        if find_outward(&self._routes, &key.client, number) or find_inward(&self._routes, port, &key.peer):
            raise ValueError(f"channel {number} or its peer has a route already")
        route = <Route *>malloc(sizeof(Route))
        if route == NULL:
            raise MemoryError()
        route[0] = key
        route.port.routes += 1
        routes_insert(&self._routes, route)

    def close_route(self, client, uint16_t number):
        """Let no more data flow; harmless for a channel without a route."""
        cdef SocketAddress address
        cdef Route *route
        fill_address(&address, client)
        route = find_outward(&self._routes, &address, number)
        if route != NULL:
            routes_remove(&self._routes, route)
            route.port.routes -= 1
            free(route)

    def send(self, client, bytes payload not None):
        """One datagram from the listening port of the client's family, behind what waits there."""
        cdef Burst burst
        cdef SocketAddress address
        cdef uint8_t is_plain = 0
        fill_address(&address, client)
        burst.port = self._listen[len(client[0]) == 4]
        if burst.port == NULL:
            raise ValueError(f"no port to listen in the family of {client}")
        burst.to, burst.is_plain = &address, &is_plain
        burst.parts = burst.count = 1
        burst.vectors[0].iov_base = <char *>payload
        burst.vectors[0].iov_len = burst.segment = burst.bytes = <size_t>len(payload)
        burst_send(&burst)

    def turn(self, int turn_ms, int linger_ms):
        """Serve all ready sockets in turn; returns when nothing is ready, or soon after `turn_ms`.

        While data flows it also waits for more, up to `linger_ms` each time: waking up the caller costs more than a
        batch. The time is bounded by what 16 sockets may bring in one round, 512 KiB each. The GIL is taken for
        requests only; what `on_request` raises comes out of here.
        """
        cdef int64_t until = now_ns() + <int64_t>turn_ms * 1_000_000
        if self._is_turning:
            raise RuntimeError("turn called from on_request")
        self._is_turning = True
        try:
            with nogil:
                serve(self, until, linger_ms)
        finally:
            self._is_turning = False
            free_closed(self)

    def close(self):
        """Close all sockets; what is queued is lost."""
        close_all(self)
        if not self._is_turning:
            free_closed(self)


# rounds

cdef int serve(RelayPath self, int64_t until, int linger_ms) except -1 nogil:
    cdef epoll_event events[EVENTS]
    cdef int count, i, timeout = 0
    cdef uint64_t before
    while True:
        count = epoll_wait(self._epoll, events, EVENTS, timeout)
        if count <= 0:  # also when a signal came
            return 0
        before = self._traffic.relayed_bytes
        for i in range(count):
            visit(self, <Port *>events[i].data.ptr, events[i].events)
        if now_ns() >= until:
            return 0
        timeout = linger_ms if self._traffic.relayed_bytes != before else 0


cdef int visit(RelayPath self, Port *port, uint32_t events) except -1 nogil:
    """One socket's turn; it may have been closed in this round."""
    cdef Py_ssize_t allowance = VISIT_BYTES
    cdef int limit
    if events & EPOLLOUT and port.fd >= 0:
        port_flush(port)
    if not events & ~<uint32_t>EPOLLOUT:
        return 0
    while allowance > 0 and port.fd >= 0:
        limit = port.limit
        if take_batch(self, port, &allowance) < limit:
            return 0
    return 0


cdef int take_batch(RelayPath self, Port *port, Py_ssize_t *allowance) except -1 nogil:
    """Receive once and forward; the number of messages. Where they are large, the next time takes fewer."""
    cdef int count = inbox_receive(self._inbox, port.fd, port.limit), i
    cdef Py_ssize_t cost = 0
    for i in range(count):
        cost += max(<Py_ssize_t>self._inbox.messages[i].msg_len, MESSAGE_COST)
        if port.is_listening:
            cost += REQUEST_COST * from_client(self, port, i)
        else:
            from_peer(self, port, i)
    send_bursts(self)
    if count:
        allowance[0] -= cost
        port.limit = <int>max(min(VISIT_BYTES * count // cost, <Py_ssize_t>MESSAGES), <Py_ssize_t>FEWEST_MESSAGES)
    return count


# forwarding

cdef int from_client(RelayPath self, Port *port, int i) except -1 nogil:
    """One message on a listening port; the number of requests in it."""
    cdef uint8_t *data = <uint8_t *>self._inbox.vectors[i].iov_base
    cdef size_t size = self._inbox.messages[i].msg_len, segment = inbox_segment(self._inbox, i)
    cdef size_t at = 0, left, length
    cdef SocketAddress *source = inbox_source(self._inbox, i)
    cdef uint16_t number
    cdef Route *route = NULL
    cdef int requests = 0
    while at < size:
        left = min(segment, size - at)
        if data[at] & 0xF0 != 0x40:
            send_bursts(self)  # nothing may point to a route that the request ends
            hand_over(self, data + at, <Py_ssize_t>left, source)
            route = NULL
            requests += 1
        elif left < HEADER:
            self._traffic.unknown += 1
        else:
            number = <uint16_t>(data[at] << 8 | data[at + 1])
            length = <size_t>(data[at + 2] << 8 | data[at + 3])
            if route == NULL or route.number != number:
                route = find_outward(&self._routes, source, number)
            if route == NULL or length > left - HEADER:
                self._traffic.unknown += 1
            else:
                forward_outward(self, route, data + at + HEADER, length)  # bytes beyond the length are ignored
        at += left
    return requests


cdef void from_peer(RelayPath self, Port *port, int i) noexcept nogil:
    """One message on the port of an allocation. An empty datagram is one, too."""
    cdef uint8_t *data = <uint8_t *>self._inbox.vectors[i].iov_base
    cdef size_t size = self._inbox.messages[i].msg_len, segment = inbox_segment(self._inbox, i)
    cdef size_t at = segment
    cdef Route *route = find_inward(&self._routes, port.number, inbox_source(self._inbox, i))
    if route == NULL:
        self._traffic.unknown += max((size + segment - 1) // segment, <size_t>1)
        return
    forward(self, route, INWARD, data, min(segment, size))
    while at < size:
        forward(self, route, INWARD, data + at, min(segment, size - at))
        at += segment


cdef void forward_outward(RelayPath self, Route *route, uint8_t *data, size_t length) noexcept nogil:
    """To the peer, or to the client behind the peer where that is an allocation of this relay."""
    cdef SocketAddress own
    cdef Port *port
    cdef Route *target
    cdef uint16_t number
    if not route.is_own_ip:
        forward(self, route, OUTWARD, data, length)
        return
    own = route.peer
    number = ntohs(own.v4.sin_port)  # in the same place for both families
    own.v4.sin_port = htons(route.port.number)
    target = find_inward(&self._routes, number, &own)
    if target != NULL:
        forward(self, target, INWARD, data, length)
        return
    port = find_port(self, route.port.ip_size, number)
    if port == NULL or port.is_listening:  # another program on the relay's own address
        forward(self, route, OUTWARD, data, length)
    else:
        self._traffic.unknown += 1


cdef void forward(RelayPath self, Route *route, int way, uint8_t *data, size_t length) noexcept nogil:
    """Into the burst of this route, which is sent first if it has no room."""
    cdef Burst *burst = route.bursts[way]
    cdef size_t size = length + HEADER if way == INWARD else length
    cdef bint is_new = burst == NULL
    self._traffic.relayed_bytes += length
    if is_new:
        burst = route.bursts[way] = take_burst(self)
        burst.port = route.listen if way == INWARD else route.port
        burst.to = &route.client if way == INWARD else &route.peer
        burst.is_plain = &route.is_plain[way]
        burst.parts = 2 if way == INWARD else 1
        burst.owner = &route.bursts[way]
    elif not burst_has_room(burst, size):
        burst_send(burst)
        is_new = True
    if is_new:
        burst.count, burst.bytes, burst.segment, burst.is_closed = 0, 0, size, False
    add_datagram(burst, route.number, data, length, size)


cdef void add_datagram(Burst *burst, uint16_t number, uint8_t *data, size_t length, size_t size) noexcept nogil:
    """All full datagrams share one header."""
    cdef iovec *vector = &burst.vectors[burst.count * burst.parts]
    cdef uint8_t *header
    burst.is_closed = size < burst.segment
    if burst.parts == 2:
        header = burst.headers[burst.is_closed]
        if burst.is_closed or burst.count == 0:
            header[0], header[1] = <uint8_t>(number >> 8), <uint8_t>(number & 0xFF)
            header[2], header[3] = <uint8_t>(length >> 8), <uint8_t>(length & 0xFF)
        vector.iov_base, vector.iov_len = header, HEADER
        vector += 1
    vector.iov_base, vector.iov_len = data, length
    burst.count += 1
    burst.bytes += size


cdef Burst *take_burst(RelayPath self) noexcept nogil:
    if self._burst_count == BURSTS:
        send_bursts(self)
    self._burst_count += 1
    return &self._bursts[self._burst_count - 1]


cdef void send_bursts(RelayPath self) noexcept nogil:
    """Everything gathered so far, before its memory or its routes are used anew."""
    cdef int i
    for i in range(self._burst_count):
        burst_send(&self._bursts[i])
        self._bursts[i].owner[0] = NULL
    self._burst_count = 0


cdef int hand_over(RelayPath self, uint8_t *data, Py_ssize_t size, SocketAddress *source) except -1 with gil:
    self._on_request(PyBytes_FromStringAndSize(<char *>data, size), address_of(source))
    return 0


# ports

cdef Port *find_port(RelayPath self, Py_ssize_t ip_size, uint16_t number) noexcept nogil:
    cdef Port *port = self._buckets[number % BUCKETS]
    while port != NULL and not (port.number == number and port.ip_size == ip_size):
        port = port.next
    return port


cdef void close_port(RelayPath self, Port *port) noexcept nogil:
    """The record stays until no event of this turn can name it."""
    epoll_ctl(self._epoll, EPOLL_CTL_DEL, port.fd, NULL)
    port_drop_queue(port)
    close(port.fd)
    port.fd = -1
    port.next = self._closed
    self._closed = port


cdef void close_all(RelayPath self) noexcept nogil:
    cdef int i
    cdef Port *port
    for i in range(BUCKETS if self._buckets != NULL else 0):
        while self._buckets[i] != NULL:
            port = self._buckets[i]
            self._buckets[i] = port.next
            close_port(self, port)
    self._listen[0] = self._listen[1] = NULL
    if self._epoll >= 0:
        close(self._epoll)
    self._epoll = -1


cdef void free_closed(RelayPath self) noexcept nogil:
    cdef Port *port
    while self._closed != NULL:
        port = self._closed
        self._closed = port.next
        free(port)


cdef int64_t now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1_000_000_000 + now.tv_nsec


cdef object os_error():
    return OSError(errno, os.strerror(errno))
