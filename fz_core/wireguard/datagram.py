"""Fields of WireGuard datagrams a demultiplexer needs, read before any authentication."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

INIT, RESPONSE, COOKIE_REPLY, DATA = 1, 2, 3, 4
RECEIVER_INDEX_OFFSET = {RESPONSE: 8, COOKIE_REPLY: 4, DATA: 4}


def receiver_index(datagram: Buffer) -> int | None:
    """The index of ours a response, cookie reply or data packet is for; None for anything else."""
    view = memoryview(datagram)
    if len(view) < 12 or view[1] | view[2] | view[3]:
        return None
    offset = RECEIVER_INDEX_OFFSET.get(view[0])
    return None if offset is None else int.from_bytes(view[offset : offset + 4], "little")
