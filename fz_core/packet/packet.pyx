# cython: cdivision=True
"""`Packet`: an inner IP packet, parsed once, rewritten in place with its checksums kept right.

A `Packet` exists only for bytes that passed `layout.parse_layout`; every accessor below relies on that.
Not here: building packets (`build`), ICMP errors (`icmp`). Source: spec/tunnel.md section 2.
"""

import ipaddress

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.string cimport memcmp, memcpy

from fz_core.packet.checksum cimport (
    add_bytes,
    adjust,
    finish,
    load,
    pseudo_sum,
    put16,
    store,
)
from fz_core.packet.layout cimport (
    PARSE_FRAGMENT,
    PARSE_OK,
    PARSE_TOO_BIG,
    PROTO_ICMP,
    PROTO_ICMPV6,
    PROTO_TCP,
    PROTO_UDP,
    parse_layout,
)

from fz_core.packet.drops import DropReason

cdef object MALFORMED = DropReason.MALFORMED_PACKET
cdef object FRAGMENTED = DropReason.FRAGMENTED
cdef object TOO_BIG = DropReason.TOO_BIG


cdef object packet_from_memory(const uint8_t *data, Py_ssize_t length):
    cdef Layout layout
    cdef Packet packet
    cdef int code = parse_layout(data, length, &layout)
    if code == PARSE_OK:
        packet = Packet.__new__(Packet)
        packet.layout = layout
        packet.length = length
        # length <= MAX_PACKET, so HEADROOM + length + TAILROOM <= CAPACITY.
        memcpy(packet.start(), data, <size_t>length)
        return packet
    if code == PARSE_FRAGMENT:
        return FRAGMENTED
    return TOO_BIG if code == PARSE_TOO_BIG else MALFORMED


@cython.freelist(64)
@cython.final
@cython.auto_pickle(False)
cdef class Packet:
    """One IPv4 or IPv6 packet of at most 1280 bytes; made by `parse_untrusted` or a builder.

    Supports the buffer protocol (read-only). Equal to another packet with the same bytes.
    """

    def __init__(self):
        raise TypeError("Packet cannot be made directly, use Packet.parse_untrusted or a builder")

    @staticmethod
    def parse_untrusted(data):
        """The packet in `data` (copied), or the `DropReason` why it is refused."""
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            return packet_from_memory(<const uint8_t *>view.buf, view.len)
        finally:
            PyBuffer_Release(&view)

    # -- reading

    @property
    def version(self):
        """4 or 6."""
        return self.layout.version

    @property
    def protocol(self):
        """Transport protocol number; for IPv6, after the extension headers."""
        return self.layout.protocol

    @property
    def src(self):
        """Source address, 4 or 16 bytes."""
        if self._src is None:
            self._src = address_at(self, True)
        return self._src

    @property
    def dst(self):
        """Destination address, 4 or 16 bytes."""
        if self._dst is None:
            self._dst = address_at(self, False)
        return self._dst

    @property
    def src_port(self):
        """TCP or UDP source port, or the echo identifier; else -1."""
        return self.layout.src_port

    @property
    def dst_port(self):
        """TCP or UDP destination port, or the echo identifier; else -1."""
        return self.layout.dst_port

    @property
    def icmp_type(self):
        """ICMP or ICMPv6 type, else -1."""
        return self.layout.icmp_type

    @property
    def icmp_code(self):
        """ICMP or ICMPv6 code, else -1."""
        return self.layout.icmp_code

    @property
    def tcp_flags(self):
        """The eight TCP flags CWR ECE URG ACK PSH RST SYN FIN, else 0."""
        return self.layout.tcp_flags

    @property
    def is_echo(self):
        """Whether this is an echo request or reply with code 0."""
        return self.layout.is_echo

    @property
    def is_icmp_error(self):
        """Whether this is an ICMP message that reports a failed packet (section 2.6)."""
        return self.layout.is_icmp_error

    @property
    def is_fz_control(self):
        """Whether this is a p2p control packet: protocol 255 from `::` to `::`, 8 bytes or more."""
        return self.layout.is_fz_control

    @property
    def control_event_type(self):
        """Event type of a p2p control packet, else -1."""
        return self.start()[self.layout.l4] if self.layout.is_fz_control else -1

    @property
    def control_body(self):
        """Body of a p2p control packet, else empty."""
        if not self.layout.is_fz_control:
            return b""
        return slice_of(self, self.layout.l4 + 8)  # is_fz_control proves 8 bytes

    @property
    def payload_length(self):
        """Bytes after the TCP, UDP or ICMP header; for other protocols the whole IP payload."""
        return self.length - self.layout.payload

    @property
    def payload(self):
        """Copy of the bytes counted by `payload_length`."""
        return slice_of(self, self.layout.payload)

    @property
    def l4_offset(self):
        """Where the transport header starts."""
        return self.layout.l4

    @property
    def ecn(self):
        """The ECN codepoint: 0 not-ECT, 1 ECT(1), 2 ECT(0), 3 CE."""
        return get_ecn(self)

    @property
    def data(self):
        """A copy of the whole packet."""
        return slice_of(self, 0)

    def icmp_error(self):
        """The `IcmpError` inside, None if this reports no error, or the `DropReason` why it is unreadable."""
        from fz_core.packet.icmp import parse_icmp_error  # icmp builds on Packet

        return parse_icmp_error(self)

    def copy(self):
        """An independent packet with the same bytes."""
        cdef Packet other = Packet.__new__(Packet)
        other.layout = self.layout
        other.length = self.length
        memcpy(other.start(), self.start(), <size_t>self.length)
        return other

    # -- rewriting

    def set_src(self, bytes address not None):
        """Replace the source address by one of the same family."""
        rewrite_address(self, address, True)
        self._src = address

    def set_dst(self, bytes address not None):
        """Replace the destination address by one of the same family."""
        rewrite_address(self, address, False)
        self._dst = address

    def set_src_port(self, int port):
        """Replace the source port or echo identifier; no effect on what has neither."""
        rewrite_port(self, port, True)

    def set_dst_port(self, int port):
        """Replace the destination port or echo identifier; no effect on what has neither."""
        rewrite_port(self, port, False)

    def set_ecn(self, int codepoint):
        """Replace the ECN codepoint."""
        if not 0 <= codepoint <= 3:
            raise ValueError(f"ECN codepoint {codepoint} is out of range, use 0 to 3")
        put_ecn(self, codepoint)

    def merge_ecn(self, int outer):
        """Take over congestion seen on the way: ECT becomes CE under an outer CE, nothing else changes."""
        cdef int inner = get_ecn(self)
        if outer == 3 and (inner == 1 or inner == 2):
            put_ecn(self, 3)

    def update_checksums(self):
        """Compute all checksums anew."""
        refresh_checksums(self)

    # -- protocol plumbing

    def __len__(self):
        return self.length

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.start(), self.length, 1, flags)

    def __eq__(self, other):
        cdef Packet that
        if not isinstance(other, Packet):
            return NotImplemented
        that = other
        return self.length == that.length and memcmp(self.start(), that.start(), <size_t>self.length) == 0

    def __hash__(self):
        raise TypeError("Packet is mutable and cannot be hashed, use its data")

    def __repr__(self):
        return f"<Packet {describe(self)} {self.length} bytes>"


