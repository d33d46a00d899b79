"""The service on loopback: our own links of all three roles, raw HTTP, slow peers, signals."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from embedded_portal_world import CLIENT_AGENT, GATEWAY_AGENT, TOKENS, policy_of, policy_text
from trio_websocket import ConnectionClosed, open_websocket

from fz_core.driver.portal import PortalLink
from fz_core.embedded import portal_server
from fz_core.embedded.portal_server import PortalServer
from fz_core.embedded.portal_state import PortalState
from fz_core.embedded.store import Store
from fz_core.portal import (
    Connected,
    Fatal,
    Hiccup,
    Login,
    MessageReceived,
    client_channel,
    gateway_channel,
    relay_channel,
)
from fz_core.portal import client as to_client
from fz_core.portal import gateway as to_gateway

UNIX = 1_800_000_000


class Service:
    def __init__(self, server: PortalServer, port: int, nursery: trio.Nursery) -> None:
        self.server, self.port, self.nursery = server, port, nursery

    def link(self, role: str, *, token: str | None = None) -> PortalLink:
        channels = {
            "client": lambda: client_channel(secrets.token_bytes),
            "gateway": lambda: gateway_channel(secrets.token_bytes),
            "relay": lambda: relay_channel(secrets.token_bytes, "0" * 64),
        }
        params = {"external_id": role, "name": role} if role != "relay" else {"ipv4": "192.0.2.1", "port": "3478"}
        agent = CLIENT_AGENT if role == "client" else GATEWAY_AGENT
        login = Login(role, f"ws://127.0.0.1:{self.port}", agent, params, token or TOKENS[role])
        key = None if role == "relay" else base64.b64encode(role[:1].encode() * 32).decode()
        link = PortalLink(login, channels[role](), public_key=lambda: key, mark=None)
        self.nursery.start_soon(link.run)
        return link

    async def joined(self, role: str) -> PortalLink:
        link = self.link(role)
        assert await link.events.receive() == Connected()
        return link

    async def say(self, text: bytes) -> bytes:
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        await stream.send_all(text)
        answer = b""
        async for part in stream:
            answer += part
        return answer


@asynccontextmanager
async def service(folder: Path, **options: Any) -> AsyncIterator[Service]:
    now = trio.current_time()
    store = Store(":memory:", secrets.token_bytes)
    state = PortalState(policy_of(folder), store, unix_epoch=UNIX - now, random_bytes=secrets.token_bytes, now=now)
    server = PortalServer(state, **options)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, listeners)
        yield Service(server, listeners[0].socket.getsockname()[1], nursery)
        nursery.cancel_scope.cancel()
    store.close()


async def message(link: PortalLink, kind: type) -> Any:
    async for event in link.events:
        if isinstance(event, MessageReceived) and isinstance(event.message, kind):
            return event.message
    raise AssertionError(f"the link ended before {kind.__name__}")


async def test_a_client_is_authorized_through_a_gateway(tmp_path: Path) -> None:
    async with service(tmp_path) as portal:
        await portal.joined("relay")
        client, gateway = await portal.joined("client"), await portal.joined("gateway")
        init = await message(client, to_client.Init)
        assert (await message(gateway, to_gateway.Init)).account_slug == "acme"
        (net,) = [r for r in init.resources if r.name == "net"]
        assert client.send(to_client.RequestAuthorization(net.id))
        order = await message(gateway, to_gateway.CreateAuthorization)
        assert gateway.send(to_gateway.AuthorizationCreated(order.ref))
        answer = await message(client, to_client.AuthorizationCreated)
        assert answer.preshared_key == order.client.preshared_key
        portal.server.set_policy(policy_of(tmp_path, policy_text().replace('resource = "net"', 'resource = "web"')))
        assert await message(client, to_client.ResourceDeleted) == to_client.ResourceDeleted(net.id)
        assert await message(gateway, to_client.RejectAccess) == to_client.RejectAccess(order.client.id, net.id)


async def test_a_relay_reaches_peers_that_wait_for_one(tmp_path: Path) -> None:
    async with service(tmp_path) as portal:
        client = await portal.joined("client")
        await portal.joined("relay")
        presence = await message(client, to_client.RelaysPresence)
        assert [str(r.address) for r in presence.connected] == ["192.0.2.1:3478"]


async def test_a_wrong_token_is_fatal_for_the_peer(tmp_path: Path) -> None:
    async with service(tmp_path) as portal:
        event = await portal.link("client", token="nobody-knows-this-one").events.receive()
        assert isinstance(event, Fatal)
        assert event.is_token_dead


async def test_a_revoked_token_is_fatal_for_the_peer(tmp_path: Path) -> None:
    async with service(tmp_path) as portal:
        gateway = await portal.joined("gateway")
        portal.server.set_policy(policy_of(tmp_path, policy_text().replace(TOKENS["gateway"], "another-token-0000")))
        events = [event async for event in gateway.events]
        assert isinstance(events[-1], Fatal)


async def test_a_newer_connection_ends_the_older(tmp_path: Path) -> None:
    async with service(tmp_path) as portal:
        old = await portal.joined("client")
        await message(old, to_client.Init)
        await portal.joined("client")
        assert isinstance(await old.events.receive(), Hiccup)


def upgrade(path: str, *headers: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", "Host: x", "Connection: keep-alive, Upgrade", "Upgrade: websocket"]
    return "\r\n".join([*lines, "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAA", *headers, "", ""]).encode()


async def test_http_answers(tmp_path: Path) -> None:
    async with service(tmp_path) as portal:
        for text, status, code in (
            (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 200, None),
            (b"GET /readyz HTTP/1.0\r\n\r\n", 200, None),
            (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not_found"),
            (b"GET /client/v2/websocket HTTP/1.1\r\nHost: x\r\n\r\n", 426, "upgrade_required"),
            (upgrade("/client/v2/websocket"), 401, "missing_token"),
            (upgrade("/client/v2/websocket?token=wrong"), 401, "invalid_token"),
            (upgrade(f"/gateway/websocket?token={TOKENS['gateway']}"), 400, "invalid_connect_params"),
            (upgrade("/relay/websocket?" + "&".join(f"a{n}=1" for n in range(99))), 400, "invalid_connect_params"),
            (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 9000, 400, "bad_request"),
            (b"\x16\x03\x01 what is this\r\n\r\n", 400, "bad_request"),
        ):
            head, _, body = (await portal.say(text)).partition(b"\r\n\r\n")
            assert head.startswith(f"HTTP/1.1 {status} ".encode()), head
            if code:
                assert b"application/problem+json" in head
                assert json.loads(body)["code"] == code
                assert json.loads(body)["status"] == status


async def test_a_token_in_the_query_is_enough_but_the_header_wins(tmp_path: Path) -> None:
    key = base64.b64encode(b"k" * 32).decode().replace("=", "%3D")
    url = f"/gateway/websocket?external_id=a&name=b&public_key={key}&token={TOKENS['gateway']}"
    async with service(tmp_path) as portal:
        async with open_websocket(
            "127.0.0.1", portal.port, url, use_ssl=False, extra_headers=[(b"user-agent", GATEWAY_AGENT.encode())]
        ) as websocket:
            await websocket.send_message('{"topic":"gateway","event":"phx_join","payload":null,"ref":0}')
            reply = json.loads(await websocket.get_message())
            assert reply == {
                "topic": "gateway", "event": "phx_reply", "ref": 0, "payload": {"status": "ok", "response": {}},
            }  # fmt: skip
        answer = await portal.say(upgrade(url, "X-Authorization: Bearer wrong"))
        assert answer.startswith(b"HTTP/1.1 401 ")


async def test_connections_are_bounded(tmp_path: Path) -> None:
    async with service(tmp_path, max_connections=1) as portal:
        await portal.joined("client")
        try:
            assert await portal.say(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") == b""
        except trio.BrokenResourceError:
            pass  # closed before it could be written to


async def test_a_peer_that_does_not_read_is_closed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(portal_server, "QUEUE", 4)
    key = base64.b64encode(b"k" * 32).decode().replace("=", "%3D")
    url = f"/gateway/websocket?external_id=a&name=b&public_key={key}&token={TOKENS['gateway']}"
    async with (
        service(tmp_path) as portal,
        open_websocket(
            "127.0.0.1", portal.port, url, use_ssl=False, message_queue_size=0,
            extra_headers=[(b"user-agent", GATEWAY_AGENT.encode())],
        ) as websocket,
    ):  # fmt: skip
        beat = '{"topic":"phoenix","event":"heartbeat","payload":{},"ref":1,"x":"' + "x" * 100 + '"}'
        try:
            while True:  # each is answered, nobody reads: the buffers fill, then the queue
                await websocket.send_message(beat)
        except ConnectionClosed:
            pass
        assert portal.server._state.counts() == {"client": 0, "gateway": 0, "relay": 0}
        await portal.joined("client")
