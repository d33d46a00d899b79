"""Full ICE for one component over UDP: trickle, aggressive re-nomination, checks for ever. Sans-IO.

    agent.add_local_candidate(candidate, now) -> what to signal; agent.add_remote_candidate(candidate, now)
    agent.accepts(message); agent.handle_input(local, remote, message, now)
    agent.handle_timeout(now); agent.poll_timeout()
    agent.poll_transmit(); agent.poll_event()

**After every call that takes `now`, drain `poll_transmit` and `poll_event`.**

Choices, all for a short time to the first byte: no pacing (a pair is checked when it is formed), a request is
answered and triggers a check in the same call, the controlling side nominates on the first success and again
whenever a better pair succeeds. Not supported, as no Firezone peer does it: ICE lite, restart, TCP, several
components, local peer-reflexive candidates. Sources: RFC 8445, spec/connectivity.md section 5.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from fz_core.ice.candidate import Candidate, CandidateKind
from fz_core.ice.checks import (
    ROLE_CONFLICT,
    build_check,
    build_role_conflict,
    build_success,
    is_addressed_to,
)
from fz_core.ice.credentials import Credentials
from fz_core.ice.events import IceEvent, IceState, Nominated, PathSilent, StateChanged
from fz_core.ice.pair import Pair
from fz_core.ice.timing import TimingProfile
from fz_core.packet import Address, DropReason, Transmit
from fz_core.stun import Message
from fz_core.stun.attributes import BINDING

MAX_PAIRS = 100
MAX_REMOTE_CANDIDATES = 100
MAX_DISCARDED = 100
# Two sides that hear requests but no answers must not trigger each other without pause.
TRIGGER_GAP = 0.05


class Agent:
    """One side of one connection."""

    def __init__(
        self,
        local: Credentials,
        remote: Credentials,
        controlling: bool,
        random_bytes: Callable[[int], bytes],
        now: float,
        profile: TimingProfile,
    ) -> None:
        self.local_credentials = local
        self.remote_credentials = remote
        self.profile = profile
        self._controlling = controlling
        self._random_bytes = random_bytes
        self._tie_breaker = int.from_bytes(random_bytes(8), "big")
        self._locals: list[Candidate] = []
        self._remotes: dict[tuple[CandidateKind, Address], Candidate] = {}
        self._discarded: dict[Address, None] = {}
        self._pairs: dict[tuple[Address, Address], Pair] = {}
        self._outstanding: dict[bytes, tuple[Pair, float, bool]] = {}
        self._selected: Pair | None = None
        self.answered_at = now  # a check of the pair in use
        self.heard_at = now  # anything authentic on the pair in use
        self._state = IceState.NEW
        self._transmits: deque[Transmit] = deque()
        self._events: deque[IceEvent] = deque()

    @property
    def state(self) -> IceState:
        """See IceState."""
        return self._state

    @property
    def is_controlling(self) -> bool:
        """Our role, which a conflict may have changed."""
        return self._controlling

    @property
    def nominated(self) -> Nominated | None:
        """The pair in use."""
        pair = self._selected
        if pair is None:
            return None
        return Nominated(pair.local.base, pair.remote.address, pair.local.kind, pair.remote.kind)

    @property
    def local_candidates(self) -> tuple[Candidate, ...]:
        """Ours, as signalled."""
        return tuple(self._locals)

    @property
    def remote_candidates(self) -> tuple[Candidate, ...]:
        """The peer's, peer-reflexive ones included."""
        return tuple(self._remotes.values())

    # Candidates

    def add_local_candidate(self, candidate: Candidate, now: float) -> Candidate | None:
        """The candidate as to be signalled, with its rank; None if it adds nothing new."""
        for known in self._locals:
            if known.address == candidate.address and known.base == candidate.base:
                return None
        same = [
            known
            for known in self._locals
            if known.kind is candidate.kind and known.address.is_ipv4 == candidate.address.is_ipv4
        ]
        ranked = candidate.ranked_after(len(same))
        self._locals.append(ranked)
        for remote in self._remote_addresses():
            self._form_pair(ranked.base, remote, now)
        self._settle(now)
        return ranked

    def remove_local_candidate(self, candidate: Candidate, now: float) -> None:
        """This address of ours is gone (in practice a relay's)."""
        kept = [c for c in self._locals if (c.kind, c.address) != (candidate.kind, candidate.address)]
        if len(kept) == len(self._locals):
            return
        self._locals = kept
        for pair in [p for p in self._pairs.values() if p.local.base == candidate.base]:
            best = self._best_local(pair.local.base)
            if best is None:
                self._remove_pair(pair)
            else:
                pair.local = best
                pair.rank(self._controlling)
        self._settle(now)

    def add_remote_candidate(self, candidate: Candidate, now: float) -> None:
        """The peer signalled this one. Nothing changes if it is known, or meant for another agent."""
        if candidate.ufrag is not None and candidate.ufrag != self.remote_credentials.ufrag:
            return
        if not self._has_room_for(candidate.address):
            return
        self._discarded.pop(candidate.address, None)
        self._remotes.pop((CandidateKind.PRFLX, candidate.address), None)
        self._remotes[candidate.kind, candidate.address] = candidate
        for base in self._bases():
            self._form_pair(base, candidate.address, now)
        self._settle(now)

    def remove_remote_candidate(self, candidate: Candidate, now: float) -> None:
        """The peer withdrew it: its pairs end, checks from there are ignored until it is announced anew."""
        gone = self._remotes.pop((candidate.kind, candidate.address), None)
        gone = self._remotes.pop((CandidateKind.PRFLX, candidate.address), None) or gone
        if gone is None:
            return
        best = self._best_remote(candidate.address)
        if best is None:
            self._discard(candidate.address)
        for pair in [p for p in self._pairs.values() if p.remote.address == candidate.address]:
            if best is None:
                self._remove_pair(pair)
            else:
                pair.remote = best
                pair.rank(self._controlling)
        self._settle(now)

    def _has_room_for(self, address: Address) -> bool:
        return len(self._remotes) < MAX_REMOTE_CANDIDATES or self._best_remote(address) is not None

    def _discard(self, address: Address) -> None:
        if len(self._discarded) >= MAX_DISCARDED:
            del self._discarded[next(iter(self._discarded))]
        self._discarded[address] = None

    def _bases(self) -> list[Address]:
        return list(dict.fromkeys(candidate.base for candidate in self._locals))

    def _remote_addresses(self) -> list[Address]:
        return list(dict.fromkeys(address for _, address in self._remotes))

    def _best_local(self, base: Address) -> Candidate | None:
        candidates = [c for c in self._locals if c.base == base]
        return max(candidates, key=lambda c: c.priority, default=None)

    def _best_remote(self, address: Address) -> Candidate | None:
        candidates = [c for (_, known), c in self._remotes.items() if known == address]
        return max(candidates, key=lambda c: c.priority, default=None)

    # Pairs

    def _form_pair(self, base: Address, remote_address: Address, now: float) -> Pair | None:
        """The pair, new or known. A new one is checked at once, unless it ranks below 100 others."""
        local, remote = self._best_local(base), self._best_remote(remote_address)
        if local is None or remote is None or len(base.ip) != len(remote_address.ip):
            return None
        pair = self._pairs.get((base, remote_address))
        is_new = pair is None
        if pair is None:
            pair = Pair(local, remote, now)
        pair.local, pair.remote = local, remote
        pair.rank(self._controlling)
        if is_new and self._make_room(pair):
            self._pairs[base, remote_address] = pair
            self._check(pair, now)
        return self._pairs.get((base, remote_address))

    def _make_room(self, pair: Pair) -> bool:
        if len(self._pairs) < MAX_PAIRS:
            return True
        others = [p for p in self._pairs.values() if p is not self._selected]
        worst = min(others, key=lambda p: p.priority)
        if worst.priority >= pair.priority:
            return False
        self._remove_pair(worst)
        return True

    def _remove_pair(self, pair: Pair) -> None:
        del self._pairs[pair.local.base, pair.remote.address]
        for transaction_id in pair.transaction_ids:
            self._outstanding.pop(transaction_id, None)
        if self._selected is pair:
            self._selected = None

    def _check(self, pair: Pair, now: float) -> None:
        transaction_id = self._random_bytes(12)
        pair.note_check(self.profile, now)
        while len(pair.transaction_ids) >= self.profile.max_retrans:
            self._outstanding.pop(pair.transaction_ids.popleft(), None)
        pair.transaction_ids.append(transaction_id)
        self._outstanding[transaction_id] = (pair, now, self._controlling)
        datagram = build_check(
            transaction_id,
            self.local_credentials,
            self.remote_credentials,
            self._controlling,
            self._tie_breaker,
            pair.local.check_priority,
            pair.is_nominated and self._controlling,
        )
        self._transmits.append(Transmit(datagram, pair.remote.address, pair.local.base))

    # Input

    def accepts(self, message: Message) -> bool:
        """Whether this message is meant for this agent; nothing is verified yet."""
        if message.method != BINDING:
            return False
        if message.is_request:
            return is_addressed_to(message, self.local_credentials, self.remote_credentials)
        return message.transaction_id in self._outstanding

    def handle_input(self, local: Address, remote: Address, message: Message, now: float) -> DropReason | None:
        """A STUN message from a peer, received on `local` (a base of ours)."""
        if not self.accepts(message):
            return DropReason.STUN_UNEXPECTED
        if message.is_request:
            drop = self._handle_request(local, remote, message, now)
        else:
            drop = self._handle_answer(local, remote, message, now)
        if drop is None:
            self._settle(now)
        return drop

    def _handle_request(self, local: Address, remote: Address, message: Message, now: float) -> DropReason | None:
        priority = message.priority
        if not message.check_integrity(self.local_credentials.key):
            return DropReason.STUN_UNAUTHENTICATED
        if priority is None or remote in self._discarded or not self._is_own(local):
            return DropReason.STUN_UNEXPECTED
        if self._lost_role_conflict(message):
            answer = build_role_conflict(message.transaction_id, self.local_credentials)
            self._transmits.append(Transmit(answer, remote, local))
            return None
        if message.use_candidate and self._controlling:
            return DropReason.STUN_UNEXPECTED
        answer = build_success(message.transaction_id, remote, self.local_credentials)
        self._transmits.append(Transmit(answer, remote, local))
        if self._best_remote(remote) is None and self._has_room_for(remote):
            self._remotes[CandidateKind.PRFLX, remote] = Candidate.prflx(remote, priority)
        self._note_request(local, remote, message.use_candidate, now)
        return None

    def _note_request(self, local: Address, remote: Address, use_candidate: bool, now: float) -> None:
        is_new = (local, remote) not in self._pairs
        pair = self._form_pair(local, remote, now)
        if pair is None:
            return
        pair.note_request(use_candidate, self.profile, now)
        if pair is self._selected:
            self.heard_at = now
        if not is_new and pair.is_doubtful and now >= pair.triggered_at + TRIGGER_GAP:
            pair.note_triggered(now)
            self._check(pair, now)

    def _is_own(self, local: Address) -> bool:
        return any(c.base == local for c in self._locals)

    def _lost_role_conflict(self, message: Message) -> bool:
        """True if the peer must change its role; if we must, it is done here."""
        theirs = message.ice_controlling if self._controlling else message.ice_controlled
        if theirs is None:
            return False
        if self._tie_breaker >= theirs:
            return True
        self._switch_role()
        return False

    def _switch_role(self) -> None:
        self._controlling = not self._controlling
        for pair in self._pairs.values():
            pair.rank(self._controlling)
            pair.is_nominated = pair.is_chosen_by_peer = False

    def _handle_answer(self, local: Address, remote: Address, message: Message, now: float) -> DropReason | None:
        pair, sent_at, was_controlling = self._outstanding[message.transaction_id]
        if not message.check_integrity(self.remote_credentials.key):
            return DropReason.STUN_UNAUTHENTICATED
        if (local, remote) != (pair.local.base, pair.remote.address):
            return DropReason.STUN_UNEXPECTED  # RFC 8445 section 7.2.5.2.1: paths must be symmetric
        if message.is_error:
            return self._handle_error(pair, message, was_controlling, now)
        if not message.is_success or message.xor_mapped_address is None:
            return DropReason.STUN_UNEXPECTED
        del self._outstanding[message.transaction_id]
        pair.transaction_ids.remove(message.transaction_id)
        pair.note_answer(sent_at, self.profile, now)
        if pair is self._selected:
            self.answered_at = self.heard_at = now
        return None

    def _handle_error(self, pair: Pair, message: Message, was_controlling: bool, now: float) -> DropReason | None:
        if message.error_code != ROLE_CONFLICT:
            return DropReason.STUN_UNEXPECTED
        if was_controlling == self._controlling:
            self._switch_role()
            self._check(pair, now)
        return None

    # Decisions

    def _settle(self, now: float) -> None:
        """Choose the pair to use, and tell what changed."""
        if self._controlling:
            self._nominate(now)
        else:
            self._follow(now)
        if self._selected is not None:
            self._enter(IceState.CONNECTED)
        elif self._pairs:
            self._enter(IceState.CHECKING)
        elif self._state is not IceState.NEW:
            self._enter(IceState.DISCONNECTED)

    def _nominate(self, now: float) -> None:
        best = self._best([p for p in self._pairs.values() if p.has_succeeded and self._is_worth_using(p, now)])
        if best is not None and best is not self._selected:
            self._select(best)
            best.note_nominated()
            self._check(best, now)

    def _follow(self, now: float) -> None:
        """What the peer chose, unless it has chosen otherwise since, or no answers come; then whatever answers."""
        chosen = [p for p in self._pairs.values() if p.is_chosen_by_peer]
        current = [p for p in chosen if not any(p.is_outlived_by(other) for other in chosen)]
        best = self._best([p for p in current if self._is_worth_using(p, now)])
        if best is None and current:
            best = self._best([p for p in self._pairs.values() if p.has_succeeded and self._is_worth_using(p, now)])
        if best is not None and best is not self._selected:
            self._select(best)

    def _is_worth_using(self, pair: Pair, now: float) -> bool:
        """Not silent; and to replace the pair in use, not late, and where that is silent, heard since."""
        used = self._selected
        if pair.is_silent or used is None or used is pair:
            return not pair.is_silent
        return not pair.is_late(now) and (not used.is_silent or pair.was_heard_since(used))

    def _best(self, pairs: list[Pair]) -> Pair | None:
        """The highest priority; among equals the one in use."""
        return max(pairs, key=lambda p: (p.priority, p is self._selected), default=None)

    def _select(self, pair: Pair) -> None:
        if self._selected is not None:
            self._selected.is_watched = self._selected.is_nominated = False
        self._selected = pair
        pair.is_watched = True
        nominated = self.nominated
        if nominated is not None:
            self._events.append(nominated)

    def _enter(self, state: IceState) -> None:
        if state is not self._state:
            self._state = state
            self._events.append(StateChanged(state))

    # Time

    def set_profile(self, profile: TimingProfile, now: float) -> None:
        """Check more or less often from now on."""
        self.profile = profile
        for pair in self._pairs.values():
            pair.adopt(profile, now)
        self.handle_timeout(now)

    def handle_timeout(self, now: float) -> None:
        """Send the checks that are due and drop the pairs that have failed."""
        due = [pair for pair in self._pairs.values() if pair.next_check_at <= now]
        if not due:
            return
        for pair in due:
            if pair.has_failed(self.profile, now):
                self._remove_pair(pair)
            else:
                self._note_if_silent(pair, now)
                self._check(pair, now)
        self._settle(now)

    def check_selected(self, now: float) -> None:
        """Data is not answered: does the path still work?"""
        pair = self._selected
        if pair is not None and not pair.unanswered:  # else checks are under way
            self._check(pair, now)

    @property
    def has_live_path(self) -> bool:
        """Whether the pair in use is not a silent one."""
        return self._selected is not None and not self._selected.is_silent

    def _note_if_silent(self, pair: Pair, now: float) -> None:
        if pair is not self._selected or pair.is_silent:
            return
        if pair.is_unheard(now):
            pair.note_silent()
            self._events.append(PathSilent(pair.local.base, pair.remote.address))
        elif pair.unanswered == 1:
            self._look_elsewhere(now)

    def _look_elsewhere(self, now: float) -> None:
        """The pair in use may be lost: learn now which others work."""
        for pair in list(self._pairs.values()):
            if pair is not self._selected and not pair.was_checked_within(pair.patience, now):
                self._check(pair, now)

    def poll_timeout(self) -> float | None:
        """When the next check is due."""
        return min((pair.next_check_at for pair in self._pairs.values()), default=None)

    def poll_transmit(self) -> Transmit | None:
        """The next datagram; `local` is the base it leaves from, which may be on a relay."""
        return self._transmits.popleft() if self._transmits else None

    def poll_event(self) -> IceEvent | None:
        """The next event."""
        return self._events.popleft() if self._events else None
