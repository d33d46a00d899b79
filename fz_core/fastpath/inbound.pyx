# cython: cdivision=True
"""From the network to the device: receive a batch, open each datagram where it lies, merge, write.

Nothing is copied: a merged packet is written with one `writev` from the places where its parts were decrypted.
Source: spec/io.md sections 3.6 and 6.4. What is not an established flow goes to the ring, decrypted if it was data.
"""

from libc.errno cimport EAGAIN, EINTR, EINVAL, errno
from libc.math cimport INFINITY
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from fz_core.fastpath.codel cimport codel_signals
from fz_core.fastpath.flows cimport (
    INSTALLED, NONE, Flow, FlowKey, flow_diverted, flows_enter, flows_find, flows_free, flows_init, flows_is_full,
    flows_touch,
)
from fz_core.fastpath.peers cimport SESSIONS, Endpoint, Peer, Receiver, peers_find, peers_touch
from fz_core.fastpath.rewrite cimport flow_growth, is_plain, key_of, mark_congestion, rewrite
from fz_core.fastpath.ring cimport (
    DATAGRAM, FORGED, NO_PACKET, OPENED, Record, ring_bar, ring_free, ring_init, ring_push,
)
from fz_core.fastpath.system cimport (
    CMSG_DATA, CMSG_FIRSTHDR, CMSG_NXTHDR, IP_PKTINFO, IP_TOS, IPPROTO_IP, IPPROTO_IPV6, IPV6_PKTINFO, IPV6_TCLASS,
    MSG_CTRUNC, MSG_DONTWAIT, MSG_TRUNC, RELAY_PORT, SO_TIMESTAMPNS, SOL_SOCKET, SOL_UDP,
    UDP_GRO, cmsghdr, fz_fence, fz_get, fz_set, fz_timespec, fz_wall, htons, in6_pktinfo,
    in_pktinfo, iovec, mmsghdr, msghdr, recvmmsg, sockaddr_in, sockaddr_in6, writev,
)
from fz_core.fastpath.virtio cimport (
    VNET_GSO_TCPV4, VNET_GSO_TCPV6, VNET_GSO_UDP_L4, VNET_HEADER, VNET_NEEDS_CSUM, VnetHeader, write_vnet,
)
from fz_core.packet.checksum cimport (
    add_bytes, finish, fold, get16, get32, load, pseudo_sum, put16, store,
)
from fz_core.packet.layout cimport MAX_PACKET, PARSE_OK, PROTO_TCP, PROTO_UDP, Layout, parse_layout
from fz_core.wireguard.protocol cimport DATA_HEADER_LENGTH, DATA_OVERHEAD, MESSAGE_DATA
from fz_core.wireguard.session cimport FORGED as SEAL_BROKEN
from fz_core.wireguard.session cimport inner_length, session_open_with
from fz_core.wireguard.shared cimport fz_time_set
from fz_core.wireguard.timers cimport traffic_received

cdef enum:
    MAX_DATAGRAM = 1316        # inner 1280, WireGuard 32, channel data 4
    MAX_PLAINTEXT = 1300       # the slow path's limit, padding included
    HEADROOM = 32              # the first datagram's packet may grow by more than its own header leaves
    BUFFER_SIZE = HEADROOM + 64 * MAX_DATAGRAM
    CONTROL_SIZE = 128
    CHANNEL_HEADER = 4
    MAX_TOTAL = 65535
    FEW_MESSAGES = 4
    BULKY = 16384              # bytes of a message
    LARGE_PAYLOAD = 512        # of a packet that may be dropped to tell its sender to slow down
    ACK = 0x10
    PSH = 0x08

# Where a datagram came from, and how.
cdef struct Arrival:
    Endpoint source
    Endpoint local
    int ecn
    int stride
    double at                  # when the kernel had it, by the wall clock; 0 if unknown


