"""No text of any peer raises out of the portal, and what goes to peers can always be read by them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from embedded_portal_world import World, policy_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fz_core.embedded.portal_hub import TO_PEER
from fz_core.portal.codec import ParseFailure

with tempfile.TemporaryDirectory() as folder:
    POLICY = policy_of(Path(folder), top="old_clients = true")

EVENTS = st.sampled_from(
    ["phx_join", "phx_leave", "heartbeat", "set_snownet_capabilities", "request_authorization", "no_relays",
     "authorization_created", "broadcast_ice_candidates", "broadcast_invalidated_ice_candidates",
     "new_gateway_ice_candidates", "invalidate_gateway_ice_candidates", "new_client_ice_candidates",
     "invalidate_client_ice_candidates", "resolve_device_pool_domain", "prepare_connection", "request_connection",
     "reuse_connection", "connection_ready", "nonsense"]
)  # fmt: skip
ICE = {"username": "mine", "password": "p" * 22}
NAME = {"name": "www.example.com", "proxy_ips": ["100.96.0.1", "fd00:2021:1111:8000::1"]}


def payloads(ids: list[str]) -> st.SearchStrategy[Any]:
    value: st.SearchStrategy[Any] = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
    some_id = st.sampled_from(ids)
    fields = {
        "resource_id": some_id | value,
        "gateway_id": some_id | value,
        "client_id": some_id | value,
        "client_ids": st.lists(some_id | value, max_size=2) | value,
        "connected_gateway_ids": st.lists(some_id, max_size=2) | value,
        "gateway_ids": st.lists(some_id | value, max_size=2) | value,
        "client_payload": st.just({"ice_parameters": ICE, "domain": NAME}) | value,
        "client_preshared_key": st.just("A" * 43 + "=") | value,
        "payload": st.just(NAME) | value,
        "gateway_payload": st.just({"ConnectionAccepted": {"ice_parameters": ICE}}) | value,
        "candidates": st.lists(value, max_size=2) | value,
        "ref": value,
        "iceless": value,
        "domain": st.text(max_size=5) | value,
        "ipv4": st.just("100.64.0.1") | value,
        "stamp_secret": st.just("0" * 64) | value,
    }
    return st.fixed_dictionaries({}, optional=fields) | value


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_peers_cannot_break_it_nor_each_other(data: st.DataObject) -> None:
    world = World(POLICY)
    world.relay()
    peers = [world.client(), world.gateway(), world.client(token="client-token-bob-001", params={"external_id": "b"})]
    peers.append(world.client(agent="Debian/12 connlib/1.3.7 (x86_64)", params={"external_id": "old"}))
    ids = [r.id for r in POLICY.resources.values()]
    ids += [d.id for owner in ("alice", "bob") for d in world.store.devices_of(POLICY.clients[owner].id)]
    ids += [d.id for d in world.store.devices_of(POLICY.sites["office"].id)]
    for _ in range(data.draw(st.integers(1, 12))):
        peer = data.draw(st.sampled_from(peers))
        topic = data.draw(st.sampled_from([peer.role, "phoenix", "x"]))
        peer.send(data.draw(EVENTS), data.draw(payloads(ids)), topic)
        world.advance(data.draw(st.sampled_from([0.0, 0.1, 2.0, 16.0])))
    for peer in peers:
        for frame in peer.inbox:
            if frame["event"] not in ("phx_reply", "disconnect"):
                parsed = TO_PEER[peer.role].parse(frame["event"], json.loads(json.dumps(frame["payload"])))
                assert not isinstance(parsed, ParseFailure), (frame, parsed)


@settings(max_examples=200)
@given(st.text(max_size=40) | st.from_regex(r'\{"topic":"(client|x)","event":"\w+"(,"payload":.{0,10})?\}?'))
def test_no_text_raises(text: str) -> None:
    world = World(POLICY)
    client = world.client()
    world.state.handle_text(client.session_id, text, world.now)
    world.drain()
