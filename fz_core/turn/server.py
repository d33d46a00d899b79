"""The protocol of a relay, without sockets.

    server.handle_client_input(client, datagram, now)     from the listening port
    server.handle_peer_input(port, peer, datagram, now)   from the port of an allocation
    server.handle_timeout(now); server.poll_timeout(); server.poll_command()

**After every call that takes `now`, drain `poll_command`.** The caller may forward ChannelData itself:
ChannelBound and ChannelUnbound keep its tables, and nothing else decides about data.

Supported: Binding, Allocate, Refresh, ChannelBind, CreatePermission (which does nothing), ChannelData, over
UDP, with long-term credentials derived from one secret. Not: Send and Data indications, TCP, EVEN-PORT,
RESERVATION-TOKEN, DONT-FRAGMENT. Source: spec/relay.md. Every reply to a request that names a user is signed,
refusals included: official clients drop others.

Deliberately different from the reference, where no peer can tell: a repeated Allocate is answered like the
first; one source (an IPv4 address, an IPv6 /64) has 1024 allocations at most (486); peers on loopback,
multicast or the relay's own service port are refused (403); nonces and unauthenticated replies are bounded; a
message with broken attributes is dropped, not answered with 500.
"""

from __future__ import annotations

import ipaddress
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from fz_core.packet import Address, DropReason
from fz_core.stun import Message, build, build_channel_data, error_code_value, u32_value, xor_address_value
from fz_core.stun.attributes import ADDITIONAL_ADDRESS_FAMILY as ADDITIONAL_FAMILY
from fz_core.stun.attributes import (
    ALLOCATE,
    BINDING,
    CHANNEL_BIND,
    CHANNEL_NUMBER,
    CREATE_PERMISSION,
    ERROR,
    ERROR_CODE,
    FAMILY_IPV4,
    FAMILY_IPV6,
    LIFETIME,
    NONCE,
    REFRESH,
    REQUESTED_TRANSPORT,
    SOFTWARE,
    SUCCESS,
    TRANSPORT_UDP,
    USERNAME,
    XOR_MAPPED_ADDRESS,
    XOR_RELAYED_ADDRESS,
)
from fz_core.stun.attributes import REALM as REALM_ATTRIBUTE
from fz_core.stun.attributes import REQUESTED_ADDRESS_FAMILY as REQUESTED_FAMILY
from fz_core.turn.server_auth import REALM, Authenticator
from fz_core.turn.server_state import RelayState, ServerAllocation, ServerChannel, source_of

DEFAULT_LIFETIME = 600
MAX_LIFETIME = 3600
FIRST_CHANNEL = 0x4000
LAST_CHANNEL = 0x4FFF
MAX_PORT_ATTEMPTS = 64
REPLIES_PER_SECOND = 1000
MAX_RATED_SOURCES = 65_536
ALLOCATIONS_PER_SOURCE = 1024

REASONS = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    437: "Allocation Mismatch",
    438: "Stale Nonce",
    440: "Address Family not Supported",
    443: "Peer Address Family Mismatch",
    486: "Allocation Quota Reached",
    500: "Server Error",
    508: "Insufficient Capacity",
}
METHODS = (BINDING, ALLOCATE, REFRESH, CREATE_PERMISSION, CHANNEL_BIND)


@dataclass(frozen=True, slots=True)
class SendToClient:
    """Send from the listening port of the client's family."""

    client: Address
    payload: bytes


@dataclass(frozen=True, slots=True)
class SendToPeer:
    """Send from the allocation's port, from its socket of the peer's family."""

    port: int
    peer: Address
    payload: bytes


@dataclass(frozen=True, slots=True)
class PortFreed:
    """Close the sockets of this allocation."""

    port: int


@dataclass(frozen=True, slots=True)
class ChannelBound:
    """Data may flow both ways now."""

    client: Address
    number: int
    port: int
    peer: Address


@dataclass(frozen=True, slots=True)
class ChannelUnbound:
    """Data must not flow any more."""

    client: Address
    number: int
    port: int
    peer: Address


RelayCommand = SendToClient | SendToPeer | PortFreed | ChannelBound | ChannelUnbound


def any_port_opens(port: int, families: tuple[int, ...]) -> bool:
    """For a relay without sockets."""
    return True