cdef int inbound_init(Inbound *inb, PeerTable *peers, uint64_t seed) noexcept nogil:
    memset(inb, 0, sizeof(Inbound))
    inb.tun = inb.sockets[0] = inb.sockets[1] = -1
    inb.peers = peers
    inb.buffers = <uint8_t *>malloc(MESSAGES * BUFFER_SIZE)
    inb.messages = <mmsghdr *>calloc(MESSAGES, sizeof(mmsghdr))
    inb.vectors = <iovec *>calloc(MESSAGES, sizeof(iovec))
    inb.names = <sockaddr_in6 *>calloc(MESSAGES, sizeof(sockaddr_in6))
    inb.controls = <uint8_t *>calloc(MESSAGES, CONTROL_SIZE)
    inb.runs = <Run *>calloc(RUNS, sizeof(Run))
    if not (inb.buffers and inb.messages and inb.vectors and inb.names and inb.controls and inb.runs):
        return -1
    if flows_init(&inb.flows, seed) < 0 or ring_init(&inb.ring) < 0:
        return -1
    return 0


cdef void inbound_free(Inbound *inb) noexcept nogil:
    free(inb.buffers)
    free(inb.messages)
    free(inb.vectors)
    free(inb.names)
    free(inb.controls)
    free(inb.runs)
    flows_free(&inb.flows)
    ring_free(&inb.ring)


cdef int inbound_turn(Inbound *inb, int family, double now) noexcept nogil:
    cdef int count, i
    # Large messages are many packets each: then a few of them are enough for a turn.
    cdef int most = FEW_MESSAGES if inb.is_bulky[family] else MESSAGES
    cdef uint64_t bytes_before = inb.received
    prepare(inb, most)
    count = recvmmsg(inb.sockets[family], inb.messages, <unsigned int>most, MSG_DONTWAIT, NULL)
    while count < 0 and errno == EINTR:
        count = recvmmsg(inb.sockets[family], inb.messages, <unsigned int>most, MSG_DONTWAIT, NULL)
    inb.calls += 1
    inb.was_full = count == most
    if count < 0:
        if errno != EAGAIN:
            inb.errors += 1
        return 0
    inb.batch += 1
    inb.wall = 0 if inb.peers.clock else fz_wall()  # a held clock knows no delays
    for i in range(count):
        take_message(inb, i, family, now)
    write_runs(inb)
    inb.is_bulky[family] = inb.received - bytes_before > <uint64_t>count * BULKY
    return count


cdef void prepare(Inbound *inb, int most) noexcept nogil:
    """Point every message at its own buffers; the kernel overwrote the lengths."""
    cdef int i
    cdef msghdr *header
    for i in range(most):
        inb.vectors[i].iov_base = inb.buffers + <Py_ssize_t>i * BUFFER_SIZE + HEADROOM
        inb.vectors[i].iov_len = BUFFER_SIZE - HEADROOM
        fz_fence(inb.vectors[i].iov_base, BUFFER_SIZE - HEADROOM, BUFFER_SIZE - HEADROOM)
        header = &inb.messages[i].msg_hdr
        header.msg_name = &inb.names[i]
        header.msg_namelen = sizeof(sockaddr_in6)
        header.msg_iov = &inb.vectors[i]
        header.msg_iovlen = 1
        header.msg_control = inb.controls + i * <int>CONTROL_SIZE
        header.msg_controllen = CONTROL_SIZE
        header.msg_flags = 0


# one message


cdef void take_message(Inbound *inb, int i, int family, double now) noexcept nogil:
    """Every datagram of a message, in order; nothing of one that no peer sends (spec/io.md 3.6)."""
    cdef msghdr *header = &inb.messages[i].msg_hdr
    cdef uint8_t *data = <uint8_t *>inb.vectors[i].iov_base
    cdef int size = <int>inb.messages[i].msg_len
    cdef Arrival arrival
    cdef double delay
    cdef int at = 0, part
    if size == 0:
        return
    memset(&arrival, 0, sizeof(Arrival))
    arrival.stride = size
    read_name(header, family, &arrival)
    read_control(header, &arrival)
    arrival.local.port = <uint16_t>inb.ports[family]
    if arrival.stride > MAX_DATAGRAM:
        inb.oversized += 1
        return
    if arrival.local.ip_size == 0 or arrival.stride <= 0 or header.msg_flags & (MSG_TRUNC | MSG_CTRUNC):
        inb.malformed += 1
        return
    inb.received += <uint64_t>size
    if arrival.at > 0:
        # A clock that was set meanwhile gives no delay, or one that no queue has.
        delay = inb.wall - arrival.at
        if codel_signals(&inb.codel, delay if 0 < delay < 1 else 0, now):
            inb.owes_signal = True
    while at < size:
        part = min(arrival.stride, size - at)
        fz_fence(data, <size_t>(at + part), BUFFER_SIZE - HEADROOM)
        inb.datagrams += 1
        take_datagram(inb, data + at, part, &arrival, now)
        at += part


