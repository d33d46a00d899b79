from typing_extensions import Buffer

from fz_core.packet import DropCounter, DropReason, Packet

def split_super_packet(data: Buffer, drops: DropCounter | None = None) -> list[Packet] | DropReason: ...
