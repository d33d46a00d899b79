"""IP packets and socket addresses (floor 0)."""

from fz_core.packet.address import Address, Transmit
from fz_core.packet.drops import DropCounter, DropReason

__all__ = ["Address", "DropCounter", "DropReason", "Transmit"]
