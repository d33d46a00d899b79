"""The candidates of both ends without ICE: identity, limits, and the pairs they form.

Source: `spec/connectivity.md` §4.2 (identity), §7.2 (pairs, peer-reflexive), §7.5 (limits).
"""

from __future__ import annotations

from collections.abc import Collection

from fz_core.ice import Candidate, CandidateKind, is_usable
from fz_core.node.path_pair import Key
from fz_core.node.path_score import TIER, Kinds
from fz_core.packet import Address

MAX_PER_KIND = 6
MAX_PEER_REFLEXIVE = 4
# A peer-reflexive address that was silent for so long may make room for a new one.
STALE_AFTER = 30.0

Identity = tuple[CandidateKind, Address, Address]


class PathCandidates:
    """What both ends may send from and to. `primary` in every call: the pair not to be evicted."""

    def __init__(self) -> None:
        self.locals: dict[Identity, Candidate] = {}
        self.remotes: dict[Identity, Candidate] = {}
        self._reflexive_at: dict[Address, float] = {}

    def add_local(self, candidate: Candidate, primary: Key | None) -> bool:
        """Whether it is new."""
        return self._add(self.locals, candidate, primary)

    def add_remote(self, candidate: Candidate, primary: Key | None) -> bool:
        """Whether it is new. A peer-reflexive one of the same address gives way to it, its pairs stay."""
        if not self._add(self.remotes, candidate, primary):
            return False
        if candidate.address in self._reflexive_at:
            self._forget_reflexive(candidate.address)
        return True

    def remove_local(self, candidate: Candidate) -> bool:
        """Whether it was there."""
        return self.locals.pop(identity_of(candidate), None) is not None

    def remove_remote(self, candidate: Candidate) -> bool:
        """Whether it was there."""
        return self.remotes.pop(identity_of(candidate), None) is not None

    def keep_locals(self, keep: Collection[Candidate]) -> None:
        """Drop all other ones."""
        kept = {identity_of(candidate) for candidate in keep}
        self.locals = {key: candidate for key, candidate in self.locals.items() if key in kept}

    def add_source(self, remote: Address, primary: Key | None, now: float) -> bool:
        """The peer reached us from there. Whether that is a new address of it."""
        if remote in self._reflexive_at:
            self._reflexive_at[remote] = now
            return False
        if any(candidate.address == remote for candidate in self.remotes.values()):
            return False
        if len(self._reflexive_at) >= MAX_PEER_REFLEXIVE:
            oldest = min(self._reflexive_at, key=self._reflexive_at.__getitem__)
            is_used = primary is not None and primary[1] == oldest
            if is_used or now - self._reflexive_at[oldest] < STALE_AFTER:
                return False
            self._forget_reflexive(oldest)
        self._reflexive_at[remote] = now
        candidate = Candidate.prflx(remote, 0)
        self.remotes[identity_of(candidate)] = candidate
        return True

    def form_pairs(self) -> dict[Key, Kinds]:
        """Every pair of one family, with the best kinds of its ends: a host and its reflexive address send alike."""
        wanted: dict[Key, Kinds] = {}
        for local in self.locals.values():
            source = send_address(local)
            for remote in self.remotes.values():
                if source.is_ipv4 != remote.address.is_ipv4:
                    continue
                key = (source, remote.address)
                local_kind, remote_kind, is_cross = wanted.get(key, (local.kind, remote.kind, local.is_cross_family))
                wanted[key] = (
                    min(local_kind, local.kind, key=TIER.__getitem__),
                    min(remote_kind, remote.kind, key=TIER.__getitem__),
                    is_cross,
                )
        return wanted

    def _add(self, known: dict[Identity, Candidate], candidate: Candidate, primary: Key | None) -> bool:
        key = identity_of(candidate)
        if key in known or not is_usable(candidate.address.ip):
            return False
        same = [other for other in known if other[0] is candidate.kind]
        if len(same) >= MAX_PER_KIND:
            used = primary or ()
            spare = [other for other in same if other[1] not in used and other[2] not in used]
            del known[(spare or same)[0]]
        known[key] = candidate
        return True

    def _forget_reflexive(self, address: Address) -> None:
        del self._reflexive_at[address]
        self.remotes.pop((CandidateKind.PRFLX, address, address), None)


def identity_of(candidate: Candidate) -> Identity:
    """What makes two ICE-less candidates the same one; `base` of a remote one is its related address."""
    return candidate.kind, candidate.address, candidate.base


def send_address(local: Candidate) -> Address:
    """What datagrams of this candidate leave from."""
    return local.base if local.kind is CandidateKind.SRFLX else local.address
