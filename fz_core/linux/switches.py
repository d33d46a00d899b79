"""Variables that switch an acceleration off, to find out whether it is to blame: nothing but speed depends on them."""

from __future__ import annotations

import os

FASTPATH, TUN_OFFLOADS = "FZ_FASTPATH", "FZ_TUN_OFFLOADS"
UDP_GSO, UDP_GRO = "FZ_UDP_GSO", "FZ_UDP_GRO"
OFF = frozenset({"off", "0", "false", "no"})


def is_on(variable: str) -> bool:
    """Whether the acceleration may be used: unless the variable says `off` (or `0`, `false`, `no`)."""
    return os.environ.get(variable, "").strip().lower() not in OFF
