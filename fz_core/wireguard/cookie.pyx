# cython: auto_pickle=False
"""mac1 and mac2 on what we send, and the cookie a peer under load asks for (paper sections 5.4.4 and 5.4.7).

Cookie reply: type 4, receiver index 4, nonce 24, encrypted cookie 32. Checking what others send is `rate_limit`.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE

from fz_core.crypto.sodium cimport sodium_memcmp
from fz_core.wireguard.protocol cimport COOKIE_LIFETIME, MAC_LENGTH

from fz_core.crypto import blake2s, xaead_open


cdef class CookieJar:
    """Stamps handshake messages to one peer and keeps the cookie it gave us."""

    def __init__(self, bytes peer_public_key not None):
        self._mac1_key = mac1_key(peer_public_key)
        self._cookie_key = cookie_key(peer_public_key)

    cdef bytes stamp(self, bytes message, double now):
        """The message with both MACs; mac2 is zero without a fresh cookie."""
        mac1 = blake2s(message, self._mac1_key, MAC_LENGTH)
        self._last_mac1 = mac1
        self._last_index = message[4:8]
        message += mac1
        if self._cookie is None or now - self._cookie_at >= COOKIE_LIFETIME:
            return message + bytes(MAC_LENGTH)
        return message + blake2s(message, self._cookie, MAC_LENGTH)

    cdef bint accept_untrusted(self, bytes reply, double now):
        """Take the cookie of a reply to our last message; a reply to nothing or to another is refused."""
        if self._last_mac1 is None or reply[4:8] != self._last_index:
            return False
        cookie = xaead_open(self._cookie_key, reply[8:32], reply[32:64], self._last_mac1)
        if cookie is None:
            return False
        self._cookie = cookie
        self._cookie_at = now
        self._last_mac1 = None
        return True


cdef bytes mac1_key(bytes public_key):
    return blake2s(b"mac1----" + public_key)


cdef bytes cookie_key(bytes public_key):
    return blake2s(b"cookie--" + public_key)


cdef bint same(bytes a, bytes b) noexcept:
    """Equality in constant time, for strings of equal length."""
    if PyBytes_GET_SIZE(a) != PyBytes_GET_SIZE(b):
        return False
    return sodium_memcmp(PyBytes_AS_STRING(a), PyBytes_AS_STRING(b), <size_t>PyBytes_GET_SIZE(a)) == 0
