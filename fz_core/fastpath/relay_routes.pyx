"""Two hash tables over the same records, which hold their chains themselves: a channel is one allocation of memory.

The hash is keyed with a random seed: clients choose addresses and numbers, and must not choose buckets.
"""

from libc.stdint cimport uint16_t, uint64_t
from libc.stdlib cimport calloc, free

from fz_core.fastpath.relay_port cimport SocketAddress

cdef extern from *:
    ctypedef unsigned long long uint128_t "unsigned __int128"

cdef enum:
    FIRST_SIZE = 256


cdef int routes_init(Routes *routes) noexcept nogil:
    """-1 without memory. The seed is the caller's."""
    routes.count = 0
    routes.size = FIRST_SIZE
    routes.outward = <Route **>calloc(FIRST_SIZE, sizeof(Route *))
    routes.inward = <Route **>calloc(FIRST_SIZE, sizeof(Route *))
    return 0 if routes.outward != NULL and routes.inward != NULL else -1


cdef void routes_free(Routes *routes) noexcept nogil:
    """All routes, and the tables."""
    cdef size_t i
    cdef Route *route
    cdef Route *following
    for i in range(routes.size if routes.outward != NULL else 0):
        route = routes.outward[i]
        while route != NULL:
            following = route.next_outward
            free(route)
            route = following
    free(routes.outward)
    free(routes.inward)
    routes.outward = routes.inward = NULL


cdef void routes_insert(Routes *routes, Route *route) noexcept nogil:
    """The caller knows that neither end has one yet."""
    if routes.count >= routes.size:
        grow(routes)
    link(routes, route)
    routes.count += 1


cdef void routes_remove(Routes *routes, Route *route) noexcept nogil:
    """The record stays the caller's."""
    cdef Route **place = &routes.outward[slot(routes, &route.client, route.number)]
    while place[0] != route:
        place = &place[0].next_outward
    place[0] = route.next_outward
    place = &routes.inward[slot(routes, &route.peer, route.port.number)]
    while place[0] != route:
        place = &place[0].next_inward
    place[0] = route.next_inward
    routes.count -= 1


cdef Route *find_outward(const Routes *routes, const SocketAddress *client, uint16_t number) noexcept nogil:
    cdef Route *route = routes.outward[slot(routes, client, number)]
    while route != NULL and not (route.number == number and is_same(&route.client, client)):
        route = route.next_outward
    return route


cdef Route *find_inward(const Routes *routes, uint16_t port, const SocketAddress *peer) noexcept nogil:
    cdef Route *route = routes.inward[slot(routes, peer, port)]
    while route != NULL and not (route.port.number == port and is_same(&route.peer, peer)):
        route = route.next_inward
    return route


cdef void grow(Routes *routes) noexcept nogil:
    """Twice as many buckets; without memory the chains grow instead."""
    cdef size_t i, old_size = routes.size
    cdef Route **old = routes.outward
    cdef Route **outward = <Route **>calloc(2 * old_size, sizeof(Route *))
    cdef Route **inward = <Route **>calloc(2 * old_size, sizeof(Route *))
    cdef Route *route
    cdef Route *following
    if outward == NULL or inward == NULL:
        free(outward)
        free(inward)
        return
    free(routes.inward)
    routes.outward, routes.inward, routes.size = outward, inward, 2 * old_size
    for i in range(old_size):
        route = old[i]
        while route != NULL:
            following = route.next_outward
            link(routes, route)
            route = following
    free(old)


cdef void link(Routes *routes, Route *route) noexcept nogil:
    cdef Route **place = &routes.outward[slot(routes, &route.client, route.number)]
    route.next_outward = place[0]
    place[0] = route
    place = &routes.inward[slot(routes, &route.peer, route.port.number)]
    route.next_inward = place[0]
    place[0] = route


cdef bint is_same(const SocketAddress *a, const SocketAddress *b) noexcept nogil:
    return (
        a.words[0] == b.words[0] and a.words[1] == b.words[1]
        and a.words[2] == b.words[2] and a.words[3] == b.words[3]
    )


cdef size_t slot(const Routes *routes, const SocketAddress *address, uint16_t number) noexcept nogil:
    cdef uint64_t low = mix(address.words[0] ^ routes.seed[0], address.words[1] ^ routes.seed[1] ^ number)
    cdef uint64_t high = mix(address.words[2] ^ routes.seed[2], address.words[3] ^ routes.seed[3] ^ low)
    return <size_t>(mix(low ^ routes.seed[2], high ^ routes.seed[0]) & (routes.size - 1))


cdef uint64_t mix(uint64_t a, uint64_t b) noexcept nogil:
    """Both halves of the product, as wyhash does."""
    cdef uint128_t product = <uint128_t>a * b
    return <uint64_t>product ^ <uint64_t>(product >> 64)
