"""What a peer client may do here, and what happens to packets between us (`spec/tunnel.md` §12).

Not here: what we may do at the peer (pools, `resources`), p2p control packets, and sending. Revocation and
expiry cut the peer's flows at once, both ways.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from fz_core.packet import DropReason, Packet
from fz_core.portal.types import Filter
from fz_core.tunnel.conntrack import ConnTrack
from fz_core.tunnel.filters import FilterSet
from fz_core.tunnel.traffic import is_classifiable


class PeerDecision(Enum):
    """What happens to a packet from or to a peer client."""

    ACCEPT = auto()  # inbound: deliver; outbound: send, no route needed
    PROHIBITED = auto()  # inbound only: answer `build_icmp_prohibited`
    ROUTE = auto()  # outbound only: a flow of our own, which needs a route


@dataclass(slots=True)
class InboundGrant:
    """One resource through which the peer reaches us; `expires_at` is monotonic seconds, None for ever."""

    filters: FilterSet
    expires_at: float | None

    def has_ended(self, now: float | None) -> bool:
        return now is not None and self.expires_at is not None and self.expires_at <= now


class PeerAccess:
    """The inbound grants of one peer client. Without any, everything it starts is refused."""

    def __init__(self) -> None:
        self._grants: dict[str, InboundGrant] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing is granted."""
        return not self._grants

    @property
    def resource_ids(self) -> set[str]:
        """Ids of all granted resources."""
        return set(self._grants)

    def grant(self, resource_id: str, filters: Iterable[Filter], expires_at: float | None) -> None:
        """Upsert a grant."""
        self._grants[resource_id] = InboundGrant(FilterSet(filters), expires_at)

    def update_filters(self, resource_id: str, filters: Iterable[Filter]) -> bool:
        """The resource's filters changed at the portal; whether it is granted here."""
        known = self._grants.get(resource_id)
        if known is not None:
            known.filters = FilterSet(filters)
        return known is not None

    def revoke(self, resource_id: str) -> bool:
        """End a grant; whether it existed."""
        return self._grants.pop(resource_id, None) is not None

    def resync(self, listed: Mapping[str, float | None]) -> list[str]:
        """Keep only listed grants, with their expiry from there; the ids of the others. Grants nothing new."""
        ended = [resource_id for resource_id in self._grants if resource_id not in listed]
        for resource_id in ended:
            self.revoke(resource_id)
        for resource_id, known in self._grants.items():
            known.expires_at = listed[resource_id]
        return ended

    def expire(self, now: float) -> list[str]:
        """End every grant whose time has come; their ids."""
        due = [resource_id for resource_id, known in self._grants.items() if known.has_ended(now)]
        for resource_id in due:
            self.revoke(resource_id)
        return due

    def next_expiry(self) -> float | None:
        """The earliest deadline."""
        return min((g.expires_at for g in self._grants.values() if g.expires_at is not None), default=None)

    def allows(self, protocol: int, port: int, now: float | None = None) -> bool:
        """Whether any grant opens this port of ours; with `now`, one that has not ended by then."""
        return any(g.filters.allows(protocol, port) and not g.has_ended(now) for g in self._grants.values())

    def attribute(self, protocol: int, port: int, now: float | None = None) -> str | None:
        """The resource through which the peer reaches this port: of several that allow it, the highest id."""
        return max(
            (
                resource_id
                for resource_id, known in self._grants.items()
                if known.filters.allows(protocol, port) and not known.has_ended(now)
            ),
            default=None,
        )

    def decide_inbound(
        self, packet: Packet, own_ips: Collection[bytes], peer_ips: Collection[bytes], flows: ConnTrack, now: float
    ) -> PeerDecision | DropReason:
        """A packet from the peer, in the order of §12; what is accepted as the peer's flow is recorded."""
        if packet.src not in peer_ips or packet.dst not in own_ips:
            return DropReason.NOT_ALLOWED
        if packet.is_icmp_error:
            return PeerDecision.ACCEPT if flows.may_accept_error(packet, now) else DropReason.NOT_ALLOWED
        if flows.is_reply(packet, now):
            return PeerDecision.ACCEPT
        if not self.allows(packet.protocol, packet.dst_port, now):
            return PeerDecision.PROHIBITED
        flows.handle_inbound(packet, now)
        return PeerDecision.ACCEPT

    def decide_outbound(self, packet: Packet, flows: ConnTrack, now: float) -> PeerDecision | DropReason:
        """A packet to the peer (§6.1 items 7 and 9).

        After ROUTE the caller finds a route, and tells `flows.handle_outbound` when it sends. A flow that the
        peer opened needs none as long as the peer may still open it.
        """
        if not is_classifiable(packet):
            if packet.is_icmp_error and flows.may_send_error(packet, now):
                return PeerDecision.ACCEPT
            return DropReason.UNSUPPORTED_PROTOCOL
        if self.allows(packet.protocol, packet.src_port, now) and flows.is_peer_opened(packet, now):
            return PeerDecision.ACCEPT
        return PeerDecision.ROUTE
