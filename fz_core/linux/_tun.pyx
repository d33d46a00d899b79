"""Reads and writes of a TUN device's only queue, in batches. Opening it is `tun.py`.

What is read and written starts with the 10-byte virtio header. Source: spec/io.md 6.2 to 6.4.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.errno cimport EAGAIN, EINTR, EINVAL, errno
from libc.stdint cimport uint8_t
from posix.unistd cimport read, write

import os

cdef enum:
    HEADER_LENGTH = 10
    BUFFER_SIZE = HEADER_LENGTH + 65535
    GSO_TYPE = 1               # offset of the header's segmentation type


@cython.final
@cython.auto_pickle(False)
cdef class TunQueue:
    """The file descriptor's packets. The descriptor belongs to the caller."""

    cdef int _fd
    cdef uint8_t *_buffer
    cdef readonly unsigned long long read_packets
    cdef readonly unsigned long long read_bytes
    cdef readonly unsigned long long written_packets
    cdef readonly unsigned long long written_bytes
    cdef readonly unsigned long long write_errors
    cdef readonly int last_write_errno
    cdef readonly bint refused_merged

    def __cinit__(self):
        self._fd = -1
        self._buffer = <uint8_t *>PyMem_RawMalloc(BUFFER_SIZE)
        if self._buffer == NULL:
            raise MemoryError()

    def __init__(self, int fd):
        self._fd = fd

    def __dealloc__(self):
        PyMem_RawFree(self._buffer)

    def read_batch(self, Py_ssize_t limit):
        """Up to `limit` raw reads, header included, until none wait; OSError where the device is gone."""
        cdef Py_ssize_t size
        cdef list packets = []
        while limit > 0:
            with nogil:
                size = read(self._fd, self._buffer, BUFFER_SIZE)
            if size > HEADER_LENGTH:
                self.read_packets += 1
                self.read_bytes += <unsigned long long>size
                packets.append(PyBytes_FromStringAndSize(<char *>self._buffer, size))
                limit -= 1
            elif size < 0 and errno == EINTR:
                continue
            elif size < 0 and errno == EAGAIN:
                break
            else:
                raise OSError(errno if size < 0 else 0, os.strerror(errno) if size < 0 else "empty read")
        return packets

    def write(self, packet):
        """Write one packet, header included. False: the queue is full, wait until it is writable.

        Any other failure drops the packet, counts it and returns True. EINVAL on a merged packet also sets
        `refused_merged`: the kernel takes single packets only.
        """
        cdef Py_buffer view
        cdef Py_ssize_t size
        cdef int error
        PyObject_GetBuffer(packet, &view, PyBUF_SIMPLE)
        try:
            while True:
                with nogil:
                    size = write(self._fd, view.buf, <size_t>view.len)
                if size >= 0:
                    self.written_packets += 1
                    self.written_bytes += <unsigned long long>size
                    return True
                error = errno
                if error == EAGAIN:
                    return False
                if error != EINTR:
                    break
            self.write_errors += 1
            self.last_write_errno = error
            if error == EINVAL and view.len > HEADER_LENGTH and (<uint8_t *>view.buf)[GSO_TYPE] != 0:
                self.refused_merged = True
            return True
        finally:
            PyBuffer_Release(&view)
