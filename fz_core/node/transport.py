"""How the data of a peer travels, for those who carry it without a call per packet, and what they tell afterwards.

Not here: the carrying itself (`fastpath/`), and the choice of a path (`connection.py`, `path_agent.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fz_core.packet import Address
from fz_core.wireguard import Tunnel


class Hop(NamedTuple):
    """Where datagrams go or come from. With a `channel` (0: none) `remote` is the relay, and `local` is None."""

    remote: Address
    local: Address | None
    channel: int


class Transport(NamedTuple):
    """How data of one peer travels at present. The tunnel knows its sessions, and for how long each may be used."""

    peer_id: str
    index: int  # type: ignore[assignment]  # hides tuple.index: the upper 24 bits of all our receiver indices for this peer
    tunnel: Tunnel
    send: Hop | None  # None: nothing may be sent without asking the node
    send_until: float  # the end of the channel's life, or infinity
    receive: Hop | None  # the way data last came


class Carried(NamedTuple):
    """What was sealed and opened elsewhere, as times of the last or first datagram.

    Only IP packets that the node has not seen count: what is handed to `Node.handle_opened` does not.
    """

    sent_at: float | None
    heard_at: float | None
    unheard_since: float | None  # the first one sent after the last one heard


class Unheard:
    """Since when the peer has not been heard, in the sense that data of ours was followed by nothing."""

    def __init__(self) -> None:
        self.since: float | None = None
        self._cleared_at = float("-inf")

    def note_sent(self, now: float) -> None:
        """Data leaves."""
        if self.since is None:
            self.since = now

    def note_carried(self, first: float | None, last: float) -> None:
        """Data was sent elsewhere, of which all from `first` on is unheard by what is known there."""
        at = first_unheard(first, last, self._cleared_at)
        if at is not None and (self.since is None or at < self.since):
            self.since = at

    def clear(self, now: float) -> None:
        """The peer was heard, or the silence has had its consequence: only data sent from now on counts."""
        self._cleared_at = max(self._cleared_at, now)
        if self.since is not None and self.since <= now:
            self.since = None


def first_unheard(first: float | None, last: float, cleared_at: float) -> float | None:
    """The first data sent since `cleared_at`, as well as it is known.

    If `first` was before that, only the last one is known to have come after it, at most one report too late.
    """
    if first is not None and first >= cleared_at:
        return first
    return last if last > cleared_at else None


class Changes:
    """Peers whose transport may differ from what was last taken, and those who depend on a relay's channels."""

    def __init__(self) -> None:
        self._changed: set[str] | None = None  # None: nobody has ever asked, so nothing is collected
        self._users: dict[Address, set[str]] = {}
        self._remotes: dict[str, frozenset[Address]] = {}

    def take(self, peers: Iterable[str]) -> set[str]:
        """Those who changed since the last call; of all `peers` at the first one."""
        taken, self._changed = self._changed, set()
        return set(peers) if taken is None else taken

    def note(self, peer_id: str, remotes: Iterable[Address]) -> None:
        """This one's transport changed; a change of the channels to `remotes` will concern it from now on."""
        if self._changed is not None:
            self._changed.add(peer_id)
        remotes = frozenset(remotes)
        before = self._remotes.get(peer_id, frozenset())
        if remotes == before:
            return
        for remote in before - remotes:
            self._users[remote].discard(peer_id)
            if not self._users[remote]:
                del self._users[remote]
        for remote in remotes - before:
            self._users.setdefault(remote, set()).add(peer_id)
        if remotes:
            self._remotes[peer_id] = remotes
        else:
            del self._remotes[peer_id]

    def note_channel(self, remote: Address) -> None:
        """A relay's channel to this address was confirmed, or is gone."""
        if self._changed is not None:
            self._changed |= self._users.get(remote, set())

    def note_relay_gone(self) -> None:
        """A relay is gone with all its channels."""
        if self._changed is not None:
            self._changed.update(self._remotes)
