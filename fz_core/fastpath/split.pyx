# cython: cdivision=True
"""Super packets read from the TUN device, split into the packets the host meant to send.

Covers TSO, USO and the completion of partial checksums. A malformed read is dropped alone, a segment that
is no acceptable packet is dropped alone. Not here: merging (`coalesce`). Source: spec/io.md 6.2, 6.3.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

from fz_core.fastpath.virtio cimport (
    VNET_GSO_NONE,
    VNET_GSO_TCPV4,
    VNET_GSO_TCPV6,
    VNET_GSO_UDP_L4,
    VNET_HEADER,
    VNET_NEEDS_CSUM,
    VnetHeader,
    read_vnet,
)
from fz_core.packet.checksum cimport (
    add_bytes,
    finish,
    finish_udp,
    get16,
    get32,
    load,
    pseudo_sum,
    put16,
    put32,
    store,
)
from fz_core.packet.layout cimport (
    MAX_PACKET,
    PARSE_FRAGMENT,
    PARSE_OK,
    PROTO_TCP,
    PROTO_UDP,
    parse_layout,
)
from fz_core.packet.packet cimport Packet, packet_from_memory

from fz_core.packet.drops import DropReason

cdef enum:
    MAX_SEGMENTS = 256
    MAX_SEGMENT = 1316     # headers and payload; what a larger one belongs to is dropped whole
    TCP_FIN_PSH = 0x09

cdef object BAD_OFFLOAD = DropReason.MALFORMED_OFFLOAD
cdef object TOO_BIG = DropReason.TOO_BIG
cdef object FRAGMENTED = DropReason.FRAGMENTED
cdef object MALFORMED = DropReason.MALFORMED_PACKET


def split_super_packet(data, drops=None):
    """The packets in one TUN read: 10-byte virtio header, then a packet or super packet.

    Returns a list of `Packet`, or the `DropReason` for the read as a whole. Segments refused one by one
    are counted in `drops` (a `DropCounter`) and left out.
    """
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        return split_memory(<const uint8_t *>view.buf, view.len, drops)
    finally:
        PyBuffer_Release(&view)


cdef object split_memory(const uint8_t *data, Py_ssize_t size, object drops):
    cdef VnetHeader header
    cdef SplitPlan plan
    cdef const uint8_t *ip = data + VNET_HEADER
    cdef int code
    if size <= VNET_HEADER:
        return BAD_OFFLOAD
    header = read_vnet(data)
    size -= VNET_HEADER
    if header.gso_type == VNET_GSO_NONE:
        return single(ip, size, header)
    code = plan_split(ip, size, header.gso_type, header.gso_size, &plan)
    if code == SPLIT_OK:
        return segments(&plan, drops)
    return TOO_BIG if code == SPLIT_TOO_BIG else BAD_OFFLOAD


cdef object single(const uint8_t *ip, Py_ssize_t size, VnetHeader header):
    cdef uint8_t copy[MAX_PACKET]
    cdef object packet
    if size > MAX_PACKET:
        return TOO_BIG
    if header.flags & VNET_NEEDS_CSUM:
        memcpy(copy, ip, <size_t>size)  # size <= MAX_PACKET
        if not complete_checksum(copy, size, header.csum_start, header.csum_offset):
            return BAD_OFFLOAD
        ip = copy
    packet = packet_from_memory(ip, size)
    return [packet] if isinstance(packet, Packet) else packet


cdef bint complete_checksum(uint8_t *ip, Py_ssize_t size, Py_ssize_t start, Py_ssize_t offset) noexcept nogil:
    """Finish a checksum whose field holds the folded pseudo-header sum; False if it lies outside."""
    cdef uint64_t total
    # start and offset are at most 65,535 each: no overflow; start < start + offset + 2 <= size.
    if start + offset + 2 > size:
        return False
    total = load(ip + start + offset)
    store(ip + start + offset, 0)
    total = add_bytes(total, ip + start, size - start)
    # 6 is the field's place in UDP only, where 0 would mean "not computed".
    store(ip + start + offset, finish_udp(total) if offset == 6 else finish(total))
    return True


cdef object segments(const SplitPlan *plan, object drops):
    cdef Packet packet
    cdef int i, code
    cdef list found = []
    for i in range(plan.count):
        if segment_size(plan, i) > MAX_PACKET:
            count(drops, TOO_BIG)
            continue
        packet = Packet.__new__(Packet)
        packet.length = write_segment(plan, i, packet.start())  # has room for MAX_PACKET bytes
        code = parse_layout(packet.start(), packet.length, &packet.layout)
        if code == PARSE_OK:
            found.append(packet)
        else:
            count(drops, FRAGMENTED if code == PARSE_FRAGMENT else MALFORMED)
    return found


cdef int count(object drops, object reason) except -1:
    if drops is not None:
        drops.add(reason)
    return 0


cdef int plan_split(
    const uint8_t *ip, Py_ssize_t size, int gso_type, int gso_size, SplitPlan *plan
) noexcept nogil:
    if size < 20 or size > 65535 or gso_size <= 0:
        return SPLIT_MALFORMED
    plan.ip = ip
    plan.version = ip[0] >> 4
    if not find_headers(ip, <int>size, plan) or not type_matches(gso_type, plan):
        return SPLIT_MALFORMED
    plan.payload = <int>size - plan.header
    if plan.payload <= 0:
        return SPLIT_MALFORMED
    plan.count = (plan.payload + gso_size - 1) // gso_size
    if plan.count > MAX_SEGMENTS:
        return SPLIT_MALFORMED
    plan.segment = min(gso_size, plan.payload)
    return SPLIT_OK if plan.header + plan.segment <= MAX_SEGMENT else SPLIT_TOO_BIG


cdef bint find_headers(const uint8_t *ip, int size, SplitPlan *plan) noexcept nogil:
    """Offsets of the L4 header and payload; on True, plan.header <= size. size >= 20 on entry."""
    cdef int l4_header = 8
    if plan.version == 4:
        plan.l4 = (ip[0] & 0x0F) * 4
        plan.protocol = ip[9]
    elif plan.version == 6:
        plan.l4 = 40
        plan.protocol = ip[6]
    else:
        return False
    if plan.l4 < 20 or plan.l4 + 8 > size:
        return False
    if plan.protocol == PROTO_TCP:
        if plan.l4 + 20 > size:
            return False
        l4_header = (ip[plan.l4 + 12] >> 4) * 4
        if l4_header < 20:
            return False
    plan.header = plan.l4 + l4_header
    return plan.header <= size


cdef bint type_matches(int gso_type, const SplitPlan *plan) noexcept nogil:
    if gso_type == VNET_GSO_TCPV4:
        return plan.version == 4 and plan.protocol == PROTO_TCP
    if gso_type == VNET_GSO_TCPV6:
        return plan.version == 6 and plan.protocol == PROTO_TCP
    return gso_type == VNET_GSO_UDP_L4 and plan.protocol == PROTO_UDP


cdef inline int segment_size(const SplitPlan *plan, int i) noexcept nogil:
    """Bytes of segment i, headers included."""
    return plan.header + min(plan.segment, plan.payload - i * plan.segment)


cdef Py_ssize_t write_segment(const SplitPlan *plan, int i, uint8_t *out) noexcept nogil:
    # i < count, so first < payload and first + part <= payload: reads stay inside the super packet.
    cdef int first = i * plan.segment
    cdef int size = segment_size(plan, i)
    cdef int part = size - plan.header
    memcpy(out, plan.ip, <size_t>plan.header)
    memcpy(out + plan.header, plan.ip + plan.header + first, <size_t>part)
    if plan.version == 4:
        put16(out + 2, <unsigned int>size)
        put16(out + 4, <unsigned int>(get16(out + 4) + i))  # wraps at 16 bits
        store(out + 10, 0)
        store(out + 10, finish(add_bytes(0, out, plan.l4)))
    else:
        put16(out + 4, <unsigned int>(size - 40))
    if plan.protocol == PROTO_TCP:
        write_tcp(plan, i, first, out + plan.l4)
    else:
        put16(out + plan.l4 + 4, <unsigned int>(size - plan.l4))
    write_checksum(plan, out, size)
    return size


cdef inline void write_tcp(const SplitPlan *plan, int i, int first, uint8_t *tcp) noexcept nogil:
    put32(tcp + 4, get32(tcp + 4) + <unsigned int>first)  # wraps at 32 bits
    if i < plan.count - 1:
        tcp[13] &= ~TCP_FIN_PSH & 0xFF


cdef inline void write_checksum(const SplitPlan *plan, uint8_t *out, int size) noexcept nogil:
    cdef int length = size - plan.l4
    cdef uint8_t *field = out + plan.l4 + (16 if plan.protocol == PROTO_TCP else 6)
    cdef uint64_t total = pseudo_sum(out, plan.version, plan.protocol, <unsigned int>length)
    store(field, 0)
    total = add_bytes(total, out + plan.l4, length)
    store(field, finish(total) if plan.protocol == PROTO_TCP else finish_udp(total))
