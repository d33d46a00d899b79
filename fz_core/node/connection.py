"""One remote peer: an ICE agent that finds a path, a WireGuard tunnel that uses it, and a state.

Not here: sockets of relays and the lookup of connections by datagram (`node.py`).
Source: `spec/connectivity.md` §6.5, §6.6, §8.1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from fz_core.crypto import PrivateKey
from fz_core.ice import (
    Agent,
    Candidate,
    CandidateKind,
    Credentials,
    IceState,
    Nominated,
    PathSilent,
    StateChanged,
    TimingProfile,
)
from fz_core.node.path_agent import PathAgent
from fz_core.node.path_events import AllPathsSilent
from fz_core.node.path_watch import SLOW_FIRST, PathWatch
from fz_core.node.transport import Carried
from fz_core.packet import Address, DropReason
from fz_core.stun import Message
from fz_core.wireguard import Expired, RateLimiter, SessionEstablished, Tunnel

Datagram = bytes | memoryview


class TunnelTiming(NamedTuple):
    """WireGuard's timers in seconds, where they differ from the paper's (`spec/connectivity.md` §6.3)."""

    rekey_attempt_time: float
    keepalive_timeout: float
    rekey_timeout: float


CANDIDATE_TIMEOUT = 10.0
DISCONNECT_TIMEOUT = 2.0
# The paper's 5 s (for the gap) make a lost handshake message the slowest part of connecting over a lossy path.
ICE_TIMING = TunnelTiming(rekey_attempt_time=20.0, keepalive_timeout=10.0, rekey_timeout=0.5)
HANDSHAKE_THROTTLE = 20.0
MAX_IDLE = 20.0
SILENCE = 3.0
SIGNAL_INTERVAL = 2.0
# How long our end is taken back when a peer is told of it anew.
TAKEN_BACK = 0.1
MAX_RETELLINGS = 50
MAX_FORMER = 8
CHANGED_LATELY = 30.0
BUFFERED_DATAGRAMS = 128


class Retelling(NamedTuple):
    """Candidate lines for the peer."""

    lines: tuple[str, ...]
    is_withdrawal: bool


class Outgoing(NamedTuple):
    """A datagram to send from `local`, which may be on a relay. `is_check`: by the agent, to find a path."""

    local: Address
    remote: Address
    payload: bytes
    is_check: bool


class State(Enum):
    """Life of a connection; FAILED is left by removal only."""

    CONNECTING = auto()
    CONNECTED = auto()
    IDLE = auto()
    FAILED = auto()


class Path(NamedTuple):
    """Where data goes. With `via_relay`, `local` is our relayed address."""

    local: Address
    remote: Address
    via_relay: bool
    to_relay: bool


@dataclass(frozen=True, slots=True)
class Profiles:
    """ICE timing while packets flow and while none do."""

    active: TimingProfile
    idle: TimingProfile


@dataclass(frozen=True)
class Parameters:
    """What the portal says about a connection. Equal parameters mean the same connection."""

    remote_key: bytes
    preshared_key: bytes
    local: Credentials
    remote: Credentials
    controlling: bool
    iceless: bool

    def __repr__(self) -> str:
        return f"Parameters(controlling={self.controlling}, iceless={self.iceless})"


class Connection:
    """State machine of one connection that uses ICE. Mutate, then `settle`, then send what is `outgoing`.

    What is different without ICE is in `iceless.py`.
    """

    timing = ICE_TIMING
    is_iceless = False

    def __init__(
        self,
        peer_id: str,
        parameters: Parameters,
        profiles: Profiles,
        relay_id: str,
        index: int,
        private_key: PrivateKey,
        rate_limiter: RateLimiter,
        unix_epoch: float,
        random_bytes: Callable[[int], bytes],
        now: float,
    ) -> None:
        self.peer_id = peer_id
        self.parameters = parameters
        self.relay_id = relay_id
        self.index = index
        self.state = State.CONNECTING
        self.path: Path | None = None
        self._random_bytes = random_bytes
        self._profiles = profiles
        self.agent: Agent | PathAgent = self._new_agent(now)
        self.tunnel = Tunnel(
            private_key,
            parameters.remote_key,
            parameters.preshared_key,
            index,
            now,
            unix_epoch,
            random_bytes,
            rekey_attempt_time=self.timing.rekey_attempt_time,
            keepalive_timeout=self.timing.keepalive_timeout,
            rekey_timeout=self.timing.rekey_timeout,
            queue_limit=BUFFERED_DATAGRAMS if parameters.controlling else 0,
            rate_limiter=rate_limiter,
        )
        self.established = False
        self.watch = PathWatch(now, slow_at=now + SLOW_FIRST if parameters.controlling else None)
        self.failure: str | None = None
        self.path_changed = False
        self._held: deque[bytes] = deque(maxlen=BUFFERED_DATAGRAMS)
        self._candidates_due_at: float | None = now + CANDIDATE_TIMEOUT
        self._disconnected_at: float | None = None
        self._handshake_at: float | None = None
        self._handshaken = False
        self._last_activity = now
        self._signalled_at = now - SIGNAL_INTERVAL
        self.received_on: tuple[Address, Address] | None = None  # (local, remote) the last data came on
        self.published: tuple[object, ...] = ()  # what the node last told of, in `_publish`
        self._carried = Carried(None, None, None)
        self.retellings = 0
        self.is_retelling_due = False
        self._former: dict[Address, Candidate] = {}  # not ours any more, but a peer may hold on to them
        self._changed_at: float | None = None
        self._retelling: deque[Retelling] = deque()
        self._retell_at: float | None = None

    def add_remote_candidate(self, candidate: Candidate, now: float) -> None:
        """Take a candidate of the peer."""
        self.agent.add_remote_candidate(candidate, now)
        if self.agent.remote_candidates:
            self._candidates_due_at = None
        self.touch(now)

    def announcement(self, candidate: Candidate) -> str:
        """The text that tells the peer of a candidate of ours."""
        return candidate.to_sdp(self.parameters.local.ufrag)

    def withdrawal(self, candidate: Candidate) -> str:
        """The text that takes it back."""
        return candidate.to_invalidation()

    def parse_untrusted(self, line: str) -> Candidate | None:
        """A candidate of the peer, or None if this is not one."""
        return Candidate.parse_untrusted(line)

    def retell(self, now: float) -> None:
        """Have the peer forget what it knows of our addresses, and learn them anew, in three messages.

        A candidate that outranks all others of the address takes over their pairs and is withdrawn with them, even
        where the peer has guessed or observed the address by itself.
        """
        if self.retellings >= MAX_RETELLINGS:
            return
        self.retellings += 1
        n, ufrag = self.retellings, self.parameters.local.ufrag
        by_address = {c.address: c for c in self.agent.local_candidates if c.kind is not CandidateKind.RELAY}
        ours = tuple(by_address.values())
        theirs = (*ours, *(c for address, c in self._former.items() if address not in by_address))
        self._retelling = deque(
            (
                Retelling(tuple(c.retold(n, ufrag, above_all=True) for c in theirs), is_withdrawal=False),
                Retelling(tuple(c.retold(n, None, above_all=True) for c in theirs), is_withdrawal=True),
                Retelling(tuple(c.retold(n, ufrag) for c in ours), is_withdrawal=False),
            )
        )
        self._retell_at, self.is_retelling_due = now + TAKEN_BACK, True

    def note_withdrawn(self, candidate: Candidate, now: float) -> None:
        """An address is not ours any more. The peer may have guessed it too, and then a withdrawal is not enough."""
        if candidate.kind is CandidateKind.RELAY:
            return
        self._former.pop(candidate.address, None)
        self._former[candidate.address] = candidate
        if len(self._former) > MAX_FORMER:
            del self._former[next(iter(self._former))]
        self._changed_at = now
        if self.path is not None:
            self.retell(now)

    def handle_portal_connected(self, now: float) -> None:
        """What was told while the portal was away came to nothing."""
        if self._changed_at is not None and now - self._changed_at < CHANGED_LATELY and self.path is not None:
            self.retell(now)

    def take_retelling(self) -> Retelling | None:
        """The next of these messages, once its time has come."""
        if not self.is_retelling_due or not self._retelling:
            return None
        self.is_retelling_due = False
        return self._retelling.popleft()

    def touch(self, now: float) -> None:
        """Note activity; an idle connection wakes up."""
        self._last_activity = now
        self._wake(now)

    def _wake(self, now: float) -> None:
        if self.state is State.IDLE:
            self.state = State.CONNECTED
            self.agent.set_profile(self._profiles.active, now)

    def may_signal_again(self, now: float) -> bool:
        """Whether an unconnected peer may be told our candidates once more; asked for, at most every 2 s."""
        if self.path is not None or now - self._signalled_at < SIGNAL_INTERVAL:
            return False
        self._signalled_at = now
        return True

    def rehandshake(self, now: float) -> None:
        """Start a handshake if we are the controlling side, a path exists and none was started lately."""
        throttled = self._handshake_at is not None and now - self._handshake_at < HANDSHAKE_THROTTLE
        if self.path is None or not self.parameters.controlling or throttled:
            return
        if not self.tunnel.handshake_in_progress:
            self._handshake_at = now
            self.tunnel.start_handshake(now)

    def handle_timeout(self, now: float) -> None:
        """Run every timer that is due."""
        self.agent.handle_timeout(now)
        self.tunnel.handle_timeout(now)
        if self._candidates_due_at is not None and now >= self._candidates_due_at:
            self._candidates_due_at = None
            if not self.agent.remote_candidates:
                self.fail("the peer sent no candidates within 10 s")
        if self._disconnected_at is not None and now >= self._disconnected_at + DISCONNECT_TIMEOUT:
            self.fail("ICE found no working path")
        if self.state is State.CONNECTED and now >= self._last_activity + MAX_IDLE and self._is_negotiated:
            self.state = State.IDLE
            self.agent.set_profile(self._profiles.idle, now)
        self.watch.handle_timeout(self, now)
        if self._retell_at is not None and now >= self._retell_at:
            self._retell_at = now + TAKEN_BACK if len(self._retelling) > 1 else None
            self.is_retelling_due = True

    def deadline(self) -> float | None:
        """When `handle_timeout` is next due. Whoever calls anything that changes this connection asks again."""
        due = [
            self.agent.poll_timeout(),
            self.tunnel.poll_timeout(),
            self._candidates_due_at,
            None if self._disconnected_at is None else self._disconnected_at + DISCONNECT_TIMEOUT,
            self._last_activity + MAX_IDLE if self.state is State.CONNECTED and self._is_negotiated else None,
            self.watch.poll_timeout(self),
            self._retell_at,
        ]
        return min((d for d in due if d is not None), default=None)

    def handle_check(self, local: Address, remote: Address, message: Message, now: float) -> DropReason | None:
        """A STUN message of the peer."""
        assert isinstance(self.agent, Agent)
        return self.agent.handle_input(local, remote, message, now)

    def handle_handshake(
        self, local: Address, remote: Address, datagram: Datagram, now: float, is_verified: bool
    ) -> DropReason | None:
        """An init, response or cookie that came this way."""
        handled = self.tunnel.handle_untrusted(datagram, remote.ip, now, is_verified)
        return handled if isinstance(handled, DropReason) else None

    def note_sent(self, now: float) -> bool:
        """An IP packet leaves; whether the agent wants its turn."""
        self.watch.note_sent(now)
        return False

    def take_data(self, local: Address, remote: Address, packet: bytes, now: float) -> bool:
        """A decrypted packet, maybe an empty one; whether it is not for the device."""
        self.received_on = local, remote
        self._note_heard(local, remote, now)
        return False

    def note_carried(self, carried: Carried, now: float) -> bool:
        """Packets were sent on the path, or came the way the last data did; whether the agent wants its turn."""
        sent_at, heard_at, unheard_since = carried
        before, self._carried = self._carried, carried
        wants_turn = False
        if heard_at is not None and heard_at != before.heard_at and self.received_on is not None:
            self._note_heard(*self.received_on, heard_at)
            wants_turn = self._note_active(heard_at, now)
        if sent_at is not None and sent_at != before.sent_at:
            wants_turn |= self._note_carried_sent(unheard_since, sent_at)
            wants_turn |= self._note_active(sent_at, now)
        return wants_turn

    def _note_active(self, at: float, now: float) -> bool:
        """There was activity a moment ago; whether it woke us."""
        is_late = at > self._last_activity and self.state is State.IDLE
        self._last_activity = max(self._last_activity, at)
        if is_late:
            self._wake(now)
        return is_late

    def _note_heard(self, local: Address, remote: Address, at: float) -> None:
        self.watch.note_answered(at)

    def _note_carried_sent(self, first: float | None, last: float) -> bool:
        self.watch.note_carried(first, last)
        return False

    def settle(self, now: float) -> None:
        """Let agent and tunnel react to each other until both are quiet."""
        while (event := self.agent.poll_event()) is not None:
            if isinstance(event, Nominated):
                self._use(event, now)
            elif isinstance(event, StateChanged):
                self._disconnected_at = now if event.state is IceState.DISCONNECTED else None
            elif isinstance(event, PathSilent):
                self.watch.note_path_silent(now)
            elif isinstance(event, AllPathsSilent):
                self.watch.note_all_silent(now)
        while (happened := self.tunnel.poll_event()) is not None:
            if isinstance(happened, SessionEstablished):
                self._handshaken = True
                if self.parameters.controlling:
                    self.watch.note_heard(now)  # our init arrived, and the answer came back
            elif isinstance(happened, Expired):
                self.fail("the WireGuard handshake was not answered")

    def outgoing(self, now: float) -> Iterator[Outgoing]:
        """Checks, then WireGuard's own datagrams, which are held back until a path exists."""
        while (check := self.agent.poll_transmit()) is not None:
            assert check.local is not None
            yield Outgoing(check.local, check.remote, check.payload, is_check=True)
        while (datagram := self.tunnel.poll_datagram()) is not None:
            self._held.append(datagram)
        while self._held and self.path is not None:
            yield Outgoing(self.path.local, self.path.remote, self._held.popleft(), is_check=False)

    def is_silent(self, now: float) -> bool:
        """Whether nothing has come back on the chosen path for longer than a live and busy peer takes."""
        assert isinstance(self.agent, Agent)
        heard_at = max(self.watch.heard_at, self.agent.heard_at)
        return self.path is not None and (now - heard_at > SILENCE or not self.agent.has_live_path)

    def restart_ice(self, now: float) -> None:
        """Look for a path from the start, and use the old one meanwhile.

        For the controlled side, which holds on to a pair for minutes: if the peer asks for access again and was
        not heard lately, it may have lost that pair and started over with the same credentials.
        """
        if not self.parameters.controlling:
            self.agent = self._new_agent(now)
            self._candidates_due_at = now + CANDIDATE_TIMEOUT
            self._disconnected_at = None

    def _new_agent(self, now: float) -> Agent | PathAgent:
        p = self.parameters
        return Agent(p.local, p.remote, p.controlling, self._random_bytes, now, self._profiles.active)

    @property
    def is_ready(self) -> bool:
        """Whether both a path and a handshake exist."""
        return self.path is not None and self._handshaken and self.state is not State.FAILED

    @property
    def _is_negotiated(self) -> bool:
        return self.agent.state is IceState.CONNECTED

    def _use(self, nominated: Nominated, now: float) -> None:
        path = Path(
            nominated.local,
            nominated.remote,
            nominated.local_kind == "relay",
            nominated.remote_kind == "relay",
        )
        if path == self.path:
            return
        remote_changed = self.path is None or self.path.remote != path.remote
        self.path, self.path_changed = path, True
        if self.state is State.CONNECTING:
            self.state = State.CONNECTED
        self.touch(now)
        if remote_changed:
            self.rehandshake(now)

    def begin(self, now: float) -> None:
        """The first candidates are known."""

    def fail(self, reason: str) -> None:
        """Give up; the node removes the connection at its next turn."""
        self.state = State.FAILED
        self.failure = self.failure or reason

    # what the watch over the path asks

    @property
    def has_path(self) -> bool:
        """Whether data has a way to go."""
        return self.path is not None

    @property
    def has_live_path(self) -> bool:
        """Whether any path gives answers."""
        return self.agent.has_live_path

    @property
    def is_resting(self) -> bool:
        """Whether no packets flow."""
        return self.state is State.IDLE

    @property
    def may_be_mute(self) -> bool:
        """Whether data without answer calls for a proof: ours to ask for, once there was a handshake."""
        return self.parameters.controlling and self._handshaken

    def check_path(self, unheard_since: float, now: float) -> None:
        """Check the path in use, unless a check was answered since."""
        assert isinstance(self.agent, Agent)
        if self.agent.answered_at < unheard_since:
            self.agent.check_selected(now)

    def ask_for_proof(self, now: float) -> bool:
        """Have the peer answer a handshake; whether it is ours to ask."""
        if not self.parameters.controlling or not self.agent.has_live_path:
            return False
        self.tunnel.start_handshake(now)
        return True
