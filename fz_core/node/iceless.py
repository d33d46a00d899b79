"""A connection without ICE: the path agent chooses, and WireGuard itself carries what it needs to know.

Source: `spec/connectivity.md` §7, §8.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

from fz_core.ice import Candidate, iceless_text, parse_iceless_candidate_untrusted
from fz_core.node.connection import TAKEN_BACK, Connection, Datagram, Outgoing, Retelling, TunnelTiming
from fz_core.node.path_agent import PathAgent
from fz_core.node.path_probe import is_probe
from fz_core.packet import Address, DropReason
from fz_core.stun import Message
from fz_core.wireguard import INIT, RESPONSE


class IcelessConnection(Connection):
    """State machine of one connection that uses a path agent."""

    timing = TunnelTiming(rekey_attempt_time=90.0, keepalive_timeout=5.0, rekey_timeout=2.0)
    is_iceless = True
    agent: PathAgent

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._answers: deque[Outgoing] = deque()

    def _new_agent(self, now: float) -> PathAgent:
        return PathAgent(self.parameters.controlling, now)

    def begin(self, now: float) -> None:
        """The controlling side starts the only handshake that is not due by age."""
        if self.parameters.controlling:
            self.tunnel.start_handshake(now)

    def rehandshake(self, now: float) -> None:
        """Neither a new path nor a repeated authorization needs one."""

    def is_silent(self, now: float) -> bool:
        """Whether the path in use gives no answers."""
        return self.path is not None and not self.agent.has_live_path

    def ask_for_proof(self, now: float) -> bool:
        """Not needed: a peer looks for another path whenever a candidate is announced again."""
        return False

    def restart_ice(self, now: float) -> None:
        """The peer is asked for again and was not heard lately: measure all paths anew, and find out if it knows us."""
        self.rebuild(self.agent.local_candidates, now)
        if self.parameters.controlling:
            self.agent.doubt_session()
            if not self.tunnel.handshake_in_progress:
                self.tunnel.start_handshake(now)

    def rebuild(self, keep: Collection[Candidate], now: float) -> None:
        """Our surroundings changed. Data stays on the last path until there is another."""
        self.agent.rebuild(now, keep)

    # candidates

    def announcement(self, candidate: Candidate) -> str:
        """The text that tells the peer of a candidate of ours."""
        return iceless_text(candidate)

    def withdrawal(self, candidate: Candidate) -> str:
        """The same text takes it back."""
        return iceless_text(candidate)

    def parse_untrusted(self, line: str) -> Candidate | None:
        """A candidate of the peer, or None if this is not a usable one."""
        return parse_iceless_candidate_untrusted(line)

    def retell(self, now: float) -> None:
        """A peer forgets a candidate that is withdrawn, and looks for another path when one is announced."""
        lines = tuple(iceless_text(c) for c in self.agent.local_candidates)
        self._retelling = deque((Retelling(lines, is_withdrawal=True), Retelling(lines, is_withdrawal=False)))
        self._retell_at, self.is_retelling_due = now + TAKEN_BACK, True

    # datagrams

    def handle_check(self, local: Address, remote: Address, message: Message, now: float) -> DropReason | None:
        """Nobody who leaves ICE out sends these."""
        return DropReason.STUN_UNEXPECTED

    def handle_handshake(
        self, local: Address, remote: Address, datagram: Datagram, now: float, is_verified: bool
    ) -> DropReason | None:
        """An init, response or cookie that came this way; an answer goes back the same way."""
        data = bytes(datagram)
        if data[0] in (INIT, RESPONSE) and self.agent.is_copy(local, remote, data, now):
            return None
        handled = self.tunnel.handle_untrusted(data, remote.ip, now, is_verified)
        if isinstance(handled, DropReason):
            return handled
        if data[0] == INIT:
            self._answer(local, remote, data, now)
        elif data[0] == RESPONSE:
            self.agent.note_response_accepted(local, remote, data, now)
        return None

    def _answer(self, local: Address, remote: Address, init: bytes, now: float) -> None:
        while (answer := self.tunnel.poll_datagram()) is not None:
            if answer[0] == RESPONSE:
                self.agent.note_init_accepted(local, remote, init, answer, now)
            else:
                self._answers.append(Outgoing(local, remote, answer, is_check=False))

    def note_sent(self, now: float) -> bool:
        """An IP packet leaves; whether the agent wants its turn."""
        return self.agent.note_data_sent(now)

    def take_data(self, local: Address, remote: Address, packet: bytes, now: float) -> bool:
        """A decrypted packet; whether it was a probe, and so for us."""
        if is_probe(packet):
            self.agent.handle_probe(local, remote, packet, now)
            return True
        return super().take_data(local, remote, packet, now)

    def _note_heard(self, local: Address, remote: Address, at: float) -> None:
        self.watch.note_heard(at)
        self.agent.note_data_received(local, remote, at)

    def _note_carried_sent(self, first: float | None, last: float) -> bool:
        return self.agent.note_data_carried(first, last)

    def settle(self, now: float) -> None:
        """Let agent and tunnel react to each other; a pair just formed is probed at once."""
        self._run_agent(now)
        super().settle(now)

    def _run_agent(self, now: float) -> None:
        due = self.agent.poll_timeout()
        if due is not None and due <= now:
            self.agent.handle_timeout(now)

    def outgoing(self, now: float) -> Iterator[Outgoing]:
        """Our inits and answers, then what the tunnel says on the path, then probes."""
        while (datagram := self.tunnel.poll_datagram()) is not None:
            if datagram[0] == INIT:
                self.agent.send_init(datagram, now)
                self._run_agent(now)  # the second one unanswered makes it look for another path
            elif self.path is not None:
                self._answers.append(Outgoing(self.path.local, self.path.remote, datagram, is_check=False))
        while self._answers:
            yield self._answers.popleft()
        while (transmit := self.agent.poll_transmit()) is not None:
            assert transmit.local is not None
            yield Outgoing(transmit.local, transmit.remote, transmit.payload, is_check=False)
        while (probe := self.agent.poll_probe()) is not None:
            local, remote, packet = probe
            sealed = self.tunnel.seal(packet, now) if self.tunnel.has_session else None
            if sealed and isinstance(sealed, bytes):
                yield Outgoing(local, remote, sealed, is_check=False)
            else:
                self.agent.note_probe_unsealed(now)
