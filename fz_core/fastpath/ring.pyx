"""Records on their way from the pump to the driver. Bounded: what does not fit is dropped and counted."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from fz_core.fastpath.flows cimport NONE
from fz_core.fastpath.peers cimport Endpoint
from fz_core.fastpath.system cimport fz_set, ntohs

cdef enum:
    RING_BYTES = 2 << 20       # thirty super packets, or thousands of datagrams; paged in as it is used

cdef double BARRED_TIME = 0.05     # the longest that a half waits for the driver


cdef int ring_init(Ring *ring) noexcept nogil:
    memset(ring, 0, sizeof(Ring))
    ring.filling = <uint8_t *>malloc(RING_BYTES)
    ring.taken = <uint8_t *>malloc(RING_BYTES)
    return 0 if ring.filling and ring.taken else -1


cdef void ring_free(Ring *ring) noexcept nogil:
    free(ring.filling)
    free(ring.taken)
    memset(ring, 0, sizeof(Ring))


cdef bint ring_push(Ring *ring, const Record *record, const uint8_t *data) noexcept nogil:
    if ring.filled + sizeof(Record) + record.size > RING_BYTES:
        fz_set(&ring.dropped, ring.dropped + 1)
        return False
    memcpy(ring.filling + ring.filled, record, sizeof(Record))
    ring.filled += sizeof(Record)
    if record.size:
        memcpy(ring.filling + ring.filled, data, record.size)
        ring.filled += record.size
    ring.produced += 1
    return True


cdef void ring_bar(Ring *ring, uint64_t position, double now) noexcept nogil:
    if ring.barrier == 0:
        ring.barred_until = now + BARRED_TIME
    if position > ring.barrier:
        fz_set(&ring.barrier, position)


cdef int ring_read(Ring *ring, uint64_t size, list records) except -1:
    cdef uint64_t at = 0
    cdef Record record
    while at < size:
        memcpy(&record, ring.taken + at, sizeof(Record))
        at += sizeof(Record)
        records.append((
            record.kind,
            None if record.peer == NONE else record.peer,
            endpoint_of(&record.local),
            endpoint_of(&record.source),
            record.ecn,
            bool(record.is_again),
            PyBytes_FromStringAndSize(<char *>ring.taken + at, record.size),
        ))
        at += record.size
    return 0


cdef object endpoint_of(const Endpoint *end):
    if end.ip_size == 0:
        return None
    return PyBytes_FromStringAndSize(<char *>end.ip, end.ip_size), ntohs(end.port)
