"""One allocation and the scripted relay it talks to, in virtual time."""

from __future__ import annotations

import random
from typing import Any

from fz_core.packet import Address
from fz_core.stun import (
    Message,
    build,
    build_channel_data,
    error_code_value,
    long_term_key,
    u32_value,
    xor_address_value,
)
from fz_core.turn import Allocation

RELAY4 = Address.parse("198.51.100.1:3478")
RELAY6 = Address.parse("[2001:db8:ffff::1]:3478")
LOCAL4 = Address.parse("192.168.0.2:52625")
LOCAL6 = Address.parse("[2001:db8:1::2]:52625")
MAPPED4 = Address.parse("203.0.113.7:40000")
MAPPED6 = LOCAL6
RELAYED4 = Address.parse("198.51.100.1:50001")
RELAYED6 = Address.parse("[2001:db8:ffff::1]:50001")
PEER = Address.parse("203.0.113.99:1000")
PEER2 = Address.parse("203.0.113.99:1001")
PEER_V6 = Address.parse("[2001:db8:2::9]:1000")

BINDING, ALLOCATE, REFRESH, CHANNEL_BIND = 1, 3, 4, 9
USERNAME, INTEGRITY, ERROR, NUMBER, LIFETIME, PEER_ADDRESS = 0x06, 0x08, 0x09, 0x0C, 0x0D, 0x12
REALM, NONCE, RELAYED, TRANSPORT, MAPPED, FAMILY = 0x14, 0x15, 0x16, 0x19, 0x20, 0x8000
KEY = long_term_key("2145916800:salt", "firezone", "secret")


class Scene:
    """An allocation, its clock, and what it has sent and reported."""

    def __init__(self, v4: bool = True, v6: bool = False, **switches: Any) -> None:
        self.now = 1000.0
        addresses = (RELAY4 if v4 else None, RELAY6 if v6 else None)
        self.allocation = Allocation(
            "relay-1", addresses, "2145916800:salt", "secret", "firezone", self.now,
            random.Random(3).randbytes, **switches,
        )  # fmt: skip
        self.sent: list[tuple[float, Message, Address]] = []
        self.events: list[object] = []
        self.drain()

    def drain(self) -> None:
        while (transmit := self.allocation.poll_transmit()) is not None:
            message = Message.parse_untrusted(transmit.payload)
            assert isinstance(message, Message)
            self.sent.append((self.now, message, transmit.remote))
        while (event := self.allocation.poll_event()) is not None:
            self.events.append(event)

    def advance(self, seconds: float) -> None:
        """Let time pass, stopping only where a deadline was announced."""
        end = self.now + seconds
        while (at := self.allocation.poll_timeout()) is not None and at <= end:
            self.now = max(at, self.now)
            self.allocation.handle_timeout(self.now)
            self.drain()
            later = self.allocation.poll_timeout()
            assert later is None or later > self.now
        self.now = end
        self.allocation.handle_timeout(end)
        self.drain()

    def take(self, method: int) -> Message:
        """The oldest unread message, which must be of this method."""
        _, message, _ = self.sent.pop(0)
        assert message.method == method
        return message

    def answer(
        self, request: Message, cls: int, attributes: list[tuple[int, bytes]], *,
        remote: Address = RELAY4, local: Address = LOCAL4, key: bytes | None = KEY,
    ) -> None:  # fmt: skip
        data = build(request.method, cls, request.transaction_id, attributes, integrity_key=key)
        assert self.allocation.handle_input(local, remote, data, self.now)
        self.drain()

    def answer_binding(self, request: Message, *, v6: bool = False) -> None:
        mapped = xor_address_value(MAPPED6 if v6 else MAPPED4, request.transaction_id)
        where = {"remote": RELAY6, "local": LOCAL6} if v6 else {}
        self.answer(request, 2, [(MAPPED, mapped)], key=None, **where)

    def answer_error(self, request: Message, code: int, nonce: str | None = None, **more: Any) -> None:
        attributes = [(ERROR, error_code_value(code, "x"))]
        if nonce is not None:
            attributes += [(REALM, b"firezone"), (NONCE, nonce.encode())]
        self.answer(request, 3, attributes, **more)

    def answer_allocate(self, request: Message, *addresses: Address, lifetime: int = 600, **more: Any) -> None:
        relayed = [(RELAYED, xor_address_value(a, request.transaction_id)) for a in addresses]
        self.answer(request, 2, [*relayed, (LIFETIME, u32_value(lifetime))], **more)

    def answer_refresh(self, request: Message, lifetime: int = 600) -> None:
        self.answer(request, 2, [(LIFETIME, u32_value(lifetime))])

    def answer_bind(self, request: Message) -> None:
        self.answer(request, 2, [])


def allocated(*addresses: Address, v6: bool = False) -> Scene:
    """Past BINDING, challenge and ALLOCATE on IPv4."""
    scene = Scene(v6=v6)
    scene.answer_binding(scene.take(BINDING))
    if v6:
        scene.answer_binding(scene.take(BINDING), v6=True)
    scene.answer_error(scene.take(ALLOCATE), 401, "nonce-1")
    scene.answer_allocate(scene.take(ALLOCATE), *(addresses or (RELAYED4,)))
    scene.events.clear()
    return scene


def bound(scene: Scene, peer: Address = PEER) -> int:
    scene.allocation.bind_channel(peer, scene.now)
    scene.drain()
    request = scene.take(CHANNEL_BIND)
    assert request.xor_peer_address == peer
    scene.answer_bind(request)
    number = request.channel_number
    assert number is not None
    return number


def receive(scene: Scene, number: int) -> None:
    data = build_channel_data(number, b"data")
    assert isinstance(scene.allocation.decapsulate(RELAY4, data, scene.now), tuple)


def times(scene: Scene, start: float) -> list[float]:
    return [at - start for at, _, _ in scene.sent]


def answer_keepalives(scene: Scene) -> None:
    for entry in [entry for entry in scene.sent if entry[1].method == BINDING]:
        scene.sent.remove(entry)
        scene.answer_binding(entry[1])
