# A packet as its flow wants it: other addresses, other ports, maybe the other IP family.

from libc.stdint cimport uint8_t

from fz_core.fastpath.flows cimport Flow, FlowKey
from fz_core.packet.layout cimport Layout

cdef enum:
    HEADER_GROWTH = 20         # IPv4 to IPv6

# The key of a packet of the kind the table is for, with `peer` 0.
cdef void key_of(const uint8_t *ip, const Layout *layout, FlowKey *key) noexcept nogil

# Whether packets like this one may be carried: TCP without SYN, FIN and RST, UDP, echo; neither options nor extensions.
cdef bint is_plain(const Layout *layout) noexcept nogil

# What the checksums lose and gain when `flow.key` becomes `flow.after`; to be called once both are set.
cdef void prepare_rewrite(Flow *flow) noexcept nogil

# Rewrites the packet at `ip`, whose headers are known (`l4` is 20 or 40), and returns where it begins now: up to
# HEADER_GROWTH bytes earlier, or 20 later. Checksums are patched. `size` is the packet's; the new one is
# size + flow_growth(flow).
cdef uint8_t *rewrite(Flow *flow, uint8_t *ip, int l4, int size) noexcept nogil

# Marks the packet as one that met congestion (RFC 3168, RFC 6040) if its ends speak ECN; whether they do.
cdef bint mark_congestion(uint8_t *ip, int version) noexcept nogil


cdef inline int flow_growth(const Flow *flow) noexcept nogil:
    """Bytes that packets of the flow grow by."""
    if not flow.crosses:
        return 0
    return HEADER_GROWTH if flow.key.version == 4 else -HEADER_GROWTH