def verify_checksums(Packet packet not None):
    """Names of the checksums that are wrong, of `ip`, `tcp`, `udp`, `icmp`; an empty tuple if all hold.

    0xFFFF and 0x0000 are equal; a UDP checksum of 0 over IPv4 is "not computed" and holds.
    """
    cdef uint8_t *ip = packet.start()
    cdef int field = checksum_field(packet.layout.protocol)
    cdef uint16_t stored
    wrong = []
    if packet.layout.version == 4 and not same(load(ip + 10), header_checksum(packet)):
        wrong.append("ip")
    if field >= 0:
        stored = load(ip + packet.layout.l4 + field)
        unused = packet.layout.protocol == PROTO_UDP and packet.layout.version == 4 and stored == 0
        if not unused and not same(stored, transport_checksum(packet, field)):
            wrong.append({PROTO_TCP: "tcp", PROTO_UDP: "udp"}.get(packet.layout.protocol, "icmp"))
    return tuple(wrong)


cdef bytes address_at(Packet packet, bint source):
    cdef char *ip = <char *>packet.start()
    if packet.layout.version == 4:  # parse_layout proved 20 bytes, 40 for IPv6
        return PyBytes_FromStringAndSize(ip + (12 if source else 16), 4)
    return PyBytes_FromStringAndSize(ip + (8 if source else 24), 16)


cdef bytes slice_of(Packet packet, Py_ssize_t first):
    return PyBytes_FromStringAndSize(<char *>packet.start() + first, packet.length - first)


cdef int checksum_field(int protocol) noexcept nogil:
    """Offset of the checksum inside the transport header, -1 where there is none."""
    if protocol == PROTO_TCP:
        return 16
    if protocol == PROTO_UDP:
        return 6
    if protocol == PROTO_ICMP or protocol == PROTO_ICMPV6:
        return 2
    return -1


