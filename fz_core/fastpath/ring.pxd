# What the pump hands to the driver: records in one of two buffers, which change places.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fz_core.fastpath.peers cimport Endpoint
from fz_core.fastpath.system cimport fz_get, fz_set

cdef enum:
    FROM_DEVICE = 0            # a read from the device, virtio header included
    DATAGRAM = 1               # from the network, untouched
    OPENED = 2                 # a peer's packet, decrypted and without padding; empty for a keep-alive
    FORGED = 3                 # nothing of it is left
    NO_PACKET = 4              # authentic, but its content is no IP packet

ctypedef struct Record:
    uint32_t size              # bytes that follow
    uint32_t peer              # number of the peer it was opened for, or NONE
    Endpoint source            # not for FROM_DEVICE
    Endpoint local
    uint8_t kind
    uint8_t ecn
    uint8_t is_again           # one of its flow came this way before, or this stands for several

ctypedef struct Ring:
    uint8_t *filling
    uint8_t *taken
    uint64_t filled            # bytes
    uint64_t produced          # records ever
    uint64_t done              # records of which nothing is left to do; atomic
    uint64_t barrier           # nothing is read before `done` reaches this; 0 for none; atomic
    double barred_until        # or before this time
    uint64_t dropped           # atomic

cdef int ring_init(Ring *ring) noexcept nogil
cdef void ring_free(Ring *ring) noexcept nogil

# Whether there was room; the record's `size` bytes are copied from `data`.
cdef bint ring_push(Ring *ring, const Record *record, const uint8_t *data) noexcept nogil

# Have the half read nothing until the driver is done with everything up to `position`, but not for long.
cdef void ring_bar(Ring *ring, uint64_t position, double now) noexcept nogil


cdef inline bint ring_is_barred(Ring *ring, double now) noexcept nogil:
    """Whether the driver must catch up before anything else of this half may be read."""
    if ring.barrier == 0:
        return False
    if fz_get(&ring.done) < ring.barrier and now < ring.barred_until:
        return True
    fz_set(&ring.barrier, 0)
    return False


# The records in the first `size` bytes of the taken buffer, as `Pump.take` gives them.
cdef int ring_read(Ring *ring, uint64_t size, list records) except -1
