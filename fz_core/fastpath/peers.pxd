# Peers as the pump sees them: the sessions of each, and the way its datagrams take.

from libc.math cimport INFINITY
from libc.stdint cimport uint8_t, uint16_t, uint32_t

from fz_core.crypto.cipher cimport AeadKey
from fz_core.fastpath.system cimport fz_now, sockaddr_in6
from fz_core.wireguard.session cimport SessionState
from fz_core.wireguard.timers cimport Traffic

cdef enum:
    MAX_PEERS = 65535          # slots are 16 bits of a flow's key, and the lower half of a peer's number
    SESSIONS = 8               # wireguard.Tunnel's RING
    CONTROL_SIZE = 128

# An endpoint as the kernel writes it, reduced to what identifies it. `ip` of IPv4 takes 4 bytes; port in memory order.
ctypedef struct Endpoint:
    uint8_t ip[16]
    uint16_t port
    uint8_t ip_size

ctypedef struct Receiver:
    SessionState *session      # NULL: none, or one that is not confirmed
    AeadKey key

ctypedef struct Peer:
    bint is_used
    uint16_t serial            # tells the slot's owners apart
    uint32_t index             # upper 24 bits of what its datagrams are addressed to
    uint32_t next              # in the chain of its bucket, or of the vacant slots
    uint32_t generation        # of its verdicts
    int limit                  # largest inner packet that fits its path
    # sessions; the memory belongs to Python objects that the Pump holds
    SessionState *current
    AeadKey seal
    Receiver receivers[SESSIONS]
    Traffic *traffic
    # sending
    bint may_send
    bint is_single             # no segmentation on this way
    bint is_ipv4
    double send_until
    uint16_t channel           # 0: none
    Endpoint remote
    unsigned int name_length
    sockaddr_in6 name          # or a sockaddr_in
    uint8_t control[CONTROL_SIZE]
    size_t control_length      # the source address, if one is asked for
    # receiving: where its data comes from
    bint may_receive
    Endpoint source
    Endpoint arrives_at        # ip_size 0: any address of ours
    uint16_t receive_channel
    # since the last note
    bint is_touched[2]         # by the sending and by the receiving half
    double sent_at
    double heard_at            # of what was carried; the driver hears of the rest by itself
    double unheard_since       # the first data sent after the last datagram heard, INFINITY for none

ctypedef struct PeerTable:
    Peer **peers               # by slot; NULL where there never was one
    uint32_t *heads            # slot + 1 by hashed index
    uint32_t used
    uint32_t vacant
    uint32_t *touched[2]
    uint32_t touched_count[2]
    double clock               # what a test says the time is; 0: the kernel's

cdef int peers_init(PeerTable *table) noexcept nogil
cdef void peers_free(PeerTable *table) noexcept nogil

# A slot for a new peer, or NONE where memory or slots are used up.
cdef uint32_t peers_add(PeerTable *table, uint32_t index) noexcept nogil
cdef void peers_remove(PeerTable *table, uint32_t slot) noexcept nogil
cdef uint32_t peers_find(PeerTable *table, uint32_t index) noexcept nogil


cdef inline double time_of(const PeerTable *table) noexcept nogil:
    """Seconds on the clock of the drivers."""
    return table.clock if table.clock else fz_now()


cdef inline void peers_touch(PeerTable *table, uint32_t slot, int half) noexcept nogil:
    """Remember that the peer has something to note; 0 is the sending half, 1 the receiving one."""
    if not table.peers[slot].is_touched[half]:
        table.peers[slot].is_touched[half] = True
        table.touched[half][table.touched_count[half]] = slot
        table.touched_count[half] += 1