cdef void read_name(msghdr *header, int family, Arrival *arrival) noexcept nogil:
    cdef sockaddr_in *v4 = <sockaddr_in *>header.msg_name
    cdef sockaddr_in6 *v6 = <sockaddr_in6 *>header.msg_name
    if family == 0:
        memcpy(arrival.source.ip, &v4.sin_addr, 4)
        arrival.source.ip_size = 4
        arrival.source.port = v4.sin_port
    else:
        memcpy(arrival.source.ip, &v6.sin6_addr, 16)
        arrival.source.ip_size = 16
        arrival.source.port = v6.sin6_port


cdef void read_control(msghdr *header, Arrival *arrival) noexcept nogil:
    cdef cmsghdr *item = CMSG_FIRSTHDR(header)
    cdef int32_t number
    while item != NULL:
        if item.cmsg_level == IPPROTO_IP and item.cmsg_type == IP_PKTINFO:
            memcpy(arrival.local.ip, &(<in_pktinfo *>CMSG_DATA(item)).ipi_addr, 4)
            arrival.local.ip_size = 4
        elif item.cmsg_level == IPPROTO_IPV6 and item.cmsg_type == IPV6_PKTINFO:
            memcpy(arrival.local.ip, &(<in6_pktinfo *>CMSG_DATA(item)).ipi6_addr, 16)
            arrival.local.ip_size = 16
        elif item.cmsg_level == IPPROTO_IP and item.cmsg_type == IP_TOS:
            arrival.ecn = CMSG_DATA(item)[0] & 3  # the kernel sends one byte here
        elif item.cmsg_level == IPPROTO_IPV6 and item.cmsg_type == IPV6_TCLASS:
            memcpy(&number, CMSG_DATA(item), 4)
            arrival.ecn = number & 3
        elif item.cmsg_level == SOL_UDP and item.cmsg_type == UDP_GRO:
            memcpy(&number, CMSG_DATA(item), 4)
            arrival.stride = number
        elif item.cmsg_level == SOL_SOCKET and item.cmsg_type == SO_TIMESTAMPNS:
            arrival.at = fz_timespec(CMSG_DATA(item))
        item = CMSG_NXTHDR(header, item)


# one datagram


cdef void take_datagram(Inbound *inb, uint8_t *data, int size, Arrival *arrival, double now) noexcept nogil:
    """Open it if it is data of a session we know on the way we know; the driver gets it as it is otherwise."""
    cdef uint8_t *datagram = data
    cdef uint16_t channel = 0
    cdef int length = size
    cdef uint32_t slot
    cdef Peer *peer
    cdef Receiver *receiver
    cdef Py_ssize_t opened
    if size > CHANNEL_HEADER and data[0] & 0xF0 == 0x40 and arrival.source.port == htons(RELAY_PORT):
        channel = <uint16_t>get16(data)
        length = get16(data + 2)
        if length > size - CHANNEL_HEADER:
            divert(inb, DATAGRAM, NONE, data, size, arrival, False)
            return
        datagram = data + CHANNEL_HEADER
    slot = peer_of(inb, datagram, length)
    if slot == NONE or not comes_as_expected(inb.peers.peers[slot], channel, arrival):
        divert(inb, DATAGRAM, NONE, data, size, arrival, False)
        return
    peer = inb.peers.peers[slot]
    receiver = &peer.receivers[datagram[4] % SESSIONS]
    if not is_live(receiver, datagram, now):
        divert(inb, DATAGRAM, NONE, data, size, arrival, False)
        return
    opened = session_open_with(receiver.session, &receiver.key, datagram, length, datagram + DATA_HEADER_LENGTH)
    if opened < 0:
        if opened == SEAL_BROKEN:
            divert(inb, FORGED, slot, data, 0, arrival, False)
        else:
            divert(inb, DATAGRAM, NONE, data, size, arrival, False)  # a replay, untouched
        return
    traffic_received(peer.traffic, opened > 0, now)
    fz_time_set(&peer.unheard_since, INFINITY)
    take_packet(inb, slot, datagram + DATA_HEADER_LENGTH, <int>opened, arrival, now)


