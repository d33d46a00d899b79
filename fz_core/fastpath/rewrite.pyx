# cython: cdivision=True
"""Rewriting in place (`spec/tunnel.md` §15), across the families as RFC 7915 says; patched by RFC 1624.

The slow path's twin is `packet.Packet.set_*` and `packet/families.py`.
"""

from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.string cimport memcpy, memset

from fz_core.fastpath.flows cimport Flow, FlowKey
from fz_core.fastpath.system cimport htons
from fz_core.packet.checksum cimport add_bytes, adjust, finish, load, put16, store
from fz_core.packet.layout cimport PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, PROTO_UDP, Layout

cdef enum:
    FIN_SYN_RST = 0x07
    ECHO_REPLY_V4 = 0
    ECHO_REQUEST_V4 = 8
    ECHO_REQUEST_V6 = 128
    ECHO_REPLY_V6 = 129


cdef void key_of(const uint8_t *ip, const Layout *layout, FlowKey *key) noexcept nogil:
    memset(key, 0, sizeof(FlowKey))
    key.version = <uint8_t>layout.version
    key.protocol = <uint8_t>layout.protocol
    if layout.version == 4:
        memcpy(key.src, ip + 12, 4)
        memcpy(key.dst, ip + 16, 4)
    else:
        memcpy(key.src, ip + 8, 16)
        memcpy(key.dst, ip + 24, 16)
    if layout.is_echo:
        key.src_port = key.dst_port = load(ip + layout.l4 + 4)
    else:
        key.src_port = load(ip + layout.l4)
        key.dst_port = load(ip + layout.l4 + 2)


cdef bint is_plain(const Layout *layout) noexcept nogil:
    if layout.src_port < 0 or layout.l4 != (20 if layout.version == 4 else 40):
        return False
    return not layout.tcp_flags & FIN_SYN_RST


cdef void prepare_rewrite(Flow *flow) noexcept nogil:
    cdef FlowKey *old = &flow.key
    cdef FlowKey *new = &flow.after
    cdef uint64_t old_ports, new_ports
    if old.protocol == PROTO_ICMP or old.protocol == PROTO_ICMPV6:
        old_ports, new_ports = old.src_port, new.src_port  # one identifier
    else:
        old_ports, new_ports = <uint64_t>old.src_port + old.dst_port, <uint64_t>new.src_port + new.dst_port
    flow.crosses = old.version != new.version
    flow.old_ip_sum = add_bytes(add_bytes(0, old.src, 16), old.dst, 16)
    flow.new_ip_sum = add_bytes(add_bytes(0, new.src, 16), new.dst, 16)
    flow.old_sum, flow.new_sum = old_ports, new_ports
    if old.protocol != PROTO_ICMP:  # which covers no addresses
        flow.old_sum += flow.old_ip_sum
    if new.protocol != PROTO_ICMP:
        flow.new_sum += flow.new_ip_sum
    flow.is_rewritten = (
        flow.crosses or flow.old_ip_sum != flow.new_ip_sum or flow.old_sum != flow.new_sum or not same_ends(old, new)
    )


cdef bint same_ends(const FlowKey *a, const FlowKey *b) noexcept nogil:
    cdef int i
    for i in range(16):
        if a.src[i] != b.src[i] or a.dst[i] != b.dst[i]:
            return False
    return a.src_port == b.src_port and a.dst_port == b.dst_port


cdef uint8_t *rewrite(Flow *flow, uint8_t *ip, int l4, int size) noexcept nogil:
    if flow.crosses and flow.key.protocol != PROTO_TCP and flow.key.protocol != PROTO_UDP:
        rewrite_echo(flow, ip + l4, size - l4)
    else:
        rewrite_transport(flow, ip + l4)
    if flow.crosses:
        return to_v6(flow, ip, size) if flow.key.version == 4 else to_v4(flow, ip, size)
    if flow.key.version == 4:
        memcpy(ip + 12, flow.after.src, 4)
        memcpy(ip + 16, flow.after.dst, 4)
        store(ip + 10, adjust(load(ip + 10), flow.old_ip_sum, flow.new_ip_sum))
    else:
        memcpy(ip + 8, flow.after.src, 16)
        memcpy(ip + 24, flow.after.dst, 16)
    return ip


