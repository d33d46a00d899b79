# The bound channels of a relay: one record each, found by either end.

from libc.stdint cimport uint8_t, uint16_t, uint64_t

from fz_core.fastpath.relay_port cimport Burst, Port, SocketAddress

cdef enum:
    OUTWARD = 0                # from the client to the peer
    INWARD = 1

cdef struct Route:
    Route *next_outward        # in the same bucket
    Route *next_inward
    Port *port                 # of the allocation, in the peer's family
    Port *listen               # of the relay, in the client's family
    Burst *bursts[2]           # not sent yet, by way
    SocketAddress client
    SocketAddress peer
    uint16_t number
    bint is_own_ip             # the peer may be an allocation of this relay
    uint8_t is_plain[2]        # by way: the destination takes single datagrams only

cdef struct Routes:
    Route **outward
    Route **inward
    size_t size                # buckets of each, a power of two
    size_t count
    uint64_t seed[4]

cdef int routes_init(Routes *routes) noexcept nogil
cdef void routes_free(Routes *routes) noexcept nogil
cdef void routes_insert(Routes *routes, Route *route) noexcept nogil
cdef void routes_remove(Routes *routes, Route *route) noexcept nogil

# By the client's address and channel number, and by the allocation's port and the peer's address.
cdef Route *find_outward(const Routes *routes, const SocketAddress *client, uint16_t number) noexcept nogil
cdef Route *find_inward(const Routes *routes, uint16_t port, const SocketAddress *peer) noexcept nogil
