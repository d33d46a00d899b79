# Sessions, ways and keys as the driver names them, turned into what the pump looks at for each packet.

from libc.stdint cimport uint32_t

from fz_core.fastpath.flows cimport FlowKey
from fz_core.fastpath.peers cimport Peer, Receiver
from fz_core.wireguard.session cimport Session

# With which session to send, and to open what comes in with an index; None for without. An unconfirmed session is the
# slow path's: its first packet changes the tunnel.
cdef void set_sender(Peer *peer, Session session) noexcept
cdef void set_receiver(Receiver *receiver, Session session) noexcept

# `(remote ip, port, local ip or None, channel)`, or None where the slow path must send.
cdef int set_way_out(Peer *peer, way) except -1

# `(source ip, port, (local ip, port) or None, channel)`, or None where the slow path must receive.
cdef int set_way_in(Peer *peer, way) except -1

# `(version, protocol, src, dst, src_port, dst_port)`.
cdef int fill_key(FlowKey *key, flow_key, uint32_t slot) except -1


cdef inline uint32_t number_of(const Peer *peer, uint32_t slot) noexcept nogil:
    """What the driver calls a peer: the number of one that is gone never means another."""
    return slot | <uint32_t>peer.serial << 16
