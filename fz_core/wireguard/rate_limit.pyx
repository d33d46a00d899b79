# cython: auto_pickle=False
"""What a responder checks before any public-key work: mac1 always, mac2 under load.

Sources: WireGuard paper section 5.3, spec/connectivity.md section 6.4.

One limiter serves all tunnels of a key. Under load is the 101st valid-mac1 handshake message of a window of at
least one second; the window restarts on the first message after its end. Cookies bind to the source IP alone.
"""

from fz_core.crypto.keys cimport PrivateKey
from fz_core.wireguard.cookie cimport cookie_key, mac1_key, same
from fz_core.wireguard.protocol cimport COOKIE_LIFETIME, INITIATION_LENGTH, MAC_LENGTH, RESPONSE_LENGTH

from fz_core.crypto import blake2s, xaead_seal
from fz_core.packet import DropReason

cdef double WINDOW_SECONDS = 1.0


cdef class RateLimiter:
    """Counts handshake messages and answers with cookies when there are too many."""

    def __init__(self, private_key, double now, random_bytes, Py_ssize_t limit=100):
        public = (private_key if isinstance(private_key, PrivateKey) else PrivateKey(private_key)).public
        self._mac1_key = mac1_key(public)
        self._cookie_key = cookie_key(public)
        self._random_bytes = random_bytes
        self._secret = random_bytes(32)
        self._secret_at = now
        self._window_at = now
        self._count = 0
        self.limit = limit

    def verify_untrusted(self, bytes datagram not None, bytes source_ip, double now):
        """None if the message may be processed, a cookie reply to send back, or why to drop it.

        `datagram` is an initiation or a response by length and type.
        """
        if len(datagram) not in (INITIATION_LENGTH, RESPONSE_LENGTH):
            return DropReason.WG_MALFORMED
        mac1_at = len(datagram) - 2 * MAC_LENGTH
        mac2_at = len(datagram) - MAC_LENGTH
        mac1 = datagram[mac1_at:mac2_at]
        if not same(blake2s(datagram[:mac1_at], self._mac1_key, MAC_LENGTH), mac1):
            return DropReason.WG_BAD_MAC
        if not self._is_under_load(now):
            return None
        if source_ip is None:
            return DropReason.WG_UNDER_LOAD
        cookie = self._cookie_for(source_ip, now)
        if same(blake2s(datagram[:mac2_at], cookie, MAC_LENGTH), datagram[mac2_at:]):
            return None
        return self._reply(datagram[4:8], mac1, cookie)

    cdef bint _is_under_load(self, double now):
        """Count one message."""
        if now - self._window_at >= WINDOW_SECONDS:
            self._window_at = now
            self._count = 0
        self._count += 1
        return self._count > self.limit

    cdef bytes _cookie_for(self, bytes source_ip, double now):
        if now - self._secret_at >= COOKIE_LIFETIME:
            self._secret = self._random_bytes(32)
            self._secret_at = now
        return blake2s(source_ip, self._secret, MAC_LENGTH)

    cdef bytes _reply(self, bytes receiver_index, bytes mac1, bytes cookie):
        nonce = self._random_bytes(24)
        return b"\x03\0\0\0" + receiver_index + nonce + xaead_seal(self._cookie_key, nonce, cookie, mac1)