class RelayServer:
    """One relay. `open_port(port, families)` opens an allocation's sockets; False means: try another port.

    Families are 4 and 16, the lengths of an IP. `unix_epoch` is the unix time at monotonic zero.
    """

    def __init__(
        self,
        *,
        stamp_secret: str,
        public_ip4: bytes | None,
        public_ip6: bytes | None,
        random_bytes: Callable[[int], bytes],
        unix_epoch: float,
        lowest_port: int = 49152,
        highest_port: int = 65535,
        listen_port: int = 3478,
        open_port: Callable[[int, tuple[int, ...]], bool] = any_port_opens,
        software: str = "firezone-relay; fz_core",
        allocations_per_source: int = ALLOCATIONS_PER_SOURCE,
    ) -> None:
        if public_ip4 is None and public_ip6 is None:
            raise ValueError("a relay needs a public IPv4 or IPv6 address")
        if not 1 <= lowest_port <= highest_port <= 65535:
            raise ValueError(f"no ports between {lowest_port} and {highest_port}")
        self._public: dict[int, bytes] = {}
        for ip in (public_ip4, public_ip6):
            if ip is not None:
                self._public[len(ip)] = ip
        self._own_ips = frozenset(self._public.values())
        self._is_on_loopback = any(ipaddress.ip_address(ip).is_loopback for ip in self._own_ips)
        self._ports = (lowest_port, highest_port)
        self._listen_port = listen_port
        self._allocations_per_source = allocations_per_source
        self._open_port = open_port
        self._random_bytes = random_bytes
        self._software = (SOFTWARE, software.encode())
        self._authenticator = Authenticator(stamp_secret, random_bytes, unix_epoch)
        self._state = RelayState(self._report_bound, self._report_unbound, self._report_freed)
        self._commands: deque[RelayCommand] = deque()
        self._rated: dict[bytes, int] = {}
        self._rated_until = 0.0

    @property
    def allocation_count(self) -> int:
        """Allocations now."""
        return len(self._state.by_client)

    @property
    def channel_count(self) -> int:
        """Bound channels now."""
        return len(self._state.outward)

    # Input

    def handle_client_input(
        self, client: Address, datagram: bytes | bytearray | memoryview, now: float
    ) -> DropReason | None:
        """A datagram on the listening port; the reason if nothing comes of it."""
        if client.port == 0 or len(datagram) == 0:
            return DropReason.UNKNOWN_DATAGRAM
        first = datagram[0]
        if 0x40 <= first <= 0x4F:
            return self._relay_outward(client, datagram, now)
        if first > 3:
            return DropReason.UNKNOWN_DATAGRAM
        message = Message.parse_untrusted(datagram)
        if not isinstance(message, Message):
            return message
        if not message.is_request:
            return DropReason.STUN_UNEXPECTED
        return self._handle_request(message, client, now)

    def handle_peer_input(
        self, port: int, peer: Address, datagram: bytes | bytearray | memoryview, now: float
    ) -> DropReason | None:
        """A datagram on an allocation's port; only peers with a bound channel get through."""
        target = self._state.inward.get((port, peer))
        if target is None:
            return DropReason.UNKNOWN_CHANNEL
        client, number = target
        self._commands.append(SendToClient(client, build_channel_data(number, datagram)))
        return None

    def handle_timeout(self, now: float) -> None:
        """End what is due."""
        self._state.expire(now)

    def poll_timeout(self) -> float | None:
        """When something ends next."""
        return self._state.next_at()

    def poll_command(self) -> RelayCommand | None:
        """The next thing to do."""
        return self._commands.popleft() if self._commands else None

    def is_own_ip(self, peer: Address) -> bool:
        """Whether this peer may be an allocation of ours: a datagram to it need not leave the machine then."""
        return peer.ip in self._own_ips

    def _relay_outward(
        self, client: Address, datagram: bytes | bytearray | memoryview, now: float
    ) -> DropReason | None:
        if len(datagram) < 4:
            return DropReason.UNKNOWN_DATAGRAM
        length = datagram[2] << 8 | datagram[3]
        target = self._state.outward.get((client, datagram[0] << 8 | datagram[1]))
        if length > len(datagram) - 4:
            return DropReason.UNKNOWN_DATAGRAM
        if target is None:
            return DropReason.UNKNOWN_CHANNEL
        port, peer = target
        payload = bytes(datagram[4 : 4 + length])
        if self.is_own_ip(peer) and peer.port in self._state.by_port:
            return self.handle_peer_input(peer.port, Address(peer.ip, port), payload, now)
        self._commands.append(SendToPeer(port, peer, payload))
        return None

    # Requests

    def _handle_request(self, message: Message, client: Address, now: float) -> DropReason | None:
        if message.method == BINDING:
            if not self._may_reply(client, now):
                return DropReason.RATE_LIMITED
            mapped = (XOR_MAPPED_ADDRESS, xor_address_value(client, message.transaction_id))
            self._reply(message, client, SUCCESS, [mapped], None)
            return None
        key = None
        username = message.username
        if username is not None:
            key = self._authenticator.key_for(username)
            if key is None:
                return DropReason.STUN_UNAUTHENTICATED  # the reply could not be signed, so there is none
        code = self._check_form(message) or self._authenticator.check(message, client, now)
        if code is not None:
            if not self._may_reply(client, now):
                return DropReason.RATE_LIMITED
            self._refuse(message, client, code, key)
            return DropReason.STUN_UNAUTHENTICATED
        assert key is not None
        assert username is not None
        code = self._execute(message, client, username, key, now)
        if code is not None:
            self._refuse(message, client, code, key)
        return None

    def _check_form(self, message: Message) -> int | None:
        """What can be refused before authentication."""
        if message.method not in METHODS:
            return 400
        for attribute, value in (
            (CHANNEL_NUMBER, message.channel_number),
            (LIFETIME, message.lifetime),
            (REQUESTED_TRANSPORT, message.requested_transport),
            (REQUESTED_FAMILY, message.requested_address_family),
            (ADDITIONAL_FAMILY, message.additional_address_family),
        ):
            if value is None and message.has(attribute):
                return 500
        for attribute, text in ((USERNAME, message.username), (NONCE, message.nonce)):
            if text is None and message.has(attribute):
                return 400
        if message.method == ALLOCATE and message.requested_transport is None:
            return 400
        if message.method == CHANNEL_BIND:
            number = message.channel_number
            if number is None or not FIRST_CHANNEL <= number <= LAST_CHANNEL:
                return 400
            if message.xor_peer_address is None:
                return 400
        return None

    def _execute(self, message: Message, client: Address, username: str, key: bytes, now: float) -> int | None:
        if message.method == ALLOCATE:
            return self._allocate(message, client, username, key, now)
        if message.method == REFRESH:
            return self._refresh(message, client, key, now)
        if message.method == CHANNEL_BIND:
            return self._bind(message, client, key, now)
        self._reply(message, client, SUCCESS, [], key)
        return None

    def _allocate(self, message: Message, client: Address, username: str, key: bytes, now: float) -> int | None:
        known = self._state.by_client.get(client)
        if known is not None:
            if known.transaction_id != message.transaction_id:
                return 437
            self._commands.append(SendToClient(client, known.reply))
            return None
        if message.requested_transport != TRANSPORT_UDP:
            return 400
        families = self._families(message.requested_address_family, message.additional_address_family)
        if isinstance(families, int):
            return families
        if self._state.held_by(client, username) >= self._allocations_per_source:
            return 486
        port = self._find_port(families)
        if port is None:
            return 508
        lifetime = effective_lifetime(message.lifetime)
        allocation = self._state.create(client, port, families, username, now + lifetime)
        self._answer_allocate(message, allocation, lifetime, key)
        return None

    def _answer_allocate(self, message: Message, allocation: ServerAllocation, lifetime: int, key: bytes) -> None:
        transaction_id = message.transaction_id
        attributes = [self._software]
        for family in allocation.families:
            relayed = Address(self._public[family], allocation.port)
            attributes.append((XOR_RELAYED_ADDRESS, xor_address_value(relayed, transaction_id)))
        attributes.append((XOR_MAPPED_ADDRESS, xor_address_value(allocation.client, transaction_id)))
        attributes.append((LIFETIME, u32_value(lifetime)))
        allocation.transaction_id = transaction_id
        allocation.reply = build(ALLOCATE, SUCCESS, transaction_id, attributes, integrity_key=key)
        self._commands.append(SendToClient(allocation.client, allocation.reply))

    def _families(self, requested: int | None, additional: int | None) -> tuple[int, ...] | int:
        """The families to allocate, or an error code (the table of spec/relay.md section 5)."""
        if requested not in (None, FAMILY_IPV4, FAMILY_IPV6) or additional not in (None, FAMILY_IPV6):
            return 400
        if additional is not None:
            return 400 if requested is not None else tuple(sorted(self._public))
        family = 16 if requested == FAMILY_IPV6 else 4
        if family not in self._public:
            return 440
        return (family,)

    def _find_port(self, families: tuple[int, ...]) -> int | None:
        lowest, highest = self._ports
        size = highest - lowest + 1
        if len(self._state.by_port) >= size:
            return None
        start = int.from_bytes(self._random_bytes(4), "big") % size
        attempts = 0
        for offset in range(size):
            port = lowest + (start + offset) % size
            if port in self._state.by_port:
                continue
            if self._open_port(port, families):
                return port
            attempts += 1
            if attempts == MAX_PORT_ATTEMPTS:
                return None
        return None

    def _refresh(self, message: Message, client: Address, key: bytes, now: float) -> int | None:
        allocation = self._state.by_client.get(client)
        if allocation is None:
            return 437
        lifetime = effective_lifetime(message.lifetime)
        if lifetime == 0:
            self._state.free(allocation)
        else:
            self._state.extend(allocation, now + lifetime)
        self._reply(message, client, SUCCESS, [(LIFETIME, u32_value(lifetime))], key)
        return None

    def _bind(self, message: Message, client: Address, key: bytes, now: float) -> int | None:
        allocation = self._state.by_client.get(client)
        peer, number = message.xor_peer_address, message.channel_number
        if allocation is None:
            return 437
        assert peer is not None
        assert number is not None
        if len(peer.ip) not in allocation.families:
            return 443
        if not self._is_permitted(peer):
            return 403
        if not self._state.bind(allocation, number, peer, now):
            return 400
        self._reply(message, client, SUCCESS, [], key)
        return None

    def _is_permitted(self, peer: Address) -> bool:
        ip = ipaddress.ip_address(peer.ip)
        if ip.is_multicast or ip.is_unspecified or peer.port == 0:
            return False
        if self.is_own_ip(peer):
            return peer.port != self._listen_port
        return self._is_on_loopback or not ip.is_loopback

    # Replies

    def _may_reply(self, client: Address, now: float) -> bool:
        """Bound the replies anyone can provoke in another's name."""
        if now >= self._rated_until or len(self._rated) > MAX_RATED_SOURCES:
            self._rated.clear()
            self._rated_until = now + 1.0
        source = source_of(client)
        replies = self._rated.get(source, 0)
        self._rated[source] = replies + 1
        return replies < REPLIES_PER_SECOND

    def _refuse(self, message: Message, client: Address, code: int, key: bytes | None) -> None:
        attributes = [(ERROR_CODE, error_code_value(code, REASONS[code]))]
        if code in (401, 438):
            attributes.append((REALM_ATTRIBUTE, REALM.encode()))
            attributes.append((NONCE, self._authenticator.nonce_for(client).encode()))
        self._reply(message, client, ERROR, attributes, key)

    def _reply(
        self,
        message: Message,
        client: Address,
        cls: int,
        attributes: list[tuple[int, bytes]],
        key: bytes | None,
    ) -> None:
        payload = build(message.method, cls, message.transaction_id, [self._software, *attributes], integrity_key=key)
        self._commands.append(SendToClient(client, payload))

    # What the state reports

    def _report_bound(self, channel: ServerChannel) -> None:
        self._commands.append(ChannelBound(channel.client, channel.number, channel.port, channel.peer))

    def _report_unbound(self, channel: ServerChannel) -> None:
        self._commands.append(ChannelUnbound(channel.client, channel.number, channel.port, channel.peer))

    def _report_freed(self, allocation: ServerAllocation) -> None:
        self._commands.append(PortFreed(allocation.port))


def effective_lifetime(requested: int | None) -> int:
    """Seconds granted."""
    return DEFAULT_LIFETIME if requested is None else min(requested, MAX_LIFETIME)