cdef void rewrite_transport(Flow *flow, uint8_t *l4) noexcept nogil:
    """Ports or identifier, and the checksum over them and the addresses; a UDP checksum of 0 stays 0."""
    cdef int field = 16
    if flow.key.protocol == PROTO_TCP or flow.key.protocol == PROTO_UDP:
        store(l4, flow.after.src_port)
        store(l4 + 2, flow.after.dst_port)
        if flow.key.protocol == PROTO_UDP:
            field = 6
            if load(l4 + 6) == 0:
                return
    else:
        store(l4 + 4, flow.after.src_port)
        field = 2
    store(l4 + field, adjust(load(l4 + field), flow.old_sum, flow.new_sum))


cdef void rewrite_echo(Flow *flow, uint8_t *l4, int length) noexcept nogil:
    """An echo that crosses: its type has another number, and only ICMPv6 covers a pseudo-header."""
    cdef uint64_t pseudo = <uint64_t>htons(<uint16_t>length) + htons(PROTO_ICMPV6)
    cdef uint64_t old = flow.old_sum + load(l4)
    cdef uint64_t new = flow.new_sum
    if flow.key.version == 4:
        l4[0] = ECHO_REPLY_V6 if l4[0] == ECHO_REPLY_V4 else ECHO_REQUEST_V6
        new += pseudo
    else:
        l4[0] = ECHO_REPLY_V4 if l4[0] == ECHO_REPLY_V6 else ECHO_REQUEST_V4
        old += pseudo
    new += load(l4)
    store(l4 + 4, flow.after.src_port)
    store(l4 + 2, adjust(load(l4 + 2), old, new))


cdef uint8_t *to_v6(Flow *flow, uint8_t *ip, int size) noexcept nogil:
    """The caller has 20 bytes of its own before the packet."""
    cdef uint8_t *out = ip - 20
    cdef uint8_t tos = ip[1]
    cdef uint8_t ttl = ip[8]
    out[0] = <uint8_t>(0x60 | (tos >> 4))
    out[1] = <uint8_t>((tos << 4) & 0xF0)
    out[2] = out[3] = 0
    put16(out + 4, <unsigned int>(size - 20))
    out[6] = flow.after.protocol
    out[7] = ttl
    memcpy(out + 8, flow.after.src, 16)
    memcpy(out + 24, flow.after.dst, 16)
    return out


cdef uint8_t *to_v4(Flow *flow, uint8_t *ip, int size) noexcept nogil:
    cdef uint8_t *out = ip + 20
    cdef uint8_t tos = <uint8_t>(((ip[0] & 0x0F) << 4) | (ip[1] >> 4))
    cdef uint8_t ttl = ip[7]
    flow.identification += 1
    out[0] = 0x45
    out[1] = tos
    put16(out + 2, <unsigned int>(size - 20))
    put16(out + 4, flow.identification)
    out[6] = out[7] = 0
    out[8] = ttl
    out[9] = flow.after.protocol
    store(out + 10, 0)
    memcpy(out + 12, flow.after.src, 4)
    memcpy(out + 16, flow.after.dst, 4)
    store(out + 10, finish(add_bytes(0, out, 20)))
    return out


cdef bint mark_congestion(uint8_t *ip, int version) noexcept nogil:
    cdef uint16_t old = load(ip)
    if version == 4:
        if not ip[1] & 3:
            return False
        ip[1] |= 3
        if load(ip) != old:
            store(ip + 10, adjust(load(ip + 10), old, load(ip)))
        return True
    if not ip[1] & 0x30:
        return False
    ip[1] |= 0x30
    return True
