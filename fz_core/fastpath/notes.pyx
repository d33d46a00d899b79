"""What the driver is told of flows."""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport malloc

from fz_core.fastpath.flows cimport INSTALLED, PENDING, Flow, FlowTable, flows_remove
from fz_core.fastpath.peers cimport PeerTable

cdef double PENDING_TIME = 30  # so long a flow's second packet is known to be that


cdef object note_of(Flow *flow):
    cdef object note = None
    if flow.state == INSTALLED and flow.packets:
        note = flow.packets, flow.bytes, flow.last_at
    flow.packets = flow.bytes = 0
    return note


cdef Note *notes_copy(FlowTable *table, uint32_t *count) noexcept nogil:
    cdef uint32_t i
    cdef Flow *flow
    cdef Note *found
    if table.touched_count == 0:
        return NULL
    found = <Note *>malloc(table.touched_count * sizeof(Note))
    if found == NULL:
        return NULL
    for i in range(table.touched_count):
        flow = &table.flows[table.touched[i]]
        flow.is_touched = 0
        if flow.state == INSTALLED and flow.packets:
            found[count[0]].index, found[count[0]].packets = table.touched[i], flow.packets
            found[count[0]].bytes, found[count[0]].last_at = flow.bytes, flow.last_at
            flow.packets = flow.bytes = 0
            count[0] += 1
    table.touched_count = 0
    return found


cdef int notes_sweep(
    FlowTable *table, PeerTable *peers, uint64_t done, uint32_t most, double now, bint is_inbound, list gone
) except -1:
    cdef uint32_t i
    cdef Flow *flow
    for i in range(min(most, table.used)):
        table.swept = (table.swept + 1) % table.used
        flow = &table.flows[table.swept]
        if flow.state == PENDING and now >= flow.last_at + PENDING_TIME and flow.diverted <= done:
            flows_remove(table, table.swept)
        elif flow.state == INSTALLED and not is_in_force(table, peers, flow, now):
            gone.append((is_inbound, table.swept, note_of(flow)))
            flows_remove(table, table.swept)
        else:
            flow.is_referenced = 0
    return 0


cdef bint is_in_force(const FlowTable *table, const PeerTable *peers, const Flow *flow, double now) noexcept nogil:
    if flow.generation != table.generation or flow.peer_generation != peers.peers[flow.peer].generation:
        return False
    return now < flow.until and now < flow.last_at + flow.ttl
