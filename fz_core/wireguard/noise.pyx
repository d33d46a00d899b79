# cython: auto_pickle=False
"""The handshake of WireGuard: Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s (paper sections 5.4.2, 5.4.3, 5.4.5).

Not here: mac1, mac2 and cookies (`cookie`), replay of timestamps and retries (`tunnel`, `timers`).

Initiation: type 4, sender index 4, ephemeral 32, static 48, timestamp 28, mac1 16, mac2 16.
Response:   type 4, sender index 4, receiver index 4, ephemeral 32, empty 16, mac1 16, mac2 16.
Every function that reads a message returns None for one that does not authenticate.
"""

import struct

from libc.stdint cimport uint8_t, uint32_t
from cpython.bytes cimport PyBytes_AS_STRING

from fz_core.crypto.keys cimport PrivateKey, wipe
from fz_core.wireguard.protocol cimport INITIATION_LENGTH, MESSAGE_INITIATION, MESSAGE_RESPONSE
from fz_core.wireguard.session cimport Session, new_session

from fz_core.crypto import aead_open, aead_seal, blake2s, hmac_blake2s

cdef bytes _CONSTRUCTION = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"
cdef bytes _IDENTIFIER = b"WireGuard v1 zx2c4 Jason@zx2c4.com"
cdef bytes _CHAIN = blake2s(_CONSTRUCTION)
cdef bytes _HASH = blake2s(_CHAIN + _IDENTIFIER)


def initiator_static_key_untrusted(private_key, datagram):
    """The public key an initiation claims to come from, or None. Proven only by the tunnel's own check.

    Costs a key agreement, so let `RateLimiter.verify_untrusted` see the datagram first.
    """
    message = bytes(datagram)
    if len(message) != INITIATION_LENGTH or message[:4] != b"\x01\0\0\0":
        return None
    key = private_key if isinstance(private_key, PrivateKey) else PrivateKey(private_key)
    opened = _open_static(key, message)
    return None if opened is None else opened[0]


cdef class Identity:
    def __dealloc__(self):
        if self.static_shared is not None:
            wipe(self.static_shared)


cdef class Initiation:
    pass


cdef class Received:
    pass


cdef class Answer:
    pass


cdef Identity new_identity(PrivateKey private_key, bytes peer_public_key, bytes preshared_key):
    cdef Identity identity = Identity.__new__(Identity)
    identity.private_key = private_key
    identity.peer_public_key = peer_public_key
    identity.preshared_key = preshared_key
    identity.static_shared = private_key.exchange(_pointer(peer_public_key))
    if identity.static_shared is None:
        raise ValueError("the peer's public key is of low order: ask the portal for the right one")
    return identity


cdef Initiation build_initiation(Identity identity, uint32_t local_index, bytes timestamp, bytes randomness):
    cdef Initiation it = Initiation.__new__(Initiation)
    it.local_index = local_index
    it.ephemeral = PrivateKey(randomness)
    hash_ = _mix_hash(_HASH, identity.peer_public_key)
    chain = _extract(_CHAIN, it.ephemeral.public)
    hash_ = _mix_hash(hash_, it.ephemeral.public)
    chain, key = _mix(chain, it.ephemeral.exchange(_pointer(identity.peer_public_key)))
    static = aead_seal(key, 0, identity.private_key.public, hash_)
    hash_ = _mix_hash(hash_, static)
    chain, key = _expand(chain, identity.static_shared, 2)
    stamp = aead_seal(key, 0, timestamp, hash_)
    it.hash = _mix_hash(hash_, stamp)
    it.chain = chain
    it.message = struct.pack("<II", MESSAGE_INITIATION, local_index) + it.ephemeral.public + static + stamp
    return it


cdef Received open_initiation(Identity identity, bytes message):
    cdef Received it
    opened = _open_static(identity.private_key, message)
    if opened is None:
        return None
    claimed, chain, hash_ = opened
    if claimed != identity.peer_public_key:
        return None
    chain, key = _expand(chain, identity.static_shared, 2)
    timestamp = aead_open(key, 0, message[88:116], hash_)
    if timestamp is None:
        return None
    it = Received.__new__(Received)
    it.remote_index = int.from_bytes(message[4:8], "little")
    it.ephemeral = message[8:40]
    it.chain = chain
    it.hash = _mix_hash(hash_, message[88:116])
    it.timestamp = timestamp
    return it


