"""`PortalLink` against a WebSocket server on loopback: what it dials, what it says, and what it survives."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio_websocket import WebSocketRequest, serve_websocket

from fz_core.driver.portal import PortalFailed, PortalLink, relay_link
from fz_core.portal import Connected, Fatal, Hiccup, Login, MessageReceived, client_channel
from fz_core.portal.client import NoRelays, ResourceDeleted

RESOURCE = "3f9fd1b1-0000-4000-8000-000000000001"
Handler = Callable[[WebSocketRequest], Any]


@asynccontextmanager
async def server(handler: Handler) -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:
        running = await nursery.start(serve_websocket, handler, "127.0.0.1", 0, None)
        yield running.port
        nursery.cancel_scope.cancel()


def link_to(port: int, host: str = "localhost", **options: Any) -> PortalLink:
    login = Login("client", f"ws://{host}:{port}", "Linux/6 headless-client/1.5.11 (x)", {"name": "a b"}, "to ken")
    return PortalLink(
        login, client_channel(bytes), public_key=lambda: "KEY=", mark=options.pop("mark", None), **options
    )


async def accept_join(request: WebSocketRequest) -> Any:
    websocket = await request.accept()
    join = json.loads(await websocket.get_message())
    reply = {"topic": join["topic"], "event": "phx_reply", "ref": join["ref"]}
    await websocket.send_message(json.dumps({**reply, "payload": {"status": "ok", "response": {}}}))
    return websocket


async def test_it_joins_and_carries_messages_both_ways() -> None:
    seen: dict[str, Any] = {}
    done = trio.Event()

    async def portal(request: WebSocketRequest) -> None:
        seen["path"], seen["headers"] = request.path, dict(request.headers)
        websocket = await accept_join(request)
        push = {"topic": "client", "event": "resource_deleted", "payload": RESOURCE, "ref": None}
        await websocket.send_message(json.dumps(push))
        seen["message"] = json.loads(await websocket.get_message())
        done.set()
        await trio.sleep_forever()

    async with server(portal) as port, trio.open_nursery() as nursery:
        link = link_to(port)
        nursery.start_soon(link.run)
        assert await link.events.receive() == Connected()
        assert await link.events.receive() == MessageReceived(ResourceDeleted(RESOURCE))
        assert link.send(NoRelays())
        await done.wait()
        nursery.cancel_scope.cancel()
    assert seen["path"] == "/client/v2/websocket?name=a+b&public_key=KEY%3D"
    assert seen["headers"][b"x-authorization"] == b"Bearer token"
    assert seen["headers"][b"user-agent"].startswith(b"Linux/6 ")
    assert seen["message"] == {"topic": "client", "event": "no_relays", "payload": {}, "ref": 1}


async def test_the_host_header_has_no_port() -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    async with trio.open_nursery() as nursery:
        link = link_to(listener.socket.getsockname()[1])
        nursery.start_soon(link.run)
        stream = await listener.accept()
        head = bytes(await stream.receive_some(4096)).split(b"\r\n")
        assert b"Host: localhost" in head
        assert not any(line.lower().startswith(b"sec-websocket-extensions") for line in head)
        nursery.cancel_scope.cancel()


async def test_a_dead_token_ends_the_link() -> None:
    async def portal(request: WebSocketRequest) -> None:
        headers = [(b"content-type", b"application/problem+json")]
        await request.reject(401, extra_headers=headers, body=b'{"code":"invalid_token"}')

    async with server(portal) as port:
        link = link_to(port)
        await link.run()
        event = await link.events.receive()
        assert isinstance(event, Fatal)
        assert event.is_token_dead
        with pytest.raises(trio.EndOfChannel):
            await link.events.receive()


async def test_refusals_and_lost_connections_are_tried_again() -> None:
    visits: list[str] = []

    async def portal(request: WebSocketRequest) -> None:
        visits.append(request.path)
        if len(visits) == 1:
            await request.reject(503, extra_headers=[(b"retry-after", b"0")], body=b"busy")
        elif len(visits) == 2:
            websocket = await accept_join(request)
            await websocket.aclose(1012)
        else:
            await accept_join(request)
            await trio.sleep_forever()

    async with server(portal) as port, trio.open_nursery() as nursery:
        link = link_to(port)
        nursery.start_soon(link.run)
        kinds = [type(await link.events.receive()) for _ in range(4)]
        assert kinds == [Hiccup, Connected, Hiccup, Connected]
        nursery.cancel_scope.cancel()


async def test_a_server_that_hangs_up_in_the_handshake_is_noticed_at_once() -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    async with trio.open_nursery() as nursery:
        link = link_to(listener.socket.getsockname()[1])
        nursery.start_soon(link.run)
        stream = await listener.accept()
        await stream.receive_some(4096)
        await stream.aclose()
        event = await link.events.receive()
        assert isinstance(event, Hiccup)
        assert "closed during the handshake" in event.error
        nursery.cancel_scope.cancel()


async def test_all_addresses_are_dialled_and_one_that_answers_wins() -> None:
    async def portal(request: WebSocketRequest) -> None:
        await accept_join(request)
        await trio.sleep_forever()

    async def resolve(host: str) -> list[str]:
        assert host == "portal.test"
        return ["127.0.0.2", "::1", "127.0.0.1"]

    async with server(portal) as port, trio.open_nursery() as nursery:
        link = link_to(port, "portal.test", resolve=resolve)
        nursery.start_soon(link.run)
        assert await link.events.receive() == Connected()
        nursery.cancel_scope.cancel()


async def test_no_addresses_is_a_hiccup() -> None:
    async def resolve(host: str) -> list[str]:
        return []

    async with trio.open_nursery() as nursery:
        link = link_to(1, "portal.test", resolve=resolve)
        nursery.start_soon(link.run)
        event = await link.events.receive()
        assert isinstance(event, Hiccup)
        assert "no addresses for portal.test" in event.error
        nursery.cancel_scope.cancel()


async def test_roaming_replaces_the_connection() -> None:
    joins = 0

    async def portal(request: WebSocketRequest) -> None:
        nonlocal joins
        joins += 1
        await accept_join(request)
        await trio.sleep_forever()

    async with server(portal) as port, trio.open_nursery() as nursery:
        link = link_to(port)
        nursery.start_soon(link.run)
        assert await link.events.receive() == Connected()
        link.reconnect()
        assert not link.send(NoRelays())
        assert isinstance(await link.events.receive(), Hiccup)
        assert await link.events.receive() == Connected()
        assert joins == 2
        nursery.cancel_scope.cancel()


@pytest.mark.root
async def test_sockets_carry_the_mark() -> None:
    from fz_core.driver.portal import connect

    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    stream = await connect("127.0.0.1", listener.socket.getsockname()[1], 0xFD002021)
    assert stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) & 0xFFFFFFFF == 0xFD002021
    assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    await stream.aclose()


async def test_a_relays_link_tells_when_it_is_ready_and_fails_for_good() -> None:
    async def portal(request: WebSocketRequest) -> None:
        websocket = await accept_join(request)
        for event, payload in (("init", {}), ("disconnect", {"reason": "token_expired"})):
            await websocket.send_message(json.dumps({"topic": "relay", "event": event, "payload": payload}))
        await trio.sleep_forever()

    ready: list[bool] = []
    async with server(portal) as port:
        login = Login("relay", f"ws://127.0.0.1:{port}", "Linux/6 relay/1.5.0 (x)", {"ipv4": "1.2.3.4"}, "t")
        with pytest.raises(ExceptionGroup) as caught:
            await relay_link(login)("ab" * 32, ready.append)
    assert caught.group_contains(PortalFailed, match="expired")
    assert ready == [True, False]
