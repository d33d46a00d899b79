"""A scripted client and gateway from before 1.4 over real WebSockets: tokens in the query, replies to frames."""

from __future__ import annotations

import base64
import json
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import trio
from embedded_portal_world import TOKENS, UNIX, policy_of
from trio_websocket import WebSocketConnection, open_websocket

from fz_core.embedded.portal_server import PortalServer
from fz_core.embedded.portal_state import PortalState
from fz_core.embedded.store import Store

AGENTS = {"client": "Debian/12 connlib/1.3.7 (x86_64)", "gateway": "Debian/12 connlib/1.4.2 (x86_64)"}
ICE = {"username": "mine", "password": "m" * 22}
READY = {"ConnectionAccepted": {"ice_parameters": {"username": "theirs", "password": "t" * 22}}}


class OldPeer:
    """Frames as a peer of that time wrote them, one after the other."""

    def __init__(self, role: str, websocket: WebSocketConnection) -> None:
        self.role, self.websocket = role, websocket
        self._ref = 0

    async def send(self, event: str, payload: Any) -> int:
        ref, self._ref = self._ref, self._ref + 1
        frame = {"topic": self.role, "event": event, "payload": payload, "ref": ref}
        await self.websocket.send_message(json.dumps(frame))
        return ref

    async def event(self, name: str) -> Any:
        while True:
            frame = json.loads(await self.websocket.get_message())
            if frame["event"] == name:
                return frame["payload"]

    async def reply(self, ref: int) -> Any:
        while True:
            frame = json.loads(await self.websocket.get_message())
            if frame["event"] == "phx_reply" and frame["ref"] == ref:
                assert frame["topic"] == self.role
                return frame["payload"]


async def test_an_old_client_gets_through_an_old_gateway(tmp_path: Path) -> None:
    now = trio.current_time()
    store = Store(":memory:", secrets.token_bytes)
    state = PortalState(policy_of(tmp_path), store, unix_epoch=UNIX - now, random_bytes=secrets.token_bytes, now=now)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(PortalServer(state).serve, listeners)
        port = listeners[0].socket.getsockname()[1]
        async with dial("client", port) as one, dial("gateway", port) as two:
            await talk(OldPeer("client", one), OldPeer("gateway", two), state.policy.resources["net"].id)
        nursery.cancel_scope.cancel()
    store.close()


async def talk(client: OldPeer, gateway: OldPeer, net: str) -> None:
    for peer in (gateway, client):
        assert await peer.reply(await peer.send("phx_join", None)) == {"status": "ok", "response": {}}
        await peer.event("init")
    prepared = await client.reply(await client.send("prepare_connection", {"resource_id": net}))
    gateway_id = prepared["response"]["gateway_id"]
    secret = base64.b64encode(b"s" * 32).decode()
    ref = await client.send(
        "request_connection",
        {"resource_id": net, "gateway_id": gateway_id, "client_payload": {"ice_parameters": ICE},
         "client_preshared_key": secret},
    )  # fmt: skip
    order = await gateway.event("request_connection")
    assert order["client"]["payload"]["ice_parameters"] == ICE
    assert order["client"]["peer"]["preshared_key"] == secret
    await gateway.send("connection_ready", {"ref": order["ref"], "gateway_payload": READY})
    assert (await client.reply(ref))["response"]["gateway_payload"] == READY
    await client.send("reuse_connection", {"resource_id": net, "gateway_id": gateway_id, "payload": None})
    assert (await gateway.event("allow_access"))["client_id"] == order["client"]["id"]


def dial(role: str, port: int) -> Any:
    key = base64.b64encode(role[:1].encode() * 32).decode()
    query = urlencode({"external_id": role, "name": role, "public_key": key, "token": TOKENS[role]})
    agent = [(b"user-agent", AGENTS[role].encode())]
    return open_websocket("127.0.0.1", port, f"/{role}/websocket?{query}", use_ssl=False, extra_headers=agent)
