"""Relays and candidates of all connections, and how datagrams leave: straight, or through a relay.

The lower half of `Node`. Source: `spec/connectivity.md` §3.8, §4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from operator import methodcaller

from fz_core.ice import Candidate, CandidateKind, is_usable
from fz_core.node.connection import Connection, Outgoing, Retelling, State
from fz_core.node.deadlines import Deadlines
from fz_core.node.events import CandidateAdded, CandidateRemoved, NodeEvent, PeerLost, PeerSilent, RelaysExhausted
from fz_core.node.lookup import Connections
from fz_core.node.transport import Changes, Hop, Transport
from fz_core.packet import Address, Transmit
from fz_core.portal.types import RelayEntry
from fz_core.turn import (
    Allocation,
    HostDiscovered,
    HostRemoved,
    ReflexiveDiscovered,
    ReflexiveRemoved,
    RelayedAdded,
    RelayedRemoved,
    Relays,
)

REALM = "firezone"
RETRY_FIRST, RETRY_MOST = 1.0, 30.0
EAGERLY_BOUND = (CandidateKind.RELAY, CandidateKind.SRFLX, CandidateKind.PRFLX)


class RelayingNode(ABC):
    """What `Node` needs of relays."""

    def __init__(self, random_bytes: Callable[[int], bytes]) -> None:
        self._random_bytes = random_bytes
        self._relays = Relays(random_bytes)
        self._connections = Connections()
        self._deadlines: Deadlines[Connection] = Deadlines(methodcaller("deadline"))
        self._changes = Changes()
        self._transmits: deque[Transmit] = deque()
        self._events: deque[NodeEvent] = deque()
        self._retries: dict[str, tuple[float, float]] = {}  # relays that fell silent: when to ask again, and the gap

    @abstractmethod
    def _settle(self, connection: Connection, now: float) -> None: ...

    def update_relays(self, removed: Iterable[str], added: Iterable[RelayEntry], now: float) -> None:
        """Forget and take up relays as the portal says; relays not mentioned are checked at once."""
        listed = {entry.id: entry for entry in added}
        for relay_id in removed:
            self._drop_relay(relay_id, now)
        for entry in listed.values():
            addresses = (entry.v4, entry.v6)
            known = self._relays.get(entry.id)
            if known is None or not known.matches(addresses, entry.username, entry.password):
                self._drop_relay(entry.id, now)
                self._relays.add(
                    Allocation(entry.id, addresses, entry.username, entry.password, REALM, now, self._random_bytes)
                )
            elif self._retries.pop(entry.id, None) is not None:
                known.restart(now)
        for allocation in self._relays:
            if allocation.relay_id not in listed:
                allocation.refresh(now)
        self._settle_relays(now)
        self._migrate(now)

    def handle_network_changed(self, now: float) -> None:
        """An address of this host may have come or gone: ask all relays where they see us."""
        for relay in self._relays:
            relay.probe(now)
            self._drain_relay(relay)
        self._wake_relays(now)

    @property
    def relay_count(self) -> int:
        """How many relays are known."""
        return len(self._relays)

    @property
    def has_relay(self) -> bool:
        """Whether a connection could be made now."""
        return any(allocation.rtt is not None for allocation in self._relays)

    @property
    def expects_relay(self) -> bool:
        """Whether a relay is being asked that may yet answer."""
        return any(allocation.free_reason is None for allocation in self._relays)

    # sending

    def _send(self, connection: Connection, outgoing: Outgoing, now: float) -> None:
        local, remote, payload, is_check = outgoing
        # Byte 0 of a STUN request is 0 and of a response 1; only requests expect an answer.
        if is_check and payload[0] == 0:
            self._connections.expect(payload[8:20], connection, now)
        if self._owner_of(local) is None and _is_relayed(connection, local):
            return  # the relay went this moment, and its address was never one of this host
        self._send_from(local, remote, payload, now)

    def _send_on_path(self, connection: Connection, datagram: bytes, now: float) -> None:
        path = connection.path
        assert path is not None
        self._send(connection, Outgoing(path.local, path.remote, datagram, is_check=False), now)

    def _send_from(self, local: Address, remote: Address, payload: bytes, now: float) -> None:
        """Send from a host address, or through the relay that owns `local`."""
        relay = self._owner_of(local)
        if relay is None:
            self._transmits.append(Transmit(payload, remote, local))
            return
        wrapped = relay.encapsulate(remote, payload, now)
        if isinstance(wrapped, Transmit):
            self._transmits.append(wrapped)
        self._drain_relay(relay)

    def _drain_relay(self, relay: Allocation) -> None:
        while (transmit := relay.poll_transmit()) is not None:
            self._transmits.append(transmit)
        while (remote := relay.poll_channel_change()) is not None:
            self._changes.note_channel(remote)

    def _owner_of(self, relayed: Address) -> Allocation | None:
        for relay in self._relays:
            if relayed in (relay.relayed_v4, relay.relayed_v6):
                return relay
        return None

    # how data travels

    def take_changed(self) -> set[str]:
        """Peers whose `transport` may differ from what it was at the last call, those that are gone included."""
        return self._changes.take(self._connections.by_peer)

    def transport(self, peer_id: str, now: float) -> Transport | None:
        """How data of this peer travels; None without a session. Ask again when `take_changed` names the peer."""
        connection = self._connections.by_peer.get(peer_id)
        if connection is None or connection.state is State.FAILED or not connection.tunnel.has_session:
            return None
        path, send, until = connection.path, None, float("inf")
        if path is not None:
            send, until = self._hop(connection, path.local, path.remote) or (None, until)
        if send is None or until <= now:
            send, until = None, float("inf")
        received = None if connection.received_on is None else self._hop(connection, *connection.received_on)
        return Transport(
            peer_id, connection.index, connection.tunnel, send, until, None if received is None else received[0]
        )

    def ends_of(self, hop: Hop) -> tuple[Address, Address] | None:
        """(local, remote) of data that came this way, as `handle_opened` takes them; None if it is no way any more."""
        if hop.channel == 0:
            return None if hop.local is None else (hop.local, hop.remote)
        relay = self._relays.by_address(hop.remote)
        return None if relay is None else relay.ends_of(hop.channel)

    def _hop(self, connection: Connection, local: Address, remote: Address) -> tuple[Hop, float] | None:
        """How datagrams between these travel, and for how long; None without a confirmed channel."""
        relay = self._owner_of(local)
        if relay is None:
            return None if _is_relayed(connection, local) else (Hop(remote, local, 0), float("inf"))
        channel = relay.confirmed_channel_to(remote)
        if channel is None or relay.server is None:
            return None
        return Hop(relay.server, None, channel[0]), channel[1]

    def _publish(self, connection: Connection) -> None:
        """Notice that its data travels in another way, or with other keys."""
        path, received_on = connection.path, connection.received_on
        way = (path, received_on, connection.tunnel.version)
        if way == connection.published or connection.state is State.FAILED:
            return
        connection.published = way
        ends = (None if path is None else path.remote, None if received_on is None else received_on[1])
        self._changes.note(connection.peer_id, {remote for remote in ends if remote is not None})

    def _forget(self, peer_id: str) -> None:
        """Nothing travels to or from this peer any more."""
        connection = self._connections.remove(peer_id)
        if connection is not None:
            self._deadlines.remove(connection)
            self._changes.note(peer_id, ())

    # what relays tell

    def _settle_relays(self, now: float) -> None:
        for relay in self._relays:
            relay_id = relay.relay_id
            while (event := relay.poll_event()) is not None:
                match event:
                    case HostDiscovered(address):
                        self._offer(Candidate.host(address), relay_id, now)
                    case HostRemoved(address):
                        if not any(address in other.host_addresses for other in self._relays):
                            self._withdraw(Candidate.host(address), now)
                    case ReflexiveDiscovered(address, base):
                        self._offer(Candidate.srflx(address, base), relay_id, now)
                    case ReflexiveRemoved(address, base):
                        if not any((address, base) in other.reflexive for other in self._relays):
                            self._withdraw(Candidate.srflx(address, base), now)
                    case RelayedAdded(address, server_is_ipv4):
                        self._offer(Candidate.relay(address, server_is_ipv4), relay_id, now)
                        for connection in self._connections.by_peer.values():
                            if connection.relay_id == relay_id:
                                self._bind_remotes(connection, relay, now)
                    case RelayedRemoved(address):
                        self._withdraw(Candidate.relay(address), now)
            self._drain_relay(relay)

    # candidates

    def _offer(self, candidate: Candidate, relay_id: str, now: float) -> None:
        """A new address of ours. One on a relay serves the connections that use this relay, any other all."""
        if not is_usable(candidate.address.ip):
            return
        for connection in list(self._connections.by_peer.values()):
            if candidate.kind is CandidateKind.RELAY and connection.relay_id != relay_id:
                continue
            ranked = connection.agent.add_local_candidate(candidate, now)
            if ranked is not None:
                connection.touch(now)
                self._signal(connection, ranked)
                self._settle(connection, now)

    def _bind_remotes(self, connection: Connection, relay: Allocation, now: float) -> None:
        """A new allocation has no channels yet, but the peer's candidates are known."""
        for remote in connection.agent.remote_candidates:
            if remote.kind in EAGERLY_BOUND:
                relay.bind_channel(remote.address, now)

    def _withdraw(self, gone: Candidate, now: float) -> None:
        """An address of ours does not work any more, so no peer should try it."""
        for connection in list(self._connections.by_peer.values()):
            for candidate in connection.agent.local_candidates:
                if candidate.kind is gone.kind and candidate.address == gone.address:
                    connection.agent.remove_local_candidate(candidate, now)
                    self._events.append(CandidateRemoved(connection.peer_id, connection.withdrawal(candidate)))
                    connection.note_withdrawn(candidate, now)
                    for n in range(1, connection.retellings + 1):
                        self._events.append(CandidateRemoved(connection.peer_id, candidate.retold(n, None)))
                    self._settle(connection, now)
                    break

    def _initial_candidates(self, chosen: Allocation | None) -> list[Candidate]:
        found: dict[tuple[CandidateKind, Address], Candidate] = {}
        for relay in self._relays:
            for candidate in _candidates_of(relay, with_relayed=relay is chosen):
                found.setdefault((candidate.kind, candidate.address), candidate)
        return sorted(found.values(), key=lambda c: -c.priority)

    def _signal_candidates(self, connection: Connection) -> None:
        for candidate in connection.agent.local_candidates:
            self._signal(connection, candidate)

    def _signal(self, connection: Connection, candidate: Candidate) -> None:
        if candidate.kind is not CandidateKind.PRFLX:
            self._events.append(CandidateAdded(connection.peer_id, connection.announcement(candidate)))

    # relays going away

    def _drop_relay(self, relay_id: str, now: float) -> None:
        self._retries.pop(relay_id, None)
        relay = self._relays.remove(relay_id)
        if relay is not None:
            self._changes.note_relay_gone()
            for address in (relay.relayed_v4, relay.relayed_v6):
                if address is not None:
                    self._withdraw(Candidate.relay(address), now)

    def _dispose_relays(self, now: float) -> None:
        """Relays that refuse us go; one that only fell silent is asked again, for the portal may be away too."""
        dead = [r for r in self._relays if r.free_reason is not None and r.relay_id not in self._retries]
        for relay in dead:
            if relay.is_refused:
                self._drop_relay(relay.relay_id, now)
            else:
                self._retries[relay.relay_id] = (now + RETRY_FIRST, RETRY_FIRST)
        if dead and len(self._relays) == len(self._retries):
            self._events.append(RelaysExhausted())

    def _retry_relays(self, now: float) -> None:
        for relay_id, (at, gap) in list(self._retries.items()):
            relay = self._relays.get(relay_id)
            if relay is None or relay.server is not None:
                del self._retries[relay_id]
            elif now >= at:
                if relay.free_reason is not None:
                    relay.restart(now)
                    self._drain_relay(relay)
                    gap = min(gap * 2, RETRY_MOST)
                self._retries[relay_id] = (now + gap, gap)

    def _wake_relays(self, now: float) -> None:
        """A connection wants a relay: those that fell silent are asked now, and not when their time has come."""
        for relay_id in self._retries:
            self._retries[relay_id] = (now, RETRY_FIRST)
        self._retry_relays(now)

    def _migrate(self, now: float) -> None:
        """Move connections whose relay is gone to another one, once one has answered."""
        used = self._connections.relay_ids
        gone = {relay_id for relay_id in used if relay_id in self._retries or self._relays.get(relay_id) is None}
        if not gone or not self.has_relay:
            return
        for connection in list(self._connections.by_peer.values()):
            if connection.relay_id in gone:
                relay = self._relays.choose()
                if relay is None:
                    return
                self._use_relay(connection, relay, now)

    def _use_relay(self, connection: Connection, relay: Allocation, now: float) -> None:
        self._connections.use_relay(connection, relay.relay_id)
        self._bind_remotes(connection, relay, now)
        for candidate in _candidates_of(relay, with_relayed=True):
            ranked = connection.agent.add_local_candidate(candidate, now)
            if ranked is not None:
                self._signal(connection, ranked)
        self._drain_relay(relay)
        self._settle(connection, now)

    # paths that fell silent

    def _handle_silence(self, connection: Connection, now: float) -> None:
        """No answers on the path in use. If there is no other, the fault may be ours, a relay's, or the peer's."""
        if connection.agent.has_live_path:
            return
        self._events.append(PeerSilent(connection.peer_id))
        for relay in self._relays:
            relay.probe(now)
            self._drain_relay(relay)
        self._borrow_relay(connection, now)

    def _borrow_relay(self, connection: Connection, now: float) -> None:
        """The relay may be at fault, so another one's addresses are offered as well."""
        spare = self._relays.choose(other_than=connection.relay_id)
        if spare is not None:
            self._use_relay(connection, spare, now)

    def _handle_lasting_silence(self, connection: Connection, now: float) -> None:
        """If there is another path, the peer may hold on to the silent one: make it let go."""
        if connection.agent.has_live_path:
            connection.retell(now)
            return
        self._handle_silence(connection, now)
        self._events.append(PeerLost(connection.peer_id))

    def _retell(self, connection: Connection, told: Retelling) -> None:
        event = CandidateRemoved if told.is_withdrawal else CandidateAdded
        self._events.extend(event(connection.peer_id, line) for line in told.lines)


def _is_relayed(connection: Connection, local: Address) -> bool:
    if connection.path is not None and connection.path.via_relay and connection.path.local == local:
        return True
    return any(c.kind is CandidateKind.RELAY and c.base == local for c in connection.agent.local_candidates)


def _candidates_of(relay: Allocation, *, with_relayed: bool) -> list[Candidate]:
    """What one allocation has learnt about our addresses."""
    candidates = [Candidate.host(address) for address in relay.host_addresses]
    candidates += [Candidate.srflx(address, base) for address, base in relay.reflexive]
    if with_relayed:
        server_is_ipv4 = relay.server is not None and relay.server.is_ipv4
        for relayed in (relay.relayed_v4, relay.relayed_v6):
            if relayed is not None:
                candidates.append(Candidate.relay(relayed, server_is_ipv4))
    return [c for c in candidates if is_usable(c.address.ip)]
