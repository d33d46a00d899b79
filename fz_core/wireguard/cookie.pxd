# mac1, mac2 and cookies, as a sender sees them.

cimport cython

cdef bytes mac1_key(bytes public_key)
cdef bytes cookie_key(bytes public_key)
cdef bint same(bytes a, bytes b) noexcept


@cython.final
cdef class CookieJar:
    cdef bytes _mac1_key
    cdef bytes _cookie_key
    cdef bytes _cookie
    cdef double _cookie_at
    cdef bytes _last_mac1
    cdef object _last_index

    cdef bytes stamp(self, bytes message, double now)
    cdef bint accept_untrusted(self, bytes reply, double now)
