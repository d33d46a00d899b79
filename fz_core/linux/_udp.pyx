"""Batched datagrams on one bound UDP socket: `recvmmsg` with GRO in, `sendmsg` with UDP_SEGMENT out.

Binding and options are `udp.py`. Network errors never raise: they are kept for `take_errors`.
Source: spec/io.md 3.4 to 3.8.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_RawCalloc, PyMem_RawFree, PyMem_RawMalloc
from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, errno
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from fz_core.packet.socket_layout cimport (
    AF_INET, AF_INET6, CMSG_DATA, CMSG_FIRSTHDR, CMSG_LEN, CMSG_NXTHDR, CMSG_SPACE, IPPROTO_IP, IPPROTO_IPV6,
    IPV6_PKTINFO, IPV6_TCLASS, IP_PKTINFO, IP_TOS, MSG_CTRUNC, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_TRUNC, SOL_UDP, UDP_GRO,
    UDP_SEGMENT, cmsghdr, htons, in6_pktinfo, in_pktinfo, iovec, mmsghdr, msghdr, ntohs, sockaddr_in, sockaddr_in6,
)

from fz_core.packet import Address

cdef extern from "sys/socket.h" nogil:
    int recvmmsg(int, mmsghdr *, unsigned int, int, void *)
    Py_ssize_t sendmsg(int, const msghdr *, int)

cdef enum:
    MESSAGES = 32
    MAX_DATAGRAM = 1316        # inner 1280, WireGuard 32, channel data 4
    BUFFER_SIZE = 64 * MAX_DATAGRAM
    CONTROL_SIZE = 128         # PKTINFO, TCLASS and GRO need 88
    MAX_SEGMENTS = 64          # UDP_MAX_SEGMENTS of older kernels
    HEADERS_V4 = 68
    HEADERS_V6 = 48
    CACHE_SIZE = 256           # a power of two
    MAX_ERRORS = 64
    MAX_SINGLE = 4096

cdef struct CacheKey:
    uint8_t ip[16]
    uint16_t port
    uint16_t used

cdef struct Received:
    const uint8_t *ip          # NULL: no destination address came with it
    Py_ssize_t stride
    int ecn


@cython.final
@cython.auto_pickle(False)
cdef class UdpQueue:
    """The datagrams of a bound, non-blocking socket of one family. The descriptor belongs to the caller."""

    cdef int _fd
    cdef int _ip_size
    cdef readonly int port
    cdef readonly int gso_segments
    cdef mmsghdr *_messages
    cdef iovec *_vectors
    cdef uint8_t *_names
    cdef uint8_t *_control
    cdef uint8_t *_buffers
    cdef CacheKey *_keys
    cdef list _addresses
    cdef set _single
    cdef list _errors
    cdef readonly unsigned long long rx_calls, rx_bytes, rx_oversized, rx_malformed, rx_errors
    cdef readonly unsigned long long tx_calls, tx_bytes, tx_errors, gso_fallbacks

    def __cinit__(self):
        self._fd = -1
        self._ip_size = 4
        self._messages = <mmsghdr *>PyMem_RawCalloc(MESSAGES, sizeof(mmsghdr))
        self._vectors = <iovec *>PyMem_RawCalloc(MESSAGES, sizeof(iovec))
        self._names = <uint8_t *>PyMem_RawCalloc(MESSAGES, sizeof(sockaddr_in6))
        self._control = <uint8_t *>PyMem_RawCalloc(MESSAGES, CONTROL_SIZE)
        self._buffers = <uint8_t *>PyMem_RawMalloc(MESSAGES * BUFFER_SIZE)
        self._keys = <CacheKey *>PyMem_RawCalloc(CACHE_SIZE, sizeof(CacheKey))
        if not (self._messages and self._vectors and self._names and self._control and self._buffers
                and self._keys):
            raise MemoryError()
        self._addresses = [None] * CACHE_SIZE
        self._single = set()
        self._errors = []

    def __init__(self, int fd, bint is_ipv4, int port, int gso_segments=64):
        self._fd = fd
        self._ip_size = 4 if is_ipv4 else 16
        self.port = port
        self.gso_segments = min(max(gso_segments, 1), MAX_SEGMENTS)

    def __dealloc__(self):
        PyMem_RawFree(self._messages)
        PyMem_RawFree(self._vectors)
        PyMem_RawFree(self._names)
        PyMem_RawFree(self._control)
        PyMem_RawFree(self._buffers)
        PyMem_RawFree(self._keys)

    def recv_batch(self, int limit=MESSAGES):
        """At most `limit` (up to 32) `(local, remote, ecn, data, segment_size)`; empty when none wait.

        `data` is one datagram, or several of `segment_size` bytes of which the last may be shorter.
        """
        cdef int count, i
        cdef list batch = []
        limit = min(max(limit, 0), MESSAGES)
        if limit == 0:
            return batch
        prepare(self, limit)
        with nogil:
            count = recvmmsg(self._fd, self._messages, <unsigned int>limit, MSG_DONTWAIT, NULL)
            while count < 0 and errno == EINTR:
                count = recvmmsg(self._fd, self._messages, <unsigned int>limit, MSG_DONTWAIT, NULL)
        self.rx_calls += 1
        if count < 0:
            if errno != EAGAIN:
                self.rx_errors += 1
                keep_error(self, errno, None, None, 0)
            return batch
        for i in range(count):
            append_message(self, batch, i)
        return batch

    def send_batch(self, buffer, Py_ssize_t segment_size, remote, local=None, int ecn=0):
        """Send datagrams of `segment_size` bytes, the last maybe shorter, to one destination.

        None when done, also if a datagram failed for good: its error is kept for `take_errors` and the
        rest is dropped. A number when the socket is full: that many bytes were taken, wait until it is
        writable and send the rest. Where only a multi-segment send fails (EIO, EINVAL), this destination
        gets single datagrams from then on.
        """
        cdef Py_buffer view
        if segment_size < 1 or not 0 <= ecn <= 3:
            raise ValueError(f"segment_size {segment_size} must be positive and ecn {ecn} 0 to 3")
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
        try:
            return send_memory(self, <uint8_t *>view.buf, view.len, segment_size, remote, local, ecn)
        finally:
            PyBuffer_Release(&view)

    def take_errors(self):
        """The `(errno, remote, local, dropped_bytes)` since the last call, at most 64; remote None: receiving."""
        cdef list errors = self._errors
        if errors:
            self._errors = []
        return errors

    def is_single(self, remote):
        """Whether this destination gets one datagram per system call."""
        return self.gso_segments == 1 or remote in self._single


# receiving

cdef void prepare(UdpQueue self, int count) noexcept:
    """Point every message at its own buffers; the kernel overwrote the lengths."""
    cdef int i
    cdef msghdr *header
    for i in range(count):
        self._vectors[i].iov_base = self._buffers + <Py_ssize_t>i * BUFFER_SIZE
        self._vectors[i].iov_len = BUFFER_SIZE
        header = &self._messages[i].msg_hdr
        header.msg_name = self._names + i * <int>sizeof(sockaddr_in6)
        header.msg_namelen = sizeof(sockaddr_in6)
        header.msg_iov = &self._vectors[i]
        header.msg_iovlen = 1
        header.msg_control = self._control + i * <int>CONTROL_SIZE
        header.msg_controllen = CONTROL_SIZE
        header.msg_flags = 0


cdef void read_control(msghdr *header, Received *received) noexcept:
    cdef cmsghdr *item = CMSG_FIRSTHDR(header)
    cdef int32_t number
    while item != NULL:
        if item.cmsg_level == IPPROTO_IP and item.cmsg_type == IP_PKTINFO:
            received.ip = <uint8_t *>&(<in_pktinfo *>CMSG_DATA(item)).ipi_addr
        elif item.cmsg_level == IPPROTO_IPV6 and item.cmsg_type == IPV6_PKTINFO:
            received.ip = <uint8_t *>&(<in6_pktinfo *>CMSG_DATA(item)).ipi6_addr
        elif item.cmsg_level == IPPROTO_IP and item.cmsg_type == IP_TOS:
            received.ecn = CMSG_DATA(item)[0] & 3  # the kernel sends one byte here
        elif item.cmsg_level == IPPROTO_IPV6 and item.cmsg_type == IPV6_TCLASS:
            memcpy(&number, CMSG_DATA(item), 4)
            received.ecn = number & 3
        elif item.cmsg_level == SOL_UDP and item.cmsg_type == UDP_GRO:
            memcpy(&number, CMSG_DATA(item), 4)
            received.stride = number
        item = CMSG_NXTHDR(header, item)


cdef int append_message(UdpQueue self, list batch, int i) except -1:
    """Add a received buffer to the batch, unless it is one no peer sends (spec/io.md 3.6)."""
    cdef msghdr *header = &self._messages[i].msg_hdr
    cdef Py_ssize_t size = self._messages[i].msg_len
    cdef Received received
    cdef uint8_t *name = <uint8_t *>header.msg_name
    cdef uint8_t *remote_ip
    cdef int port
    if size == 0:
        return 0
    received.ip = NULL
    received.stride = size
    received.ecn = 0
    read_control(header, &received)
    if received.stride > MAX_DATAGRAM:
        self.rx_oversized += 1
        return 0
    if received.ip == NULL or not 0 < received.stride <= size or header.msg_flags & (MSG_TRUNC | MSG_CTRUNC):
        self.rx_malformed += 1
        return 0
    if self._ip_size == 4:
        remote_ip = <uint8_t *>&(<sockaddr_in *>name).sin_addr
        port = ntohs((<sockaddr_in *>name).sin_port)
    else:
        remote_ip = <uint8_t *>&(<sockaddr_in6 *>name).sin6_addr
        port = ntohs((<sockaddr_in6 *>name).sin6_port)
    self.rx_bytes += <unsigned long long>size
    batch.append((
        cached_address(self, received.ip, self.port),
        cached_address(self, remote_ip, port),
        received.ecn,
        PyBytes_FromStringAndSize(<char *>self._vectors[i].iov_base, size),
        received.stride,
    ))
    return 0


cdef object cached_address(UdpQueue self, const uint8_t *ip, int port):
    """The Address of an endpoint, the same object for as long as its place in the table is not taken."""
    cdef CacheKey *key
    cdef uint64_t low = 0, high = 0
    cdef Py_ssize_t slot
    memcpy(&low, ip, 4 if self._ip_size == 4 else 8)
    if self._ip_size == 16:
        memcpy(&high, ip + 8, 8)
    slot = <Py_ssize_t>(((low ^ (high * 3) ^ (<uint64_t>port << 40)) * 0x9E3779B97F4A7C15U) >> 56)
    key = &self._keys[slot]  # 8 bits, CACHE_SIZE entries
    if key.used and key.port == port and memcmp(key.ip, ip, <size_t>self._ip_size) == 0:
        return self._addresses[slot]
    address = Address(PyBytes_FromStringAndSize(<char *>ip, self._ip_size), port)
    memcpy(key.ip, ip, <size_t>self._ip_size)
    key.port = <uint16_t>port
    key.used = 1
    self._addresses[slot] = address
    return address


# sending

cdef object send_memory(
    UdpQueue self, uint8_t *data, Py_ssize_t total, Py_ssize_t segment_size, remote, local, int ecn
):
    cdef Outgoing out
    cdef Py_ssize_t sent = 0, size, per_call
    cdef int error, refused = 0
    fill_outgoing(self, &out, remote, local, ecn)
    per_call = segment_size
    if self.gso_segments > 1 and not (self._single and remote in self._single):
        per_call = segment_size * most_segments(self, segment_size)
    while sent < total:
        size = min(total - sent, per_call)
        with nogil:
            error = send_once(self._fd, &out, data + sent, size, segment_size)
        self.tx_calls += 1
        if error == 0:
            sent += size
            self.tx_bytes += <unsigned long long>size
            if refused:
                refused = 0
                remember_single(self, remote)
        elif error == EAGAIN:
            return sent
        elif size > segment_size and (error == EIO or error == EINVAL):
            per_call = segment_size  # only if a single datagram passes is segmentation to blame
            refused = error
        else:
            self.tx_errors += 1
            keep_error(self, error, remote, local, total - sent)
            return None
    return None


cdef struct Outgoing:
    msghdr header
    iovec vector
    sockaddr_in v4
    sockaddr_in6 v6
    uint8_t control[CONTROL_SIZE]
    size_t control_length      # without UDP_SEGMENT, which comes last


cdef int fill_outgoing(UdpQueue self, Outgoing *out, remote, local, int ecn) except -1:
    """Destination, source and ECN as the kernel wants them; ValueError for the wrong family."""
    cdef bytes ip = remote[0]
    cdef int port = remote[1]
    cdef bytes source
    if len(ip) != self._ip_size or not 0 <= port <= 0xFFFF:
        raise ValueError(f"destination {remote} does not fit a socket with {self._ip_size}-byte addresses")
    memset(out, 0, sizeof(Outgoing))
    if self._ip_size == 4:
        out.v4.sin_family = AF_INET
        out.v4.sin_port = htons(<uint16_t>port)
        memcpy(&out.v4.sin_addr, <char *>ip, 4)
        out.header.msg_name = &out.v4
        out.header.msg_namelen = sizeof(sockaddr_in)
    else:
        out.v6.sin6_family = AF_INET6
        out.v6.sin6_port = htons(<uint16_t>port)
        memcpy(&out.v6.sin6_addr, <char *>ip, 16)
        out.header.msg_name = &out.v6
        out.header.msg_namelen = sizeof(sockaddr_in6)
    out.header.msg_iov = &out.vector
    out.header.msg_iovlen = 1
    if ecn:
        add_ecn(self, out, ecn)
    if local is not None:
        source = local[0]
        if len(source) != self._ip_size:
            raise ValueError(f"source {local} and destination {remote} differ in family")
        add_source(self, out, <uint8_t *><char *>source)
    return 0


cdef void add_ecn(UdpQueue self, Outgoing *out, int ecn) noexcept:
    cdef int32_t tos = ecn
    if self._ip_size == 4:
        add_control(out, IPPROTO_IP, IP_TOS, &tos, 4)
    else:
        add_control(out, IPPROTO_IPV6, IPV6_TCLASS, &tos, 4)


cdef void add_source(UdpQueue self, Outgoing *out, const uint8_t *ip) noexcept:
    """The source address only: interface index 0 leaves the route to the kernel."""
    cdef in_pktinfo v4
    cdef in6_pktinfo v6
    if self._ip_size == 4:
        memset(&v4, 0, sizeof(v4))
        memcpy(&v4.ipi_spec_dst, ip, 4)
        add_control(out, IPPROTO_IP, IP_PKTINFO, &v4, sizeof(v4))
    else:
        memset(&v6, 0, sizeof(v6))
        memcpy(&v6.ipi6_addr, ip, 16)
        add_control(out, IPPROTO_IPV6, IPV6_PKTINFO, &v6, sizeof(v6))


cdef void add_control(Outgoing *out, int level, int kind, const void *data, size_t size) noexcept nogil:
    """Append a control message; PKTINFO, TOS and SEGMENT take 88 of the 128 bytes."""
    cdef cmsghdr *item = <cmsghdr *>(out.control + out.control_length)
    item.cmsg_len = CMSG_LEN(size)
    item.cmsg_level = level
    item.cmsg_type = kind
    memcpy(CMSG_DATA(item), data, size)
    out.control_length += CMSG_SPACE(size)


cdef int send_once(
    int fd, Outgoing *out, uint8_t *data, Py_ssize_t size, Py_ssize_t segment_size
) noexcept nogil:
    """One system call, repeated while interrupted; 0 or the errno."""
    cdef uint16_t segment = <uint16_t>segment_size
    cdef size_t base_length = out.control_length
    cdef Py_ssize_t result
    if size > segment_size:
        add_control(out, SOL_UDP, UDP_SEGMENT, &segment, 2)
    out.vector.iov_base = data
    out.vector.iov_len = <size_t>size
    out.header.msg_control = out.control if out.control_length else NULL
    out.header.msg_controllen = out.control_length
    out.control_length = base_length
    result = sendmsg(fd, &out.header, MSG_DONTWAIT | MSG_NOSIGNAL)
    while result < 0 and errno == EINTR:
        result = sendmsg(fd, &out.header, MSG_DONTWAIT | MSG_NOSIGNAL)
    return errno if result < 0 else 0


cdef Py_ssize_t most_segments(UdpQueue self, Py_ssize_t segment_size) noexcept:
    """Whole segments that fit one IP packet with its longest header."""
    cdef Py_ssize_t room = 65535 - (HEADERS_V4 if self._ip_size == 4 else HEADERS_V6)
    return max(1, min(<Py_ssize_t>self.gso_segments, room // segment_size))


cdef void remember_single(UdpQueue self, remote):
    if len(self._single) >= MAX_SINGLE:
        self._single.clear()
    self._single.add(remote)
    self.gso_fallbacks += 1


cdef void keep_error(UdpQueue self, int error, remote, local, Py_ssize_t dropped):
    if len(self._errors) < MAX_ERRORS:
        self._errors.append((error, remote, local, dropped))
