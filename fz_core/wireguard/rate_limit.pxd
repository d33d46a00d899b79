cimport cython


@cython.final
cdef class RateLimiter:
    cdef bytes _mac1_key
    cdef bytes _cookie_key
    cdef object _random_bytes
    cdef bytes _secret
    cdef double _secret_at
    cdef double _window_at
    cdef Py_ssize_t _count
    cdef readonly Py_ssize_t limit

    cdef bint _is_under_load(self, double now)
    cdef bytes _cookie_for(self, bytes source_ip, double now)
    cdef bytes _reply(self, bytes receiver_index, bytes mac1, bytes cookie)
