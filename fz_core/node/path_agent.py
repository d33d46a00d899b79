"""Finds and keeps a path without ICE: handshakes over relays first, then probes inside WireGuard. Sans-IO.

    agent = PathAgent(controlling, now)
    agent.add_local_candidate(candidate, now) -> what to signal; agent.add_remote_candidate(candidate, now)
    agent.remove_local_candidate(...); agent.remove_remote_candidate(...); agent.rebuild(now, keep)
    agent.send_init(datagram, now)                            our tunnel made an init: the agent decides where to
    agent.is_copy(local, remote, datagram, now)               an init or response arrived: True = do not decrypt it
    agent.note_init_accepted(local, remote, datagram, response, now)
    agent.note_response_accepted(local, remote, datagram, now)
    agent.note_data_sent(now); agent.note_data_received(local, remote, now)                  cheap, for every packet
    agent.note_data_carried(first, last)                      instead of the former, for packets sent elsewhere
    agent.handle_probe(local, remote, packet, now)            a decrypted packet for which `is_probe` holds
    agent.handle_timeout(now); agent.poll_timeout()
    agent.poll_transmit() -> Transmit                         handshake bytes, to send as they are
    agent.poll_probe() -> (local, remote, packet)             to encrypt and send on exactly that pair;
    agent.note_probe_unsealed(now)                            if the tunnel cannot
    agent.poll_event() -> Nominated | PathSilent | AllPathsSilent       data stays on the last Nominated until the next

**After every call that takes `now`, drain the three polls and ask for the timeout again** (after the two per-packet
calls only if they return True). `local` is what `Transmit.local` means to `ice.Agent`: a host's own address, the
base of a reflexive one, or our relayed address.

Not here: encryption, relays, and what follows from silence. Each side chooses its sending path on its own.
Source: `spec/connectivity.md` §7; the additions are explained in `path_health.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from fz_core.ice import Candidate, IceState, Nominated, PathSilent, TimingProfile
from fz_core.node.path_candidates import PathCandidates
from fz_core.node.path_events import AllPathsSilent, PathEvent
from fz_core.node.path_handshake import Copies, FanOut
from fz_core.node.path_health import CHANGE_PATIENCE, OUTAGE_PATIENCE, PathHealth, Verdict
from fz_core.node.path_pair import PRIMARY_KEEPALIVE, PROBE_BUDGET, Key, Pair
from fz_core.node.path_pairs import PathPairs
from fz_core.node.path_probe import build_probe, parse_probe
from fz_core.node.path_score import is_clear_win
from fz_core.packet import Address, Transmit

# How long the former primary is waited for when only a new candidate made us look again.
FORMER_PREFERENCE = 0.3
# Without a primary a probe leaves every second, or cannot.
UNSEALED_TTL = 2.0


class PathAgent:
    """One side of one connection."""

    def __init__(self, controlling: bool, now: float) -> None:
        self._controlling = controlling
        self._candidates = PathCandidates()
        self._pairs = PathPairs()
        self._primary: Pair | None = None
        self._former: Pair | None = None
        self._former_until = float("-inf")
        self._has_session = False
        self._doubts_session = False  # the peer may have lost it
        self._unsealed_at = float("-inf")
        self._fan_out: FanOut | None = None
        self._copies = Copies()
        self._health = PathHealth(now)
        self._transmits: deque[Transmit] = deque()
        self._probes: deque[tuple[Address, Address, bytes]] = deque()
        self._events: deque[PathEvent] = deque()

    @property
    def is_controlling(self) -> bool:
        """Whether we start the handshake."""
        return self._controlling

    @property
    def state(self) -> IceState:
        """In the words of ICE: connected means a primary is chosen."""
        if self._primary is not None:
            return IceState.CONNECTED
        return IceState.CHECKING if any(self._pairs) else IceState.NEW

    @property
    def nominated(self) -> Nominated | None:
        """The pair in use."""
        return None if self._primary is None else self._primary.nominated

    @property
    def primary(self) -> Key | None:
        """The addresses of the pair in use."""
        return None if self._primary is None else self._primary.key

    @property
    def has_live_path(self) -> bool:
        """Whether a primary is chosen."""
        return self._primary is not None

    @property
    def local_candidates(self) -> tuple[Candidate, ...]:
        """Ours, as signalled."""
        return tuple(self._candidates.locals.values())

    @property
    def remote_candidates(self) -> tuple[Candidate, ...]:
        """The peer's, peer-reflexive ones included."""
        return tuple(self._candidates.remotes.values())

    @property
    def pairs(self) -> tuple[Key, ...]:
        """Every (local, remote) that may be probed."""
        return tuple(pair.key for pair in self._pairs)

    def set_profile(self, profile: TimingProfile, now: float) -> None:
        """Nothing: an idle connection already sends one probe per 25 s."""

    # Candidates

    def add_local_candidate(self, candidate: Candidate, now: float) -> Candidate | None:
        """The candidate if it is new and so to be signalled."""
        if not self._candidates.add_local(candidate, self.primary):
            return None
        self._match(now)
        return candidate

    def remove_local_candidate(self, candidate: Candidate, now: float) -> None:
        """This address of ours is gone."""
        if self._candidates.remove_local(candidate):
            self._match(now)

    def add_remote_candidate(self, candidate: Candidate, now: float) -> None:
        """The peer signalled this one; nothing changes if it is known or unusable."""
        if self._candidates.add_remote(candidate, self.primary):
            self._match(now)

    def remove_remote_candidate(self, candidate: Candidate, now: float) -> None:
        """The peer withdrew this one."""
        if self._candidates.remove_remote(candidate):
            self._match(now)

    def rebuild(self, now: float, keep: Collection[Candidate] = ()) -> None:
        """Our surroundings changed: keep these locals, all remotes and the session; measure everything anew."""
        self._candidates.keep_locals(keep)
        self._pairs.clear()
        self._transmits.clear()
        self._probes.clear()
        self._primary = self._former = None
        self._copies = Copies()
        if self._fan_out is not None:
            self._fan_out = FanOut(self._fan_out.init)
        self._health = PathHealth(now)
        if self._has_session:
            self._health.unwatch(now, CHANGE_PATIENCE)
        self._match(now)

    # Handshakes

    def send_init(self, datagram: bytes, now: float) -> None:
        """Our tunnel wants this init sent."""
        if not self._has_session:
            if self._fan_out is None:
                self._fan_out = FanOut(datagram)
            else:
                self._fan_out.replace(datagram)
            self._drive_fan_out(now)
            return
        is_distress = self._health.is_second_own_init()
        if self._primary is not None:
            self._transmit(self._primary.key, datagram)
            if is_distress:
                self._clear(now, OUTAGE_PATIENCE)
        elif self._doubts_session or now - self._unsealed_at <= UNSEALED_TTL:
            # the session is over, here or there: no probe can find a path any more, only a handshake can
            for key in self._pairs.relayed:
                self._transmit(key, datagram)

    def doubt_session(self) -> None:
        """The peer may know nothing of it: until a path is found, inits of ours go out as the first one did."""
        self._doubts_session = True

    def is_copy(self, local: Address, remote: Address, datagram: bytes, now: float) -> bool:
        """Whether this init or response was taken before; it is answered as then, where it came from."""
        answer = self._copies.answer(datagram, now)
        if answer:
            self._transmit((local, remote), answer)
        return answer is not None

    def note_init_accepted(self, local: Address, remote: Address, datagram: bytes, response: bytes, now: float) -> None:
        """The tunnel took this init and answered; the answer goes back where the init came from."""
        is_first = not self._has_session
        self._copies.note_init(datagram, response, now)
        self._transmit((local, remote), response)
        self._has_session = True
        self._fan_out = None
        self._register(remote, now)
        if is_first:
            # probes start with the peer's first data packet: until then the tunnel must not encrypt
            pair = self._pairs.get((local, remote))
            if pair is not None and self._primary is None:
                self._set_primary(pair, now)
        if self._health.is_second_peer_init() and self._primary is not None:
            self._clear(now, OUTAGE_PATIENCE)

    def note_response_accepted(self, local: Address, remote: Address, datagram: bytes, now: float) -> None:
        """The tunnel took this response: its pair works both ways."""
        self._copies.note_response(datagram)
        self._health.note_response()
        self._has_session = True
        self._fan_out = None
        self._register(remote, now)
        pair = self._pairs.get((local, remote))
        if pair is not None and (self._primary is None or pair.bucket < self._primary.bucket):
            self._set_primary(pair, now)
        self._start_probing(now)

    def note_probe_unsealed(self, now: float) -> None:
        """The tunnel could not encrypt a probe of `poll_probe`."""
        self._unsealed_at = now

    # Data

    def note_data_sent(self, now: float) -> bool:
        """An IP packet leaves on the path in use. True: ask for the timeout again."""
        return self._health.note_sent(now)

    def note_data_carried(self, first: float | None, last: float) -> bool:
        """IP packets left on the path in use, and we hear of it now. True: ask for the timeout again."""
        return self._health.note_carried(first, last)

    def note_data_received(self, local: Address, remote: Address, now: float) -> bool:
        """The tunnel decrypted data, a keep-alive included, but no probe. True: ask for the timeout again."""
        self._health.note_received(local, remote, now)
        if self._pairs.is_probing:
            return False
        return self._start_probing(now)

    def handle_probe(self, local: Address, remote: Address, packet: bytes, now: float) -> None:
        """A decrypted packet for which `is_probe` holds."""
        probe = parse_probe(packet)
        if probe is None:
            return
        self._start_probing(now)
        if probe.is_request:
            self._probes.append((local, remote, build_probe(False, probe.id, probe.seq)))
            self._handle_request(local, remote, now)
        else:
            self._handle_reply(local, remote, probe.id, probe.seq, now)

    def _handle_request(self, local: Address, remote: Address, now: float) -> None:
        self._register(remote, now)
        pair = self._pairs.get((local, remote))
        self._health.note_request(pair is not None and pair is self._primary, now)
        if pair is not None and pair.next_at is None and pair.rtt is None and self._pairs.is_probing:
            # its filter is open towards us at this moment
            pair.restart(now)

    def _handle_reply(self, local: Address, remote: Address, id: int, seq: int, now: float) -> None:
        pair = self._pairs.get((local, remote))
        if pair is None or pair.id != id or not pair.take_answer(seq, now):
            return
        self._health.note_received(local, remote, now)
        if pair is self._primary:
            self._health.note_answer(now)
        self._select(now)

    # Time

    def handle_timeout(self, now: float) -> None:
        """Run everything that is due."""
        self._drive_fan_out(now)
        if not self._pairs.is_probing:
            return
        self._drive_health(now)
        if self._former is not None and now >= self._former_until:
            self._former = None
            self._select(now)
        for pair in self._pairs:
            if pair.next_at is not None and now >= pair.next_at:
                self._fire(pair, now)

    def poll_timeout(self) -> float | None:
        """When `handle_timeout` is next due."""
        due = []
        if self._fan_out is not None:
            due.append(self._fan_out.poll_timeout())
        if self._pairs.is_probing:
            due.append(self._health.poll_timeout())
            due.append(self._pairs.poll_timeout())
            if self._former is not None:
                due.append(self._former_until)
        return min((at for at in due if at is not None), default=None)

    def poll_transmit(self) -> Transmit | None:
        """Handshake bytes for one pair."""
        return self._transmits.popleft() if self._transmits else None

    def poll_probe(self) -> tuple[Address, Address, bytes] | None:
        """An inner packet, and the pair to send it on."""
        return self._probes.popleft() if self._probes else None

    def poll_event(self) -> PathEvent | None:
        """What happened."""
        return self._events.popleft() if self._events else None

    def _drive_fan_out(self, now: float) -> None:
        if self._fan_out is not None:
            for key in self._fan_out.take_due(self._pairs.relayed, now):
                self._transmit(key, self._fan_out.init)

    def _drive_health(self, now: float) -> None:
        primary = self._primary
        verdict = self._health.step(None if primary is None else primary.rtt, now)
        if verdict is Verdict.ALL_SILENT:
            self.doubt_session()
            self._events.append(AllPathsSilent())
        elif verdict is Verdict.DEAD:
            self._bury(now)
        elif verdict is not Verdict.NOTHING and primary is not None:
            self._send_probe(primary, now)
            if primary.sent >= PROBE_BUDGET:
                primary.next_at = now + PRIMARY_KEEPALIVE
            if verdict is Verdict.PROBE_ALL:
                self._pairs.ask_others(primary, now)

    def _fire(self, pair: Pair, now: float) -> None:
        self._send_probe(pair, now)
        pair.schedule(now, pair is self._primary, self._primary is None)

    def _send_probe(self, pair: Pair, now: float) -> None:
        self._probes.append((*pair.key, build_probe(True, pair.id, pair.fire(now))))

    def _start_probing(self, now: float) -> bool:
        if self._pairs.is_probing or not self._has_session:
            return False
        if self._primary is None:
            self._health.unwatch(now, CHANGE_PATIENCE)
        self._pairs.start(now)
        return True

    # Choosing

    def _select(self, now: float) -> None:
        """Measured pairs only ever rise: a better bucket wins at once, an equal one if clearly faster."""
        best = self._pairs.best_measured()
        if best is None or best is self._primary:
            return
        if self._primary is None:
            if self._former is None or best.bucket <= self._former.bucket:
                self._set_primary(best, now)
        elif is_clear_win(best.score, self._primary.score):
            self._set_primary(best, now)

    def _set_primary(self, pair: Pair, now: float) -> None:
        self._primary, self._former, self._doubts_session = pair, None, False
        self._health.watch(*pair.key, now)
        self._pairs.settle_on(pair, now)
        self._events.append(pair.nominated)

    def _clear(self, now: float, patience: float, prefer_former: bool = False) -> None:
        """Look again: the primary has to win anew."""
        former, self._primary = self._primary, None
        if former is not None:
            self._former = former if prefer_former and former.rtt is not None else None
            self._former_until = now + max(FORMER_PREFERENCE, 2 * (former.rtt or 0.0))
        if not self._has_session:
            return
        self._health.unwatch(now, patience)
        if self._pairs.is_probing:
            self._pairs.look_again(former, now)

    def _bury(self, now: float) -> None:
        """The primary is dead. Whoever answered during the alarm takes over, the rest is probed anew."""
        dead, self._primary, self._former = self._primary, None, None
        if dead is None:
            return
        dead.is_dead = True
        self._events.append(PathSilent(*dead.key))
        self._health.unwatch(now, OUTAGE_PATIENCE)
        self._pairs.bury(dead, self._health.suspected_at, now)
        self._select(now)

    # Pairs

    def _match(self, now: float) -> None:
        """Bring the pairs in line with the candidates; look again if one came, or the primary went."""
        wanted = self._candidates.form_pairs()
        is_new = self._pairs.match(wanted, now)
        if self._fan_out is not None:
            self._fan_out.keep(wanted)
        if self._primary is not None and self._primary.key not in self._pairs:
            self._clear(now, CHANGE_PATIENCE)
        elif is_new:
            self._clear(now, CHANGE_PATIENCE, prefer_former=True)
        if is_new:
            self._drive_fan_out(now)

    def _register(self, remote: Address, now: float) -> None:
        if self._candidates.add_source(remote, self.primary, now):
            self._match(now)

    def _transmit(self, key: Key, datagram: bytes) -> None:
        self._transmits.append(Transmit(datagram, key[1], key[0]))
