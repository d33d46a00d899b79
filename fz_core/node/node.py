"""Connections to peers by id: relays, ICE and WireGuard composed, nothing of policy.

One mutation, then drain `poll_transmit` and `poll_event`, then wait for `poll_timeout`.

Source: `spec/connectivity.md` §2, §3.8, §8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fz_core.crypto import PrivateKey
from fz_core.ice import (
    CLIENT_DEFAULT,
    CLIENT_IDLE,
    SERVER_DEFAULT,
    SERVER_IDLE,
    optimistic_candidates,
)
from fz_core.node.connection import Connection, Parameters, Path, Profiles, State
from fz_core.node.events import (
    CandidateRemoved,
    ConnectionClosed,
    ConnectionEstablished,
    ConnectionFailed,
    NodeEvent,
    NoRelays,
    PathChanged,
    PeerLost,
    PeerStuck,
)
from fz_core.node.iceless import IcelessConnection
from fz_core.node.relaying import EAGERLY_BOUND, RelayingNode
from fz_core.node.transport import Carried
from fz_core.packet import Address, DropReason, Transmit
from fz_core.stun import Message, build, is_stun_untrusted
from fz_core.stun.attributes import BINDING, INDICATION, PADDING
from fz_core.turn import Allocation
from fz_core.wireguard import INIT, RateLimiter, initiator_static_key_untrusted, receiver_index

if TYPE_CHECKING:
    from typing_extensions import Buffer

Datagram = bytes | memoryview
RELAY_PORT = 3478
CHANNEL_HEADER = 4
LARGEST_DATAGRAM = 1312  # inner 1280, WireGuard 32
CLIENT_PROFILES = Profiles(CLIENT_DEFAULT, CLIENT_IDLE)
GATEWAY_PROFILES = Profiles(SERVER_DEFAULT, SERVER_IDLE)
PEER_CLIENT_PROFILES = Profiles(CLIENT_DEFAULT, CLIENT_IDLE)


class Node(RelayingNode):
    """All connections of one process. `unix_epoch` is the unix time at `now == 0`."""

    def __init__(
        self, private_key: PrivateKey, now: float, unix_epoch: float, random_bytes: Callable[[int], bytes]
    ) -> None:
        super().__init__(random_bytes)
        self._unix_epoch = unix_epoch
        self._take_key(private_key, now)

    def _take_key(self, private_key: PrivateKey, now: float) -> None:
        self._private_key = private_key
        self.public_key: bytes = private_key.public
        self._rate_limiter = RateLimiter(private_key, now, self._random_bytes)

    def reset(self, private_key: PrivateKey, now: float) -> list[str]:
        """Our network changed: relays are asked anew, and connections that use ICE end; the ids of their peers.

        If all do without ICE they live on under the old key, and find their paths again. Otherwise all end, to be made
        again under the new one. No goodbye is sent, for nothing may get through. Events and datagrams not yet taken
        are lost. Source: `spec/connectivity.md` §8.9.
        """
        self._transmits.clear()
        self._events.clear()
        self._retries.clear()
        connections = list(self._connections.by_peer.values())
        if not connections or not all(isinstance(c, IcelessConnection) for c in connections):
            for connection in connections:
                self._forget(connection.peer_id)
                self._events.append(ConnectionClosed(connection.peer_id))
            self._take_key(private_key, now)
        for relay in self._relays:
            relay.restart(now)
            while relay.poll_event() is not None:
                pass  # what is lost is said below, to those who stay
            self._drain_relay(relay)
        for connection in self._connections.by_peer.values():
            assert isinstance(connection, IcelessConnection)
            for candidate in connection.agent.local_candidates:
                self._events.append(CandidateRemoved(connection.peer_id, connection.withdrawal(candidate)))
            connection.rebuild((), now)
            self._deadlines.note(connection)
        return [c.peer_id for c in connections if c.peer_id not in self._connections.by_peer]

    # connections

    def upsert_connection(
        self, peer_id: str, parameters: Parameters, now: float, profiles: Profiles = CLIENT_PROFILES
    ) -> bool:
        """Make a connection, or wake the one that has the same parameters; whether it is a new one.

        NoRelays if there is no relay.
        """
        connection = self._connections.by_peer.get(peer_id)
        if connection is not None and connection.parameters == parameters:
            self._reuse(connection, now)
            return False
        relay = self._relays.choose()
        if relay is None:
            self._wake_relays(now)
            raise NoRelays
        self._forget(peer_id)
        kind = IcelessConnection if parameters.iceless else Connection
        connection = kind(
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
        self._deadlines.add(connection)
        for candidate in self._initial_candidates(relay):
            connection.agent.add_local_candidate(candidate, now)
        self._signal_candidates(connection)
        connection.begin(now)
        self._settle(connection, now)
        return True

    def _reuse(self, connection: Connection, now: float) -> None:
        """The peer may have lost what we told it: say it again, with what was learnt since (§8.3)."""
        connection.touch(now)
        if connection.is_silent(now):
            self._wake_relays(now)
            self._doubt_relay(connection.relay_id, now)
            self._borrow_relay(connection, now)
            connection.restart_ice(now)
        for candidate in self._initial_candidates(self._relays.get(connection.relay_id)):
            connection.agent.add_local_candidate(candidate, now)
        self._signal_candidates(connection)
        connection.rehandshake(now)
        self._settle(connection, now)

    def handle_portal_connected(self, now: float) -> None:
        """Tell unconnected peers our candidates again: what was said before may have been lost with the portal."""
        for connection in list(self._connections.by_peer.values()):
            if connection.path is None:
                self._signal_candidates(connection)
            connection.handle_portal_connected(now)
            self._settle(connection, now)

    def add_remote_candidate(self, peer_id: str, line: str, now: float) -> None:
        """Take a candidate the peer signalled; a malformed or foreign one is ignored."""
        connection = self._connections.by_peer.get(peer_id)
        candidate = None if connection is None else connection.parse_untrusted(line)
        if connection is None or candidate is None:
            return
        if candidate in connection.agent.remote_candidates and connection.may_signal_again(now):
            # The peer repeats itself, so the portal was away, and what we said may not have reached the peer.
            self._signal_candidates(connection)
        relay = self._relays.get(connection.relay_id)
        if relay is not None and candidate.kind in EAGERLY_BOUND:
            relay.bind_channel(candidate.address, now)
            self._drain_relay(relay)  # without ICE the gateway has nothing to send that would
        connection.add_remote_candidate(candidate, now)
        for guess in optimistic_candidates(connection.agent.remote_candidates):
            connection.add_remote_candidate(guess, now)
        self._settle(connection, now)

    def remove_remote_candidate(self, peer_id: str, line: str, now: float) -> None:
        """Take back a candidate of the peer."""
        connection = self._connections.by_peer.get(peer_id)
        candidate = None if connection is None else connection.parse_untrusted(line)
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
        self._forget(peer_id)

    def remove(self, peer_id: str) -> None:
        """Forget a connection without a word."""
        self._forget(peer_id)

    def is_known(self, peer_id: str) -> bool:
        """Whether a connection to this peer exists, ready or not."""
        return peer_id in self._connections.by_peer

    def is_ready(self, peer_id: str) -> bool:
        """Whether packets can be sent to this peer."""
        connection = self._connections.by_peer.get(peer_id)
        return connection is not None and connection.is_ready

    def is_busy(self, peer_id: str) -> bool:
        """Whether packets were exchanged with this peer lately, or are about to be."""
        connection = self._connections.by_peer.get(peer_id)
        return connection is not None and connection.state is not State.IDLE

    def path(self, peer_id: str) -> Path | None:
        """Where data to this peer travels; the same object until that changes."""
        connection = self._connections.by_peer.get(peer_id)
        return None if connection is None else connection.path

    def first_hop(self, peer_id: str) -> tuple[Address, Address | None, int] | None:
        """Where datagrams for a peer leave to, from where (None: any), and the bytes a relay's header adds."""
        path = self.path(peer_id)
        if path is None or not path.via_relay:
            return None if path is None else (path.remote, path.local, 0)
        relay = self._owner_of(path.local)
        return None if relay is None or relay.server is None else (relay.server, None, CHANNEL_HEADER)

    def probe_mtu(self, peer_id: str, now: float) -> None:
        """Send a datagram as large as any, so that a router that cannot pass it says so; the peer ignores it."""
        connection = self._connections.by_peer.get(peer_id)
        if connection is not None and connection.path is not None:
            padding = ((PADDING, bytes(LARGEST_DATAGRAM - 24)),)
            self._send_on_path(connection, build(BINDING, INDICATION, self._random_bytes(12), padding), now)

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
        self._deadlines.note(connection)
        if not sealed:
            return None  # a handshake is under way, and the packet goes out when it is done
        connection._last_activity = now
        if connection.note_sent(now):
            self._settle(connection, now)
        if connection.state is State.IDLE:
            connection.touch(now)
            self._settle(connection, now)
        path = connection.path
        if path is None:
            return DropReason.NOT_CONNECTED
        if not path.via_relay:
            return Transmit(sealed, path.remote, path.local, ecn)
        relay = self._owner_of(path.local)
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
            return self._handle_data(local, remote, datagram, now)
        if is_stun_untrusted(datagram):
            return self._handle_peer_stun(local, remote, datagram, now)
        return self._handle_wireguard(first, local, remote, datagram, now)

    # data that others sealed and opened

    def handle_opened(
        self, peer_id: str, local: Address, remote: Address, plaintext: bytes, now: float
    ) -> tuple[str, bytes] | None:
        """Take a packet that a session of this peer's tunnel has authenticated, padding removed; b"" is a keep-alive.

        The tunnel's timers know of it already. What came through a relay came from the peer to our relayed address.
        The result is that of `handle_network_input`.
        """
        connection = self._connections.by_peer.get(peer_id)
        if connection is None:
            return None
        relay = self._owner_of(local)
        if relay is not None:
            relay.note_data_received(remote, now)
        self._deadlines.note(connection)
        return self._take_opened(connection, local, remote, plaintext, now)

    def note_traffic(self, peer_id: str, carried: Carried, now: float) -> None:
        """What was sent and received elsewhere since the last call has the effects it would have had here."""
        connection = self._connections.by_peer.get(peer_id)
        if connection is None:
            return
        self._deadlines.note(connection)
        path, received_on = connection.path, connection.received_on
        sender = None if path is None else self._owner_of(path.local)
        if sender is not None and carried.sent_at is not None:
            sender.note_data_sent(carried.sent_at)
        receiver = None if received_on is None else self._owner_of(received_on[0])
        if receiver is not None and received_on is not None and carried.heard_at is not None:
            receiver.note_data_received(received_on[1], carried.heard_at)
        if connection.note_carried(carried, now) or not connection.established:
            self._settle(connection, now)

    # time

    def handle_timeout(self, now: float) -> None:
        """Run every timer that is due."""
        for allocation in self._relays:
            due = allocation.poll_timeout()
            if due is not None and due <= now:
                allocation.handle_timeout(now)
        self._settle_relays(now)
        for connection in self._deadlines.take(now):
            connection.handle_timeout(now)
            self._settle(connection, now)
        self._dispose_relays(now)
        self._retry_relays(now)
        self._migrate(now)

    def poll_timeout(self) -> float | None:
        """When `handle_timeout` is next due."""
        due = [self._deadlines.poll_timeout()]
        due += [allocation.poll_timeout() for allocation in self._relays]
        due += [at for at, _ in self._retries.values()]
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

    def _handle_data(
        self, local: Address, remote: Address, datagram: Datagram, now: float
    ) -> tuple[str, bytes] | DropReason | None:
        connection = self._connections.by_index.get(int.from_bytes(datagram[4:8], "little") >> 8)
        if connection is None:
            return DropReason.WG_UNKNOWN_SESSION
        opened = connection.tunnel.handle_untrusted(datagram, remote.ip, now)
        self._deadlines.note(connection)
        if not isinstance(opened, bytes):
            self._settle(connection, now)
            return opened
        return self._take_opened(connection, local, remote, opened, now)

    def _take_opened(
        self, connection: Connection, local: Address, remote: Address, opened: bytes, now: float
    ) -> tuple[str, bytes] | None:
        if connection.take_data(local, remote, opened, now) or not opened:
            self._settle(connection, now)
            return None
        connection._last_activity = now
        if connection.state is State.IDLE or not connection.established:
            connection.touch(now)
            self._settle(connection, now)
        self._publish(connection)
        return connection.peer_id, opened

    def _handle_wireguard(
        self, first: int, local: Address, remote: Address, datagram: Datagram, now: float
    ) -> DropReason | None:
        is_verified = first == INIT
        connection = self._connections.by_init(datagram) if first == INIT else None
        if connection is not None:
            pass  # a copy of one that was accepted, which came another way
        elif first == INIT:
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
        dropped = connection.handle_handshake(local, remote, datagram, now, is_verified)
        if connection.is_iceless and first == INIT and dropped is None:
            self._connections.remember_init(datagram, connection, now)
        self._settle(connection, now)
        return dropped

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
        elif message.cls == INDICATION:
            return None  # a peer's `probe_mtu`
        else:
            return DropReason.STUN_UNEXPECTED
        if connection is None:
            return DropReason.UNKNOWN_CONNECTION
        dropped = connection.handle_check(local, remote, message, now)
        self._settle(connection, now)
        return dropped

    # settling: let the parts react until nothing is left

    def _settle(self, connection: Connection, now: float) -> None:
        self._deadlines.note(connection)
        connection.settle(now)
        for outgoing in connection.outgoing(now):
            self._send(connection, outgoing, now)
        if connection.path_changed and connection.path is not None:
            connection.path_changed = False
            path = connection.path
            self._events.append(
                PathChanged(connection.peer_id, str(path.local), str(path.remote), path.via_relay or path.to_relay)
            )
        watch = connection.watch
        if watch.is_silenced:
            watch.is_silenced = False
            self._handle_silence(connection, now)
        if watch.has_lasting_silence:
            watch.has_lasting_silence = False
            self._handle_lasting_silence(connection, now)
        if watch.is_stuck:
            watch.is_stuck = False
            self._events.append(PeerStuck(connection.peer_id))
        if watch.is_slow:
            watch.is_slow = False
            self._events.append(PeerLost(connection.peer_id))
        told = connection.take_retelling()
        if told is not None:
            self._retell(connection, told)
        if connection.is_ready and not connection.established:
            connection.established = True
            self._events.append(ConnectionEstablished(connection.peer_id))
        if connection.state is State.FAILED:
            self._forget(connection.peer_id)
            self._doubt_relay(connection.relay_id, now)
            self._events.append(ConnectionFailed(connection.peer_id, connection.failure or "failed"))
        self._publish(connection)

    def _doubt_relay(self, relay_id: str, now: float) -> None:
        """No path, not even over the relay: it may have lost our allocation, and data would never tell."""
        relay = self._relays.get(relay_id)
        if relay is not None:
            relay.refresh(now)
            self._drain_relay(relay)
