"""The open connections of an embedded portal and what goes out on them. All of it is values; no sockets, no clock."""

from __future__ import annotations

import heapq
import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fz_core.embedded.policy import ClientAccount, Policy
from fz_core.embedded.portal_derivation import FAR_FUTURE, turn_credentials
from fz_core.embedded.portal_modes import Modes
from fz_core.embedded.portal_moves import Moves
from fz_core.embedded.portal_session import Session
from fz_core.embedded.portal_versions import SITES, understands
from fz_core.embedded.store import Store
from fz_core.packet import Address
from fz_core.portal import client_wire, gateway, relay
from fz_core.portal.codec import Codec
from fz_core.portal.framing import Frame
from fz_core.portal.types import Relay

MAX_RELAYS = 2
log = logging.getLogger("firezone_portal")
Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Send:
    """A text for a connection."""

    session_id: int
    text: str


@dataclass(frozen=True, slots=True)
class Close:
    """End a connection, after all texts before."""

    session_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Evict(Close):
    """End a connection that another process of the same device replaced; `text` is for it if it still lives."""

    text: str


@dataclass(frozen=True, slots=True)
class Look:
    """See whether a relay answers at these addresses, and tell `handle_relay_dead` if not."""

    relay_id: str
    addresses: tuple[Address, ...]


Output = Send | Close | Look

TO_PEER: dict[str, Codec] = {"client": client_wire.TO_CLIENT, "gateway": gateway.TO_GATEWAY, "relay": relay.TO_RELAY}
FROM_PEER: dict[str, Codec] = {
    "client": client_wire.TO_PORTAL,
    "gateway": gateway.TO_PORTAL,
    "relay": relay.TO_PORTAL,
}


class Timers:
    """Deadlines by key; setting a key again moves it."""

    def __init__(self) -> None:
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []

    def set(self, key: Key, at: float) -> None:
        """Fire at this time, instead of any earlier set one."""
        if self._due.get(key) == at:
            return
        self._due[key] = at
        heapq.heappush(self._heap, (at, key))
        if len(self._heap) > 2 * len(self._due) + 64:
            self._heap = [(due, k) for k, due in self._due.items()]
            heapq.heapify(self._heap)

    def cancel(self, key: Key) -> None:
        """Do not fire."""
        self._due.pop(key, None)

    def next_at(self) -> float | None:
        """When something is due."""
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop(self, now: float) -> Key | None:
        """One key that is due."""
        at = self.next_at()
        if at is None or at > now:
            return None
        _, key = heapq.heappop(self._heap)
        del self._due[key]
        return key

    def __len__(self) -> int:
        return len(self._due)