cdef void adjust_transport(Packet packet, uint64_t old, uint64_t new) noexcept:
    """Patch the transport checksum for words that changed; a UDP checksum of 0 stays 0."""
    cdef int field = checksum_field(packet.layout.protocol)
    cdef uint8_t *at
    if field < 0:
        return
    at = packet.start() + packet.layout.l4 + field  # inside the transport header that was parsed
    if packet.layout.protocol == PROTO_UDP and load(at) == 0:
        return
    store(at, adjust(load(at), old, new))


cdef int rewrite_address(Packet packet, bytes address, bint source) except -1:
    cdef int version = packet.layout.version
    cdef int size = 4 if version == 4 else 16
    cdef uint8_t *ip = packet.start()
    cdef uint8_t *at
    cdef uint64_t old, new
    if len(address) != size:
        raise ValueError(f"address of {len(address)} bytes in an IPv{version} packet, use {size} bytes")
    at = ip + ((12 if source else 16) if version == 4 else (8 if source else 24))
    old = add_bytes(0, at, size)
    memcpy(at, PyBytes_AS_STRING(address), <size_t>size)
    new = add_bytes(0, at, size)
    if version == 4:
        store(ip + 10, adjust(load(ip + 10), old, new))
    if packet.layout.protocol != PROTO_ICMP:  # ICMPv4 has no pseudo-header
        adjust_transport(packet, old, new)
    return 0


cdef int rewrite_port(Packet packet, int port, bint source) except -1:
    cdef uint8_t *at = packet.start() + packet.layout.l4
    cdef uint16_t old
    if not 0 <= port <= 65535:
        raise ValueError(f"port {port} is out of range, use 0 to 65535")
    if packet.layout.src_port < 0:
        return 0
    if packet.layout.is_echo:
        packet.layout.src_port = packet.layout.dst_port = port
        at += 4
    elif source:
        packet.layout.src_port = port
    else:
        packet.layout.dst_port = port
        at += 2
    old = load(at)
    put16(at, <unsigned int>port)
    adjust_transport(packet, old, load(at))
    return 0


cdef inline int get_ecn(Packet packet) noexcept:
    cdef int byte = packet.start()[1]
    return byte & 3 if packet.layout.version == 4 else (byte >> 4) & 3


cdef void put_ecn(Packet packet, int codepoint) noexcept:
    cdef uint8_t *ip = packet.start()
    cdef uint16_t old = load(ip)
    if packet.layout.version == 4:
        ip[1] = <uint8_t>((ip[1] & 0xFC) | codepoint)
        if load(ip) != old:
            store(ip + 10, adjust(load(ip + 10), old, load(ip)))
    else:
        ip[1] = <uint8_t>((ip[1] & 0xCF) | (codepoint << 4))


cdef uint16_t header_checksum(Packet packet) noexcept:
    """The right IPv4 header checksum, whatever is stored now."""
    cdef uint8_t *ip = packet.start()
    return finish(add_bytes(add_bytes(0, ip, 10), ip + 12, packet.layout.l4 - 12))


cdef uint16_t transport_checksum(Packet packet, int field) noexcept:
    """The right transport checksum, whatever is stored now; `field` is its even offset."""
    cdef uint8_t *l4 = packet.start() + packet.layout.l4
    cdef Py_ssize_t size = packet.length - packet.layout.l4
    cdef uint64_t total = 0
    if packet.layout.protocol != PROTO_ICMP:
        total = pseudo_sum(packet.start(), packet.layout.version, packet.layout.protocol, <unsigned int>size)
    total = add_bytes(total, l4, field)
    return finish(add_bytes(total, l4 + field + 2, size - field - 2))


cdef void refresh_checksums(Packet packet) noexcept:
    cdef uint8_t *ip = packet.start()
    cdef int field = checksum_field(packet.layout.protocol)
    cdef uint16_t value
    if packet.layout.version == 4:
        store(ip + 10, header_checksum(packet))
    if field >= 0:
        value = transport_checksum(packet, field)
        if packet.layout.protocol == PROTO_UDP and value == 0:
            value = 0xFFFF
        store(ip + packet.layout.l4 + field, value)


cdef inline bint same(uint16_t a, uint16_t b) noexcept:
    return a == b or (a == 0 and b == 0xFFFF) or (a == 0xFFFF and b == 0)


cdef str describe(Packet packet):
    src = ipaddress.ip_address(packet.src)
    dst = ipaddress.ip_address(packet.dst)
    if packet.layout.is_echo:
        return f"echo {src} > {dst} id {packet.src_port}"
    if packet.layout.icmp_type >= 0:
        return f"icmp {src} > {dst} type {packet.icmp_type} code {packet.icmp_code}"
    if packet.layout.src_port >= 0:
        name = "tcp" if packet.layout.protocol == PROTO_TCP else "udp"
        return f"{name} {src} {packet.src_port} > {dst} {packet.dst_port}"
    return f"proto {packet.protocol} {src} > {dst}"