cdef inline bint is_live(const Receiver *receiver, const uint8_t *datagram, double now) noexcept nogil:
    if receiver.session == NULL or receiver.session.local_index != index_of(datagram):
        return False
    return now < receiver.session.receive_until


cdef inline uint32_t index_of(const uint8_t *datagram) noexcept nogil:
    return datagram[4] | (<uint32_t>datagram[5] << 8) | (<uint32_t>datagram[6] << 16) | (<uint32_t>datagram[7] << 24)


cdef inline uint32_t peer_of(Inbound *inb, const uint8_t *datagram, int length) noexcept nogil:
    """Whose data this is, or NONE."""
    if length < DATA_OVERHEAD or length - DATA_OVERHEAD > MAX_PLAINTEXT:
        return NONE
    if datagram[0] != MESSAGE_DATA or datagram[1] | datagram[2] | datagram[3]:
        return NONE
    return peers_find(inb.peers, index_of(datagram) >> 8)


cdef inline bint comes_as_expected(const Peer *peer, uint16_t channel, const Arrival *arrival) noexcept nogil:
    if not peer.may_receive or peer.receive_channel != channel:
        return False
    if not same_endpoint(&peer.source, &arrival.source):
        return False
    return peer.arrives_at.ip_size == 0 or same_endpoint(&peer.arrives_at, &arrival.local)


cdef inline bint same_endpoint(const Endpoint *a, const Endpoint *b) noexcept nogil:
    return a.port == b.port and a.ip_size == b.ip_size and memcmp(a.ip, b.ip, a.ip_size) == 0


cdef void divert(
    Inbound *inb, uint8_t kind, uint32_t peer, const uint8_t *data, int size, const Arrival *arrival,
    bint is_again
) noexcept nogil:
    cdef Record record
    memset(&record, 0, sizeof(Record))
    record.kind = kind
    record.size = <uint32_t>size
    record.peer = peer if peer == NONE else peer | <uint32_t>inb.peers.peers[peer].serial << 16
    record.source = arrival.source
    record.local = arrival.local
    record.ecn = <uint8_t>arrival.ecn
    record.is_again = is_again
    ring_push(&inb.ring, &record, data)


# one packet


cdef void take_packet(
    Inbound *inb, uint32_t slot, uint8_t *ip, int size, const Arrival *arrival, double now
) noexcept nogil:
    """Queue it for the device if its flow is established."""
    cdef Layout layout
    cdef FlowKey key
    cdef Flow *flow
    cdef uint32_t index = NONE
    cdef Py_ssize_t length = inner_length(ip, size) if size else 0
    if length < 0:
        divert(inb, NO_PACKET, slot, ip, 0, arrival, False)
        return
    if length == 0 or parse_layout(ip, length, &layout) != PARSE_OK or layout.src_port < 0:
        divert(inb, OPENED, slot, ip, <int>length, arrival, False)
        return
    key_of(ip, &layout, &key)
    key.peer = <uint16_t>slot
    index = flows_find(&inb.flows, &key)
    if index == NONE:
        if flows_is_full(&inb.flows):
            write_runs(inb)  # one of them may belong to the flow that goes
        index = flows_enter(&inb.flows, &key)
    flow = &inb.flows.flows[index]
    if not is_plain(&layout) or not may_pass(inb, flow, slot, &layout, <int>length, ip, now):
        divert(inb, OPENED, slot, ip, <int>length, arrival, flow.diverted != 0)
        if flow_diverted(flow, inb.ring.produced, fz_get(&inb.ring.done), now):
            ring_bar(&inb.ring, inb.ring.produced, now)
        return
    if inb.owes_signal and layout.protocol == PROTO_TCP and length - layout.payload >= LARGE_PAYLOAD:
        inb.owes_signal = False
        inb.signalled += 1
        if not mark_congestion(ip, layout.version):
            return
    flow.packets += 1
    flow.bytes += <uint64_t>(length - layout.payload)
    flow.last_at = now
    flows_touch(&inb.flows, index)
    inb.peers.peers[slot].heard_at = now
    peers_touch(inb.peers, slot, 1)
    inb.packets += 1
    inb.bytes += <uint64_t>length
    if arrival.ecn == 3:
        mark_congestion(ip, layout.version)
    queue(inb, index, ip, <int>length, &layout)


