"""What a flow log says: one record when a flow starts, one when it ends (`spec/tunnel.md` §19).

Not here: when flows start and end (`flows`), and where records go (`driver/flow_logs/lines`, `driver/flow_logs/spool`).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from ipaddress import ip_address
from types import MappingProxyType
from typing import Any, NamedTuple

from fz_core.node.connection import Path
from fz_core.packet import Address
from fz_core.portal.types import read_ingest_token


class RecordKind(Enum):
    """Whether a record opens a flow or completes it; the value is the word in file names."""

    START = "start"
    END = "end"


class IngestToken:
    """The portal's word on whose flow it is. A bearer credential: `text` belongs in no log.

    `claims` holds what the portal says, as far as it is known; the signature is not ours to check.
    """

    __slots__ = ("claims", "expires_at", "role", "text", "uploads_enabled")

    def __init__(self, text: str, claims: Mapping[str, str], uploads_enabled: bool, expires_at: int) -> None:
        self.text = text
        self.claims = MappingProxyType(dict(claims))
        self.uploads_enabled = uploads_enabled
        self.expires_at = expires_at
        self.role = claims["role"]

    @staticmethod
    def parse(text: str) -> IngestToken | None:
        """Read a token; None for what is none, as an empty text."""
        try:
            read_ingest_token(text)
            if not TOKEN.fullmatch(text):
                return None
            claims = _claims(text)
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if claims["role"] not in ("initiator", "responder"):
            return None
        known = {name: value for name in CLAIMS if isinstance(value := claims.get(name), str) and _is_text(value)}
        return IngestToken(text, known, claims["uploads_enabled"], claims["exp"])

    def __repr__(self) -> str:
        return f"IngestToken(role={self.role}, uploads_enabled={self.uploads_enabled})"


class OuterPath(NamedTuple):
    """Sockets between which a flow's datagrams travel; the initiator is the source, None where relayed."""

    src: Address | None
    dst: Address

    @staticmethod
    def of_sent(path: Path) -> OuterPath:
        """For packets that we send. Behind our relay nobody knows which of our sockets counts."""
        return OuterPath(None if path.via_relay else path.local, path.remote)

    @staticmethod
    def of_received(path: Path) -> OuterPath:
        """For packets that the peer, the initiator, sends us."""
        return OuterPath(path.remote, path.local)


class Outer(NamedTuple):
    """A path, and when (unix microseconds) the first packet of the flow took it."""

    path: OuterPath
    activated_at: int


@dataclass(frozen=True, slots=True, repr=False)
class FlowRecord:
    """A flow as its start or end found it; times are unix microseconds.

    `tx` is initiator to responder. Of a START record the times of the end and the counters mean nothing.
    """

    kind: RecordKind
    token: IngestToken
    protocol: str
    inner_src: Address
    inner_dst: Address
    outers: tuple[Outer, ...]
    flow_start: int
    domain: str | None = None
    flow_end: int = 0
    last_packet: int = 0
    rx_packets: int = 0
    tx_packets: int = 0
    rx_bytes: int = 0
    tx_bytes: int = 0

    def __repr__(self) -> str:
        return f"FlowRecord({self.kind.value}, {self.protocol})"


def to_json(record: FlowRecord) -> dict[str, Any]:
    """The record as the portal's schema (`FlowLogIngestRecord`) wants it: attribution is the token's affair."""
    fields: dict[str, Any] = {
        "protocol": record.protocol,
        "inner_src_ip": record.inner_src.host,
        "inner_src_port": record.inner_src.port,
        "inner_dst_ip": record.inner_dst.host,
        "inner_dst_port": record.inner_dst.port,
    }
    if record.domain is not None:
        fields["domain"] = record.domain
    fields |= {"outers": [_outer(outer) for outer in record.outers], "flow_start": rfc3339(record.flow_start)}
    if record.kind is RecordKind.END:
        fields |= {
            "flow_end": rfc3339(record.flow_end),
            "last_packet": rfc3339(record.last_packet),
            "rx_packets": record.rx_packets,
            "tx_packets": record.tx_packets,
            "rx_bytes": record.rx_bytes,
            "tx_bytes": record.tx_bytes,
        }
    return fields


def rfc3339(unix_us: int) -> str:
    """UTC with microseconds."""
    return (EPOCH + timedelta(microseconds=unix_us)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _outer(outer: Outer) -> dict[str, Any]:
    src, dst = outer.path
    source = {} if src is None else {"src_ip": str(ip_address(src[0])), "src_port": src[1]}
    end = {"dst_ip": str(ip_address(dst[0])), "dst_port": dst[1]}
    return {**source, **end, "path_activated_at": rfc3339(outer.activated_at)}


def _claims(token: str) -> dict[str, Any]:
    payload = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims


def _is_text(value: str) -> bool:
    """Whether the claim can be written to a log: half a surrogate pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


TOKEN = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# In the order of the log lines (`spec/binaries.md` §10.1).
CLAIMS = (
    "role", "initiator_device_id", "responder_device_id", "policy_authorization_id", "policy_id", "resource_id",
    "resource_name", "resource_address", "initiator_actor_id", "initiator_actor_email", "initiator_actor_name",
    "initiator_auth_provider_id", "authorized_at", "authorization_expires_at", "initiator_client_version",
    "initiator_device_os_name", "initiator_device_os_version", "initiator_device_serial", "initiator_device_uuid",
    "initiator_device_identifier_for_vendor", "initiator_device_firebase_installation_id",
)  # fmt: skip
