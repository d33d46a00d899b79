"""The compiled half of this room, with one clear sentence where it is missing."""

from __future__ import annotations

try:
    from fz_core.linux._tun import TunQueue
    from fz_core.linux._udp import UdpQueue
except ModuleNotFoundError as error:
    raise ImportError("fz_core is not compiled: run 'python setup.py build_ext --inplace' or 'make build'") from error

__all__ = ["TunQueue", "UdpQueue"]
