"""A portal and its peers in virtual time: every jump goes to a deadline the portal announced."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

from fz_core.embedded.policy import Policy
from fz_core.embedded.policy_file import read_policy
from fz_core.embedded.portal_session import Knock, Refusal
from fz_core.embedded.portal_state import Close, Evict, Look, PortalState, Send
from fz_core.embedded.store import Store

UNIX = 1_800_000_000
CLIENT_AGENT = "Debian/12 headless-client/1.5.11 (x86_64)"
GATEWAY_AGENT = "Debian/12 gateway/1.6.0 (x86_64)"
TOKENS = {"client": "client-token-alice-1", "gateway": "gateway-token-office", "relay": "relay-token-00000000"}

POLICY = """
account = "acme"
groups = ["staff", "admins"]
{top}
[dns]
servers = ["1.1.1.1", "https://dns.example/dns-query"]
search_domain = "corp.example"
[relay]
token = "relay-token-00000000"
[[sites]]
name = "office"
[[sites]]
name = "lab"
[[gateways]]
site = "office"
token = "gateway-token-office"
[[gateways]]
site = "lab"
token = "gateway-token-lab-00"
[[clients]]
name = "alice"
groups = ["staff"]
token = "client-token-alice-1"
{alice}
[[clients]]
name = "bob"
groups = ["admins"]
token = "client-token-bob-001"
[[resources]]
name = "net"
type = "cidr"
address = "10.0.0.0/8"
site = "office"
{net}
[[resources]]
name = "web"
type = "dns"
address = "*.example.com"
site = "office"
{web}
[[resources]]
name = "internet"
type = "internet"
site = "office"
[[resources]]
name = "pool"
type = "static_device_pool"
devices = ["bob"]
[[policies]]
group = "staff"
resource = "net"
{rule}
[[policies]]
group = "everyone"
resource = "web"
[[policies]]
group = "staff"
resource = "internet"
[[policies]]
group = "staff"
resource = "pool"
"""


def policy_text(**parts: str) -> str:
    return POLICY.format(**{name: parts.get(name, "") for name in ("top", "alice", "net", "web", "rule")})


def policy_of(folder: Path, text: str | None = None, **parts: str) -> Policy:
    path = folder / "portal.toml"
    path.write_text(policy_text(**parts) if text is None else text)
    return read_policy(path)


class Peer:
    """One connection; `inbox` holds decoded frames."""

    def __init__(self, world: World, session_id: int, role: str, topic: str | None = None) -> None:
        self.world, self.session_id, self.role = world, session_id, role
        self.inbox: list[dict[str, Any]] = []
        self.is_closed = False
        self.last_word: Any = None
        self.id = ""
        self._ref = 0

    def send(self, event: str, payload: Any, topic: str | None = None) -> int:
        ref, self._ref = self._ref, self._ref + 1
        frame = {"topic": topic or self.role, "event": event, "payload": payload, "ref": ref}
        self.world.state.handle_text(self.session_id, json.dumps(frame), self.world.now)
        self.world.drain()
        return ref

    def join(self, payload: Any = None) -> dict[str, Any]:
        """The payload of `init`."""
        self.send("phx_join", payload)
        init: dict[str, Any] = self.take("init")[0]
        return init

    def take(self, event: str) -> list[Any]:
        """Remove and return the payloads of one event."""
        found = [f["payload"] for f in self.inbox if f["event"] == event]
        self.inbox = [f for f in self.inbox if f["event"] != event]
        return found

    def events(self) -> list[str]:
        """Names of all that arrived but replies; empties the inbox."""
        names = [f["event"] for f in self.inbox if f["event"] != "phx_reply"]
        self.inbox.clear()
        return names

    def leave(self) -> None:
        self.world.state.handle_closed(self.session_id, self.world.now)
        self.world.drain()


class World:
    def __init__(self, policy: Policy, store: Store | None = None, seed: int = 1) -> None:
        self.now = 1000.0
        self.random = random.Random(seed)
        self.store = store or Store(":memory:", self.random.randbytes)
        self.peers: dict[int, Peer] = {}
        self.log: list[tuple[int, str]] = []
        self.looks: list[Look] = []
        self.state = PortalState(
            policy, self.store, unix_epoch=UNIX - self.now, random_bytes=self.random.randbytes, now=self.now
        )

    def knock(self, role: str, **options: Any) -> int | Refusal:
        return self.state.open(self.knock_of(role, **options), self.now)

    def knock_of(self, role: str, **options: Any) -> Knock:
        key = options.pop("key", role[0].encode() * 32)
        params = {"external_id": f"{role}-1", "name": f"{role}-name", "public_key": base64.b64encode(key).decode()}
        if role == "relay":
            params = {"ipv4": "192.0.2.1", "ipv6": "2001:db8::1", "port": "3478"}
        params |= options.pop("params", {})
        default_agent = CLIENT_AGENT if role == "client" else GATEWAY_AGENT
        return Knock(
            role, options.pop("legacy", False), params, options.pop("token", TOKENS[role]),
            options.pop("agent", default_agent), options.pop("remote", "192.0.2.9"),
        )  # fmt: skip

    def open(self, role: str, **options: Any) -> Peer:
        session_id = self.knock(role, **options)
        assert isinstance(session_id, int), session_id
        peer = self.peers[session_id] = Peer(self, session_id, role)
        self.drain()
        return peer

    def client(self, **options: Any) -> Peer:
        peer = self.open("client", **options)
        peer.init = peer.join()  # type: ignore[attr-defined]
        return peer

    def gateway(self, **options: Any) -> Peer:
        peer = self.open("gateway", **options)
        peer.init = peer.join()  # type: ignore[attr-defined]
        return peer

    def relay(self, secret: str = "0" * 64, **options: Any) -> Peer:
        peer = self.open("relay", **options)
        peer.join({"stamp_secret": secret})
        return peer

    def drain(self) -> None:
        while (output := self.state.poll_output()) is not None:
            if isinstance(output, Look):
                self.looks.append(output)
                continue
            peer = self.peers.get(output.session_id)
            if isinstance(output, Send) and peer is not None:
                frame = json.loads(output.text)
                peer.inbox.append(frame)
                self.log.append((output.session_id, frame["event"]))
            elif isinstance(output, Close) and peer is not None:
                peer.is_closed = True
                if isinstance(output, Evict):
                    peer.last_word = json.loads(output.text)

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while (deadline := self.state.poll_timeout()) is not None and deadline <= end:
            assert deadline >= self.now, "a deadline in the past"
            self.now = deadline
            self.state.handle_timeout(self.now)
            self.drain()
            following = self.state.poll_timeout()
            assert following is None or following > self.now
        self.now = end

    def keep_alive(self, seconds: float) -> None:
        """Pass time while all peers send heartbeats."""
        for _ in range(int(seconds // 10)):
            self.advance(10.0)
            for peer in self.peers.values():
                if not peer.is_closed:
                    peer.send("heartbeat", {}, "phoenix")
        self.advance(seconds % 10)

    def resource(self, name: str) -> str:
        return self.state.policy.resources[name].id

    def authorize(self, client: Peer, gateway: Peer, name: str = "net") -> dict[str, Any]:
        """The whole exchange; what the client was told."""
        client.send("request_authorization", {"resource_id": self.resource(name), "connected_gateway_ids": []})
        (order,) = gateway.take("create_authorization")
        gateway.send("authorization_created", {"ref": order["ref"]})
        (answer,) = client.take("authorization_created")
        result: dict[str, Any] = {"order": order, "answer": answer}
        return result
