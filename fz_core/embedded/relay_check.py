"""Does a relay still answer its clients? Asked when its connection to the portal ended, which may mean little.

Source: RFC 8489 Binding. Not here: what follows from the answer (`portal_state`).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import trio

from fz_core.packet import Address
from fz_core.stun import Message, build
from fz_core.stun.attributes import BINDING

TRIES = (0.0, 0.1, 0.1)
PATIENCE = 0.2


async def is_dead(addresses: Sequence[Address]) -> bool:
    """True if at least one address could be asked and none answered; takes 0.4 s at most."""
    asked: list[bool] = []
    async with trio.open_nursery() as nursery:

        async def ask(address: Address) -> None:
            answer = await _answers(address)
            if answer is not None:
                asked.append(answer)
            if answer:
                nursery.cancel_scope.cancel()

        for address in addresses:
            nursery.start_soon(ask, address)
    return bool(asked) and not any(asked)


async def _answers(address: Address) -> bool | None:
    """Whether it does; None if it cannot be asked from here."""
    family = trio.socket.AF_INET if len(address.ip) == 4 else trio.socket.AF_INET6
    with trio.socket.socket(family, trio.socket.SOCK_DGRAM) as sock:
        try:
            await sock.connect((address.host, address.port))
        except OSError:
            return None
        transaction_id = secrets.token_bytes(12)
        question = build(BINDING, 0, transaction_id, [])
        try:
            for pause in TRIES:
                with trio.move_on_after(pause):
                    if await _hears(sock, transaction_id):
                        return True
                await sock.send(question)
            with trio.move_on_after(PATIENCE):
                return await _hears(sock, transaction_id)
        except OSError:  # refused: its machine says that nobody listens
            return False
    return False


async def _hears(sock: trio.socket.SocketType, transaction_id: bytes) -> bool:
    while True:
        message = Message.parse_untrusted(await sock.recv(2048))
        if isinstance(message, Message) and message.transaction_id == transaction_id:
            return True
