# Internet checksum (RFC 1071) and its incremental form (RFC 1624), inlined into their users.
#
# Sums are kept in memory order: 16-bit words are loaded and stored with memcpy, never byte-swapped,
# because one's-complement addition is independent of byte order (RFC 1071 section 2 B). Constants that
# enter a sum therefore pass through `be16`.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy


cdef inline uint16_t get16(const uint8_t *p) noexcept nogil:
    """Big-endian 16-bit value at p."""
    return <uint16_t>((p[0] << 8) | p[1])


cdef inline void put16(uint8_t *p, unsigned int value) noexcept nogil:
    """Store the low 16 bits of value, big-endian."""
    p[0] = <uint8_t>((value >> 8) & 0xFF)
    p[1] = <uint8_t>(value & 0xFF)


cdef inline uint32_t get32(const uint8_t *p) noexcept nogil:
    """Big-endian 32-bit value at p."""
    return (<uint32_t>p[0] << 24) | (<uint32_t>p[1] << 16) | (<uint32_t>p[2] << 8) | <uint32_t>p[3]


cdef inline void put32(uint8_t *p, uint32_t value) noexcept nogil:
    """Store value, big-endian."""
    p[0] = <uint8_t>(value >> 24)
    p[1] = <uint8_t>((value >> 16) & 0xFF)
    p[2] = <uint8_t>((value >> 8) & 0xFF)
    p[3] = <uint8_t>(value & 0xFF)


cdef inline uint16_t load(const uint8_t *p) noexcept nogil:
    """The 16-bit word at p in memory order."""
    cdef uint16_t word
    memcpy(&word, p, 2)
    return word


cdef inline void store(uint8_t *p, uint16_t word) noexcept nogil:
    """Store a word in memory order."""
    memcpy(p, &word, 2)


cdef inline uint16_t be16(unsigned int value) noexcept nogil:
    """A constant as the memory-order word that `load` would read from its wire form."""
    cdef uint8_t wire[2]
    put16(wire, value)
    return load(wire)


cdef inline uint64_t add_bytes(uint64_t total, const uint8_t *p, Py_ssize_t n) noexcept nogil:
    """Add n bytes to an unfolded sum; an odd last byte is padded with zero.

    Adds 32-bit words: 2**32 of them fit before the 64-bit sum could wrap, far above any packet.
    """
    cdef Py_ssize_t i
    cdef Py_ssize_t words = n // 4
    cdef Py_ssize_t done = words * 4
    cdef uint32_t word
    cdef uint8_t tail[2]
    for i in range(words):
        memcpy(&word, p + 4 * i, 4)
        total += word
    if n - done >= 2:
        total += load(p + done)
        done += 2
    if done < n:
        tail[0] = p[done]
        tail[1] = 0
        total += load(tail)
    return total


cdef inline uint16_t fold(uint64_t total) noexcept nogil:
    """One's-complement sum as 16 bits, not complemented."""
    total = <uint64_t><uint32_t>total + (total >> 32)
    total = <uint64_t><uint32_t>total + (total >> 32)
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return <uint16_t>total


cdef inline uint16_t finish(uint64_t total) noexcept nogil:
    """The checksum field for an unfolded sum."""
    return <uint16_t>(~fold(total) & 0xFFFF)


cdef inline uint16_t finish_udp(uint64_t total) noexcept nogil:
    """As `finish`; a result of 0 becomes 0xFFFF, because 0 means "not computed" in UDP (RFC 768)."""
    cdef uint16_t value = finish(total)
    return value if value != 0 else 0xFFFF


cdef inline uint64_t pseudo_sum(
    const uint8_t *ip, int version, int protocol, unsigned int length
) noexcept nogil:
    """Unfolded sum of the TCP/UDP/ICMPv6 pseudo-header of the packet at ip; length below 65,536."""
    cdef uint64_t total = <uint64_t>be16(<unsigned int>protocol) + be16(length)
    if version == 4:
        return add_bytes(total, ip + 12, 8)
    return add_bytes(total, ip + 8, 32)


cdef inline uint16_t adjust(uint16_t checksum, uint64_t old, uint64_t new) noexcept nogil:
    """RFC 1624 equation 3: the checksum after words summing to `old` became words summing to `new`.

    A result of 0x0000 is given as 0xFFFF, its equal, which also verifies over all-zero data.
    """
    cdef uint64_t total = <uint64_t><uint16_t>(~checksum & 0xFFFF)
    total += <uint16_t>(~fold(old) & 0xFFFF)
    total += fold(new)
    return finish_udp(total)
