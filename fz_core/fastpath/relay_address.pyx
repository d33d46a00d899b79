"""Socket addresses of a relay, between the core's form and the kernel's. Not here: how they are found (`relay_routes`)."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t
from libc.string cimport memcpy, memset

from fz_core.fastpath.system cimport AF_INET, AF_INET6, htons, ntohs

from fz_core.packet import Address


cdef int fill_address(SocketAddress *out, address) except -1:
    """As the kernel would report it."""
    cdef bytes ip = address[0]
    cdef uint16_t port = address[1]
    memset(out, 0, sizeof(SocketAddress))
    if len(ip) == 4:
        out.v4.sin_family = AF_INET
        memcpy(&out.v4.sin_addr, <char *>ip, 4)
    elif len(ip) == 16:
        out.v6.sin6_family = AF_INET6
        memcpy(&out.v6.sin6_addr, <char *>ip, 16)
    else:
        raise ValueError(f"an IP has 4 or 16 bytes, not {len(ip)}")
    out.v4.sin_port = htons(port)
    return 0


cdef object address_of(const SocketAddress *address):
    """As the core wants it."""
    cdef const uint8_t *ip = <const uint8_t *>&address.v4.sin_addr
    cdef Py_ssize_t ip_size = 4
    if address.v4.sin_family != AF_INET:
        ip, ip_size = <const uint8_t *>&address.v6.sin6_addr, 16
    return Address(PyBytes_FromStringAndSize(<const char *>ip, ip_size), ntohs(address.v4.sin_port))
