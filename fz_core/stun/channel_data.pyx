"""ChannelData: number 2, payload length 2, payload. RFC 8656 section 12.4, spec/connectivity.md section 2.

Over UDP nothing is padded: the official peers require the length field to equal what follows exactly.
"""

from libc.stdint cimport uint8_t

from fz_core.packet import DropReason

cdef enum:
    HEADER_LENGTH = 4
    FIRST_NUMBER = 0x4000
    LAST_NUMBER = 0x7FFF


def parse_channel_data_untrusted(data):
    """(number, payload as memoryview of `data`), or a DropReason."""
    cdef const uint8_t[::1] view = data
    cdef Py_ssize_t size = view.shape[0]
    cdef int number
    if size < HEADER_LENGTH:
        return DropReason.UNKNOWN_DATAGRAM
    number = (view[0] << 8) | view[1]
    if not FIRST_NUMBER <= number <= LAST_NUMBER or (view[2] << 8 | view[3]) != size - HEADER_LENGTH:
        return DropReason.UNKNOWN_DATAGRAM
    return number, memoryview(data)[HEADER_LENGTH:]


def build_channel_data(int number, payload):
    """One datagram; the payload must fit a UDP datagram."""
    cdef Py_ssize_t size = len(payload)
    if not FIRST_NUMBER <= number <= LAST_NUMBER:
        raise ValueError(f"channel number {number:#x} is out of range, use 0x4000 to 0x7fff")
    if size > 0xFFFF:
        raise ValueError(f"payload has {size} bytes, at most 65535 fit")
    return bytes((number >> 8, number & 0xFF, size >> 8, size & 0xFF)) + payload
