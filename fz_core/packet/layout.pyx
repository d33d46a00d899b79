# cython: cdivision=True
"""The one parser of IP packets, over raw memory; `Packet` and `fastpath/` are its users.

Checksums are not verified and nothing is reassembled. Source: spec/tunnel.md section 2.1 and 2.2.
"""

from libc.stdint cimport uint8_t

from fz_core.packet.checksum cimport get16


cdef int parse_layout(const uint8_t *data, Py_ssize_t length, Layout *out) noexcept nogil:
    cdef int code
    if length > MAX_PACKET:
        return PARSE_TOO_BIG
    if length < 20:
        return PARSE_MALFORMED
    out.version = data[0] >> 4
    out.src_port = out.dst_port = -1
    out.icmp_type = out.icmp_code = -1
    out.tcp_flags = 0
    out.is_echo = out.is_icmp_error = out.is_fz_control = False
    if out.version == 4:
        code = parse_v4(data, length, out)
    elif out.version == 6:
        code = parse_v6(data, length, out)
    else:
        return PARSE_MALFORMED
    if code != PARSE_OK:
        return code
    return parse_transport(data, length, out)


cdef int parse_v4(const uint8_t *data, Py_ssize_t length, Layout *out) noexcept nogil:
    # length >= 20, checked by the caller.
    out.l4 = (data[0] & 0x0F) * 4
    if out.l4 < 20 or out.l4 > length or get16(data + 2) != length:
        return PARSE_MALFORMED
    if get16(data + 6) & 0x3FFF:  # more-fragments flag or fragment offset
        return PARSE_FRAGMENT
    out.protocol = data[9]
    return PARSE_OK if out.protocol != PROTO_ICMPV6 else PARSE_MALFORMED


cdef int parse_v6(const uint8_t *data, Py_ssize_t length, Layout *out) noexcept nogil:
    cdef int at = 40
    cdef int following
    if length < 40 or 40 + get16(data + 4) != length:
        return PARSE_MALFORMED
    following = data[6]
    while is_extension(following):
        if at + 8 > length:  # every extension header has at least 8 bytes
            return PARSE_MALFORMED
        if following == 44:
            if get16(data + at + 2) & 0xFFF9:  # offset, or more-fragments flag; bits 1 and 2 are reserved
                return PARSE_FRAGMENT
            following = data[at]
            at += 8
            continue
        following = data[at]
        at += 8 + 8 * data[at + 1]
        if at > length:
            return PARSE_MALFORMED
    out.protocol = following
    out.l4 = at  # <= length by the two checks above
    return PARSE_OK if out.protocol != PROTO_ICMP else PARSE_MALFORMED


cdef int parse_transport(const uint8_t *data, Py_ssize_t length, Layout *out) noexcept nogil:
    # out.l4 <= length holds for both versions.
    cdef const uint8_t *l4 = data + out.l4
    cdef int size = <int>length - out.l4
    if out.protocol == PROTO_TCP:
        return parse_tcp(l4, size, out)
    if out.protocol == PROTO_UDP:
        if size < 8 or get16(l4 + 4) != size:
            return PARSE_MALFORMED
        out.src_port = get16(l4)
        out.dst_port = get16(l4 + 2)
        out.payload = out.l4 + 8
        return PARSE_OK
    if out.protocol == PROTO_ICMP or out.protocol == PROTO_ICMPV6:
        return parse_icmp(l4, size, out)
    out.payload = out.l4
    if out.protocol == PROTO_FZ_CONTROL and out.version == 6 and size >= 8:
        out.is_fz_control = all_zero(data + 8, 32)
    return PARSE_OK


cdef int parse_tcp(const uint8_t *l4, int size, Layout *out) noexcept nogil:
    cdef int header
    if size < 20:
        return PARSE_MALFORMED
    header = (l4[12] >> 4) * 4
    if header < 20 or header > size:
        return PARSE_MALFORMED
    out.src_port = get16(l4)
    out.dst_port = get16(l4 + 2)
    out.tcp_flags = l4[13]
    out.payload = out.l4 + header
    return PARSE_OK


cdef int parse_icmp(const uint8_t *l4, int size, Layout *out) noexcept nogil:
    cdef int kind
    if size < 8:
        return PARSE_MALFORMED
    kind = out.icmp_type = l4[0]
    out.icmp_code = l4[1]
    out.payload = out.l4 + 8
    if out.protocol == PROTO_ICMP:
        out.is_echo = (kind == 8 or kind == 0) and out.icmp_code == 0
        out.is_icmp_error = kind == 3 or kind == 11
    else:
        out.is_echo = (kind == 128 or kind == 129) and out.icmp_code == 0
        out.is_icmp_error = kind == 1 or kind == 3 or (kind == 2 and out.icmp_code == 0)
    if out.is_echo:
        out.src_port = out.dst_port = get16(l4 + 4)
    return PARSE_OK


cdef inline bint is_extension(int protocol) noexcept nogil:
    """Hop-by-hop, routing, fragment, destination options, mobility, HIP, shim6 and two experimental."""
    return (
        protocol == 0 or protocol == 43 or protocol == 44 or protocol == 60 or protocol == 135
        or protocol == 139 or protocol == 140 or protocol == 253 or protocol == 254
    )


cdef inline bint all_zero(const uint8_t *p, int n) noexcept nogil:
    cdef int i
    cdef uint8_t seen = 0
    for i in range(n):
        seen |= p[i]
    return seen == 0
