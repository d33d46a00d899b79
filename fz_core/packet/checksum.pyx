"""Internet checksums for slow paths and tests; packet-rate code cimports `checksum.pxd`.

Source: RFC 1071, RFC 1624, spec/tunnel.md section 2.3.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint16_t, uint64_t

from fz_core.packet.checksum cimport add_bytes, adjust, be16, fold, get16, store


def ones_complement_sum(data, int initial=0):
    """The folded 16-bit sum of big-endian words of data, added to `initial`; not complemented."""
    cdef Py_buffer view
    cdef uint64_t total
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        total = be16(<unsigned int>(initial & 0xFFFF))
        return swap(fold(add_bytes(total, <const uint8_t *>view.buf, view.len)))
    finally:
        PyBuffer_Release(&view)


def checksum(data, int initial=0):
    """The Internet checksum of data, with a pseudo-header's sum as `initial`."""
    return ~ones_complement_sum(data, initial) & 0xFFFF


def update_checksum(int current, int old, int new):
    """`current` after one 16-bit word changed from `old` to `new` (RFC 1624); never 0x0000."""
    return swap(adjust(
        be16(<unsigned int>(current & 0xFFFF)),
        be16(<unsigned int>(old & 0xFFFF)),
        be16(<unsigned int>(new & 0xFFFF)),
    ))


cdef int swap(uint16_t word) noexcept:
    cdef uint8_t wire[2]
    store(wire, word)
    return get16(wire)
