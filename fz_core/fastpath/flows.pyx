# cython: cdivision=True
"""The flow table: chained hashing over a dense array, bounded, swept by a clock hand when it is full.

Memory grows with the flows that were ever alive at once, at about 0.3 KiB each. Losing an entry costs its flow a
visit to the slow path. The hash is seeded: who chooses addresses cannot choose buckets.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

cdef enum:
    HEADS = 65536              # a power of two
    SWEEP = 64                 # entries looked at for one that can go


cdef int flows_init(FlowTable *table, uint64_t seed) noexcept nogil:
    memset(table, 0, sizeof(FlowTable))
    table.flows = <Flow *>calloc(MAX_FLOWS, sizeof(Flow))
    table.heads = <uint32_t *>calloc(HEADS, sizeof(uint32_t))
    table.touched = <uint32_t *>calloc(MAX_FLOWS, sizeof(uint32_t))
    table.vacant = NONE
    table.seed = seed | 1
    return 0 if table.flows and table.heads and table.touched else -1


cdef void flows_free(FlowTable *table) noexcept nogil:
    free(table.flows)
    free(table.heads)
    free(table.touched)
    memset(table, 0, sizeof(FlowTable))


cdef inline uint32_t bucket_of(FlowTable *table, const FlowKey *key) noexcept nogil:
    cdef uint64_t words[5]
    cdef uint64_t hashed = table.seed
    cdef int i
    memcpy(words, key, 40)
    for i in range(5):
        hashed = (hashed ^ words[i]) * <uint64_t>0x9E3779B97F4A7C15
        hashed ^= hashed >> 29
    return <uint32_t>((hashed * table.seed) >> 48)


# Heads hold index + 1, so that calloc makes them empty; chains hold the index or NONE.
cdef uint32_t flows_find(FlowTable *table, const FlowKey *key) noexcept nogil:
    cdef uint32_t index = table.latest
    # An entry that is vacant has version 0 in its key, which no packet has.
    if memcmp(&table.flows[index].key, key, sizeof(FlowKey)) == 0:
        return index
    index = table.heads[bucket_of(table, key)] - 1
    while index != NONE:
        if memcmp(&table.flows[index].key, key, sizeof(FlowKey)) == 0:
            table.latest = index
            return index
        index = table.flows[index].next
    return NONE


cdef uint32_t flows_enter(FlowTable *table, const FlowKey *key) noexcept nogil:
    cdef uint32_t index = flows_find(table, key)
    cdef uint32_t bucket
    cdef Flow *flow
    if index != NONE:
        return index
    if table.vacant != NONE:
        index = table.vacant
        table.vacant = table.flows[index].next
    elif table.used < MAX_FLOWS:
        index = table.used
        table.used += 1
    else:
        index = make_room(table)
    bucket = bucket_of(table, key)
    flow = &table.flows[index]
    reset(flow)  # what was still to be noted of a flow that had to go is lost
    flow.key = key[0]
    flow.state = PENDING
    flow.next = table.heads[bucket] - 1
    table.heads[bucket] = index + 1
    table.count += 1
    return index


cdef void reset(Flow *flow) noexcept nogil:
    """Empty, but for its place in the list of touched ones."""
    cdef uint8_t touched = flow.is_touched
    memset(flow, 0, sizeof(Flow))
    flow.is_touched = touched
    flow.peer = NONE


cdef void flows_remove(FlowTable *table, uint32_t index) noexcept nogil:
    unlink(table, index)
    reset(&table.flows[index])
    table.flows[index].next = table.vacant
    table.vacant = index


cdef void unlink(FlowTable *table, uint32_t index) noexcept nogil:
    cdef uint32_t bucket = bucket_of(table, &table.flows[index].key)
    cdef uint32_t at = table.heads[bucket] - 1
    if at == index:
        table.heads[bucket] = table.flows[index].next + 1
    else:
        while table.flows[at].next != index:
            at = table.flows[at].next
        table.flows[at].next = table.flows[index].next
    table.count -= 1


cdef uint32_t make_room(FlowTable *table) noexcept nogil:
    """Unlink an entry nobody used lately; what was only seen goes before what was decided."""
    cdef uint32_t chosen = NONE
    cdef uint32_t i = 0
    cdef Flow *flow
    while i < SWEEP:
        i += 1
        table.hand = (table.hand + 1) % MAX_FLOWS
        flow = &table.flows[table.hand]
        if flow.state == PENDING:
            chosen = table.hand
            break
        if not flow.is_referenced and chosen == NONE:
            chosen = table.hand
        flow.is_referenced = 0
    if chosen == NONE:
        chosen = table.hand
    unlink(table, chosen)
    table.evictions += 1
    return chosen
