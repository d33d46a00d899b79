# The 10 bytes before every packet on a TUN device with IFF_VNET_HDR (spec/io.md section 6.2).
# Multi-byte fields are in host byte order.

from libc.stdint cimport uint8_t, uint16_t
from libc.string cimport memcpy

cdef enum:
    VNET_HEADER = 10
    VNET_NEEDS_CSUM = 1
    VNET_GSO_NONE = 0
    VNET_GSO_TCPV4 = 1
    VNET_GSO_TCPV6 = 4
    VNET_GSO_UDP_L4 = 5


cdef packed struct VnetHeader:
    uint8_t flags
    uint8_t gso_type
    uint16_t hdr_len
    uint16_t gso_size
    uint16_t csum_start
    uint16_t csum_offset


cdef inline VnetHeader read_vnet(const uint8_t *p) noexcept nogil:
    """The header in the VNET_HEADER bytes at p."""
    cdef VnetHeader header
    memcpy(&header, p, VNET_HEADER)
    return header


cdef inline void write_vnet(uint8_t *p, VnetHeader header) noexcept nogil:
    """Store the header in the VNET_HEADER bytes at p."""
    memcpy(p, &header, VNET_HEADER)
