"""Peers whose way to us has changed: their relays may know them at the old address only, and they do not notice.

An official peer whose NAT router got another address, or rebooted, goes on to use its allocations, which answer nobody
any more, and tells its peers of addresses that are not its own. Other relay credentials make it begin anew with its
relays, which is all it needs. So the credentials, a function of key and expiry, get another expiry, seconds earlier,
when a peer comes from another address, or anew while its old connection still stands here: it was cut on its side.
"""

from __future__ import annotations

from fz_core.embedded.portal_session import Session

MAX_KNOWN = 4096
MAX_MOVES = 3600


class Moves:
    """How often each key has moved, and from where it was last seen, by family."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[dict[bool, str], int]] = {}

    def note(self, session: Session, *, was_cut: bool) -> None:
        """A peer connects. Another family is not another place."""
        if not session.public_key or not session.remote:
            return
        places, moves = self._known.pop(session.public_key, ({}, 0))
        is_ipv6 = ":" in session.remote
        if was_cut or places.get(is_ipv6, session.remote) != session.remote:
            moves = (moves + 1) % MAX_MOVES
            places = {}
        self._known[session.public_key] = {**places, is_ipv6: session.remote}, moves
        if len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]

    def of(self, session: Session) -> int:
        """The number of moves so far, for its relay credentials."""
        return self._known.get(session.public_key, ({}, 0))[1]
