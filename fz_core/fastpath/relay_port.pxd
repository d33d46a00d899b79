# A relay's sockets in C memory: what they send, and what waits for room in the kernel.

from libc.stdint cimport uint8_t, uint16_t, uint64_t

from fz_core.fastpath.system cimport iovec
from fz_core.fastpath.relay_address cimport SocketAddress

cdef enum:
    MAX_SEGMENTS = 64          # UDP_MAX_SEGMENTS of older kernels
    MAX_DATAGRAM = 65507       # payload of one IPv4 packet
    MAX_QUEUE = 512            # batches of a socket
    MAX_QUEUED_BYTES = 4 << 20         # of a socket
    MAX_QUEUED_BYTES_OF_ALL = 64 << 20
    HEADER = 4                 # of ChannelData

# Counters and the queued bytes of all sockets of one relay.
cdef struct Traffic:
    uint64_t relayed_bytes     # payload, both ways
    uint64_t unknown           # datagrams: no channel, or malformed
    uint64_t overflowed        # datagrams: no room in the queue
    uint64_t refused           # datagrams: an error of the kernel
    size_t queued_bytes

# Datagrams of one destination, `segment` bytes each but the last, which may be shorter. Their bytes follow.
cdef struct Pending:
    Pending *next
    SocketAddress to
    size_t segment
    size_t length
    size_t sent
    bint is_plain

cdef struct Port:
    int fd                     # -1: closed
    int epoll
    uint16_t number
    uint8_t ip_size            # 4 or 16
    bint is_listening
    int limit                  # messages per system call
    Py_ssize_t routes          # channels that use it
    Traffic *traffic
    Pending *first
    Pending *last
    size_t queued
    size_t queued_bytes
    Port *next                 # in its bucket, or among the closed

# Datagrams on their way out of one receive buffer: `parts` vectors each.
cdef struct Burst:
    Burst **owner              # where its route points to it
    Port *port
    SocketAddress *to
    uint8_t *is_plain          # the destination takes single datagrams only
    int parts
    int count
    size_t segment
    size_t bytes
    bint is_closed             # the last datagram was shorter
    uint8_t headers[2][4]      # of a full datagram and of the last one
    iovec vectors[128]

cdef bint burst_has_room(const Burst *burst, size_t size) noexcept nogil
cdef void burst_send(Burst *burst) noexcept nogil
cdef void port_flush(Port *port) noexcept nogil
cdef void port_drop_queue(Port *port) noexcept nogil
