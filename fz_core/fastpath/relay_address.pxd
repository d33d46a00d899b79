# Socket addresses as the kernel reports and takes them.

from libc.stdint cimport uint64_t

from fz_core.fastpath.system cimport sockaddr_in, sockaddr_in6

# What a family does not use is zero, so that addresses compare as words.
cdef union SocketAddress:
    sockaddr_in v4
    sockaddr_in6 v6
    uint64_t words[4]

cdef int fill_address(SocketAddress *out, address) except -1
cdef object address_of(const SocketAddress *address)
