# From the network to the device: the receiving half of the pump.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fz_core.fastpath.codel cimport Codel
from fz_core.fastpath.flows cimport FlowTable
from fz_core.fastpath.peers cimport PeerTable
from fz_core.fastpath.ring cimport Ring
from fz_core.fastpath.system cimport iovec, mmsghdr, sockaddr_in6

cdef enum:
    MESSAGES = 32              # of one recvmmsg
    RUNS = 64
    RUN_PACKETS = 128

# Packets that are written at once. The first is whole, of those that follow only the payload counts.
ctypedef struct Run:
    uint8_t vnet[10]
    bint is_open               # more may follow
    uint8_t *first             # not rewritten yet
    int size                   # bytes of the first packet
    int l4
    int header                 # bytes before its payload
    int segment                # payload bytes of all packets but the last
    int total                  # bytes of the packet as it will be written, before rewriting
    int count
    uint32_t next_sequence
    uint8_t psh
    uint32_t flow
    iovec parts[RUN_PACKETS + 1]

ctypedef struct Inbound:
    int tun
    int sockets[2]             # IPv4, IPv6; -1 where there is none
    int ports[2]               # in memory order
    uint8_t *buffers
    mmsghdr *messages
    iovec *vectors
    sockaddr_in6 *names
    uint8_t *controls
    Run *runs
    int run_count
    uint32_t batch
    bint was_full              # the last batch: there may be more
    bint is_bulky[2]           # whether the last messages of a socket were large
    double wall                # the wall clock, as the kernel stamps messages by it
    Codel codel
    bint owes_signal           # a large packet is to be dropped or marked
    bint merges                # whether the device takes merged packets
    FlowTable flows
    PeerTable *peers
    Ring ring
    uint64_t refused_merged    # the error with which the device first refused a merged packet; atomic
    uint64_t received, signalled
    uint64_t calls, datagrams, packets, bytes, writes, oversized, malformed, errors, write_errors
    int last_error

cdef int inbound_init(Inbound *inb, PeerTable *peers, uint64_t seed) noexcept nogil
cdef void inbound_free(Inbound *inb) noexcept nogil

# One batch from one socket (0: IPv4, 1: IPv6), written to the device before it returns; how many messages.
cdef int inbound_turn(Inbound *inb, int family, double now) noexcept nogil
