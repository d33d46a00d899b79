# cython: cdivision=True
"""From the device to the network: read a super packet, look its flow up once, seal each segment into a batch.

A payload is read where the kernel put it and sealed from there straight into the batch: each segment's header is
written in front of its payload, over the end of the one before, which is sealed by then.
Source: spec/io.md sections 3.4, 3.5, 6.2, 6.3. What is not an established flow goes to the ring.
"""

from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, ENOBUFS, errno
from libc.math cimport INFINITY
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memmove, memset
from posix.unistd cimport read

from fz_core.fastpath.codel cimport codel_signals
from fz_core.fastpath.flows cimport (
    INSTALLED, NONE, Flow, FlowKey, flow_diverted, flows_enter, flows_free, flows_init, flows_touch,
)
from fz_core.fastpath.peers cimport CONTROL_SIZE, Peer, peers_touch, time_of
from fz_core.fastpath.rewrite cimport HEADER_GROWTH, flow_growth, is_plain, key_of, mark_congestion, rewrite
from fz_core.fastpath.ring cimport FROM_DEVICE, Record, ring_bar, ring_free, ring_init, ring_push
from fz_core.fastpath.split cimport SPLIT_OK, SplitPlan, plan_split
from fz_core.fastpath.system cimport (
    CMSG_DATA, CMSG_LEN, CMSG_SPACE, IP_TOS, IPPROTO_IP, IPPROTO_IPV6, IPV6_TCLASS, MSG_DONTWAIT, MSG_NOSIGNAL,
    SOL_UDP, UDP_SEGMENT, cmsghdr, fz_fence, fz_get, fz_set, iovec, msghdr, sendmsg,
)
from fz_core.fastpath.virtio cimport (
    VNET_GSO_NONE, VNET_HEADER, VNET_NEEDS_CSUM, VnetHeader, read_vnet,
)
from fz_core.packet.checksum cimport (
    add_bytes, finish, finish_udp, get16, get32, load, pseudo_sum, put16, put32, store,
)
from fz_core.packet.layout cimport PARSE_OK, PROTO_TCP, PROTO_UDP, Layout, parse_layout
from fz_core.wireguard.protocol cimport DATA_OVERHEAD
from fz_core.wireguard.session cimport session_seal_with
from fz_core.wireguard.shared cimport fz_time_get, fz_time_set
from fz_core.wireguard.timers cimport traffic_sent

cdef enum:
    READ_SIZE = VNET_HEADER + 65535
    HEADROOM = 64
    BATCH_SIZE = 65535
    MAX_SEGMENTS = 64          # UDP_MAX_SEGMENTS of older kernels
    HEADERS_V4 = 68            # longest IPv4 header and UDP
    HEADERS_V6 = 48
    CHANNEL_HEADER = 4
    PSH_FIN = 0x09
    BYTES_PER_TURN = 128 << 10 # then the other half has its turn
    READS_PER_LOOK = 4         # looks at the clock
    LARGE = 4096               # bytes of a read that others may pass
    SMALL = 2048               # of one that may pass

cdef double PATIENCE = 0.1     # so long a socket may take nothing before what waits for it is dropped


cdef int outbound_init(Outbound *out, PeerTable *peers, uint64_t seed) noexcept nogil:
    cdef int i
    memset(out, 0, sizeof(Outbound))
    out.tun = out.sockets[0] = out.sockets[1] = -1
    out.peers = peers
    if flows_init(&out.flows, seed) < 0 or ring_init(&out.ring) < 0:
        return -1
    for i in range(OPEN_BATCHES):
        out.batches[i].memory = <uint8_t *>malloc(BATCH_SIZE)
        if out.batches[i].memory == NULL:
            return -1
    return 0


cdef void outbound_free(Outbound *out) noexcept nogil:
    cdef int i
    for i in range(OPEN_BATCHES):
        free(out.batches[i].memory)
    for i in range(BACKLOG):
        free(out.backlog[i].memory)
    flows_free(&out.flows)
    ring_free(&out.ring)


