# The queue of outgoing datagrams, for callers that encrypt straight into it.

cimport cython
from libc.stdint cimport uint8_t


@cython.final
cdef class BufferPool:
    cdef uint8_t *_free[32]
    cdef int _count
    cdef uint8_t *take(self) except NULL
    cdef void give(self, uint8_t *buffer) noexcept


@cython.final
cdef class GsoBatch:
    cdef BufferPool _pool
    cdef uint8_t *_memory      # 65,535 bytes
    cdef Py_ssize_t _start     # bytes already sent
    cdef Py_ssize_t length     # bytes committed, sent ones included
    cdef Py_ssize_t _limit     # bytes it may reach
    cdef int segment_size
    cdef object remote
    cdef object local
    cdef object ecn
    cdef object _key


@cython.final
cdef class GsoQueue:
    cdef readonly Py_ssize_t max_batches
    cdef readonly object dropped
    cdef list _batches
    cdef dict _recent
    cdef BufferPool _pool
    cdef GsoBatch _latest

    # A batch with room for `size` more bytes, or None if the queue is full. The caller writes to
    # `batch._memory + batch.length` and adds to `batch.length`; what it does not add was never there.
    cdef GsoBatch reserve(self, Py_ssize_t size, object remote, object local, object ecn)
