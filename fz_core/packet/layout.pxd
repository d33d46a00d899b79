# Where things are in an IP packet: found once, trusted after (spec/tunnel.md section 2.1, 2.2).

from libc.stdint cimport uint8_t

cdef enum:
    MAX_PACKET = 1280      # the tunnel MTU; larger packets are refused

    PARSE_OK = 0
    PARSE_MALFORMED = 1
    PARSE_FRAGMENT = 2
    PARSE_TOO_BIG = 3

    PROTO_ICMP = 1
    PROTO_TCP = 6
    PROTO_UDP = 17
    PROTO_ICMPV6 = 58
    PROTO_FZ_CONTROL = 255


cdef struct Layout:
    int version            # 4 or 6
    int protocol           # transport protocol, after IPv6 extension headers
    int l4                 # offset of the transport header
    int payload            # offset of the transport payload
    int src_port           # TCP or UDP port, or echo identifier; else -1
    int dst_port
    int icmp_type          # else -1
    int icmp_code
    int tcp_flags          # byte 13 of the TCP header; else 0
    bint is_echo
    bint is_icmp_error
    bint is_fz_control


# Fills `out` and returns PARSE_OK, or another PARSE_ code and leaves `out` undefined.
cdef int parse_layout(const uint8_t *data, Py_ssize_t length, Layout *out) noexcept nogil
