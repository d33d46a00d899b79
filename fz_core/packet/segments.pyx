# cython: cdivision=True
"""Making TCP fit a path narrower than the tunnel: MSS options, cutting segments, shortening ICMP errors.

Not here: which limit holds for whom (`tunnel/path_mtu.py`). Source: RFC 9293 section 3.7.1, RFC 6691, RFC 1624.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from fz_core.packet.checksum cimport add_bytes, adjust, get16, get32, load, put16, put32, store
from fz_core.packet.layout cimport MAX_PACKET, PROTO_TCP
from fz_core.packet.packet cimport Packet, packet_from_memory

from fz_core.packet.packet import verify_checksums

cdef enum:
    FIN = 0x01
    SYN = 0x02
    RST = 0x04
    PSH = 0x08
    URG = 0x20
    CWR = 0x80
    OPTION_END = 0
    OPTION_NOP = 1
    OPTION_MSS = 2
    LEAST_PAYLOAD = 8
    LEAST_ERROR = 56           # ICMP header, and of the quote an IPv6 header and 8 bytes


def clamp_mss(Packet packet not None, int limit):
    """Lower the MSS option of a SYN so that segments fit packets of `limit` bytes; whether it was changed.

    Nothing happens to other packets, to a SYN without the option, and to one whose options cannot be read.
    """
    cdef int mss = limit - (40 if packet.layout.version == 4 else 60)
    cdef uint8_t *tcp
    cdef int at, header
    if packet.layout.protocol != PROTO_TCP or not packet.layout.tcp_flags & SYN or not 0 < mss <= 0xFFFF:
        return False
    tcp = packet.start() + packet.layout.l4
    header = packet.layout.payload - packet.layout.l4  # parse_tcp proved 20 <= header <= bytes that follow
    at = find_mss(tcp, header)
    if at < 0 or get16(tcp + at) <= mss:
        return False
    put_covered(tcp, at, mss)
    return True


def split_tcp(Packet packet not None, int limit):
    """The segment cut into packets of at most `limit` bytes, as a sender would have; None if it cannot be cut.

    Not cut: what is not TCP, carries SYN, RST, URG or no payload, headers that leave no room, and a segment whose
    checksum is wrong: the pieces get checksums of their own, and would pass for sound.
    """
    cdef int room = limit - packet.layout.payload
    cdef int total = <int>packet.length - packet.layout.payload
    cdef int done = 0, size, number = 0
    cdef list pieces = []
    if packet.layout.protocol != PROTO_TCP or packet.layout.tcp_flags & (SYN | RST | URG):
        return None
    if room < LEAST_PAYLOAD or total <= 0 or verify_checksums(packet):
        return None
    while done < total:
        size = min(room, total - done)
        pieces.append(piece_of(packet, done, size, number, done + size == total))
        done += size
        number += 1
    return pieces


def shorten_error(Packet packet not None, int limit):
    """An ICMP error with less of the packet it quotes, at most `limit` bytes; None if it is none or nothing is left."""
    cdef uint8_t memory[MAX_PACKET]
    cdef int size
    if not packet.layout.is_icmp_error or limit < packet.layout.l4 + LEAST_ERROR or limit >= packet.length:
        return None
    size = limit & ~3
    memcpy(memory, packet.start(), <size_t>size)  # size < packet.length <= MAX_PACKET
    return finished(packet, memory, size)


cdef int find_mss(const uint8_t *tcp, int header) noexcept:
    """Where the value of the MSS option is, -1 if there is none that can be trusted."""
    cdef int at = 20, size
    while at < header:
        if tcp[at] == OPTION_END:
            return -1
        if tcp[at] == OPTION_NOP:
            at += 1
            continue
        if at + 2 > header:
            return -1
        size = tcp[at + 1]
        if size < 2 or at + size > header:
            return -1
        if tcp[at] == OPTION_MSS:
            return at + 2 if size == 4 else -1
        at += size
    return -1


cdef void put_covered(uint8_t *tcp, int at, int value) noexcept:
    """Replace a 16-bit value in the options, at an odd offset too, and patch the checksum that covers it.

    An odd value lies in two words. The second is inside: the header's length is even and `at + 1` is below it.
    """
    cdef int first = at & ~1
    cdef int size = 4 if at & 1 else 2
    cdef uint64_t old = add_bytes(0, tcp + first, size)
    put16(tcp + at, <unsigned int>value)
    store(tcp + 16, adjust(load(tcp + 16), old, add_bytes(0, tcp + first, size)))


cdef object piece_of(Packet packet, int first, int size, int number, bint is_last):
    cdef uint8_t memory[MAX_PACKET]
    cdef uint8_t *data = packet.start()
    cdef uint8_t *tcp = memory + packet.layout.l4
    cdef int headers = packet.layout.payload
    cdef int flags = packet.layout.tcp_flags
    memcpy(memory, data, <size_t>headers)  # headers + size <= packet.length <= MAX_PACKET
    memcpy(memory + headers, data + headers + first, <size_t>size)
    put32(tcp + 4, get32(tcp + 4) + <uint32_t>first)
    if not is_last:
        flags &= ~(FIN | PSH)
    if number:
        flags &= ~CWR
        if packet.layout.version == 4:
            put16(memory + 4, <unsigned int>(get16(memory + 4) + number))
    tcp[13] = <uint8_t>flags
    return finished(packet, memory, headers + size)


cdef object finished(Packet packet, uint8_t *memory, int size):
    """A packet from copied bytes, with its length and checksums set."""
    if packet.layout.version == 4:
        put16(memory + 2, <unsigned int>size)
    else:
        put16(memory + 4, <unsigned int>(size - 40))
    made = packet_from_memory(memory, size)
    made.update_checksums()  # the headers were parsed before: this is a Packet
    return made
