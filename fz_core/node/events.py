"""What a node tells its owner. All frozen; `peer_id` is the portal's id of the other end."""

from __future__ import annotations

from fz_core.packet.frozen import frozen


@frozen
class CandidateAdded:
    """Signal this candidate line to the peer."""

    peer_id: str
    candidate: str


@frozen
class CandidateRemoved:
    """Withdraw a relayed candidate from the peer."""

    peer_id: str
    candidate: str


@frozen
class ConnectionEstablished:
    """A path is chosen and a WireGuard handshake was processed; sent once per connection."""

    peer_id: str


@frozen
class PathChanged:
    """Data now travels between these sockets, through our relay if `relayed`."""

    peer_id: str
    local: str
    remote: str
    relayed: bool


@frozen
class ConnectionFailed:
    """The connection is gone; `reason` is for people."""

    peer_id: str
    reason: str


@frozen
class ConnectionClosed:
    """The connection was closed by us."""

    peer_id: str


@frozen
class PeerSilent:
    """No path to the peer gives answers just now; the network under us may have changed."""

    peer_id: str


@frozen
class PeerLost:
    """No answers, or no path yet: the peer may have started anew, or know nothing of us. Repeated while it lasts."""

    peer_id: str


@frozen
class PeerStuck:
    """There is a path that works, but the peer goes on to use one that does not; a new key would make it begin anew."""

    peer_id: str


@frozen
class RelaysExhausted:
    """The last relay is gone; the portal must be asked for others."""


NodeEvent = (
    CandidateAdded
    | CandidateRemoved
    | ConnectionEstablished
    | PathChanged
    | ConnectionFailed
    | ConnectionClosed
    | PeerSilent
    | PeerLost
    | PeerStuck
    | RelaysExhausted
)


class NoRelays(Exception):
    """No relay has answered yet, so no connection can be made; ask the portal for relays."""
