"""Connections to peers by id: relays, ICE and WireGuard composed, nothing of policy.

One mutation, then drain `poll_transmit` and `poll_event`, then wait for `poll_timeout`.

Source: `spec/connectivity.md` §2, §3.8, §8. Every connection is an ICE one:
`Parameters.iceless` only tells connections apart, since we never offer that mode (`docs/deviations.md`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from fz_core.crypto import PrivateKey
from fz_core.ice import (
    CLIENT_DEFAULT,
    CLIENT_IDLE,
    SERVER_DEFAULT,
    SERVER_IDLE,
    Candidate,
    CandidateKind,
    is_usable,
    optimistic_candidates,
)
from fz_core.node.connection import Connection, Parameters, Path, Profiles, State
from fz_core.node.events import (
    CandidateAdded,
    CandidateRemoved,
    ConnectionClosed,
    ConnectionEstablished,
    ConnectionFailed,
    NodeEvent,
    NoRelays,
    PathChanged,
    RelaysExhausted,
)
from fz_core.node.lookup import Connections
from fz_core.packet import Address, DropReason, Transmit
from fz_core.portal.types import RelayEntry
from fz_core.stun import Message, is_stun_untrusted
from fz_core.turn import (
    Allocation,
    HostDiscovered,
    ReflexiveDiscovered,
    RelayedAdded,
    RelayedRemoved,
    Relays,
)
from fz_core.wireguard import RateLimiter, initiator_static_key_untrusted, receiver_index

if TYPE_CHECKING:
    from typing_extensions import Buffer

Datagram = bytes | memoryview
RELAY_PORT = 3478
REALM = "firezone"
CLIENT_PROFILES = Profiles(CLIENT_DEFAULT, CLIENT_IDLE)
GATEWAY_PROFILES = Profiles(SERVER_DEFAULT, SERVER_IDLE)
PEER_CLIENT_PROFILES = Profiles(CLIENT_DEFAULT, CLIENT_DEFAULT)
EAGERLY_BOUND = (CandidateKind.RELAY, CandidateKind.SRFLX, CandidateKind.PRFLX)


class Node:
    """All connections of one process. `unix_epoch` is the unix time at `now == 0`."""

    def __init__(
        self, private_key: PrivateKey, now: float, unix_epoch: float, random_bytes: Callable[[int], bytes]
    ) -> None:
        self._private_key = private_key
        self.public_key: bytes = private_key.public
        self._unix_epoch = unix_epoch
        self._random_bytes = random_bytes
        self._rate_limiter = RateLimiter(private_key, now, random_bytes)
        self._relays = Relays(random_bytes)
        self._connections = Connections()
        self._transmits: deque[Transmit] = deque()
        self._events: deque[NodeEvent] = deque()

    # relays

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
        for allocation in self._relays:
            if allocation.relay_id not in listed:
                allocation.refresh(now)
        self._settle_relays(now)
        self._migrate(now)

    @property
    def relay_count(self) -> int:
        """How many relays are known."""
        return len(self._relays)

    @property
    def has_relay(self) -> bool:
        """Whether a connection could be made now."""
        return any(allocation.rtt is not None for allocation in self._relays)

    # connections

    def upsert_connection(
        self, peer_id: str, parameters: Parameters, now: float, profiles: Profiles = CLIENT_PROFILES
    ) -> None:
        """Make a connection, or wake the one that has the same parameters. NoRelays if there is no relay."""
        connection = self._connections.by_peer.get(peer_id)
        if connection is not None and connection.parameters == parameters:
            self._reuse(connection, now)
            return
        relay = self._relays.choose()
        if relay is None:
            raise NoRelays
        self._connections.remove(peer_id)
        connection = Connection(
            peer_id,
            parameters,
            profiles,
            relay.relay_id,
            self._connections.free_index(int.from_bytes(self._random_bytes(3), "big")),
            self._private_key,
            self._rate_limiter,
            self._unix_epoch,
            self._random_bytes,
            now,
        )
        self._connections.add(connection)
        for candidate in self._initial_candidates(relay):
            connection.agent.add_local_candidate(candidate, now)
        self._signal_candidates(connection)
        self._settle(connection, now)

    def _reuse(self, connection: Connection, now: float) -> None:
        """The peer may have lost what we told it: say it again, with what was learnt since (§8.3)."""
        connection.touch(now)
        if connection.is_silent(now):
            self._doubt_relay(connection.relay_id, now)
            connection.restart_ice(now)
        for candidate in self._initial_candidates(self._relays.get(connection.relay_id)):
            connection.agent.add_local_candidate(candidate, now)
        self._signal_candidates(connection)
        connection.rehandshake(now)
        self._settle(connection, now)

    def resignal_candidates(self) -> None:
        """Tell unconnected peers our candidates again: what was said before may have been lost with the portal."""
        for connection in self._connections.by_peer.values():
            if connection.path is None:
                self._signal_candidates(connection)

    def add_remote_candidate(self, peer_id: str, line: str, now: float) -> None:
        """Take a candidate the peer signalled; a malformed or foreign one is ignored."""
        connection = self._connections.by_peer.get(peer_id)
        candidate = Candidate.parse_untrusted(line)
        if connection is None or candidate is None:
            return
        if candidate in connection.agent.remote_candidates and connection.may_signal_again(now):
            # The peer repeats itself, so the portal was away, and what we said may not have reached the peer.
            self._signal_candidates(connection)
        relay = self._relays.get(connection.relay_id)
        if relay is not None and candidate.kind in EAGERLY_BOUND:
            relay.bind_channel(candidate.address, now)
        connection.add_remote_candidate(candidate, now)
        for guess in optimistic_candidates(connection.agent.remote_candidates):
            connection.add_remote_candidate(guess, now)
        self._settle(connection, now)

    def remove_remote_candidate(self, peer_id: str, line: str, now: float) -> None:
        """Take back a candidate of the peer."""
        connection = self._connections.by_peer.get(peer_id)
        candidate = Candidate.parse_untrusted(line)
        if connection is not None and candidate is not None:
            connection.touch(now)
            connection.agent.remove_remote_candidate(candidate, now)
            self._settle(connection, now)

    def close(self, peer_id: str, goodbye: bytes, now: float) -> None:
        """End a connection, saying goodbye inside the tunnel if it stands."""
        connection = self._connections.by_peer.get(peer_id)
        if connection is None:
            return
        if connection.is_ready:
            farewell = self.encapsulate(peer_id, goodbye, 0, now)
            if isinstance(farewell, Transmit):
                self._transmits.append(farewell)
            self._events.append(ConnectionClosed(peer_id))
        self._connections.remove(peer_id)

    def remove(self, peer_id: str) -> None:
        """Forget a connection without a word."""
        self._connections.remove(peer_id)

    def is_known(self, peer_id: str) -> bool:
        """Whether a connection to this peer exists, ready or not."""
        return peer_id in self._connections.by_peer

    def is_ready(self, peer_id: str) -> bool:
        """Whether packets can be sent to this peer."""
        connection = self._connections.by_peer.get(peer_id)
        return connection is not None and connection.is_ready

    def path(self, peer_id: str) -> Path | None:
        """Where data to this peer travels; the same object until that changes."""
        connection = self._connections.by_peer.get(peer_id)
        return None if connection is None else connection.path

    @property
    def peers(self) -> list[str]:
        """Ids of all connections."""
        return list(self._connections.by_peer)

    # data

    def encapsulate(self, peer_id: str, packet: Buffer, ecn: int, now: float) -> Transmit | DropReason | None:
        """Encrypt an inner packet for a peer; `packet` is anything with the buffer protocol.

        None: the session has aged out, so the packet waits for the handshake that this starts.
        """
        connection = self._connections.by_peer.get(peer_id)
        if connection is None or connection.path is None:
            return DropReason.NOT_CONNECTED
        sealed = connection.tunnel.seal(packet, now)
        if sealed is DropReason.WG_NO_SESSION and connection.parameters.controlling:
            return self._renew_session(connection, packet, now)
        if isinstance(sealed, DropReason):
            return sealed
        connection.dirty = True
        connection._last_activity = now
        if connection.state is State.IDLE:
            connection.touch(now)
            self._settle(connection, now)
        path = connection.path
        if path is None:
            return DropReason.NOT_CONNECTED
        if not path.via_relay:
            return Transmit(sealed, path.remote, path.local, ecn)
        relay = self._relays.get(connection.relay_id)
        if relay is None:
            return DropReason.NO_CHANNEL
        sent = relay.encapsulate(path.remote, sealed, now)
        return sent._replace(ecn=ecn) if isinstance(sent, Transmit) and ecn else sent

    def _renew_session(self, connection: Connection, packet: Buffer, now: float) -> DropReason | None:
        """Nothing can be sent in a session's last 10 s; do not wait for its end, and keep the packet meanwhile."""
        connection.touch(now)
        connection.tunnel.start_handshake(now)
        queued = connection.tunnel.seal(packet, now)
        self._settle(connection, now)
        return queued if isinstance(queued, DropReason) else None

    def handle_network_input(
        self, local: Address, remote: Address, datagram: Datagram, now: float
    ) -> tuple[str, bytes] | DropReason | None:
        """Take a datagram: an inner packet with its peer's id, None if consumed, or why it was dropped."""
        if len(datagram) == 0:
            return DropReason.UNKNOWN_DATAGRAM
        if remote.port == RELAY_PORT:
            allocation = self._relays.by_address(remote)
            is_channel_data = 0x40 <= datagram[0] <= 0x4F
            is_stun = datagram[0] <= 3 and is_stun_untrusted(datagram)
            if allocation is None:
                if (is_stun or is_channel_data) and self._relays.is_disconnected(remote):
                    return DropReason.UNKNOWN_CONNECTION
            elif is_stun:
                return self._handle_relay_stun(allocation, local, remote, datagram, now)
            elif is_channel_data:
                unwrapped = allocation.decapsulate(remote, datagram, now)
                if isinstance(unwrapped, DropReason):
                    return unwrapped
                remote, datagram, local = unwrapped
                if len(datagram) == 0:
                    return DropReason.UNKNOWN_DATAGRAM
        first = datagram[0]
        if first == 4:
            return self._handle_data(remote, datagram, now)
        if is_stun_untrusted(datagram):
            return self._handle_peer_stun(local, remote, datagram, now)
        return self._handle_wireguard(first, local, remote, datagram, now)

    # time

    def handle_timeout(self, now: float) -> None:
        """Run every timer that is due."""
        for allocation in self._relays:
            due = allocation.poll_timeout()
            if due is not None and due <= now:
                allocation.handle_timeout(now)
        self._settle_relays(now)
        for connection in list(self._connections.by_peer.values()):
            due = connection.deadline()
            if due is not None and due <= now:
                connection.handle_timeout(now)
                self._settle(connection, now)
        self._dispose_relays(now)
        self._migrate(now)

    def poll_timeout(self) -> float | None:
        """When `handle_timeout` is next due."""
        due = [allocation.poll_timeout() for allocation in self._relays]
        due += [connection.deadline() for connection in self._connections.by_peer.values()]
        return min((d for d in due if d is not None), default=None)

    def poll_transmit(self) -> Transmit | None:
        """A datagram to send."""
        return self._transmits.popleft() if self._transmits else None

    def poll_event(self) -> NodeEvent | None:
        """Something the owner should know."""
        return self._events.popleft() if self._events else None

    @property
    def has_events(self) -> bool:
        """Whether `poll_event` has something."""
        return bool(self._events)

    # datagrams, by kind

    def _handle_relay_stun(
        self, allocation: Allocation, local: Address, remote: Address, datagram: Datagram, now: float
    ) -> DropReason | None:
        accepted = allocation.handle_input(local, remote, datagram, now)
        self._settle_relays(now)
        # An answer may be what ends an allocation, or what a connection without relay waits for; no timer tells.
        self._dispose_relays(now)
        self._migrate(now)
        return None if accepted else DropReason.STUN_UNEXPECTED

    def _handle_data(self, remote: Address, datagram: Datagram, now: float) -> tuple[str, bytes] | DropReason | None:
        connection = self._connections.by_index.get(int.from_bytes(datagram[4:8], "little") >> 8)
        if connection is None:
            return DropReason.WG_UNKNOWN_SESSION
        opened = connection.tunnel.handle_untrusted(datagram, remote.ip, now)
        connection.dirty = True
        if isinstance(opened, bytes):
            connection.heard_at = now
        if isinstance(opened, bytes) and opened:
            connection._last_activity = now
            if connection.state is State.IDLE or not connection.established:
                connection.touch(now)
                self._settle(connection, now)
            return connection.peer_id, opened
        self._settle(connection, now)
        return None if isinstance(opened, bytes) else opened

    def _handle_wireguard(
        self, first: int, local: Address, remote: Address, datagram: Datagram, now: float
    ) -> DropReason | None:
        is_verified = first == 1
        if first == 1:
            # The limiter comes first: finding out whose init this is costs a Diffie-Hellman operation.
            refused = self._rate_limiter.verify_untrusted(bytes(datagram), remote.ip, now)
            if refused is not None:
                return self._refuse_handshake(refused, local, remote, now)
            key = initiator_static_key_untrusted(self._private_key, datagram)
            connection = None if key is None else self._connections.by_key(key)
        elif (index := receiver_index(datagram)) is not None:
            connection = self._connections.by_index.get(index >> 8)
        else:
            return DropReason.UNKNOWN_DATAGRAM
        if connection is None:
            return DropReason.UNKNOWN_CONNECTION
        handled = connection.tunnel.handle_untrusted(datagram, remote.ip, now, is_verified)
        self._settle(connection, now)
        return handled if isinstance(handled, DropReason) else None

    def _refuse_handshake(self, refused: bytes | DropReason, local: Address, remote: Address, now: float) -> DropReason:
        """Under load: a cookie reply goes back the way the init came."""
        if isinstance(refused, DropReason):
            return refused
        self._send_from(local, remote, refused, now)
        return DropReason.WG_UNDER_LOAD

    def _handle_peer_stun(self, local: Address, remote: Address, datagram: Datagram, now: float) -> DropReason | None:
        message = Message.parse_untrusted(datagram)
        if isinstance(message, DropReason):
            return message
        if message.is_request:
            connection = self._connections.by_username(message.username or "")
        elif message.is_success:
            connection = self._connections.answered(message.transaction_id, now)
        else:
            return DropReason.STUN_UNEXPECTED
        if connection is None:
            return DropReason.UNKNOWN_CONNECTION
        dropped = connection.agent.handle_input(local, remote, message, now)
        self._settle(connection, now)
        return dropped

    # settling: let the parts react until nothing is left

    def _settle(self, connection: Connection, now: float) -> None:
        connection.settle(now)
        while (transmit := connection.agent.poll_transmit()) is not None:
            self._send_check(connection, transmit, now)
        for datagram in connection.take_datagrams():
            self._send_on_path(connection, datagram, now)
        if connection.path_changed and connection.path is not None:
            connection.path_changed = False
            path = connection.path
            self._events.append(
                PathChanged(connection.peer_id, str(path.local), str(path.remote), path.via_relay or path.to_relay)
            )
        if connection.is_ready and not connection.established:
            connection.established = True
            self._events.append(ConnectionEstablished(connection.peer_id))
        if connection.state is State.FAILED:
            self._connections.remove(connection.peer_id)
            self._doubt_relay(connection.relay_id, now)
            self._events.append(ConnectionFailed(connection.peer_id, connection.failure or "failed"))

    def _doubt_relay(self, relay_id: str, now: float) -> None:
        """No path, not even over the relay: it may have lost our allocation, and data would never tell."""
        relay = self._relays.get(relay_id)
        if relay is not None:
            relay.refresh(now)
            self._drain_relay(relay)

    def _send_check(self, connection: Connection, check: Transmit, now: float) -> None:
        # Byte 0 of a STUN request is 0 and of a response 1; only requests expect an answer.
        if check.payload[0] == 0:
            self._connections.expect(check.payload[8:20], connection, now)
        assert check.local is not None
        if self._owner_of(check.local) is None and _is_relayed(connection, check.local):
            return  # the relay went this moment; the candidate follows
        self._send_from(check.local, check.remote, check.payload, now)

    def _send_on_path(self, connection: Connection, datagram: bytes, now: float) -> None:
        path = connection.path
        assert path is not None
        if path.via_relay and self._owner_of(path.local) is None:
            return  # the relay is gone, and its address was never one of this host
        self._send_from(path.local, path.remote, datagram, now)

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

    def _owner_of(self, relayed: Address) -> Allocation | None:
        for relay in self._relays:
            if relayed in (relay.relayed_v4, relay.relayed_v6):
                return relay
        return None

    def _settle_relays(self, now: float) -> None:
        for relay in self._relays:
            relay_id = relay.relay_id
            while (event := relay.poll_event()) is not None:
                match event:
                    case HostDiscovered(address):
                        self._offer(Candidate.host(address), relay_id, now)
                    case ReflexiveDiscovered(address, base):
                        self._offer(Candidate.srflx(address, base), relay_id, now)
                        if relay.relayed_v4 is not None or relay.relayed_v6 is not None:
                            relay.refresh(now)  # a NAT gave us another port: the relay may not know us there
                    case RelayedAdded(address, server_is_ipv4):
                        self._offer(Candidate.relay(address, server_is_ipv4), relay_id, now)
                        for connection in self._connections.by_peer.values():
                            if connection.relay_id == relay_id:
                                self._bind_remotes(connection, relay, now)
                    case RelayedRemoved(address):
                        self._withdraw(address, now)
            self._drain_relay(relay)

    # candidates

    def _offer(self, candidate: Candidate, relay_id: str, now: float) -> None:
        for connection in list(self._connections.by_peer.values()):
            if connection.relay_id != relay_id or not is_usable(candidate.address.ip):
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

    def _withdraw(self, relayed: Address, now: float) -> None:
        for connection in list(self._connections.by_peer.values()):
            for candidate in connection.agent.local_candidates:
                if candidate.kind is CandidateKind.RELAY and candidate.address == relayed:
                    connection.agent.remove_local_candidate(candidate, now)
                    self._events.append(CandidateRemoved(connection.peer_id, candidate.to_invalidation()))
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
            line = candidate.to_sdp(connection.parameters.local.ufrag)
            self._events.append(CandidateAdded(connection.peer_id, line))

    # relays going away

    def _drop_relay(self, relay_id: str, now: float) -> None:
        relay = self._relays.remove(relay_id)
        if relay is not None:
            for address in (relay.relayed_v4, relay.relayed_v6):
                if address is not None:
                    self._withdraw(address, now)

    def _dispose_relays(self, now: float) -> None:
        dead = [relay for relay in self._relays if relay.free_reason is not None]
        for relay in dead:
            self._drop_relay(relay.relay_id, now)
        if dead and len(self._relays) == 0:
            self._events.append(RelaysExhausted())

    def _migrate(self, now: float) -> None:
        """Move connections whose relay is gone to another one, once one has answered."""
        for connection in list(self._connections.by_peer.values()):
            if self._relays.get(connection.relay_id) is not None:
                continue
            relay = self._relays.choose()
            if relay is None:
                return
            connection.relay_id = relay.relay_id
            self._bind_remotes(connection, relay, now)
            for candidate in _candidates_of(relay, with_relayed=True):
                ranked = connection.agent.add_local_candidate(candidate, now)
                if ranked is not None:
                    self._signal(connection, ranked)
            self._drain_relay(relay)
            self._settle(connection, now)


def _is_relayed(connection: Connection, local: Address) -> bool:
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
