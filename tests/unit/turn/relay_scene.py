"""A relay core with its clock, and what a client of it says."""

from __future__ import annotations

import random
from typing import Any

from fz_core.packet import Address
from fz_core.stun import (
    Message,
    build,
    build_channel_data,
    channel_number_value,
    long_term_key,
    u8_value,
    xor_address_value,
)
from fz_core.turn import (
    RelayServer,
    SendToClient,
    SendToPeer,
    relay_credentials,
    relay_password,
)

SECRET = "0" * 64
UNIX_NOW = 1_900_000_000
EXPIRY = 2_000_000_000
CLIENT = Address.parse("203.0.113.7:40000")
CLIENT2 = Address.parse("203.0.113.8:40000")
CLIENT6 = Address.parse("[2001:db8::7]:40000")
PEER = Address.parse("192.0.2.99:1000")
PEER2 = Address.parse("192.0.2.99:1001")
PEER6 = Address.parse("[2001:db8:9::9]:1000")
IP4 = Address.parse("198.51.100.1:0").ip
IP6 = Address.parse("[2001:db8:ffff::1]:0").ip

BINDING, ALLOCATE, REFRESH, PERMISSION, BIND = 1, 3, 4, 8, 9
UDP4 = (0x19, u8_value(17))
DUAL = (0x8000, u8_value(2))
WANT4, WANT6 = (0x17, u8_value(1)), (0x17, u8_value(2))


class Relay:
    """A relay core with its clock, and what it wants done."""

    def __init__(self, *, v4: bool = True, v6: bool = True, **options: Any) -> None:
        self.now = 0.0
        self.rng = random.Random(14)
        self.server = RelayServer(
            stamp_secret=SECRET,
            public_ip4=IP4 if v4 else None,
            public_ip6=IP6 if v6 else None,
            random_bytes=self.rng.randbytes,
            unix_epoch=UNIX_NOW,
            **options,
        )
        self.commands: list[object] = []
        self.nonces: dict[Address, str] = {}

    def drain(self) -> None:
        while (command := self.server.poll_command()) is not None:
            self.commands.append(command)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.server.handle_timeout(self.now)
        self.drain()

    def deadline(self) -> float | None:
        """Seconds from now."""
        at = self.server.poll_timeout()
        return None if at is None else at - self.now

    def ask(self, client: Address, data: bytes) -> Message | None:
        """The reply to one datagram."""
        self.server.handle_client_input(client, data, self.now)
        self.drain()
        replies = [c for c in self.commands if isinstance(c, SendToClient) and c.client == client]
        for reply in replies:
            self.commands.remove(reply)
        if not replies:
            return None
        message = Message.parse_untrusted(replies[-1].payload)
        assert isinstance(message, Message)
        return message

    def request(
        self,
        client: Address,
        method: int,
        *attributes: tuple[int, bytes],
        salt: str = "s",
        nonce: str | None = None,
        expiry: int = EXPIRY,
        secret: str = SECRET,
        txid: bytes | None = None,
    ) -> Message:
        """An authenticated request; the nonce is fetched once per client."""
        username, password = relay_credentials(expiry, salt, secret)
        if client not in self.nonces:
            self.nonces[client] = self.challenge(client)
        attributes = (
            *attributes,
            (0x06, username.encode()),
            (0x14, b"firezone"),
            (0x15, (nonce or self.nonces[client]).encode()),
        )
        key = long_term_key(username, "firezone", password)
        reply = self.ask(client, build(method, 0, txid or self.rng.randbytes(12), attributes, integrity_key=key))
        assert reply is not None
        right = long_term_key(username, "firezone", relay_password(expiry, salt, SECRET))
        assert reply.check_integrity(right)
        return reply

    def challenge(self, client: Address) -> str:
        reply = self.ask(client, build(ALLOCATE, 0, bytes(12), [UDP4]))
        assert reply is not None
        assert (reply.error_code, reply.realm) == (401, "firezone")
        assert reply.nonce is not None
        return reply.nonce

    def allocate(self, client: Address, *attributes: tuple[int, bytes], **more: Any) -> list[Address]:
        reply = self.request(client, ALLOCATE, UDP4, *attributes, **more)
        assert reply.is_success
        assert reply.xor_mapped_address == client
        return reply.xor_relayed_addresses

    def bind(self, client: Address, number: int, peer: Address, **more: Any) -> int | None:
        """The error code, if any."""
        address = (0x12, b"")
        txid = self.rng.randbytes(12)
        address = (0x12, xor_address_value(peer, txid))
        reply = self.request(client, BIND, address, (0x0C, channel_number_value(number)), txid=txid, **more)
        return reply.error_code

    def to_peer(self, client: Address, number: int, payload: bytes) -> SendToPeer | None:
        self.commands.clear()
        self.server.handle_client_input(client, build_channel_data(number, payload), self.now)
        self.drain()
        return next((c for c in self.commands if isinstance(c, SendToPeer)), None)

    def to_client(self, port: int, peer: Address, payload: bytes) -> SendToClient | None:
        self.commands.clear()
        self.server.handle_peer_input(port, peer, payload, self.now)
        self.drain()
        return next((c for c in self.commands if isinstance(c, SendToClient)), None)


def code_of(reply: Message) -> int | None:
    return reply.error_code
