"""What a node tells its owner. All frozen; `peer_id` is the portal's id of the other end."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CandidateAdded:
    """Signal this candidate line to the peer."""

    peer_id: str
    candidate: str


@dataclass(frozen=True, slots=True)
class CandidateRemoved:
    """Withdraw a relayed candidate from the peer."""

    peer_id: str
    candidate: str


@dataclass(frozen=True, slots=True)
class ConnectionEstablished:
    """A path is chosen and a WireGuard handshake was processed; sent once per connection."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class PathChanged:
    """Data now travels between these sockets, through our relay if `relayed`."""

    peer_id: str
    local: str
    remote: str
    relayed: bool


@dataclass(frozen=True, slots=True)
class ConnectionFailed:
    """The connection is gone; `reason` is for people."""

    peer_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class ConnectionClosed:
    """The connection was closed by us."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class PeerSilent:
    """No path to the peer gives answers just now; the network under us may have changed."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class PeerLost:
    """No answers, or no path yet: the peer may have started anew, or know nothing of us. Repeated while it lasts."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class PeerStuck:
    """There is a path that works, but the peer goes on to use one that does not; a new key would make it begin anew."""

    peer_id: str


@dataclass(frozen=True, slots=True)
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
