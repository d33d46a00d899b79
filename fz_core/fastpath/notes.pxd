# What is to be told of flows: how much was carried, and that they are gone.

from libc.stdint cimport uint32_t, uint64_t

from fz_core.fastpath.flows cimport Flow, FlowTable
from fz_core.fastpath.peers cimport PeerTable

ctypedef struct Note:
    uint32_t index
    uint64_t packets
    uint64_t bytes
    double last_at

# What is still to be noted of the flow's verdict, `(packets, payload bytes, last at)` or None; then it starts anew.
cdef object note_of(Flow *flow)

# The notes of all flows touched since the last call; the caller frees them. NULL for none, or where memory is short.
cdef Note *notes_copy(FlowTable *table, uint32_t *count) noexcept nogil

# Forgets what has lapsed among the next `most` flows, and appends `(is_inbound, index, note)` of each to `gone`.
# What was only seen goes once the driver is done with it.
cdef int notes_sweep(
    FlowTable *table, PeerTable *peers, uint64_t done, uint32_t most, double now, bint is_inbound, list gone
) except -1
