# cython: cdivision=True
"""Outgoing datagrams, gathered into batches that one `sendmsg` with UDP_SEGMENT can carry.

Batches leave in the order they were started; a datagram joins only the most recent batch of its
(source, destination, ECN), so the order within it is kept. Not here: sockets and the fallback to single
sends (`linux/`). Source: spec/io.md 3.4.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.stdint cimport uint8_t
from libc.string cimport memcpy

cdef enum:
    BUFFER_SIZE = 65535        # the most a UDP datagram's IP packet can hold
    MAX_SEGMENTS = 64          # UDP_MAX_SEGMENTS of older kernels
    HEADERS_V4 = 68            # longest IPv4 header and UDP
    HEADERS_V6 = 48
    POOL_SIZE = 32


@cython.final
@cython.auto_pickle(False)
cdef class BufferPool:
    """Up to 32 buffers of 65,535 bytes, kept so that a busy queue does not page memory in and out."""

    def __dealloc__(self):
        while self._count:
            self._count -= 1
            PyMem_RawFree(self._free[self._count])

    cdef uint8_t *take(self) except NULL:
        cdef uint8_t *buffer
        if self._count:
            self._count -= 1
            return self._free[self._count]
        buffer = <uint8_t *>PyMem_RawMalloc(BUFFER_SIZE)
        if buffer == NULL:
            raise MemoryError()
        return buffer

    cdef void give(self, uint8_t *buffer) noexcept:
        if self._count < POOL_SIZE:
            self._free[self._count] = buffer
            self._count += 1
        else:
            PyMem_RawFree(buffer)


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
cdef class GsoBatch:
    """Datagrams of one size, back to back; the last may be shorter. A read-only buffer of unsent bytes."""

    def __dealloc__(self):
        if self._memory != NULL:
            self._pool.give(self._memory)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self._memory + self._start, self.length - self._start, 1, flags)

    def __len__(self):
        return self.length - self._start


@cython.auto_pickle(False)
@cython.final
cdef class GsoQueue:
    """The bounded queue of batches for one socket.

    A datagram that would start a batch beyond `max_batches` is dropped and counted in `dropped`.
    """

    def __init__(self, Py_ssize_t max_batches=64):
        if max_batches < 1:
            raise ValueError(f"max_batches {max_batches} is out of range, use 1 or more")
        self.max_batches = max_batches
        self.dropped = 0
        self._batches = []
        self._recent = {}
        self._pool = BufferPool()

    def append(self, payload, remote, local=None, ecn=0):
        """Queue one datagram of 1 to 65,467 bytes (65,487 over IPv6); False if it was dropped."""
        cdef Py_buffer view
        if type(payload) is bytes:
            return append_memory(self, <const uint8_t *><char *>payload, len(payload), remote, local, ecn)
        PyObject_GetBuffer(payload, &view, PyBUF_SIMPLE)
        try:
            return append_memory(self, <const uint8_t *>view.buf, view.len, remote, local, ecn)
        finally:
            PyBuffer_Release(&view)

    def append_transmit(self, transmit):
        """Queue a `Transmit`; False if it was dropped."""
        payload, remote, local, ecn = transmit
        return self.append(payload, remote, local, ecn)

    def drain(self):
        """Yield `(buffer, segment_size, remote, local, ecn)`, oldest first.

        A batch leaves the queue when the next one is asked for: a sender that stops the loop because
        its socket would block finds the batch again, less what it reported to `consume`.
        """
        cdef GsoBatch head
        while self._batches:
            head = self._batches[0]
            if head.length > head._start:
                seal(self, head)
                yield head, head.segment_size, head.remote, head.local, head.ecn
            if self._batches and self._batches[0] is head:
                seal(self, head)
                del self._batches[0]

    def consume(self, Py_ssize_t count):
        """Forget the first `count` bytes of the oldest batch, sent while the rest could not be."""
        cdef GsoBatch head
        if not self._batches:
            raise ValueError("no batch to consume from")
        head = self._batches[0]
        if not 0 <= count <= head.length - head._start:
            raise ValueError(f"cannot consume {count} of {len(head)} bytes")
        seal(self, head)
        head._start += count

    def clear(self):
        """Forget everything queued."""
        self._batches = []
        self._recent = {}
        self._latest = None

    def __len__(self):
        """Batches queued."""
        return len(self._batches)

    cdef GsoBatch reserve(self, Py_ssize_t size, object remote, object local, object ecn):
        cdef GsoBatch batch = self._latest
        cdef object key
        # Identity is the cheap sign of a train; equal but distinct addresses meet in the dict.
        if batch is not None and batch.remote is remote and batch.local is local and batch.ecn is ecn:
            if has_room(batch, size):
                return batch
            key = batch._key
        else:
            key = (remote, None if local is None else local[0], ecn)
            batch = self._recent.get(key)
            if batch is not None and has_room(batch, size):
                return batch
        return start_batch(self, size, remote, local, ecn, key)


cdef object append_memory(
    GsoQueue self, const uint8_t *data, Py_ssize_t size, object remote, object local, object ecn
):
    cdef GsoBatch batch
    cdef Py_ssize_t most = BUFFER_SIZE - headers_of(remote)
    if not 0 < size <= most:
        raise ValueError(f"datagram of {size} bytes, use 1 to {most}")
    batch = self.reserve(size, remote, local, ecn)
    if batch is None:
        self.dropped += 1
        return False
    memcpy(batch._memory + batch.length, data, <size_t>size)  # reserve proved the room
    batch.length += size
    return True


cdef inline bint has_room(GsoBatch batch, Py_ssize_t size) noexcept:
    """True proves length + size <= BUFFER_SIZE: `set_limit` keeps _limit below it."""
    if batch.length == 0:  # an abandoned reservation: begin again with this size
        set_limit(batch, size)
        return True
    return (
        size <= batch.segment_size
        and batch.length + size <= batch._limit
        and batch.length % batch.segment_size == 0
    )


cdef GsoBatch start_batch(
    GsoQueue self, Py_ssize_t size, object remote, object local, object ecn, object key
):
    cdef GsoBatch batch
    if len(self._batches) >= self.max_batches:
        return None
    batch = GsoBatch.__new__(GsoBatch)
    batch._pool = self._pool
    batch._memory = self._pool.take()
    batch.remote = remote
    batch.local = local
    batch.ecn = ecn
    batch._key = key
    set_limit(batch, size)
    self._batches.append(batch)
    self._recent[key] = batch
    self._latest = batch
    return batch


cdef void set_limit(GsoBatch batch, Py_ssize_t size) noexcept:
    """Whole segments only, within the 64 of UDP_SEGMENT and the 65,535 bytes of an IP packet."""
    cdef Py_ssize_t room = BUFFER_SIZE - headers_of(batch.remote)
    batch.segment_size = <int>size
    batch._limit = min(<Py_ssize_t>MAX_SEGMENTS, room // size) * size


cdef inline Py_ssize_t headers_of(object remote) noexcept:
    return HEADERS_V4 if len(<object>remote[0]) == 4 else HEADERS_V6


cdef int seal(GsoQueue self, GsoBatch batch) except -1:
    """Nothing more may join the batch: what a sender looks at no longer changes."""
    if self._recent.get(batch._key) is batch:
        del self._recent[batch._key]
    if self._latest is batch:
        self._latest = None
    return 0
