"""`PortalLink` when it is doubted, when dialling hangs, and when frames need an earlier look at the clock.

Time stands still but for jumps; sockets on loopback work meanwhile.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from test_portal_link import accept_join, server
from trio.testing import MockClock
from trio_websocket import ConnectionClosed, WebSocketRequest

from fz_core.driver import portal as driver
from fz_core.driver.portal import PortalLink
from fz_core.portal import Connected, Hiccup, Login, client_channel


def link_to(port: int, **options: Any) -> PortalLink:
    login = Login("client", f"ws://localhost:{port}", "Linux/6 headless-client/1.5.11 (x)", {"name": "a"}, "token")
    return PortalLink(login, client_channel(bytes), mark=None, now=trio.current_time, **options)


class Portal:
    """Accepts joins; answers heartbeats while `is_kind`."""

    def __init__(self) -> None:
        self.is_kind = True
        self.joins = 0
        self.beats = 0
        self.beaten = trio.Event()

    async def __call__(self, request: WebSocketRequest) -> None:
        websocket = await accept_join(request)
        self.joins += 1
        try:
            while True:
                frame = json.loads(await websocket.get_message())
                self.beats += frame["event"] == "heartbeat"
                self.beaten.set()
                if self.is_kind:
                    payload = {"status": "ok", "response": {}}
                    reply = {"topic": "phoenix", "event": "phx_reply", "ref": frame["ref"], "payload": payload}
                    await websocket.send_message(json.dumps(reply))
        except ConnectionClosed:
            pass


async def settle(rounds: int = 50) -> None:
    """Let loopback traffic happen; the mock clock does not move."""
    for _ in range(rounds):
        await trio.lowlevel.checkpoint()
        await trio.to_thread.run_sync(lambda: None)


async def test_a_probe_goes_out_at_once_and_an_answered_one_changes_nothing(mock_clock: MockClock) -> None:
    portal = Portal()
    async with server(portal) as port, trio.open_nursery() as nursery:
        link = link_to(port)
        nursery.start_soon(link.run)
        assert await link.events.receive() == Connected()
        link.probe()
        await portal.beaten.wait()
        await settle()
        mock_clock.jump(9.0)
        await settle()
        assert (portal.joins, portal.beats) == (1, 1)
        mock_clock.jump(1.0)
        await settle()
        assert (portal.joins, portal.beats) == (1, 2), "the regular heartbeat came when it was due"
        nursery.cancel_scope.cancel()


async def test_an_unanswered_probe_brings_a_new_connection_after_2_s(mock_clock: MockClock) -> None:
    portal = Portal()
    async with server(portal) as port, trio.open_nursery() as nursery:
        link = link_to(port)
        nursery.start_soon(link.run)
        assert await link.events.receive() == Connected()
        portal.is_kind = False
        link.probe()
        await portal.beaten.wait()
        await settle()
        mock_clock.jump(1.9)
        await settle()
        assert portal.joins == 1
        mock_clock.jump(0.1)
        hiccup = await link.events.receive()
        assert isinstance(hiccup, Hiccup)
        assert (hiccup.delay, hiccup.error) == (0.0, "the portal did not answer a probe within 2 s")
        assert await link.events.receive() == Connected()
        assert portal.joins == 2
        nursery.cancel_scope.cancel()


async def test_the_farewell_to_a_portal_that_is_gone_delays_nothing(mock_clock: MockClock) -> None:
    """The old connection leads nowhere: no answer comes to the Close frame either."""
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    portal = Portal()
    async with server(portal) as port, trio.open_nursery() as nursery:
        deaf = await deaf_portal(nursery, listener)
        addresses = [deaf, port]
        login = LoginTo(addresses)
        link = PortalLink(login, client_channel(bytes), mark=None, now=trio.current_time)  # type: ignore[arg-type]
        nursery.start_soon(link.run)
        assert await link.events.receive() == Connected()
        addresses.pop(0)
        link.reconnect()
        assert isinstance(await link.events.receive(), Hiccup)
        await settle()
        mock_clock.jump(driver.LOST_CLOSE_BUDGET)
        assert await link.events.receive() == Connected()
        assert driver.LOST_CLOSE_BUDGET <= 0.1
        nursery.cancel_scope.cancel()


async def test_a_dial_that_hangs_gives_way_to_a_changed_network(mock_clock: MockClock) -> None:
    portal = Portal()
    hung = trio.Event()
    lookups = 0

    async def resolve(host: str) -> list[str]:
        nonlocal lookups
        lookups += 1
        if lookups == 1:
            hung.set()
            await trio.sleep_forever()
        return ["127.0.0.1"]

    async with server(portal) as port, trio.open_nursery() as nursery:
        link = link_to(port, resolve=resolve)
        nursery.start_soon(link.run)
        await hung.wait()
        link.reconnect()
        assert await link.events.receive() == Connected()
        assert lookups == 2, "names are looked up before every attempt"
        nursery.cancel_scope.cancel()


async def test_a_wait_between_attempts_gives_way_to_a_changed_network(mock_clock: MockClock) -> None:
    portal = Portal()
    answers: list[list[str]] = [[], ["127.0.0.1"]]

    async def resolve(host: str) -> list[str]:
        return answers.pop(0)

    async with server(portal) as port, trio.open_nursery() as nursery:
        link = link_to(port, resolve=resolve)
        nursery.start_soon(link.run)
        assert isinstance(await link.events.receive(), Hiccup)
        link.reconnect()
        assert await link.events.receive() == Connected()
        nursery.cancel_scope.cancel()


async def test_an_attempt_is_given_up_after_15_s_in_all(mock_clock: MockClock) -> None:
    async def resolve(host: str) -> list[str]:
        await trio.sleep_forever()
        return []

    async with trio.open_nursery() as nursery:
        link = link_to(1, resolve=resolve)
        nursery.start_soon(link.run)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(15.0)
        hiccup = await link.events.receive()
        assert isinstance(hiccup, Hiccup)
        assert "15 s" in hiccup.error
        nursery.cancel_scope.cancel()


async def test_a_join_on_an_open_socket_times_out_when_it_should(mock_clock: MockClock) -> None:
    """The watcher sleeps until the next heartbeat when an earlier deadline comes up."""
    joins = 0

    async def portal(request: WebSocketRequest) -> None:
        nonlocal joins
        websocket = await accept_join(request)
        joins += 1
        payload = {"status": "error", "response": {"reason": "unmatched topic"}}
        frame = {"topic": "client", "event": "phx_reply", "ref": 77, "payload": payload}
        await websocket.send_message(json.dumps(frame))
        await trio.sleep_forever()

    async with server(portal) as port, trio.open_nursery() as nursery:
        link = link_to(port)
        nursery.start_soon(link.run)
        assert await link.events.receive() == Connected()
        await settle()
        mock_clock.jump(5.0)
        hiccup = await link.events.receive()
        assert isinstance(hiccup, Hiccup)
        assert "join" in hiccup.error
        nursery.cancel_scope.cancel()


async def test_an_owner_that_is_slow_to_listen_does_not_lose_the_link(
    mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks while messages still wait to be handed up."""
    monkeypatch.setattr(driver, "QUEUE", 1)
    joins = 0

    async def portal(request: WebSocketRequest) -> None:
        nonlocal joins
        websocket = await accept_join(request)
        joins += 1
        if joins == 1:
            for _ in range(5):
                push = {
                    "topic": "client",
                    "event": "resource_deleted",
                    "payload": "0" * 8 + "-0000-4000-8000-" + "0" * 12,
                }
                await websocket.send_message(json.dumps(push))
            await websocket.aclose()
        else:
            await trio.sleep_forever()

    async with server(portal) as port, trio.open_nursery() as nursery:
        link = link_to(port)
        nursery.start_soon(link.run)
        await settle()
        kinds = []
        while len([k for k in kinds if k is Connected]) < 2:
            event = await link.events.receive()
            kinds.append(type(event))
            if isinstance(event, Hiccup):
                await settle()
                mock_clock.jump(event.delay)
        nursery.cancel_scope.cancel()


class LoginTo:
    """A login whose port is the first of a list that may change."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = ports

    def _login(self) -> Login:
        return Login("client", f"ws://localhost:{self._ports[0]}", "Linux/6 headless-client/1.5.11 (x)", {}, "token")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._login(), name)


async def deaf_portal(nursery: trio.Nursery, listener: trio.SocketListener) -> int:
    """Accepts one join and reads nothing any more."""
    from wsproto import ConnectionType, WSConnection
    from wsproto.events import AcceptConnection, Request, TextMessage

    async def serve() -> None:
        stream = await listener.accept()
        protocol = WSConnection(ConnectionType.SERVER)
        while True:
            protocol.receive_data(await stream.receive_some(4096))
            for event in protocol.events():
                if isinstance(event, Request):
                    await stream.send_all(protocol.send(AcceptConnection()))
                elif isinstance(event, TextMessage):
                    payload = {"status": "ok", "response": {}}
                    reply = {"topic": "client", "event": "phx_reply", "ref": 0, "payload": payload}
                    await stream.send_all(protocol.send(TextMessage(json.dumps(reply))))
                    await trio.sleep_forever()

    nursery.start_soon(serve)
    port: int = listener.socket.getsockname()[1]
    return port
