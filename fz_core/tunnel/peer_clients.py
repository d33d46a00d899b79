"""Other clients: devices of pools we reach, and clients that may reach us (`spec/tunnel.md` §12)."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

from fz_core.node.deadlines import Deadlines
from fz_core.tunnel.conntrack import ConnTrack
from fz_core.tunnel.peer_access import PeerAccess
from fz_core.tunnel.status import DeviceView
from fz_core.tunnel.verdict import Verdict


class PeerClient:
    """One other client: what it may do here, what we may do there, and the flows of both."""

    def __init__(
        self, client_id: str, name: str, ips: tuple[IPv4Address, IPv6Address], revoked: list[Verdict] | None = None
    ) -> None:
        self.id, self.name, self.addresses = client_id, name, ips
        self.ips = (ips[0].packed, ips[1].packed)
        self.access = PeerAccess()
        self.flows = ConnTrack(revoked=revoked)
        self.pools: set[str] = set()

    def view(self, pools: tuple[str, ...]) -> DeviceView:
        """What people see."""
        return DeviceView(self.id, self.name, *self.addresses, pools)


class PeerClients:
    """Peers by id and by address. Verdicts that stood on one of their flows go to `revoked`.

    Whoever changes the grants of a peer says so with `note_grants`.
    """

    def __init__(self, revoked: list[Verdict] | None = None) -> None:
        self._revoked = revoked
        self._by_id: dict[str, PeerClient] = {}
        self._by_ip: dict[bytes, PeerClient] = {}
        self._expiries: Deadlines[PeerClient] = Deadlines(lambda peer: peer.access.next_expiry())
        self.note_grants = self._expiries.note

    def __iter__(self) -> Iterator[PeerClient]:
        return iter(list(self._by_id.values()))

    def get(self, client_id: str) -> PeerClient | None:
        """The peer with this id."""
        return self._by_id.get(client_id)

    def by_ip(self, ip: bytes) -> PeerClient | None:
        """The peer with this address inside the tunnel."""
        return self._by_ip.get(ip)

    def upsert(self, client_id: str, name: str, ips: tuple[IPv4Address, IPv6Address]) -> PeerClient:
        """A new peer, or the known one with its new name; other addresses make it a new one."""
        peer = self._by_id.get(client_id)
        if peer is None or peer.addresses != ips:
            self.forget(client_id)
            peer = self._by_id[client_id] = PeerClient(client_id, name, ips, self._revoked)
            self._expiries.add(peer)
            for ip in peer.ips:
                self._by_ip[ip] = peer
        peer.name = name
        return peer

    def forget(self, client_id: str) -> bool:
        """Drop everything about a peer; whether it was known."""
        peer = self._by_id.pop(client_id, None)
        if peer is None:
            return False
        self._expiries.remove(peer)
        for ip in peer.ips:
            if self._by_ip.get(ip) is peer:
                del self._by_ip[ip]
        return True

    def leave_pool(self, pool_id: str, client_id: str | None = None) -> None:
        """We may not open flows to this peer, or to any, through this pool."""
        for peer in self._by_id.values():
            if client_id in (None, peer.id):
                peer.pools.discard(pool_id)

    def expire(self, now: float) -> list[tuple[str, str]]:
        """End grants and flows whose time has come; the grants as (client, resource)."""
        for peer in self._by_id.values():
            peer.flows.handle_timeout(now)
        due = self._expiries.take(now)
        return [(peer.id, resource_id) for peer in due for resource_id in peer.access.expire(now)]

    def next_expiry(self) -> float | None:
        """The earliest end of a grant."""
        return self._expiries.poll_timeout()
