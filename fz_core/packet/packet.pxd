# One inner IP packet. Other rooms `from fz_core.packet.packet cimport Packet, packet_from_memory`.

cimport cython
from libc.stdint cimport uint8_t

from fz_core.packet.layout cimport Layout

cdef enum:
    # Room before the packet for a ChannelData header (4) and a WireGuard data header (16),
    # and behind it for the AEAD tag (16): sealing in place needs no copy.
    HEADROOM = 20
    TAILROOM = 16
    CAPACITY = 1316        # HEADROOM + 1280 + TAILROOM


@cython.final
cdef class Packet:
    cdef uint8_t _memory[CAPACITY]
    cdef Layout layout
    cdef Py_ssize_t length
    cdef bytes _src
    cdef bytes _dst

    cdef inline uint8_t *start(self) noexcept nogil:
        """The packet's first byte; `length` bytes follow."""
        return self._memory + HEADROOM


# A Packet, or the DropReason for what is wrong with the bytes.
cdef object packet_from_memory(const uint8_t *data, Py_ssize_t length)
