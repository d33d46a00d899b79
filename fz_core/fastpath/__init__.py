"""Offload transformations: split and merge TUN packets, batch outgoing datagrams (floor 5)."""

from fz_core.fastpath.coalesce import Coalescer
from fz_core.fastpath.gso import GsoBatch, GsoQueue
from fz_core.fastpath.pump import Pump
from fz_core.fastpath.split import split_super_packet

__all__ = ["Coalescer", "GsoBatch", "GsoQueue", "Pump", "split_super_packet"]