cdef int outbound_turn(Outbound *out, double now) noexcept nogil:
    cdef int done = 0, taken
    cdef Py_ssize_t total = 0
    if out.is_stalled and not outbound_flush(out, now):
        return 0
    out.is_drained = False
    while total < BYTES_PER_TURN and not out.is_stalled:
        if not out.is_drained:
            read_backlog(out, now)
        if out.waiting == 0:
            break
        taken = choose(out)
        total += out.backlog[taken].size
        done += 1
        handle(out, &out.backlog[taken], now)
        remove(out, taken)
        if done % READS_PER_LOOK == 0:
            now = time_of(out.peers)
            out.is_drained = False  # something may have come meanwhile
    out.is_drained = out.is_drained and out.waiting == 0
    if out.open_count:
        outbound_flush(out, now)
    return done


# the backlog: read early, so that a packet of a calm flow need not wait for everything a busy one has queued


cdef void read_backlog(Outbound *out, double now) noexcept nogil:
    """Read as long as there is room and something to read."""
    cdef Slot *slot
    cdef Py_ssize_t size
    while out.waiting < BACKLOG:
        slot = &out.backlog[out.waiting]
        if slot.memory == NULL:
            slot.memory = <uint8_t *>malloc(HEADROOM + READ_SIZE)
            if slot.memory == NULL:
                return
        fz_fence(slot.memory + HEADROOM, READ_SIZE, READ_SIZE)
        size = read(out.tun, slot.memory + HEADROOM, READ_SIZE)
        if size > VNET_HEADER:
            fz_fence(slot.memory + HEADROOM, <size_t>size, READ_SIZE)
            out.reads += 1
            slot.size = <int>size
            slot.flow = flow_of(out, slot.memory + HEADROOM, size)
            slot.read_at = now
            out.waiting += 1
            continue
        if size < 0 and errno == EINTR:
            continue
        if size >= 0 or errno != EAGAIN:
            fz_set(&out.device_failed, 1)
        out.is_drained = True
        return


cdef int choose(const Outbound *out) noexcept nogil:
    """The first, or before a large one a small one that is the first of its flow."""
    cdef int i
    if out.backlog[0].size <= LARGE:
        return 0
    for i in range(1, out.waiting):
        if out.backlog[i].size <= SMALL and out.backlog[i].flow != NONE and is_first(out, i):
            return i
    return 0


cdef inline bint is_first(const Outbound *out, int which) noexcept nogil:
    cdef int i
    for i in range(which):
        if out.backlog[i].flow == out.backlog[which].flow or out.backlog[i].flow == NONE:
            return False
    return True


cdef void remove(Outbound *out, int which) noexcept nogil:
    """Close the gap; the memory goes to the end."""
    cdef Slot gone = out.backlog[which]
    out.waiting -= 1
    memmove(&out.backlog[which], &out.backlog[which + 1], <size_t>(out.waiting - which) * sizeof(Slot))
    out.backlog[out.waiting] = gone


cdef void handle(Outbound *out, Slot *slot, double now) noexcept nogil:
    cdef bint is_late = codel_signals(&out.codel, now - slot.read_at, now)
    if not carry(out, slot, is_late, now):
        divert(out, slot, now)


cdef void divert(Outbound *out, const Slot *slot, double now) noexcept nogil:
    """To the slow path. What follows in its flow must not overtake it."""
    cdef Record record
    cdef bint is_super = read_vnet(slot.memory + HEADROOM).gso_type != VNET_GSO_NONE
    memset(&record, 0, sizeof(Record))
    record.kind = FROM_DEVICE
    record.peer = NONE
    record.size = <uint32_t>slot.size
    record.is_again = is_super or (slot.flow != NONE and out.flows.flows[slot.flow].diverted != 0)
    ring_push(&out.ring, &record, slot.memory + HEADROOM)
    if slot.flow != NONE and flow_diverted(&out.flows.flows[slot.flow], out.ring.produced, fz_get(&out.ring.done), now):
        ring_bar(&out.ring, out.ring.produced, now)


# one read


