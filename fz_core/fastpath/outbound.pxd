# From the device to the network: the sending half of the pump.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fz_core.fastpath.flows cimport FlowTable
from fz_core.fastpath.peers cimport PeerTable
from fz_core.fastpath.ring cimport Ring

cdef enum:
    OPEN_BATCHES = 8
    MAX_REFUSALS = 64

# Datagrams of one size to one peer, back to back; the last may be shorter.
ctypedef struct Batch:
    uint8_t *memory
    uint32_t peer
    int ecn
    int segment                # bytes of each
    int length                 # bytes so far
    int limit
    bint is_closed

# A datagram the kernel did not take.
ctypedef struct Refusal:
    uint32_t peer
    int error
    int size

ctypedef struct Outbound:
    int tun
    int sockets[2]             # IPv4, IPv6; -1 where there is none
    bint has_gso
    uint8_t *reading           # room for a super packet, and before it for a larger header
    Batch batches[OPEN_BATCHES]
    int open_count
    int first                  # batches before it are sent
    double stalled_at          # since when the socket takes nothing; 0: it does
    bint is_stalled
    FlowTable flows
    PeerTable *peers
    Ring ring
    bint device_failed
    Refusal refusals[MAX_REFUSALS]
    int refusal_count
    uint64_t reads, packets, bytes, calls, datagrams, dropped

cdef int outbound_init(Outbound *out, PeerTable *peers, uint64_t seed) noexcept nogil
cdef void outbound_free(Outbound *out) noexcept nogil

# Reads up to `budget` times and sends what became of it; how many reads there were.
cdef int outbound_turn(Outbound *out, int budget, double now) noexcept nogil

# Sends what waits; False while the socket is full.
cdef bint outbound_flush(Outbound *out, double now) noexcept nogil
