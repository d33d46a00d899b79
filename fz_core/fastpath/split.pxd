# Splitting a super packet over raw memory, for callers at packet rate.

from libc.stdint cimport uint8_t

cdef enum:
    SPLIT_OK = 0
    SPLIT_MALFORMED = 1
    SPLIT_TOO_BIG = 2


cdef struct SplitPlan:
    const uint8_t *ip      # the super packet, without the virtio header
    int version
    int protocol
    int l4                 # offset of the TCP or UDP header
    int header             # bytes of IP and L4 header, copied to every segment
    int segment            # payload bytes of all segments but the last
    int payload            # payload bytes in all
    int count              # 1 to 256


# `ip` must outlive the plan.
cdef int plan_split(
    const uint8_t *ip, Py_ssize_t size, int gso_type, int gso_size, SplitPlan *plan
) noexcept nogil

# Writes segment `i` (0 <= i < plan.count) to `out`, which has room for its bytes, at most
# plan.header + plan.segment; returns how many.
cdef Py_ssize_t write_segment(const SplitPlan *plan, int i, uint8_t *out) noexcept nogil
