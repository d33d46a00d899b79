"""Which of two pairs is the better path. Internal to each side.

Source: `spec/connectivity.md` §7.4.
"""

from __future__ import annotations

from operator import attrgetter

from fz_core.ice import CandidateKind
from fz_core.packet import Address

HYSTERESIS_FRACTION = 0.2
HYSTERESIS_FLOOR = 0.01
TIER = {CandidateKind.HOST: 0, CandidateKind.SRFLX: 1, CandidateKind.PRFLX: 1, CandidateKind.RELAY: 2}

# Kinds of the two ends, and whether our relayed address is of another family than our way to that relay.
Kinds = tuple[CandidateKind, CandidateKind, bool]
Bucket = tuple[int, int, bool, bool, bool]


def bucket_of(local: Address, kinds: Kinds) -> Bucket:
    """Smaller is the better path, whatever the round trips.

    In this order: worse end, better end, our relay rather than theirs, relayed address of the family we talk to
    the relay in, IPv6.
    """
    local_kind, remote_kind, is_cross_family = kinds
    better, worse = sorted((TIER[local_kind], TIER[remote_kind]))
    return worse, better, local_kind is not CandidateKind.RELAY, is_cross_family, local.is_ipv4


def is_clear_win(new: tuple[Bucket, float], current: tuple[Bucket, float]) -> bool:
    """A better bucket, or in the same one a round trip so much shorter that jitter is no reason."""
    if new[0] != current[0] or current[1] == float("inf"):
        return new[0] < current[0]
    return new[1] + max(HYSTERESIS_FLOOR, HYSTERESIS_FRACTION * current[1]) < current[1]


by_score = attrgetter("score")
