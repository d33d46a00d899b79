"""Who may connect to an embedded portal, and what is known of a connection (`spec/portal-protocol.md` §1.7)."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

from fz_core.embedded.policy import ClientAccount, GatewayAccount, Policy
from fz_core.embedded.portal_derivation import token_hash
from fz_core.embedded.portal_versions import Agent, parse_agent
from fz_core.embedded.store import Device
from fz_core.packet import Address

MAX_TEXT = 255
DEFAULT_RELAY_PORT = 3478


@dataclass(frozen=True, slots=True)
class Knock:
    """An upgrade request. `params` are the decoded query parameters."""

    role: str
    is_legacy: bool
    params: Mapping[str, str] = field(repr=False)
    token: str | None = field(repr=False)
    user_agent: str = ""
    remote: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An HTTP answer instead of a WebSocket. `retry_after` in seconds."""

    status: int
    code: str
    detail: str
    retry_after: int | None = None


@dataclass(eq=False, slots=True)
class Session:
    """One open connection. `account` is set for clients and gateways, `device` too; `relay` once a relay joined.

    `is_iceless` is None until the peer has said whether it can do without ICE.
    """

    id: int
    role: str
    is_legacy: bool
    token: str = field(repr=False)
    last_frame_at: float
    account: ClientAccount | GatewayAccount | None = None
    device: Device | None = None
    public_key: str = ""
    agent: Agent | None = None
    user_agent: str = ""
    remote: str = ""
    is_joined: bool = False
    was_joined: bool = False
    joined_at: float = 0.0
    is_iceless: bool | None = None
    relays: set[str] = field(default_factory=set)
    addresses: tuple[Address, ...] = ()
    stamp_secret: str | None = field(default=None, repr=False)
    relay_id: str | None = None

    @property
    def peer_id(self) -> str:
        """The device's id; empty for relays."""
        return "" if self.device is None else self.device.id

    @property
    def name(self) -> str:
        """For log lines."""
        return self.device.name if self.device else f"relay at {self.remote}"


def admit(knock: Knock, policy: Policy, session_id: int, unix_now: float, now: float) -> Session | Refusal:
    """A session without its device, or why not."""
    if knock.token is None or not knock.token.strip():
        return Refusal(401, "missing_token", "Give a token in the header X-Authorization, or as ?token=.")
    token = token_hash(knock.token)
    account = owner_of(policy, knock.role, token)
    is_expired = isinstance(account, ClientAccount) and (account.expires_at or unix_now + 1) <= unix_now
    if is_expired or (account is None and not (knock.role == "relay" and token in policy.relay_tokens)):
        return Refusal(401, "invalid_token", "This token is unknown, expired, or of another role.")
    session = Session(session_id, knock.role, knock.is_legacy, token, now, account)
    session.user_agent, session.remote = knock.user_agent[:MAX_TEXT], knock.remote
    session.agent = parse_agent(session.user_agent)
    problem = _read_relay(session, knock) if knock.role == "relay" else _read_peer(session, knock)
    return session if problem is None else Refusal(400, "invalid_connect_params", problem)


def owner_of(policy: Policy, role: str, token: str) -> ClientAccount | GatewayAccount | None:
    """Whose token (by hash) this is, if it is one of this role."""
    if role == "client":
        return policy.client_of(token)
    return policy.gateway_of(token) if role == "gateway" else None


def external_id_of(params: Mapping[str, str]) -> str:
    """The device's own id, under either name."""
    return params.get("external_id") or params.get("firezone_id", "")


def _read_peer(session: Session, knock: Knock) -> str | None:
    key = knock.params.get("public_key", "")
    try:
        is_key = len(key) == 44 and len(base64.b64decode(key, validate=True)) == 32
    except (binascii.Error, ValueError):
        is_key = False
    if not is_key:
        return "public_key is not the Base64 of 32 bytes."
    session.public_key = key
    for name, value in (("external_id", external_id_of(knock.params)), ("name", knock.params.get("name", ""))):
        if not 0 < len(value) <= MAX_TEXT:
            return f"{name} has {len(value)} characters, send 1 to {MAX_TEXT}."
    if session.role == "client" and session.agent is None:
        return "The User-Agent names no known component."
    return None


def _read_relay(session: Session, knock: Knock) -> str | None:
    try:
        port = int(knock.params.get("port", DEFAULT_RELAY_PORT))
        v4, v6 = knock.params.get("ipv4"), knock.params.get("ipv6")
        ips = ([IPv4Address(v4).packed] if v4 else []) + ([IPv6Address(v6).packed] if v6 else [])
    except ValueError as error:
        return f"Bad relay address: {error}"
    if not ips or not 0 < port < 65536:
        return "A relay sends ipv4, ipv6 or both, and a port."
    session.addresses = tuple(Address(ip, port) for ip in ips)
    return None
