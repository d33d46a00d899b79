"""The service on loopback when peers die, or two claim to be one: who is asked whether he still lives."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import trio
from embedded_portal_world import CLIENT_AGENT, GATEWAY_AGENT, TOKENS
from test_embedded_portal_server import service
from trio.testing import MockClock
from trio_websocket import ConnectionRejected, WebSocketConnection, connect_websocket_url

from fz_core.embedded import portal_server
from fz_core.embedded.relay_check import is_dead
from fz_core.packet import Address
from fz_core.stun import Message, build


async def knock(nursery: trio.Nursery, port: int, role: str, key: bytes) -> WebSocketConnection:
    """A joined peer of its own making."""
    params = urlencode({"external_id": role, "name": role, "public_key": base64.b64encode(key * 32).decode()})
    agent = CLIENT_AGENT if role == "client" else GATEWAY_AGENT
    headers = [("X-Authorization", f"Bearer {TOKENS[role]}"), ("User-Agent", agent)]
    url = f"ws://127.0.0.1:{port}/{role}/v2/websocket?{params}"
    websocket = await connect_websocket_url(nursery, url, extra_headers=headers)
    await websocket.send_message(json.dumps({"topic": role, "event": "phx_join", "payload": None, "ref": 0}))
    await read_until(websocket, "init")
    return websocket


async def read_until(websocket: WebSocketConnection, event: str) -> Any:
    while True:
        frame = json.loads(await websocket.get_message())
        if frame["event"] == event:
            return frame["payload"]


@pytest.fixture
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the old connection led nowhere any more: pings get lost."""

    async def ping(self: WebSocketConnection, payload: bytes | None = None) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(portal_server, "ALIVE_TIMEOUT", 0.01)
    monkeypatch.setattr(WebSocketConnection, "ping", ping)


async def test_a_second_gateway_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    async with service(tmp_path) as portal, trio.open_nursery() as nursery:
        first = await knock(nursery, portal.port, "gateway", b"1")
        with pytest.raises(ExceptionGroup) as refused:
            async with trio.open_nursery() as inner:
                await knock(inner, portal.port, "gateway", b"2")
        (error,) = find(refused.value, ConnectionRejected)
        assert error.status_code == 409
        assert json.loads(error.body)["code"] == "gateway_already_connected"
        again = await knock(nursery, portal.port, "gateway", b"1")  # the same process: its network changed
        assert again.closed is None
        del first
        nursery.cancel_scope.cancel()


async def test_a_restarted_gateway_gets_in_if_the_old_connection_leads_nowhere(
    tmp_path: Path, nobody_answers: None
) -> None:
    async with service(tmp_path) as portal, trio.open_nursery() as nursery:
        await knock(nursery, portal.port, "gateway", b"1")
        assert (await knock(nursery, portal.port, "gateway", b"2")).closed is None
        nursery.cancel_scope.cancel()


async def test_of_two_living_clients_the_older_hears_that_it_is_over(tmp_path: Path) -> None:
    async with service(tmp_path) as portal, trio.open_nursery() as nursery:
        first = await knock(nursery, portal.port, "client", b"1")
        second = await knock(nursery, portal.port, "client", b"2")
        assert await read_until(first, "disconnect") == {"reason": "token_expired"}
        assert second.closed is None
        nursery.cancel_scope.cancel()


async def test_a_client_that_roamed_is_not_mistaken_for_two(tmp_path: Path, nobody_answers: None) -> None:
    async with service(tmp_path) as portal, trio.open_nursery() as nursery:
        first = await knock(nursery, portal.port, "client", b"1")
        await knock(nursery, portal.port, "client", b"2")
        with pytest.raises(portal_server.ConnectionClosed):
            await read_until(first, "disconnect")
        nursery.cancel_scope.cancel()


def find(group: BaseException, kind: type[Any]) -> list[Any]:
    if isinstance(group, BaseExceptionGroup):
        return [error for inner in group.exceptions for error in find(inner, kind)]
    return [group] if isinstance(group, kind) else []


# relays


async def udp() -> tuple[Any, Address]:
    sock = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
    await sock.bind(("127.0.0.1", 0))
    return sock, Address.parse(f"127.0.0.1:{sock.getsockname()[1]}")


async def test_a_relay_that_answers_lives() -> None:
    sock, address = await udp()

    async def relay() -> None:
        while True:
            data, source = await sock.recvfrom(2048)
            question = Message.parse_untrusted(data)
            assert isinstance(question, Message)
            await sock.sendto(b"noise", source)
            await sock.sendto(build(1, 2, question.transaction_id, []), source)

    refused_sock, refused = await udp()
    refused_sock.close()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(relay)
        assert not await is_dead([address])
        assert not await is_dead([refused, address]), "one family is enough"
        nursery.cancel_scope.cancel()
    sock.close()


async def test_a_closed_port_is_a_dead_relay() -> None:
    sock, address = await udp()
    sock.close()
    assert await is_dead([address])


async def test_silence_is_a_dead_relay(autojump_clock: MockClock) -> None:
    sock, address = await udp()
    began = trio.current_time()
    assert await is_dead([address])
    assert trio.current_time() - began == pytest.approx(0.4)
    sock.close()


async def test_what_cannot_be_asked_is_not_judged() -> None:
    unreachable = Address.parse("255.255.255.255:9")  # broadcasting is not allowed without asking for it
    assert not await is_dead([unreachable])
    assert not await is_dead([])