cdef Answer build_response(Identity identity, Received received, uint32_t local_index, bytes randomness):
    cdef Answer answer
    cdef PrivateKey ephemeral = PrivateKey(randomness)
    chain = _extract(received.chain, ephemeral.public)
    hash_ = _mix_hash(received.hash, ephemeral.public)
    ephemeral_shared = ephemeral.exchange(_pointer(received.ephemeral))
    if ephemeral_shared is None:
        return None
    chain = _mix_chain(chain, ephemeral_shared)
    chain = _mix_chain(chain, ephemeral.exchange(_pointer(identity.peer_public_key)))
    chain, mixed, key = _expand(chain, identity.preshared_key, 3)
    hash_ = _mix_hash(hash_, mixed)
    answer = Answer.__new__(Answer)
    answer.message = (
        struct.pack("<III", MESSAGE_RESPONSE, local_index, received.remote_index)
        + ephemeral.public
        + aead_seal(key, 0, b"", hash_)
    )
    answer.session = _derive(chain, local_index, received.remote_index, False)
    return answer


cdef Session open_response(Identity identity, Initiation initiation, bytes message):
    ephemeral = message[12:44]
    chain = _extract(initiation.chain, ephemeral)
    hash_ = _mix_hash(initiation.hash, ephemeral)
    ephemeral_shared = initiation.ephemeral.exchange(_pointer(ephemeral))
    static_shared = identity.private_key.exchange(_pointer(ephemeral))
    if ephemeral_shared is None or static_shared is None:
        return None
    chain = _mix_chain(chain, ephemeral_shared)
    chain = _mix_chain(chain, static_shared)
    chain, mixed, key = _expand(chain, identity.preshared_key, 3)
    if aead_open(key, 0, message[44:60], _mix_hash(hash_, mixed)) is None:
        return None
    return _derive(chain, initiation.local_index, int.from_bytes(message[4:8], "little"), True)


cdef tuple _open_static(PrivateKey private_key, bytes message):
    """The initiator's static key, the chaining key and the hash after it; or None."""
    ephemeral = message[8:40]
    hash_ = _mix_hash(_mix_hash(_HASH, private_key.public), ephemeral)
    shared = private_key.exchange(_pointer(ephemeral))
    if shared is None:
        return None
    chain, key = _mix(_extract(_CHAIN, ephemeral), shared)
    static = aead_open(key, 0, message[40:88], hash_)
    return None if static is None else (static, chain, _mix_hash(hash_, message[40:88]))


cdef Session _derive(bytes chain, uint32_t local_index, uint32_t remote_index, bint is_initiator):
    """Transport keys: the first is the initiator's for sending."""
    cdef bytes first, second
    first, second = _expand(chain, b"", 2)
    if is_initiator:
        session = new_session(first, second, local_index, remote_index, True)
    else:
        session = new_session(second, first, local_index, remote_index, False)
    wipe(first)
    wipe(second)
    wipe(chain)
    return session


cdef bytes _mix_hash(bytes hash_, bytes data):
    return blake2s(hash_ + data)


cdef bytes _extract(bytes chain, bytes data):
    return hmac_blake2s(hmac_blake2s(chain, data), b"\x01")


cdef bytes _mix_chain(bytes chain, bytes shared):
    """`_extract` of a fresh shared secret, which is wiped."""
    mixed = _extract(chain, shared)
    wipe(shared)
    return mixed


cdef list _mix(bytes chain, bytes shared):
    """Chaining key and key of a fresh shared secret, which is wiped."""
    keys = _expand(chain, shared, 2)
    wipe(shared)
    return keys


cdef list _expand(bytes chain, bytes data, int count):
    """Noise's HKDF (Noise specification section 4.3): `count` keys of 32 bytes."""
    cdef bytes secret = hmac_blake2s(chain, data)
    cdef list keys = []
    cdef bytes last = b""
    for number in range(1, count + 1):
        last = hmac_blake2s(secret, last + bytes((number,)))
        keys.append(last)
    wipe(secret)
    return keys


cdef inline const uint8_t *_pointer(bytes data) noexcept:
    return <const uint8_t *>PyBytes_AS_STRING(data)
