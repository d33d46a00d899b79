# Ways and keys as the driver names them, turned into what the pump looks at for each packet.

from libc.stdint cimport uint32_t

from fz_core.fastpath.flows cimport FlowKey
from fz_core.fastpath.peers cimport Peer

# `(remote ip, port, local ip or None, channel)`, or None where the slow path must send.
cdef int set_way_out(Peer *peer, way) except -1

# `(source ip, port, (local ip, port) or None, channel)`, or None where the slow path must receive.
cdef int set_way_in(Peer *peer, way) except -1

# `(version, protocol, src, dst, src_port, dst_port)`.
cdef int fill_key(FlowKey *key, flow_key, uint32_t slot) except -1
