"""Flow logs as lines (spec/binaries.md §10.1)."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from fz_core.driver import logs
from fz_core.driver.flow_logs import lines
from fz_core.packet import Address
from fz_core.tunnel.flow_record import FlowRecord, IngestToken, Outer, OuterPath, RecordKind
from tests.unit.tunnel.flow_samples import token_text

OPTIONAL: dict[str, Any] = {
    "resource_address": "*.corp.example",
    "initiator_actor_email": "ada@corp.example",
    "initiator_auth_provider_id": "idp",
    "initiator_client_version": "1.5.11",
    "initiator_device_os_name": "Ubuntu",
    "initiator_device_os_version": "24.04",
    "initiator_device_serial": "s1",
    "initiator_device_uuid": "u1",
    "initiator_device_identifier_for_vendor": "v1",
    "initiator_device_firebase_installation_id": "f1",
}
# The specification's list, restated.
FIELDS = [
    "protocol", "role", "initiator_device_id", "responder_device_id", "policy_authorization_id", "policy_id",
    "resource_id", "resource_name", "resource_address", "initiator_actor_id", "initiator_actor_email",
    "initiator_actor_name", "initiator_auth_provider_id", "authorized_at", "authorization_expires_at",
    "initiator_client_version", "initiator_device_os_name", "initiator_device_os_version",
    "initiator_device_serial", "initiator_device_uuid", "initiator_device_identifier_for_vendor",
    "initiator_device_firebase_installation_id", "inner_src_ip", "inner_src_port", "inner_dst_ip",
    "inner_dst_port", "domain", "outers", "flow_start", "flow_end", "last_packet",
    "rx_packets", "tx_packets", "rx_bytes", "tx_bytes",
]  # fmt: skip
END_FIELDS = 6


pytestmark = pytest.mark.usefixtures("restored_logs")


def a_record(kind: RecordKind = RecordKind.END, **claims: Any) -> FlowRecord:
    token = IngestToken.parse(token_text(**claims))
    assert token is not None
    start = 1_800_000_000_000_000
    src, dst = Address.parse("100.64.0.1:5000"), Address.parse("172.21.0.101:80")
    outers = (
        Outer(OuterPath(Address.parse("192.0.2.1:1"), Address.parse("198.51.100.1:2")), start),
        Outer(OuterPath(None, Address.parse("[2001:db8::1]:2")), start + 1),
    )
    ends = (start + 2_000_000, start + 1_500_000, 10, 20, 3000, 4000)
    return FlowRecord(kind, token, "tcp", src, dst, outers, start, "download.httpbin", *ends)


def test_a_line_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", flow_logs=True)
    lines.log_record(a_record(RecordKind.START, resource_name="web"))
    lines.log_record(a_record(resource_name="web"))
    started, completed = capsys.readouterr().out.splitlines()
    assert re.match(r"\S+Z TRACE flow_logs: TCP flow started protocol=tcp role=initiator initiator_device_id=", started)
    assert " flow_end=" not in started
    assert " TRACE flow_logs: TCP flow completed protocol=tcp " in completed
    assert " inner_dst_ip=172.21.0.101 inner_dst_port=80 domain=download.httpbin outers=[{" in completed
    assert completed.endswith(" rx_packets=10 tx_packets=20 rx_bytes=3000 tx_bytes=4000")
    outers = re.search(r" outers=(\S+) ", completed)
    assert outers is not None
    assert json.loads(outers[1]) == [
        {
            "src_ip": "192.0.2.1",
            "src_port": 1,
            "dst_ip": "198.51.100.1",
            "dst_port": 2,
            "path_activated_at": "2027-01-15T08:00:00.000000Z",
        },
        {"dst_ip": "2001:db8::1", "dst_port": 2, "path_activated_at": "2027-01-15T08:00:00.000001Z"},
    ]


def test_the_order_of_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("", as_json=True, flow_logs=True)
    lines.log_record(a_record(RecordKind.START, **OPTIONAL))
    lines.log_record(replace(a_record(**OPTIONAL), protocol="udp"))
    lines.log_record(replace(a_record(), domain=None))
    started, completed, plain = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    frame = ["timestamp", "level"], ["message", "target"]
    assert list(started) == [*frame[0], *FIELDS[:-END_FIELDS], *frame[1]]
    assert list(completed) == [*frame[0], *FIELDS, *frame[1]]
    assert list(plain) == [*frame[0], *(f for f in FIELDS if f not in OPTIONAL and f != "domain"), *frame[1]]
    assert (completed["message"], completed["level"], completed["target"]) == (
        "UDP flow completed",
        "TRACE",
        "flow_logs",
    )


@pytest.mark.parametrize(("directives", "flow_logs"), [("info", False), ("debug", False), ("flow_logs=debug", False)])
def test_nobody_asked(directives: str, flow_logs: bool, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(directives, flow_logs=flow_logs)
    assert not lines.is_enabled()
    lines.log_record(a_record())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("directives", "flow_logs"),
    [("off", True), ("", True), ("flow_logs=off", True), ("flow_logs=trace", False), ("trace", False)],
)
def test_somebody_asked(directives: str, flow_logs: bool, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(directives, flow_logs=flow_logs)
    assert lines.is_enabled()
    lines.log_record(a_record())
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_token_is_not_in_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("trace", flow_logs=True)
    record = a_record()
    lines.log_record(record)
    out = capsys.readouterr().out
    assert all(part not in out for part in record.token.text.split("."))