cdef bint may_pass(
    Inbound *inb, const Flow *flow, uint32_t slot, const Layout *layout, int length, const uint8_t *ip, double now
) noexcept nogil:
    if flow.state != INSTALLED or flow.generation != inb.flows.generation:
        return False
    if flow.diverted > fz_get(&inb.ring.done):
        return False
    if flow.peer_generation != inb.peers.peers[slot].generation:
        return False
    if now >= flow.until or now >= flow.last_at + flow.ttl:
        return False
    if not flow.crosses:
        return True
    if layout.protocol == PROTO_UDP and load(ip + layout.l4 + 6) == 0:
        return False  # a checksum that was left out must be computed
    return length + flow_growth(flow) <= MAX_PACKET


# merging


cdef void queue(Inbound *inb, uint32_t index, uint8_t *ip, int size, const Layout *layout) noexcept nogil:
    """To the flow's run if the packet continues it, or to a new one."""
    cdef Flow *flow = &inb.flows.flows[index]
    cdef int part = size - layout.payload
    cdef bint is_candidate = inb.merges and may_merge(layout, part)
    cdef Run *run
    if flow.batch == inb.batch and flow.run < inb.run_count:
        run = &inb.runs[flow.run]
        if is_candidate and run.is_open and run.flow == index and continues(run, flow, ip, layout, part):
            extend(run, ip, layout, part)
            return
    if inb.run_count == RUNS:
        write_runs(inb)
    run = &inb.runs[inb.run_count]
    flow.batch = inb.batch
    flow.run = <uint16_t>inb.run_count
    inb.run_count += 1
    start(run, index, ip, size, layout, is_candidate)


cdef inline bint may_merge(const Layout *layout, int part) noexcept nogil:
    if part <= 0:
        return False
    if layout.protocol == PROTO_TCP:
        return (layout.tcp_flags & ~PSH) == ACK
    return layout.protocol == PROTO_UDP


cdef inline void start(
    Run *run, uint32_t index, uint8_t *ip, int size, const Layout *layout, bint is_candidate
) noexcept nogil:
    run.flow = index
    run.first = ip
    run.size = run.total = size
    run.l4 = layout.l4
    run.header = layout.payload
    run.segment = size - layout.payload
    run.count = 1
    run.psh = 0
    run.is_open = is_candidate
    if layout.protocol == PROTO_TCP:
        run.next_sequence = get32(ip + layout.l4 + 4) + <uint32_t>run.segment
        run.psh = <uint8_t>(layout.tcp_flags & PSH)
        if run.psh:
            run.is_open = False


cdef inline void extend(Run *run, uint8_t *ip, const Layout *layout, int part) noexcept nogil:
    run.parts[run.count + 1].iov_base = ip + layout.payload
    run.parts[run.count + 1].iov_len = <size_t>part
    run.count += 1
    run.total += part
    run.next_sequence += <uint32_t>part
    if layout.protocol == PROTO_TCP:
        run.psh |= <uint8_t>(layout.tcp_flags & PSH)
    if part < run.segment or run.psh or run.count == RUN_PACKETS:
        run.is_open = False


