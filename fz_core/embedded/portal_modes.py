"""Whether two peers connect with ICE or without, decided once per pair (`spec/connectivity.md` §7.1).

A changed answer makes both ends replace their connection, so an answer lasts as long as what it was made for: the
keys of both ends and what they said they can do. Until a peer that came back with the same key has said so again, it
is taken to be able to do what it could before. The policy's switch counts when a pair is new.
"""

from __future__ import annotations

from dataclasses import dataclass

from fz_core.embedded.portal_session import Session

MAX_PAIRS = 65_536


@dataclass(frozen=True, slots=True)
class _Decision:
    keys: tuple[str, str]
    abilities: tuple[bool | None, bool | None]
    is_iceless: bool


class Modes:
    """The answers given so far, the oldest of which are forgotten beyond a bound."""

    def __init__(self) -> None:
        self._decisions: dict[tuple[str, str], _Decision] = {}

    def is_iceless(self, one: Session, other: Session, *, is_allowed: bool) -> bool:
        """The answer for both ends of a pair, in either order."""
        one, other = sorted((one, other), key=lambda s: s.peer_id)
        known = self._known(one, other)
        if known is not None:
            return known
        abilities = (one.is_iceless, other.is_iceless)
        answer = is_allowed and all(abilities)
        pair = (one.peer_id, other.peer_id)
        self._decisions.pop(pair, None)
        self._decisions[pair] = _Decision((one.public_key, other.public_key), abilities, answer)
        if len(self._decisions) > MAX_PAIRS:
            del self._decisions[next(iter(self._decisions))]
        return answer

    def is_open(self, one: Session, other: Session) -> bool:
        """Whether nothing is decided yet because one end has not said what it can do."""
        one, other = sorted((one, other), key=lambda s: s.peer_id)
        return None in (one.is_iceless, other.is_iceless) and self._known(one, other) is None

    def _known(self, one: Session, other: Session) -> bool | None:
        decision = self._decisions.get((one.peer_id, other.peer_id))
        if decision is None or decision.keys != (one.public_key, other.public_key):
            return None
        said = zip((one.is_iceless, other.is_iceless), decision.abilities, strict=True)
        return decision.is_iceless if all(now is None or now == then for now, then in said) else None