cdef uint32_t flow_of(Outbound *out, uint8_t *data, Py_ssize_t size) noexcept nogil:
    """The flow it belongs to, made if it is a new one, or NONE."""
    cdef VnetHeader vnet = read_vnet(data)
    cdef SplitPlan plan
    cdef Layout layout
    cdef FlowKey key
    if not plan_read(data + VNET_HEADER, size - VNET_HEADER, &vnet, &plan, &layout):
        return NONE
    key_of(data + VNET_HEADER, &layout, &key)
    return flows_enter(&out.flows, &key)


cdef bint carry(Outbound *out, Slot *slot, bint is_late, double now) noexcept nogil:
    """Send what was read, if its flow is established; False leaves it untouched."""
    cdef uint8_t *ip = slot.memory + HEADROOM + VNET_HEADER
    cdef VnetHeader vnet = read_vnet(slot.memory + HEADROOM)
    cdef SplitPlan plan
    cdef Layout layout
    cdef FlowKey key
    cdef Flow *flow
    cdef Peer *peer
    cdef bint is_super = vnet.gso_type != VNET_GSO_NONE
    if slot.flow == NONE or not plan_read(ip, slot.size - VNET_HEADER, &vnet, &plan, &layout):
        return False
    key_of(ip, &layout, &key)
    if memcmp(&key, &out.flows.flows[slot.flow].key, sizeof(FlowKey)) != 0:
        slot.flow = NONE  # its entry went to another flow while it waited
        return False
    if not is_plain(&layout) or (not is_super and not is_usual_checksum(&vnet, &layout)):
        return False
    flow = &out.flows.flows[slot.flow]
    peer = carrier_of(out, flow, &plan, now)
    if peer == NULL:
        return False
    if not is_super and vnet.flags & VNET_NEEDS_CSUM:
        complete(ip, &plan)
    flow.packets += <uint64_t>plan.count
    flow.bytes += <uint64_t>plan.payload
    flow.last_at = now
    flows_touch(&out.flows, slot.flow)
    if is_late and is_super and plan.protocol == PROTO_TCP:
        out.signalled += 1
        seal_all(out, flow, peer, &plan, True, plan.count // 2, now)
    else:
        seal_all(out, flow, peer, &plan, is_super, -1, now)
    note_sent(out, flow.peer, peer, now)
    out.packets += <uint64_t>plan.count
    out.bytes += <uint64_t>(slot.size - VNET_HEADER)
    return True


cdef bint plan_read(
    uint8_t *ip, Py_ssize_t size, const VnetHeader *vnet, SplitPlan *plan, Layout *layout
) noexcept nogil:
    """Find out what was read: one packet, or one that stands for several. False for what has no flow."""
    if vnet.gso_type == VNET_GSO_NONE:
        if parse_layout(ip, size, layout) != PARSE_OK or layout.src_port < 0:
            return False
        plan.ip = ip
        plan.version, plan.protocol, plan.l4, plan.header = layout.version, layout.protocol, layout.l4, layout.payload
        plan.payload = plan.segment = <int>size - layout.payload
        plan.count = 1
        return True
    if plan_split(ip, size, vnet.gso_type, vnet.gso_size, plan) != SPLIT_OK:
        return False
    if plan.version == 4 and get16(ip + 6) & 0x3FFF:  # a fragment
        return False
    layout.version, layout.protocol, layout.l4 = plan.version, plan.protocol, plan.l4
    layout.is_echo = False
    layout.src_port = 0
    layout.tcp_flags = ip[plan.l4 + 13] if plan.protocol == PROTO_TCP else 0
    return True


cdef inline bint is_usual_checksum(const VnetHeader *vnet, const Layout *layout) noexcept nogil:
    """Whether what is to be completed, if anything, is the transport's own checksum."""
    cdef int field = 16 if layout.protocol == PROTO_TCP else 6
    if not vnet.flags & VNET_NEEDS_CSUM:
        return True
    return vnet.csum_start == layout.l4 and vnet.csum_offset == field and layout.protocol in (PROTO_TCP, PROTO_UDP)


cdef inline void complete(uint8_t *ip, const SplitPlan *plan) noexcept nogil:
    """The field holds the folded sum of the pseudo-header."""
    cdef uint8_t *field = ip + plan.l4 + (16 if plan.protocol == PROTO_TCP else 6)
    cdef uint64_t total = load(field)
    store(field, 0)
    total = add_bytes(total, ip + plan.l4, plan.header - plan.l4 + plan.payload)
    store(field, finish(total) if plan.protocol == PROTO_TCP else finish_udp(total))


cdef Peer *carrier_of(Outbound *out, const Flow *flow, const SplitPlan *plan, double now) noexcept nogil:
    """The peer to send to, or NULL where the slow path must decide."""
    cdef Peer *peer
    if flow.state != INSTALLED or flow.generation != out.flows.generation:
        return NULL
    if flow.diverted > fz_get(&out.ring.done):
        return NULL
    if now >= flow.until or now >= flow.last_at + flow.ttl:
        return NULL
    peer = out.peers.peers[flow.peer]
    if flow.peer_generation != peer.generation or not peer.may_send or peer.current == NULL:
        return NULL
    if now >= peer.send_until or now >= peer.current.send_until:
        return NULL
    if plan.header + plan.segment + flow_growth(flow) > peer.limit:
        return NULL
    if flow.crosses and plan.protocol == PROTO_UDP and plan.count == 1 and load(plan.ip + plan.l4 + 6) == 0:
        return NULL  # a checksum that was left out must be computed
    if out.sockets[0 if peer.is_ipv4 else 1] < 0:
        return NULL
    return peer


cdef inline void note_sent(Outbound *out, uint32_t slot, Peer *peer, double now) noexcept nogil:
    traffic_sent(peer.traffic, True, now)
    peer.sent_at = now
    if fz_time_get(&peer.unheard_since) == INFINITY:
        fz_time_set(&peer.unheard_since, now)
    peers_touch(out.peers, slot, 0)


# sealing


cdef void seal_all(
    Outbound *out, Flow *flow, Peer *peer, const SplitPlan *plan, bint is_super, int signal, double now
) noexcept nogil:
    """Every segment, in order. A single packet's checksums are patched, those of a super packet's segments computed.

    The segment of number `signal` tells the sender to slow down: it is marked if both ends speak ECN, or left out.
    """
    cdef uint8_t header[HEADER_GROWTH + 120]
    cdef uint8_t *start = header + HEADER_GROWTH
    cdef uint8_t *payload = <uint8_t *>plan.ip + plan.header
    cdef uint8_t *packet
    cdef int ecn = ecn_of(plan.ip, plan.version)
    cdef int size = plan.header
    cdef int l4 = plan.l4
    cdef int version = plan.version
    cdef int i, part
    memcpy(start, plan.ip, <size_t>plan.header)  # at most 120 bytes: both headers are 60 at most
    if flow.is_rewritten:
        start = rewrite(flow, start, plan.l4, plan.header + plan.segment)
        size += flow_growth(flow)
        l4 += flow_growth(flow)
        version = flow.after.version
        flow.identification += <uint16_t>(plan.count - 1)
    for i in range(plan.count):
        part = min(plan.segment, plan.payload - i * plan.segment)
        if i == signal and ecn == 0:
            flow.packets -= 1
            flow.bytes -= <uint64_t>part
            continue
        packet = payload + i * plan.segment - size
        memcpy(packet, start, <size_t>size)
        if i == signal:
            mark_congestion(packet, version)
        if is_super:
            write_lengths(packet, version, l4, size + part, i)
            write_transport(packet, version, plan.protocol, l4, size + part, i * plan.segment, i + 1 == plan.count)
        seal_one(out, flow, peer, packet, size + part, 3 if i == signal else ecn, now)


cdef inline int ecn_of(const uint8_t *ip, int version) noexcept nogil:
    return ip[1] & 3 if version == 4 else (ip[1] >> 4) & 3


cdef inline void write_lengths(uint8_t *ip, int version, int l4, int size, int i) noexcept nogil:
    if version == 4:
        put16(ip + 2, <unsigned int>size)
        put16(ip + 4, <unsigned int>(get16(ip + 4) + i))  # wraps at 16 bits
        store(ip + 10, 0)
        store(ip + 10, finish(add_bytes(0, ip, l4)))
    else:
        put16(ip + 4, <unsigned int>(size - 40))


cdef inline void write_transport(
    uint8_t *ip, int version, int protocol, int l4, int size, int first, bint is_last
) noexcept nogil:
    cdef uint8_t *at = ip + l4
    cdef int length = size - l4
    cdef uint64_t total
    if protocol == PROTO_TCP:
        put32(at + 4, get32(at + 4) + <uint32_t>first)  # wraps at 32 bits
        if not is_last:
            at[13] &= ~PSH_FIN & 0xFF
        store(at + 16, 0)
    else:
        put16(at + 4, <unsigned int>length)
        store(at + 6, 0)
    total = pseudo_sum(ip, version, protocol, <unsigned int>length)
    total = add_bytes(total, at, length)
    if protocol == PROTO_TCP:
        store(at + 16, finish(total))
    else:
        store(at + 6, finish_udp(total))


cdef void seal_one(
    Outbound *out, Flow *flow, Peer *peer, const uint8_t *packet, int size, int ecn, double now
) noexcept nogil:
    cdef int prefix = CHANNEL_HEADER if peer.channel else 0
    cdef Batch *batch = batch_for(out, flow, peer, ecn, prefix + size + DATA_OVERHEAD, now)
    cdef uint8_t *at
    cdef Py_ssize_t sealed
    if batch == NULL:
        out.dropped += 1
        return
    at = batch.memory + batch.length
    sealed = session_seal_with(peer.current, &peer.seal, packet, size, at + prefix)
    if sealed < 0:
        out.dropped += 1  # counters used up, after 2**64 packets
        return
    if prefix:
        put16(at, peer.channel)
        put16(at + 2, <unsigned int>sealed)
    batch.length += prefix + <int>sealed
    if prefix + sealed < batch.segment:
        batch.is_closed = True


# batches


cdef Batch *batch_for(Outbound *out, Flow *flow, Peer *peer, int ecn, int size, double now) noexcept nogil:
    """A batch with room for `size` more bytes; NULL where none can be had.

    Only the latest of a way and mark is continued, and only if no later one has datagrams of the same flow.
    """
    cdef Batch *batch = latest_batch(out, flow.peer, ecn)
    cdef bint is_behind
    if batch != NULL:
        is_behind = <int32_t>(flow.batch - batch.number) > 0  # wraps at 32 bits
        if not is_behind and not batch.is_closed and size <= batch.segment and batch.length + size <= batch.limit:
            flow.batch = batch.number
            return batch
        if batch.length + batch.segment > batch.limit:
            outbound_flush(out, now)  # it is full: sending it later costs no less
    if out.open_count == OPEN_BATCHES and not outbound_flush(out, now):
        return NULL
    batch = &out.batches[out.open_count]
    out.open_count += 1
    out.opened += 1
    batch.number = flow.batch = out.opened
    batch.peer = flow.peer
    batch.ecn = ecn
    batch.segment = size
    batch.length = 0
    batch.is_closed = False
    batch.limit = min(MAX_SEGMENTS, (BATCH_SIZE - (HEADERS_V4 if peer.is_ipv4 else HEADERS_V6)) // size) * size
    return batch


cdef inline Batch *latest_batch(Outbound *out, uint32_t slot, int ecn) noexcept nogil:
    cdef int i = out.open_count - 1
    while i >= out.first:
        if out.batches[i].peer == slot and out.batches[i].ecn == ecn:
            return &out.batches[i]
        i -= 1
    return NULL


cdef bint outbound_flush(Outbound *out, double now) noexcept nogil:
    cdef Batch *batch
    cdef Peer *peer
    while out.first < out.open_count:
        batch = &out.batches[out.first]
        peer = out.peers.peers[batch.peer]
        if batch.length and peer.is_used and not send_batch(out, batch, peer):
            out.stalled_on = 0 if peer.is_ipv4 else 1
            if not out.is_stalled:
                out.is_stalled, out.stalled_at = True, now
                return False
            if now < out.stalled_at + PATIENCE:
                return False
            out.dropped += <uint64_t>((batch.length + batch.segment - 1) // batch.segment)
        out.first += 1
    out.first = out.open_count = 0
    out.is_stalled = False
    return True


cdef void outbound_forget(Outbound *out, uint32_t slot) noexcept nogil:
    cdef int i
    for i in range(out.first, out.open_count):
        if out.batches[i].peer == slot:
            out.dropped += <uint64_t>((out.batches[i].length + out.batches[i].segment - 1) // out.batches[i].segment)
            out.batches[i].length = 0
            out.batches[i].is_closed = True


cdef bint send_batch(Outbound *out, Batch *batch, Peer *peer) noexcept nogil:
    """False where the socket is full; what was sent until then is taken out of the batch."""
    cdef int fd = out.sockets[0 if peer.is_ipv4 else 1]
    cdef int at = 0, size, error
    cdef bint was_refused = False
    while at < batch.length:
        size = batch.segment if peer.is_single or not out.has_gso or was_refused else batch.length
        size = min(size, batch.length - at)
        error = send_some(fd, peer, batch.memory + at, size, batch.segment, batch.ecn)
        out.calls += 1
        if error == 0:
            at += size
            out.datagrams += <uint64_t>((size + batch.segment - 1) // batch.segment)
            if was_refused:
                peer.is_single = True  # only now it is known that segmentation was to blame
        elif error == EAGAIN:
            memmove(batch.memory, batch.memory + at, <size_t>(batch.length - at))
            batch.length -= at
            return False
        elif size > batch.segment and (error == EIO or error == EINVAL):
            was_refused = True
        else:
            refuse(out, batch, error, batch.length - at)
            return True
    return True


cdef void refuse(Outbound *out, const Batch *batch, int error, int size) noexcept nogil:
    out.dropped += <uint64_t>((size + batch.segment - 1) // batch.segment)
    if out.refusal_count < MAX_REFUSALS:
        out.refusals[out.refusal_count].peer = batch.peer | <uint32_t>out.peers.peers[batch.peer].serial << 16
        out.refusals[out.refusal_count].error = error
        out.refusals[out.refusal_count].size = size
        out.refusal_count += 1


cdef int send_some(int fd, Peer *peer, uint8_t *data, int size, int segment, int ecn) noexcept nogil:
    """One `sendmsg`; 0 or the error. Nobody waits for the kernel's memory: that counts as a full socket."""
    cdef uint8_t control[CONTROL_SIZE]
    cdef size_t used = peer.control_length
    cdef msghdr header
    cdef iovec vector
    cdef int32_t tos = ecn
    cdef uint16_t stride = <uint16_t>segment
    memcpy(control, peer.control, used)
    if ecn:
        used += add_control(
            control + used, IPPROTO_IP if peer.is_ipv4 else IPPROTO_IPV6, IP_TOS if peer.is_ipv4 else IPV6_TCLASS,
            &tos, 4)
    if size > segment:
        used += add_control(control + used, SOL_UDP, UDP_SEGMENT, &stride, 2)
    vector.iov_base = data
    vector.iov_len = <size_t>size
    memset(&header, 0, sizeof(header))
    header.msg_name = &peer.name
    header.msg_namelen = peer.name_length
    header.msg_iov = &vector
    header.msg_iovlen = 1
    header.msg_control = control if used else NULL
    header.msg_controllen = used
    while sendmsg(fd, &header, MSG_DONTWAIT | MSG_NOSIGNAL) < 0:
        if errno == EINTR:
            continue
        return EAGAIN if errno == ENOBUFS else errno
    return 0


cdef inline size_t add_control(uint8_t *at, int level, int kind, const void *data, size_t size) noexcept nogil:
    """PKTINFO, TOS and SEGMENT take 88 of the 128 bytes; the bytes used."""
    cdef cmsghdr *item = <cmsghdr *>at
    memset(at, 0, CMSG_SPACE(size))
    item.cmsg_len = CMSG_LEN(size)
    item.cmsg_level = level
    item.cmsg_type = kind
    memcpy(CMSG_DATA(item), data, size)
    return CMSG_SPACE(size)
