# The Noise_IKpsk2 handshake. Message parts here are without mac1 and mac2, which `cookie` adds.

cimport cython
from libc.stdint cimport uint32_t

from fz_core.crypto.keys cimport PrivateKey
from fz_core.wireguard.session cimport Session


@cython.final
cdef class Identity:
    """Both static keys and what they share; fixed for the life of a tunnel."""
    cdef PrivateKey private_key
    cdef bytes peer_public_key
    cdef bytes static_shared
    cdef bytes preshared_key


@cython.final
cdef class Initiation:
    """What an initiator remembers until the response."""
    cdef uint32_t local_index
    cdef PrivateKey ephemeral
    cdef bytes chain
    cdef bytes hash
    cdef bytes message


@cython.final
cdef class Received:
    """An authenticated initiation, ready to be answered."""
    cdef uint32_t remote_index
    cdef bytes ephemeral
    cdef bytes chain
    cdef bytes hash
    cdef bytes timestamp


@cython.final
cdef class Answer:
    """A response and the session it makes."""
    cdef bytes message
    cdef Session session

cdef Identity new_identity(PrivateKey private_key, bytes peer_public_key, bytes preshared_key)
cdef Initiation build_initiation(Identity identity, uint32_t local_index, bytes timestamp, bytes randomness)
cdef Received open_initiation(Identity identity, bytes message)
cdef Answer build_response(Identity identity, Received received, uint32_t local_index, bytes randomness)
cdef Session open_response(Identity identity, Initiation initiation, bytes message)
