# cython: cdivision=True
"""Packets on their way to the TUN device, merged so that one write carries many.

The window is one batch: `add` packets, then `drain`. Order within a connection never changes; what cannot
be merged passes through untouched. Not here: the write itself (`linux/`). Source: spec/io.md 6.2, 6.4.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

from fz_core.fastpath.virtio cimport (
    VNET_GSO_TCPV4,
    VNET_GSO_TCPV6,
    VNET_GSO_UDP_L4,
    VNET_HEADER,
    VNET_NEEDS_CSUM,
    VnetHeader,
    write_vnet,
)
from fz_core.packet.checksum cimport add_bytes, finish, fold, get32, pseudo_sum, put16, store
from fz_core.packet.layout cimport PROTO_TCP, PROTO_UDP
from fz_core.packet.packet cimport Packet

cdef enum:
    MAX_TOTAL = 65535          # bytes of one coalesced packet
    MAX_UDP_SEGMENTS = 128
    TCP_PSH = 0x08
    TCP_ACK = 0x10
    CONNECTION_KEY = 38        # version, protocol, two ports, two addresses


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
cdef class Entry:
    """One element of the queue: a packet, or the first packet of a run and those that follow it."""

    cdef Packet first
    cdef list rest
    cdef bint is_open          # whether more may be merged
    cdef int segment           # payload bytes of `first`
    cdef Py_ssize_t total      # bytes of the packet as it will be written
    cdef uint32_t next_seq     # TCP only
    cdef uint8_t psh           # TCP_PSH if any segment has it
    cdef uint8_t key[CONNECTION_KEY]


@cython.auto_pickle(False)
@cython.final
cdef class Coalescer:
    """Collects one batch of packets for the TUN device.

    With `enabled` False every packet is written alone, under an all-zero header. The coalescer owns the
    packets it is given until `drain`: the caller must not rewrite them.
    """

    cdef public bint enabled
    cdef list _entries
    cdef dict _recent          # connection key -> its most recent Entry
    cdef Entry _latest

    def __init__(self, bint enabled=True):
        self.enabled = enabled
        self._entries = []
        self._recent = {}

    def add(self, packet):
        """Queue a `Packet`, or any buffer that holds one; None, or the `DropReason` for bad bytes."""
        if not isinstance(packet, Packet):
            packet = Packet.parse_untrusted(packet)
            if not isinstance(packet, Packet):
                return packet
        enqueue(self, packet)
        return None

    def drain(self):
        """Empty the queue: its packets in order, each as bytes with its 10-byte virtio header."""
        cdef Entry entry
        cdef list entries = self._entries
        self._entries = []
        self._recent = {}
        self._latest = None
        return [alone(entry.first) if entry.rest is None else merged(entry) for entry in entries]

    def __len__(self):
        """Writes that `drain` would give."""
        return len(self._entries)


cdef int enqueue(Coalescer self, Packet packet) except -1:
    cdef Entry recent
    cdef uint8_t key[CONNECTION_KEY]
    cdef bint candidate
    if not self.enabled or packet.layout.src_port < 0 or packet.layout.is_echo:
        self._entries.append(new_entry(packet))
        return 0
    candidate = is_candidate(packet)
    fill_key(packet, key)
    recent = find_recent(self, key)
    if candidate and recent is not None and recent.is_open and fits(recent, packet):
        extend(recent, packet)
        self._latest = recent
        return 0
    start_run(self, packet, key, candidate)
    return 0


cdef Entry find_recent(Coalescer self, const uint8_t *key):
    """The connection's most recent entry; trains make it nearly always the latest one."""
    if self._latest is not None and memcmp(self._latest.key, key, CONNECTION_KEY) == 0:
        return self._latest
    return self._recent.get(PyBytes_FromStringAndSize(<const char *>key, CONNECTION_KEY))


cdef int start_run(Coalescer self, Packet packet, const uint8_t *key, bint candidate) except -1:
    cdef Entry entry = new_entry(packet)
    cdef const uint8_t *tcp = packet.start() + packet.layout.l4
    memcpy(entry.key, key, CONNECTION_KEY)
    entry.is_open = candidate
    entry.segment = payload_of(packet)
    if packet.layout.protocol == PROTO_TCP:
        entry.next_seq = get32(tcp + 4) + <uint32_t>entry.segment
        entry.psh = <uint8_t>(packet.layout.tcp_flags & TCP_PSH)
        if entry.psh:
            entry.is_open = False
    self._entries.append(entry)
    self._recent[PyBytes_FromStringAndSize(<const char *>key, CONNECTION_KEY)] = entry
    self._latest = entry
    return 0


cdef int extend(Entry entry, Packet packet) except -1:
    cdef int part = payload_of(packet)
    if entry.rest is None:
        entry.rest = []
    entry.rest.append(packet)
    entry.total += part
    entry.next_seq += <uint32_t>part
    if packet.layout.protocol == PROTO_TCP:
        entry.psh |= <uint8_t>(packet.layout.tcp_flags & TCP_PSH)
    if part < entry.segment or entry.psh:
        entry.is_open = False
    return 0


cdef Entry new_entry(Packet packet):
    cdef Entry entry = Entry.__new__(Entry)
    entry.first = packet
    entry.total = packet.length
    return entry


cdef inline int payload_of(Packet packet) noexcept:
    return <int>packet.length - packet.layout.payload


