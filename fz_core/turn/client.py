"""TURN client: one allocation on one relay. Sans-IO.

    allocation.handle_input(local, remote, datagram, now)   STUN from the relay
    allocation.encapsulate(peer, payload, now)              data to a peer, as ChannelData
    allocation.decapsulate(remote, datagram, now)           ChannelData from the relay
    allocation.handle_timeout(now); allocation.poll_timeout()
    allocation.poll_transmit(); allocation.poll_event(); allocation.poll_channel_change()

**After every call that takes `now`, drain these three.**

Life: BINDING to each address of the relay; the first to answer is used from then on; ALLOCATE; REFRESH at
half of the lifetime; BINDING every 25 s of silence. Data moves through channels only. Sources:
spec/connectivity.md section 3, RFC 8656.

Two dialects. Towards the official relay the first ALLOCATE is signed and only signed challenges count. With
`accept_unsigned_challenge` (for coturn, spec/relay.md section 12) the first ALLOCATE is unsigned, a plain 401
or 438 is followed once per request, and REFRESH carries nothing but LIFETIME and SOFTWARE.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from fz_core.packet import Address, DropReason, Transmit
from fz_core.stun import (
    Message,
    build,
    build_channel_data,
    channel_number_value,
    parse_channel_data_untrusted,
    u8_value,
    u32_value,
    xor_address_value,
)
from fz_core.stun.attributes import (
    ADDITIONAL_ADDRESS_FAMILY,
    ALLOCATE,
    BINDING,
    CHANNEL_BIND,
    CHANNEL_NUMBER,
    FAMILY_IPV6,
    LIFETIME,
    REFRESH,
    REQUEST,
    REQUESTED_TRANSPORT,
    SOFTWARE,
    TRANSPORT_UDP,
    XOR_PEER_ADDRESS,
)
from fz_core.turn.channels import CHANNEL_LIFETIME, Channel, Channels
from fz_core.turn.credentials import Credentials
from fz_core.turn.events import (
    HostDiscovered,
    HostRemoved,
    ReflexiveDiscovered,
    ReflexiveRemoved,
    RelayedAdded,
    RelayedRemoved,
    TurnEvent,
)
from fz_core.turn.requests import MAX_CHALLENGES, REQUEST_TIMEOUT, Backoff, Request, Requests

BINDING_INTERVAL = 25.0
DEFAULT_LIFETIME = 600
MAX_BUFFERED_BINDS = 100
MIN_REFRESH_RETRY = 5.0


class Allocation:
    """One relay as seen by its client.

    Errors: bytes from the network never raise; a wrong use of the API raises ValueError.
    """

    def __init__(
        self,
        relay_id: str,
        addresses: tuple[Address | None, Address | None],
        username: str,
        password: str,
        realm: str,
        now: float,
        random_bytes: Callable[[int], bytes],
        software: str = "fz_core",
        *,
        accept_unsigned_challenge: bool = False,
    ) -> None:
        self.relay_id = relay_id
        self.server_addresses = tuple(address for address in addresses if address is not None)
        if not self.server_addresses:
            raise ValueError(f"relay {relay_id} has no address, give one for IPv4, IPv6 or both")
        self.accept_unsigned_challenge = accept_unsigned_challenge
        self._random_bytes = random_bytes
        self._software = (SOFTWARE, software.encode())
        self._username = username
        self._password = password
        self._realm = realm
        self._credentials: Credentials | None = Credentials(username, password, realm)
        self._requests = Requests()
        self._channels = Channels()
        self._pending_binds: deque[Address] = deque(maxlen=MAX_BUFFERED_BINDS)
        self._transmits: deque[Transmit] = deque()
        self._events: deque[TurnEvent] = deque()
        self._rtt: float | None = None
        self._hosts: dict[int, Address] = {}
        self._old_hosts: dict[int, Address] = {}
        self._reflexives: dict[int, tuple[Address, Address]] = {}
        self._old_reflexives: dict[int, tuple[Address, Address]] = {}
        self._start(now)

    def _start(self, now: float) -> None:
        self._server: Address | None = None
        # what was true before the last start is withdrawn when something else is
        self._old_hosts, self._hosts = {**self._old_hosts, **self._hosts}, {}
        self._old_reflexives, self._reflexives = {**self._old_reflexives, **self._reflexives}, {}
        self._relayed: dict[int, Address] = {}
        self._expires_at: float | None = None
        self._refresh_due_at: float | None = None
        self._active_at = now
        self._is_suspended = False
        self._is_probing = False
        self._has_protocol_failure = False
        for address in self.server_addresses:
            self._send_binding(address, now)

    # What is known

    @property
    def server(self) -> Address | None:
        """The relay address in use, once one has answered."""
        return self._server

    @property
    def relayed_v4(self) -> Address | None:
        """Our relayed IPv4 address."""
        return self._relayed.get(4)

    @property
    def relayed_v6(self) -> Address | None:
        """Our relayed IPv6 address."""
        return self._relayed.get(16)

    @property
    def rtt(self) -> float | None:
        """Smoothed round-trip time in seconds; None before the first answer."""
        return self._rtt

    @property
    def expires_at(self) -> float | None:
        """When the relay forgets us unless refreshed; None without an allocation."""
        return self._expires_at

    @property
    def host_addresses(self) -> tuple[Address, ...]:
        """Local addresses the relay's answers arrived on, at most one per family."""
        return tuple(self._hosts.values())

    @property
    def reflexive(self) -> tuple[tuple[Address, Address], ...]:
        """(address, base) as the relay saw us, at most one per family."""
        return tuple(self._reflexives.values())

    @property
    def free_reason(self) -> str | None:
        """Why this allocation can be disposed of; None while it is of use."""
        if self._has_protocol_failure:
            return "TURN protocol failure"
        if len(self._requests):
            return None
        if self._credentials is None:
            return "authentication error"
        return "no response received" if self._server is None else None

    @property
    def is_refused(self) -> bool:
        """Whether the relay will not have us, so that asking again is of no use."""
        return self._has_protocol_failure or self._credentials is None

    def matches(self, addresses: tuple[Address | None, Address | None], username: str, password: str) -> bool:
        """Whether a relay entry of the portal is this very allocation."""
        known = tuple(address for address in addresses if address is not None)
        return (known, username, password) == (self.server_addresses, self._username, self._password)

    # Commands

    def bind_channel(self, peer: Address, now: float) -> None:
        """Have data to `peer` relayed: harmless if it is already, kept for later without an allocation."""
        if self._is_suspended or self._credentials is None:
            return
        if not self._relayed:
            if peer not in self._pending_binds:
                self._pending_binds.append(peer)
            return
        if len(peer.ip) in self._relayed:
            channel = self._channels.request(peer, now)
            if channel is not None:
                self._send_bind(channel, now)

    def refresh(self, now: float) -> None:
        """Find out soon whether the relay is still there: a single attempt of one second."""
        if self._credentials is None or self._requests.has(ALLOCATE):
            return
        if self._is_suspended:
            self._restart(now)
        elif self._server is not None and self._relayed:
            if not self._requests.has(REFRESH):
                self._send_refresh(now, max_elapsed=REQUEST_TIMEOUT)
        elif self._server is not None and not len(self._requests):
            self._send_allocate(now)

    def probe(self, now: float) -> None:
        """Peers are silent, perhaps because the network changed: does the relay answer, and where does it see us?

        A changed address, or the REFRESH that follows the answer, tells whether it still knows our allocation.
        """
        if self._credentials is None or self._is_suspended or self._server is None:
            self.refresh(now)
        else:
            self._is_probing = True
            for address in self.server_addresses:
                if not self._requests.has_to(BINDING, address):
                    self._send_binding(address, now)

    def restart(self, now: float) -> None:
        """The network changed: forget all about it and begin anew with the same credentials."""
        self._credentials = Credentials(self._username, self._password, self._realm)
        self._restart(now)

    def _restart(self, now: float) -> None:
        self._invalidate()
        if self._credentials is not None:
            self._credentials.nonce = None
        self._start(now)

    # Data

    def encapsulate(
        self, peer: Address, payload: bytes | bytearray | memoryview, now: float, ecn: int = 0
    ) -> Transmit | DropReason:
        """One datagram to the relay. Without a channel the payload is lost and a bind begins."""
        number = self._channels.number_to(peer, now)
        if number is None or self._server is None:
            self.bind_channel(peer, now)
            return DropReason.NO_CHANNEL
        self._active_at = now
        return Transmit(build_channel_data(number, payload), self._server, None, ecn)

    def channel_to(self, peer: Address, now: float) -> int | None:
        """The channel number for `peer`, for a caller that writes the four header bytes itself."""
        return self._channels.number_to(peer, now)

    def confirmed_channel_to(self, peer: Address) -> tuple[int, float] | None:
        """The number of a channel the relay has confirmed, and when that ends unless it is refreshed."""
        channel = self._channels.confirmed_to(peer)
        if channel is None or channel.bound_at is None:
            return None
        return channel.number, channel.bound_at + CHANNEL_LIFETIME

    def ends_of(self, number: int) -> tuple[Address, Address] | None:
        """(our relayed address, peer) of a channel that was ever confirmed."""
        peer = self._channels.peer_of(number)
        relayed = None if peer is None else self._relayed.get(len(peer.ip))
        return None if peer is None or relayed is None else (relayed, peer)

    def note_data_sent(self, at: float) -> None:
        """ChannelData was sent elsewhere, so the relay needs no sign of life from us for a while."""
        self._active_at = max(self._active_at, at)

    def note_data_received(self, peer: Address, at: float) -> None:
        """ChannelData was unwrapped elsewhere: the channel is in use and worth refreshing."""
        self._channels.note_received(peer, at)

    def decapsulate(
        self, remote: Address, datagram: bytes | bytearray | memoryview, now: float
    ) -> tuple[Address, memoryview, Address] | DropReason:
        """(peer, payload, our relayed address) of ChannelData from the relay."""
        if remote not in self.server_addresses:
            return DropReason.UNKNOWN_CHANNEL
        parsed = parse_channel_data_untrusted(datagram)
        if not isinstance(parsed, tuple):
            return parsed
        peer = self._channels.receive(parsed[0], now)
        relayed = None if peer is None else self._relayed.get(len(peer.ip))
        if peer is None or relayed is None:
            return DropReason.UNKNOWN_CHANNEL
        return peer, parsed[1], relayed

    # STUN from the relay

    def handle_input(
        self, local: Address, remote: Address, datagram: bytes | bytearray | memoryview, now: float
    ) -> bool:
        """True if this was STUN from the relay, whatever became of it."""
        if remote not in self.server_addresses:
            return False
        message = Message.parse_untrusted(datagram)
        if not isinstance(message, Message):
            return False
        request = self._requests.get(message.transaction_id)
        if request is not None and self._is_answer(message, request, remote):
            self._requests.remove(request)
            self._sample_rtt(now - request.backoff.started_at)
            if message.is_error:
                self._handle_error(message, request, now)
            else:
                self._handle_success(message, request, local, now)
        return True

    def _is_answer(self, message: Message, request: Request, remote: Address) -> bool:
        if not (message.is_success or message.is_error):
            return False
        if request.destination != remote or message.method != request.method:
            return False
        if message.method == BINDING:
            return True
        if self._credentials is None:
            return False
        return message.check_integrity(self._credentials.key) or self._is_unsigned_challenge(message, request)

    def _is_unsigned_challenge(self, message: Message, request: Request) -> bool:
        """A plain challenge is a hint to follow once, never proof that credentials are dead."""
        if not self.accept_unsigned_challenge or message.has_integrity or request.unsigned_challenge_used:
            return False
        if message.error_code == 438 or (message.error_code == 401 and not request.had_nonce):
            request.unsigned_challenge_used = True
            return True
        return False

    def _sample_rtt(self, sample: float) -> None:
        self._rtt = sample if self._rtt is None else self._rtt * 7 / 8 + sample / 8

    def _handle_success(self, message: Message, request: Request, local: Address, now: float) -> None:
        if request.method == BINDING:
            self._handle_binding(message, request, local, now)
        elif request.method == ALLOCATE:
            self._handle_allocated(message, now)
        elif request.method == REFRESH:
            self._handle_refreshed(message, request, now)
        elif request.channel is not None:
            self._channels.confirm(request.channel, now)

    def _handle_binding(self, message: Message, request: Request, local: Address, now: float) -> None:
        mapped = message.xor_mapped_address
        if mapped is None:
            return
        family = len(local.ip)
        host = self._hosts.get(family)
        if host != local:
            self._hosts[family] = local
            self._events.append(HostDiscovered(local))
            old_host = host or self._old_hosts.pop(family, None)
            if old_host not in (None, local):
                self._events.append(HostRemoved(old_host))
        known = self._reflexives.get(family)
        if known != (mapped, local):
            self._reflexives[family] = (mapped, local)
            self._events.append(ReflexiveDiscovered(mapped, local))
            old = known or self._old_reflexives.pop(family, None)
            if old not in (None, (mapped, local)):
                self._events.append(ReflexiveRemoved(*old))
        if self._server is None:
            self._server = request.destination
            self._active_at = now
            self._send_allocate(now)
        elif self._is_probing or known not in (None, (mapped, local)):
            self._is_probing = False
            self.refresh(now)  # if a NAT gave us another address, the relay does not know us there

    def _handle_allocated(self, message: Message, now: float) -> None:
        lifetime = message.lifetime
        if lifetime is None:
            lifetime = DEFAULT_LIFETIME
        relayed = {len(address.ip): address for address in reversed(message.xor_relayed_addresses)}
        if not relayed or lifetime == 0 or self._server is None:
            return
        self._relayed = {family: relayed[family] for family in sorted(relayed)}
        self._extend(lifetime, now)
        self._active_at = now
        for address in self._relayed.values():
            self._events.append(RelayedAdded(address, self._server.is_ipv4))
        binds, self._pending_binds = self._pending_binds, deque(maxlen=MAX_BUFFERED_BINDS)
        for peer in binds:
            self.bind_channel(peer, now)

    def _handle_refreshed(self, message: Message, request: Request, now: float) -> None:
        if request.is_delete:
            self._send_allocate(now)
        elif self._relayed:
            self._extend(message.lifetime or DEFAULT_LIFETIME, now)

    def _extend(self, lifetime: int, now: float) -> None:
        self._expires_at = now + lifetime
        self._refresh_due_at = now + lifetime / 2

    # Errors

    def _handle_error(self, message: Message, request: Request, now: float) -> None:
        code = message.error_code
        if code == 401 and request.had_nonce:
            self._credentials = None
            self._invalidate()
        elif code in (401, 438):
            self._answer_challenge(message, request, now)
        elif code == 437:
            self._resynchronise(request, now)
        elif code == 420:
            self._invalidate()
            self._has_protocol_failure = True
        elif request.method == ALLOCATE:
            self._pending_binds.clear()
            self._is_suspended = True
        elif request.channel is not None:
            self._channels.reject(request.channel)
        elif request.method == REFRESH and not request.is_delete:
            self._put_off_refresh(now)

    def _answer_challenge(self, message: Message, request: Request, now: float) -> None:
        request.challenges += 1
        is_ours = message.nonce is not None and message.realm == self._realm
        if self._credentials is None or not is_ours or request.challenges > MAX_CHALLENGES:
            self._give_up_challenge(request)
            return
        self._credentials.nonce = message.nonce
        request.backoff = Backoff(now, rtt=self._rtt)
        self._send(request)

    def _give_up_challenge(self, request: Request) -> None:
        if request.channel is not None:
            self._channels.reject(request.channel)
        elif request.method == ALLOCATE:
            self._is_suspended = True

    def _resynchronise(self, request: Request, now: float) -> None:
        """437: the relay and we differ on whether there is an allocation."""
        self._invalidate()
        if request.method == ALLOCATE:
            self._send_refresh(now, is_delete=True)
            return
        if request.peer is not None:
            self._pending_binds.append(request.peer)
        self._send_allocate(now)

    def _put_off_refresh(self, now: float) -> None:
        if self._expires_at is not None:
            self._refresh_due_at = now + max((self._expires_at - now) / 2, MIN_REFRESH_RETRY)

    def _invalidate(self) -> None:
        """The relayed addresses are gone, and with them channels and everything in flight."""
        for address in self._relayed.values():
            self._events.append(RelayedRemoved(address))
        self._relayed = {}
        self._expires_at = None
        self._refresh_due_at = None
        self._channels.clear()
        self._requests.clear()

    # Time

    def handle_timeout(self, now: float) -> None:
        """Do what is due."""
        for request in self._requests.due(now):
            if self._requests.get(request.transaction_id) is not request:
                continue  # an earlier one took all down
            if request.backoff.is_exhausted(now):
                self._give_up(request)
            else:
                request.backoff.advance(now)
                self._repeat(request)
        if self._expires_at is not None and now >= self._expires_at:
            self._restart(now)
        self._refresh_allocation(now)
        for channel in self._channels.due(now):
            self._send_bind(self._channels.begin(channel, now), now)

    def poll_timeout(self) -> float | None:
        """The next time `handle_timeout` has something to do."""
        times = [self._requests.next_at(), self._expires_at, self._channels.next_refresh_at()]
        if self._relayed and self._server is not None:
            if not self._requests.has(REFRESH):
                times.append(self._refresh_due_at)
            if not self._requests.has_to(BINDING, self._server):
                times.append(self._active_at + BINDING_INTERVAL)
        return min((at for at in times if at is not None), default=None)

    def poll_transmit(self) -> Transmit | None:
        """The next datagram for the relay."""
        return self._transmits.popleft() if self._transmits else None

    def poll_event(self) -> TurnEvent | None:
        """The next event."""
        return self._events.popleft() if self._events else None

    def poll_channel_change(self) -> Address | None:
        """A peer whose channel was confirmed, or is gone, since this was last drained."""
        return self._channels.poll_change()

    def _refresh_allocation(self, now: float) -> None:
        if self._server is None or not self._relayed:
            return
        due = self._refresh_due_at is not None and now >= self._refresh_due_at
        if due and not self._requests.has(REFRESH):
            self._send_refresh(now)
        if now >= self._active_at + BINDING_INTERVAL and not self._requests.has_to(BINDING, self._server):
            self._active_at = now
            self._send_binding(self._server, now)

    def _give_up(self, request: Request) -> None:
        self._requests.remove(request)
        if self._server is not None and request.destination.is_ipv4 == self._server.is_ipv4:
            self._server = self._rtt = None
            self._invalidate()

    # Sending

    def _send_binding(self, destination: Address, now: float) -> None:
        self._send(Request(BINDING, [self._software], destination, Backoff(now, rtt=self._rtt)))

    def _send_allocate(self, now: float) -> None:
        assert self._server is not None
        self._send(Request(ALLOCATE, [*self._wishes(), self._software], self._server, Backoff(now, rtt=self._rtt)))

    def _send_refresh(self, now: float, *, max_elapsed: float = 8.0, is_delete: bool = False) -> None:
        assert self._server is not None
        attributes = [] if self.accept_unsigned_challenge else self._wishes()
        attributes.append(self._software)
        if is_delete:
            attributes.append((LIFETIME, u32_value(0)))
        rtt = self._rtt if max_elapsed > REQUEST_TIMEOUT else None
        request = Request(REFRESH, attributes, self._server, Backoff(now, max_elapsed, rtt))
        request.is_delete = is_delete
        self._send(request)

    def _wishes(self) -> list[tuple[int, bytes]]:
        """The official client sends these two with REFRESH as well."""
        return [
            (REQUESTED_TRANSPORT, u8_value(TRANSPORT_UDP)),
            (ADDITIONAL_ADDRESS_FAMILY, u8_value(FAMILY_IPV6)),
        ]

    def _send_bind(self, channel: Channel, now: float) -> None:
        assert self._server is not None
        request = Request(CHANNEL_BIND, [], self._server, Backoff(now, rtt=self._rtt))
        request.peer = channel.peer
        request.channel = channel.number
        self._send(request)

    def _repeat(self, request: Request) -> None:
        if request.method == BINDING:
            self._transmits.append(Transmit(request.datagram, request.destination))
        else:
            self._requests.remove(request)
            self._send(request)

    def _send(self, request: Request) -> None:
        """Under a fresh transaction id, which a late answer to an earlier one will not have."""
        request.transaction_id = self._random_bytes(12)
        attributes = list(request.attributes)
        if request.peer is not None and request.channel is not None:
            # the address is masked with the transaction id, so it is written anew each time
            attributes.append((XOR_PEER_ADDRESS, xor_address_value(request.peer, request.transaction_id)))
            attributes.append((CHANNEL_NUMBER, channel_number_value(request.channel)))
            attributes.append(self._software)
        key: bytes | None = None
        if request.method != BINDING and self._credentials is not None:
            attributes += self._credentials.attributes()
            request.had_nonce = self._credentials.nonce is not None
            if request.had_nonce or not self.accept_unsigned_challenge:
                key = self._credentials.key
        request.datagram = build(request.method, REQUEST, request.transaction_id, attributes, integrity_key=key)
        self._requests.add(request)
        self._transmits.append(Transmit(request.datagram, request.destination))