class Hub:
    """Sessions by id and, once joined, by device."""

    def __init__(self, policy: Policy, store: Store, unix_epoch: float, random_bytes: Callable[[int], bytes]) -> None:
        self.policy, self.store, self.random_bytes = policy, store, random_bytes
        self.timers, self.modes, self.moves = Timers(), Modes(), Moves()
        self.sessions: dict[int, Session] = {}
        self.missing_relays: set[str] = set()
        self.outputs: deque[Output] = deque()
        self._unix_epoch = unix_epoch
        self._by_device: dict[str, Session] = {}

    def unix(self, now: float) -> int:
        """Unix seconds at a monotonic time."""
        return int(self._unix_epoch + now)

    def monotonic(self, unix: int) -> float:
        """The inverse."""
        return unix - self._unix_epoch

    def choose(self, count: int) -> int:
        """A random index below `count`."""
        return int.from_bytes(self.random_bytes(8), "big") % count

    def add(self, session: Session) -> None:
        """A connection was accepted; an older one of the same device ends."""
        old = self._by_device.get(session.peer_id) if session.device else None
        if old is not None:
            log.info("Replaced role=%s name=%s remote=%s by remote=%s", old.role, old.name, old.remote, session.remote)
            self._replace(old, session)
        self.sessions[session.id] = session
        self.moves.note(session, was_cut=old is not None and old.public_key == session.public_key)
        if session.device is not None:
            self._by_device[session.peer_id] = session

    def _replace(self, old: Session, session: Session) -> None:
        """A process that comes back keeps its key; two that fight over one identity would never come to rest."""
        reason = "replaced by a newer connection of this device"
        if old.role != "client" or old.public_key == session.public_key:
            self.close(old, reason)
        elif self.forget(old):
            self.outputs.append(Evict(old.id, reason, _token_expired(old)))

    def forget(self, session: Session) -> bool:
        """The connection is gone; False if that was known."""
        if self.sessions.pop(session.id, None) is None:
            return False
        if self._by_device.get(session.peer_id) is session:
            del self._by_device[session.peer_id]
        session.is_joined = False
        return True

    def joined(self, role: str) -> Iterator[Session]:
        """All joined peers of a role."""
        return (s for s in list(self.sessions.values()) if s.is_joined and s.role == role)

    def peer(self, device_id: str, role: str) -> Session | None:
        """The joined session of a device."""
        session = self._by_device.get(device_id)
        return session if session is not None and session.is_joined and session.role == role else None

    def online_devices(self) -> set[str]:
        """Ids of connected devices."""
        return set(self._by_device)

    def is_iceless(self, one: Session, other: Session) -> bool:
        """Whether these two connect without ICE, which both are to be told alike."""
        return self.modes.is_iceless(one, other, is_allowed=self.policy.allow_iceless)

    # output

    def send(self, session: Session, message: Any) -> None:
        """A typed message, in the dialect of the peer."""
        event, payload = TO_PEER[session.role].build(message, is_legacy=session.is_legacy)
        if session.role == "client" and not (session.agent and understands(session.agent, SITES)):
            payload = client_wire.write_for_old_sites(event, payload)
        self.outputs.append(Send(session.id, Frame(session.role, event, payload).encode()))

    def reply(self, session: Session, frame: Frame, status: str, response: dict[str, Any] | None = None) -> None:
        """Answer a frame. `response` is exactly {} for success."""
        payload = {"status": status, "response": response or {}}
        self.outputs.append(Send(session.id, Frame(frame.topic, "phx_reply", payload, frame.ref).encode()))

    def close(self, session: Session, reason: str) -> None:
        """End a connection; the peer will come back."""
        if self.forget(session):
            self.outputs.append(Close(session.id, reason))

    def expel(self, session: Session) -> None:
        """End a connection whose token is not valid any more; the peer gives up."""
        if session.id in self.sessions:
            self.outputs.append(Send(session.id, _token_expired(session)))
            self.close(session, "token expired or revoked")

    # relays

    def relays_for(self, session: Session) -> tuple[Relay, ...]:
        """Up to two relays, those given before first, with credentials for this peer."""
        online = {s.relay_id: s for s in self.joined("relay") if s.relay_id}
        chosen = [i for i in (*online, *sorted(self.missing_relays)) if i in session.relays][:MAX_RELAYS]
        others = [i for i in online if i not in chosen]
        while others and len(chosen) < MAX_RELAYS:
            chosen.append(others.pop(self.choose(len(others))))
        session.relays = set(chosen)
        return tuple(r for i in chosen if i in online for r in self._entries(online[i], session))

    def _entries(self, relay_session: Session, session: Session) -> Iterator[Relay]:
        account = session.account
        expires_at = (account.expires_at if isinstance(account, ClientAccount) else None) or FAR_FUTURE
        secret, identity = relay_session.stamp_secret or "", relay_session.relay_id or ""
        expires_at -= self.moves.of(session)
        username, password = turn_credentials(session.public_key, expires_at, secret)
        return (Relay(identity, a, username, password, expires_at) for a in relay_session.addresses)


def _token_expired(session: Session) -> str:
    return Frame(session.role, "disconnect", {"reason": "token_expired"}).encode()
