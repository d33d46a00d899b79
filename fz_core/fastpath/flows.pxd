# The flow table: what `tunnel/` decided about flows, in C memory. One table for each direction.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    MAX_FLOWS = 65536
    NONE = 0xFFFFFFFF          # no flow, no peer
    VACANT = 0
    PENDING = 1                # seen, but nothing was decided yet
    INSTALLED = 2
    MOST_WAITING = 32          # packets of one flow

# Addresses of IPv4 take the first 4 of 16 bytes, the others are zero. Ports are in memory order; of echo both are
# the identifier. `peer` is the sender's slot for packets from the network, 0 for those from the device.
ctypedef struct FlowKey:
    uint8_t src[16]
    uint8_t dst[16]
    uint16_t src_port
    uint16_t dst_port
    uint8_t version
    uint8_t protocol
    uint16_t peer

ctypedef struct Flow:
    FlowKey key
    FlowKey after              # as the packets go on
    uint64_t old_sum           # what the transport checksum covers before and after: adjust(checksum, old, new)
    uint64_t new_sum
    uint64_t old_ip_sum
    uint64_t new_ip_sum
    uint64_t diverted          # position in the ring after the last packet that went the slow way
    uint64_t packets           # since the last note
    uint64_t bytes             # payload, since the last note
    double ttl
    double until
    double last_at             # when it was carried last; while nothing is decided, when it came last
    uint32_t peer              # slot
    uint32_t generation        # of the table when installed
    uint32_t peer_generation
    uint32_t next              # in the chain of its bucket, or of the vacant ones
    uint32_t batch             # number of the latest one it is in: inbound that in which `run` counts
    uint16_t run
    uint16_t identification
    uint16_t waiting           # packets that went the slow way and are not done with
    uint8_t state
    uint8_t is_rewritten
    uint8_t crosses            # to the other family
    uint8_t is_touched
    uint8_t is_referenced      # used since the sweep for room last passed

ctypedef struct FlowTable:
    Flow *flows                # MAX_FLOWS, paged in as they are used
    uint32_t *heads
    uint32_t *touched
    uint32_t touched_count
    uint32_t used              # never used before from here on
    uint32_t vacant
    uint32_t hand              # of the clock that finds room
    uint32_t swept             # where the sweep for lapsed ones is
    uint32_t count
    uint32_t latest            # the last one that was found; trains ask for it again
    uint32_t generation
    uint64_t seed
    uint64_t evictions

cdef int flows_init(FlowTable *table, uint64_t seed) noexcept nogil
cdef void flows_free(FlowTable *table) noexcept nogil

# The index of a flow in any state, or NONE.
cdef uint32_t flows_find(FlowTable *table, const FlowKey *key) noexcept nogil

# The same, made as PENDING where there is none; another one may have to go for it.
cdef uint32_t flows_enter(FlowTable *table, const FlowKey *key) noexcept nogil

cdef void flows_remove(FlowTable *table, uint32_t index) noexcept nogil


cdef inline bint flow_diverted(Flow *flow, uint64_t position, uint64_t done, double now) noexcept nogil:
    """A packet went the slow way, where this is its position. True if enough wait there to let the driver catch up."""
    if flow.state == PENDING:
        flow.last_at = now
    flow.waiting = 1 if flow.diverted <= done else min(flow.waiting, <uint16_t>0xFFFE) + 1
    flow.diverted = position
    flow.is_referenced = 1
    return flow.waiting >= MOST_WAITING


cdef inline bint flows_is_full(const FlowTable *table) noexcept nogil:
    """Whether another flow has to go for the next new one."""
    return table.vacant == NONE and table.used == MAX_FLOWS


cdef inline void flows_touch(FlowTable *table, uint32_t index) noexcept nogil:
    """Remember that the flow has something to note."""
    cdef Flow *flow = &table.flows[index]
    flow.is_referenced = 1
    if not flow.is_touched:
        flow.is_touched = 1
        table.touched[table.touched_count] = index  # each at most once, so MAX_FLOWS are enough
        table.touched_count += 1
