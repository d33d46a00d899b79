# cython: cdivision=True
"""The table of peers, by slot and by the 24 bits that all receiver indices of one peer share."""

from libc.math cimport INFINITY
from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from fz_core.crypto.cipher cimport aead_wipe
from fz_core.fastpath.flows cimport NONE

cdef enum:
    HEADS = 4096               # a power of two


cdef int peers_init(PeerTable *table) noexcept nogil:
    memset(table, 0, sizeof(PeerTable))
    table.peers = <Peer **>calloc(MAX_PEERS, sizeof(Peer *))
    table.heads = <uint32_t *>calloc(HEADS, sizeof(uint32_t))
    table.touched[0] = <uint32_t *>calloc(MAX_PEERS, sizeof(uint32_t))
    table.touched[1] = <uint32_t *>calloc(MAX_PEERS, sizeof(uint32_t))
    table.vacant = NONE
    return 0 if table.peers and table.heads and table.touched[0] and table.touched[1] else -1


cdef void peers_free(PeerTable *table) noexcept nogil:
    cdef uint32_t slot
    for slot in range(table.used):
        if table.peers[slot] != NULL:
            forget_keys(table.peers[slot])
            free(table.peers[slot])
    free(table.peers)
    free(table.heads)
    free(table.touched[0])
    free(table.touched[1])
    memset(table, 0, sizeof(PeerTable))


cdef inline uint32_t bucket_of(uint32_t index) noexcept nogil:
    return ((index * <uint32_t>0x9E3779B1) >> 16) & (HEADS - 1)


cdef uint32_t peers_find(PeerTable *table, uint32_t index) noexcept nogil:
    cdef uint32_t slot = table.heads[bucket_of(index)] - 1
    while slot != NONE and table.peers[slot].index != index:
        slot = table.peers[slot].next
    return slot


cdef uint32_t peers_add(PeerTable *table, uint32_t index) noexcept nogil:
    cdef uint32_t slot = table.vacant
    cdef uint32_t generation
    cdef uint16_t serial
    cdef bint touched[2]
    cdef Peer *peer
    if slot != NONE:
        table.vacant = table.peers[slot].next
    elif table.used < MAX_PEERS:
        slot = table.used
        table.peers[slot] = <Peer *>calloc(1, sizeof(Peer))
        if table.peers[slot] == NULL:
            return NONE
        table.used += 1
    else:
        return NONE
    peer = table.peers[slot]
    serial = <uint16_t>((peer.serial + 1) & 0x7FFF)
    generation = peer.generation + 1  # nothing decided about the slot's last owner holds
    touched[0], touched[1] = peer.is_touched[0], peer.is_touched[1]
    memset(peer, 0, sizeof(Peer))
    peer.is_used = True
    peer.serial = serial
    peer.is_touched[0], peer.is_touched[1] = touched[0], touched[1]  # it is still in those lists
    peer.generation = generation
    peer.index = index
    peer.sent_at = peer.heard_at = -INFINITY
    peer.unheard_since = INFINITY
    peer.next = table.heads[bucket_of(index)] - 1
    table.heads[bucket_of(index)] = slot + 1
    return slot


cdef void peers_remove(PeerTable *table, uint32_t slot) noexcept nogil:
    cdef Peer *peer = table.peers[slot]
    cdef uint32_t bucket = bucket_of(peer.index)
    cdef uint32_t at = table.heads[bucket] - 1
    if at == slot:
        table.heads[bucket] = peer.next + 1
    else:
        while table.peers[at].next != slot:
            at = table.peers[at].next
        table.peers[at].next = peer.next
    forget_keys(peer)
    peer.current = NULL
    peer.traffic = NULL
    peer.is_used = peer.may_send = peer.may_receive = False
    peer.generation += 1
    peer.next = table.vacant
    table.vacant = slot


cdef void forget_keys(Peer *peer) noexcept nogil:
    cdef int i
    aead_wipe(&peer.seal)
    for i in range(SESSIONS):
        peer.receivers[i].session = NULL
        aead_wipe(&peer.receivers[i].key)
