"""Tokens, paths and the published schema, for the tests of flow logs."""

from __future__ import annotations

import base64
import json
from datetime import datetime
from ipaddress import ip_address
from typing import Any

from fz_core.node.connection import Path
from fz_core.packet import Address

AUTHORIZATION = "7b0c8f0e-1111-4222-8333-944444444444"
REQUIRED: dict[str, Any] = {
    "account_id": "acc",
    "iat": 1_700_000_000,
    "exp": 1_900_000_000,
    "uploads_enabled": True,
    "role": "initiator",
    "initiator_device_id": "dev-a",
    "responder_device_id": "dev-b",
    "policy_authorization_id": AUTHORIZATION,
    "policy_id": "pol",
    "resource_id": "res",
    "resource_name": "Head Office",
    "initiator_actor_id": "actor",
    "initiator_actor_name": "Ada",
    "authorized_at": "2026-01-01T00:00:00Z",
    "authorization_expires_at": "2026-01-02T00:00:00Z",
}


def segment(value: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def token_text(alg: str = "HS256", signature: str = "c2ln", **claims: Any) -> str:
    """A token of the required claims and these; None takes one away."""
    merged = {name: value for name, value in {**REQUIRED, **claims}.items() if value is not None}
    return f"{segment({'alg': alg, 'typ': 'JWT'})}.{segment(merged)}.{signature}"


DIRECT = Path(Address.parse("192.0.2.1:52625"), Address.parse("198.51.100.7:52625"), False, False)
RELAYED = Path(Address.parse("203.0.113.9:49152"), Address.parse("198.51.100.7:52625"), True, False)


def nth_path(number: int) -> Path:
    return DIRECT._replace(local=Address(DIRECT.local.ip, 10_000 + number))


OPEN_FIELDS = {"protocol", "inner_src_ip", "inner_src_port", "inner_dst_ip", "inner_dst_port", "outers", "flow_start"}
END_FIELDS = {"flow_end", "last_packet", "rx_packets", "tx_packets", "rx_bytes", "tx_bytes"}
OUTER_FIELDS = {"dst_ip", "dst_port", "path_activated_at"}
SOURCE_FIELDS = {"src_ip", "src_port"}


def assert_conforms(report: dict[str, Any], kind: str) -> None:
    """The published schema, restated."""
    assert json.loads(json.dumps(report)) == report
    assert set(report) - {"domain"} == OPEN_FIELDS | (END_FIELDS if kind == "end" else set())
    assert report["protocol"] in ("tcp", "udp")
    assert_endpoint(report, "inner_src")
    assert_endpoint(report, "inner_dst")
    if "domain" in report:
        assert isinstance(report["domain"], str)
    assert 1 <= len(report["outers"]) <= 16
    for outer in report["outers"]:
        assert set(outer) in (OUTER_FIELDS, OUTER_FIELDS | SOURCE_FIELDS)
        assert_endpoint(outer, "dst")
        if "src_ip" in outer:
            assert_endpoint(outer, "src")
        assert instant(report["flow_start"]) <= instant(outer["path_activated_at"])
    if kind == "end":
        for name in ("rx_packets", "tx_packets", "rx_bytes", "tx_bytes"):
            assert type(report[name]) is int
            assert 0 <= report[name] < 2**63
        assert instant(report["flow_start"]) <= instant(report["last_packet"]) <= instant(report["flow_end"])


def assert_endpoint(fields: dict[str, Any], name: str) -> None:
    assert str(ip_address(fields[f"{name}_ip"])) == fields[f"{name}_ip"]
    assert type(fields[f"{name}_port"]) is int
    assert 0 <= fields[f"{name}_port"] <= 65535


def instant(text: str) -> datetime:
    assert text.endswith("Z")
    return datetime.fromisoformat(text)