cdef inline bint continues(
    const Run *run, const Flow *flow, const uint8_t *ip, const Layout *layout, int part
) noexcept nogil:
    """Whether a candidate continues an open run of its flow (spec/io.md 6.4)."""
    cdef const uint8_t *a = run.first
    cdef const uint8_t *b = ip
    if part > run.segment or run.total + part + flow_growth(flow) > MAX_TOTAL or run.header != layout.payload:
        return False
    if layout.version == 4:  # TOS, the three flag bits, TTL
        if a[1] != b[1] or (a[6] & 0xE0) != (b[6] & 0xE0) or a[8] != b[8]:
            return False
    elif a[0] != b[0] or (a[1] & 0xF0) != (b[1] & 0xF0) or a[7] != b[7]:  # traffic class, hop limit
        return False
    if layout.protocol == PROTO_UDP:
        return True
    a += run.l4
    b += run.l4
    # Acknowledgement number, then header length with the reserved bits.
    if get32(b + 4) != run.next_sequence or memcmp(a + 8, b + 8, 5) != 0:
        return False
    return memcmp(a + 20, b + 20, <size_t>(run.header - run.l4 - 20)) == 0


cdef void write_runs(Inbound *inb) noexcept nogil:
    cdef int i
    for i in range(inb.run_count):
        write_run(inb, &inb.runs[i])
    inb.run_count = 0
    inb.batch += 1  # no flow's run continues


cdef void write_run(Inbound *inb, Run *run) noexcept nogil:
    cdef Flow *flow = &inb.flows.flows[run.flow]
    cdef uint8_t *ip = run.first
    cdef int l4 = run.l4
    cdef int growth = 0
    memset(run.vnet, 0, VNET_HEADER)
    if flow.is_rewritten:
        growth = flow_growth(flow)
        ip = rewrite(flow, ip, l4, run.size)
        l4 += growth
    if run.count > 1:
        flow.identification += <uint16_t>(run.count - 1)
        finish_headers(run, ip, l4, growth, flow)
    run.parts[0].iov_base = run.vnet
    run.parts[0].iov_len = VNET_HEADER
    run.parts[1].iov_base = ip
    run.parts[1].iov_len = <size_t>(run.size + growth)
    while writev(inb.tun, run.parts, run.count + 1) < 0:
        if errno == EINTR:
            continue
        inb.write_errors += 1
        inb.last_error = errno
        if errno == EINVAL and run.count > 1:
            inb.merges = False  # single packets only, from now on
            fz_set(&inb.refused_merged, <uint64_t>errno)
        return
    inb.writes += 1


cdef void finish_headers(Run *run, uint8_t *ip, int l4, int growth, const Flow *flow) noexcept nogil:
    """Lengths, PSH and checksums of the whole; total <= MAX_TOTAL even if it grew, so every length field holds it."""
    cdef VnetHeader vnet
    cdef int version = flow.after.version
    cdef int total = run.total + growth
    cdef unsigned int length = <unsigned int>(total - l4)
    cdef int field = 6
    vnet.flags = VNET_NEEDS_CSUM
    vnet.gso_type = VNET_GSO_UDP_L4
    if flow.after.protocol == PROTO_TCP:
        vnet.gso_type = VNET_GSO_TCPV4 if version == 4 else VNET_GSO_TCPV6
        field = 16
        ip[l4 + 13] |= run.psh
    else:
        put16(ip + l4 + 4, length)
    if version == 4:
        put16(ip + 2, <unsigned int>total)
        store(ip + 10, 0)
        store(ip + 10, finish(add_bytes(0, ip, l4)))
    else:
        put16(ip + 4, <unsigned int>(total - 40))
    vnet.hdr_len = <uint16_t>(run.header + growth)
    vnet.gso_size = <uint16_t>run.segment
    vnet.csum_start = <uint16_t>l4
    vnet.csum_offset = <uint16_t>field
    write_vnet(run.vnet, vnet)
    # The kernel adds the rest: pseudo-header sum, folded but not complemented.
    store(ip + l4 + field, fold(pseudo_sum(ip, version, flow.after.protocol, length)))
