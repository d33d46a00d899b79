"""What was decided about a flow, in a form that a flow table can act on (`design.md` §4).

A role offers a `Verdict` about a packet that it has just passed, when every later packet of the same key would be
treated in the same way. It is void from the moment the role says so (`TunnelRole.generation`, `take_stale`,
`take_revoked`), after `ttl` idle seconds, and from `until` on.

Not here: the table (`fastpath`), and which packets get one (`client`, `gateway`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fz_core.packet import Packet

FOREVER = float("inf")
# What needs no state is still looked at again now and then: an idle flow costs room in the table.
IDLE_SECONDS = 120.0
# A verdict ends so long before what it stands on, because that hears of packets a little later.
NOTE_DELAY = 2.0
# A client may send from one port to a translated address's every port: that is one session, with many verdicts.
MAX_BORNE = 8
FIN, RST = 0x01, 0x04
FIN_OR_RST = FIN | RST

Note = Callable[[int, int, float], None]


class FlowKey(NamedTuple):
    """Addresses (4 or 16 bytes), IP protocol and ports of a packet; of an echo both ports are the identifier."""

    version: int
    protocol: int
    src: bytes
    dst: bytes
    src_port: int
    dst_port: int

    @staticmethod
    def of(packet: Packet) -> FlowKey:
        """The key of a packet as it is now."""
        return FlowKey(packet.version, packet.protocol, packet.src, packet.dst, packet.src_port, packet.dst_port)

    @property
    def back(self) -> FlowKey:
        """The key of the answers."""
        return FlowKey(self.version, self.protocol, self.dst, self.src, self.dst_port, self.src_port)


class Verdict:
    """Packets that come as `before`, from the device to this peer or inbound from it, go on as `after`.

    It stands for its direction and `before`, and if inbound for its peer, which nobody else may speak for: what is
    installed for these is void when any verdict for them is revoked. Sizes are not part of it: a packet that exceeds
    the peer's path MTU, or 1280 bytes where the family changes, is for the slow path. So are FIN, RST, and whatever
    is neither plain TCP, UDP nor echo.
    """

    __slots__ = ("_notes", "after", "before", "is_inbound", "peer_id", "ttl", "until")

    def __init__(self, is_inbound: bool, peer_id: str, before: FlowKey, after: FlowKey, until: float = FOREVER) -> None:
        self.is_inbound = is_inbound
        self.peer_id = peer_id
        self.before = before
        self.after = after
        self.ttl = IDLE_SECONDS
        self.until = until
        self._notes: tuple[Note, ...] = ()

    def note(self, packets: int, payload_bytes: int, last_at: float) -> None:
        """What was carried since the last note: bytes after the transport header, and when the last packet passed.

        Within `NOTE_DELAY` of that, and never later than the `now` of the role's next call. What was carried before
        the verdict became void may be noted after.
        """
        for note in self._notes:
            note(packets, payload_bytes, last_at)

    def stand_on(self, lifetime: float, note: Note) -> None:
        """Something must be told of packets, and lives so many seconds without."""
        self.ttl = min(self.ttl, lifetime - NOTE_DELAY)
        self._notes += (note,)


class Basis:
    """What verdicts stand on, as a session: they are void when it ends."""

    __slots__ = ("_verdicts",)

    def __init__(self) -> None:
        self._verdicts: dict[tuple[bool, FlowKey], Verdict] | None = None  # most never bear one

    def bear(self, verdict: Verdict, revoked: list[Verdict]) -> None:
        """Remember a verdict, instead of an earlier one for the same packets; of too many the first is revoked."""
        if self._verdicts is None:
            self._verdicts = {}
        key = verdict.is_inbound, verdict.before
        if self._verdicts.pop(key, None) is None and len(self._verdicts) >= MAX_BORNE:
            revoked.append(self._verdicts.pop(next(iter(self._verdicts))))
        self._verdicts[key] = verdict

    def revoke(self, revoked: list[Verdict]) -> None:
        """Nothing stands on this any more."""
        if self._verdicts is not None:
            revoked.extend(self._verdicts.values())
            self._verdicts = None


def is_plain(packet: Packet) -> bool:
    """Whether later packets like this one may be carried by a flow table: TCP that does not end, UDP, echo."""
    return packet.src_port >= 0 and not packet.tcp_flags & FIN_OR_RST
