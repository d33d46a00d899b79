# From the device to the network: the sending half of the pump.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fz_core.fastpath.codel cimport Codel
from fz_core.fastpath.flows cimport FlowTable
from fz_core.fastpath.peers cimport PeerTable
from fz_core.fastpath.ring cimport Ring

cdef enum:
    OPEN_BATCHES = 8
    BACKLOG = 32               # super packets; behind them the device's own queue fills
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
    uint32_t number            # in the order they were opened

# What was read from the device and is not sent yet.
ctypedef struct Slot:
    uint8_t *memory            # room for a super packet, and before it for a larger header
    int size                   # header included
    uint32_t flow              # or NONE
    double read_at

# A datagram the kernel did not take.
ctypedef struct Refusal:
    uint32_t peer              # its number
    int error
    int size

ctypedef struct Outbound:
    int tun
    int sockets[2]             # IPv4, IPv6; -1 where there is none
    bint has_gso
    Slot backlog[BACKLOG]      # in the order they were read; the memory is made as it is needed
    int waiting
    bint is_drained            # nothing waits, here or in the device
    Codel codel
    Batch batches[OPEN_BATCHES]
    int open_count
    int first                  # batches before it are sent
    uint32_t opened            # batches ever
    double stalled_at          # since when the socket takes nothing; 0: it does
    bint is_stalled
    int stalled_on             # the family whose socket that is
    FlowTable flows
    PeerTable *peers
    Ring ring
    uint64_t device_failed     # atomic
    Refusal refusals[MAX_REFUSALS]
    int refusal_count
    uint64_t reads, packets, bytes, calls, datagrams, dropped, signalled

cdef int outbound_init(Outbound *out, PeerTable *peers, uint64_t seed) noexcept nogil
cdef void outbound_free(Outbound *out) noexcept nogil

# Reads for a turn's worth, and sends what became of it; how many reads there were.
cdef int outbound_turn(Outbound *out, double now) noexcept nogil

# Sends what waits; False while the socket is full.
cdef bint outbound_flush(Outbound *out, double now) noexcept nogil

# What waits for this peer is lost.
cdef void outbound_forget(Outbound *out, uint32_t slot) noexcept nogil