cdef bint is_candidate(Packet packet) noexcept:
    """Whether the packet may be part of a run at all. Lengths were checked when it was parsed."""
    if packet.layout.l4 != (20 if packet.layout.version == 4 else 40):
        return False  # IPv4 options or IPv6 extension headers
    if payload_of(packet) <= 0:
        return False
    if packet.layout.protocol == PROTO_TCP:
        return (packet.layout.tcp_flags & ~TCP_PSH) == TCP_ACK
    return packet.layout.protocol == PROTO_UDP


cdef bint fits(Entry entry, Packet packet) noexcept:
    """Whether a candidate of the same connection continues an open run."""
    cdef Packet first = entry.first
    cdef const uint8_t *a = first.start()
    cdef const uint8_t *b = packet.start()
    cdef int part = payload_of(packet)
    if part > entry.segment or entry.total + part > MAX_TOTAL:
        return False
    if first.layout.payload != packet.layout.payload or not same_ip_header(a, b, first.layout.version):
        return False
    if first.layout.protocol == PROTO_UDP:
        return entry.rest is None or len(entry.rest) + 1 < MAX_UDP_SEGMENTS
    a += first.layout.l4
    b += first.layout.l4
    # Acknowledgement number, then header length with the reserved bits (RFC 9768 uses one of them).
    if get32(b + 4) != entry.next_seq or memcmp(a + 8, b + 8, 5) != 0:
        return False
    # Both headers end at the same offset, at least 20 bytes after l4: options may differ only there.
    return memcmp(a + 20, b + 20, <size_t>(first.layout.payload - first.layout.l4 - 20)) == 0


cdef inline bint same_ip_header(const uint8_t *a, const uint8_t *b, int version) noexcept nogil:
    """What the segments of one super packet share, besides the addresses in the key."""
    if version == 4:  # TOS, the three flag bits, TTL
        return a[1] == b[1] and (a[6] & 0xE0) == (b[6] & 0xE0) and a[8] == b[8]
    # traffic class, hop limit; the flow label may differ
    return a[0] == b[0] and (a[1] & 0xF0) == (b[1] & 0xF0) and a[7] == b[7]


cdef inline void fill_key(Packet packet, uint8_t *key) noexcept:
    cdef const uint8_t *ip = packet.start()
    key[0] = <uint8_t>packet.layout.version
    key[1] = <uint8_t>packet.layout.protocol
    put16(key + 2, <unsigned int>packet.layout.src_port)
    put16(key + 4, <unsigned int>packet.layout.dst_port)
    if packet.layout.version == 4:
        memcpy(key + 6, ip + 12, 8)
        memset(key + 14, 0, CONNECTION_KEY - 14)
    else:
        memcpy(key + 6, ip + 8, 32)


cdef bytes alone(Packet packet):
    cdef bytes out = PyBytes_FromStringAndSize(NULL, VNET_HEADER + packet.length)
    cdef char *at = PyBytes_AS_STRING(out)
    memset(at, 0, VNET_HEADER)
    memcpy(at + VNET_HEADER, packet.start(), <size_t>packet.length)
    return out


cdef bytes merged(Entry entry):
    cdef bytes out = PyBytes_FromStringAndSize(NULL, VNET_HEADER + entry.total)
    cdef uint8_t *ip = <uint8_t *>PyBytes_AS_STRING(out) + VNET_HEADER
    cdef uint8_t *at = ip
    cdef Packet packet = entry.first
    # entry.total is the sum of what is copied here: the first packet and every further payload.
    memcpy(at, packet.start(), <size_t>packet.length)
    at += packet.length
    for packet in entry.rest:
        memcpy(at, packet.start() + packet.layout.payload, <size_t>payload_of(packet))
        at += payload_of(packet)
    write_vnet(<uint8_t *>PyBytes_AS_STRING(out), vnet_of(entry))
    write_headers(entry, ip)
    return out


cdef VnetHeader vnet_of(Entry entry) noexcept:
    cdef VnetHeader header
    cdef Packet first = entry.first
    header.flags = VNET_NEEDS_CSUM
    header.gso_type = VNET_GSO_UDP_L4
    header.csum_offset = 6
    if first.layout.protocol == PROTO_TCP:
        header.gso_type = VNET_GSO_TCPV4 if first.layout.version == 4 else VNET_GSO_TCPV6
        header.csum_offset = 16
    header.hdr_len = <uint16_t>first.layout.payload
    header.gso_size = <uint16_t>entry.segment
    header.csum_start = <uint16_t>first.layout.l4
    return header


cdef void write_headers(Entry entry, uint8_t *ip) noexcept:
    """Lengths, PSH and checksums of the whole; total <= MAX_TOTAL, so every length field holds it."""
    cdef Packet first = entry.first
    cdef unsigned int length = <unsigned int>(entry.total - first.layout.l4)
    cdef uint8_t *l4 = ip + first.layout.l4
    cdef int field = 16
    if first.layout.version == 4:
        put16(ip + 2, <unsigned int>entry.total)
        store(ip + 10, 0)
        store(ip + 10, finish(add_bytes(0, ip, first.layout.l4)))
    else:
        put16(ip + 4, <unsigned int>(entry.total - 40))
    if first.layout.protocol == PROTO_TCP:
        l4[13] |= entry.psh
    else:
        field = 6
        put16(l4 + 4, length)
    # The kernel adds the rest: pseudo-header sum, folded but not complemented.
    store(l4 + field, fold(pseudo_sum(ip, first.layout.version, first.layout.protocol, length)))
