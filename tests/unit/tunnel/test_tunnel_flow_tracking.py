"""When flows are tracked, and under which token (spec/tunnel.md §19)."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from fz_core.packet import build_udp
from fz_core.portal.types import NO_FLOW_LOGS, FlowLogs
from fz_core.tunnel.flow_record import FlowRecord
from fz_core.tunnel.flow_tracking import FlowTracking
from tests.unit.tunnel.flow_samples import DIRECT, token_text

ON = FlowLogs("https://api.example", 60, 0)
SRC, DST = ip_address("100.64.0.1").packed, ip_address("10.0.0.1").packed
PACKET = build_udp(SRC, DST, 1, 2, b"x")
ANSWER = build_udp(DST, SRC, 2, 1, b"y")


def taken(tracking: FlowTracking) -> list[FlowRecord]:
    records = []
    while (record := tracking.poll_record()) is not None:
        records.append(record)
    return records


def a_gateway() -> FlowTracking:
    tracking = FlowTracking("gateway", 0.0, has_spool=True)
    tracking.configure(ON, 0.0)
    return tracking


@pytest.mark.parametrize(
    ("is_local", "has_spool", "settings", "expected"),
    [
        (False, True, NO_FLOW_LOGS, False),
        (False, True, ON, True),
        (False, False, ON, False),
        (True, True, NO_FLOW_LOGS, True),
        (True, False, ON, True),
    ],
)
def test_who_asks(is_local: bool, has_spool: bool, settings: FlowLogs, expected: bool) -> None:
    tracking = FlowTracking("client", 0.0, is_local=is_local, has_spool=has_spool)
    assert (tracking.tracker is not None) == is_local
    assert tracking.configure(settings, 0.0) == (settings == ON)
    assert not tracking.configure(settings, 0.0)
    assert (tracking.tracker is not None) == expected


def test_turning_off_ends_flows_and_a_token_learnt_meanwhile_counts_later() -> None:
    tracking = a_gateway()
    tracking.learn("c", "r", token_text())
    tracking.note_tx("c", "r", PACKET, DIRECT, 1.0)
    tracking.configure(NO_FLOW_LOGS, 2.0)
    assert [r.kind.value for r in taken(tracking)] == ["start", "end"]
    assert (tracking.tracker, tracking.poll_timeout()) == (None, None)
    tracking.note_tx("c", "r", PACKET, DIRECT, 3.0)
    tracking.learn("c", "r2", token_text(resource_id="r2"))
    tracking.configure(ON, 4.0)
    tracking.note_tx("c", "r2", PACKET, DIRECT, 5.0)
    assert [r.token.claims["resource_id"] for r in taken(tracking)] == ["r2"]


def test_settings_repeated_leave_flows_alone() -> None:
    tracking = a_gateway()
    tracking.learn("c", "r", token_text())
    tracking.note_tx("c", "r", PACKET, DIRECT, 1.0)
    tracking.configure(FlowLogs("https://other.example", 5, 5), 2.0)
    assert [r.kind.value for r in taken(tracking)] == ["start"]


def test_without_its_token_a_resource_has_no_flows() -> None:
    tracking = a_gateway()
    tracking.learn("c", "r", token_text())
    tracking.learn("c", "r3", "no token")
    for resource_id in ("r2", "r3"):
        tracking.note_tx("c", resource_id, PACKET, DIRECT, 1.0)
    assert taken(tracking) == []


def test_access_that_ends_ends_its_flows_and_its_token() -> None:
    tracking = a_gateway()
    tracking.learn("c", "r", token_text())
    tracking.note_tx("c", "r", PACKET, DIRECT, 1.0)
    tracking.end_access("c", "r", 2.0)
    tracking.note_tx("c", "r", PACKET, DIRECT, 3.0)
    assert [r.kind.value for r in taken(tracking)] == ["start", "end"]
    assert not tracking._tokens


def test_a_new_token_is_for_new_flows() -> None:
    tracking = a_gateway()
    tracking.learn("c", "r", token_text(policy_id="old"))
    tracking.note_tx("c", "r", PACKET, DIRECT, 1.0)
    tracking.learn("c", "r", token_text(policy_id="new"))
    tracking.note_tx("c", "r", PACKET, DIRECT, 2.0)
    tracking.end_peer("c", 3.0)
    records = taken(tracking)
    assert [(r.kind.value, r.token.claims["policy_id"]) for r in records] == [("start", "old"), ("end", "old")]
    assert records[-1].tx_packets == 2


def test_two_clients_that_reach_each_other_have_a_token_for_each_direction() -> None:
    tracking = FlowTracking("client", 0.0, is_local=True)
    tracking.learn("peer", "pool", token_text())
    tracking.learn("peer", "pool", token_text(role="responder"), opened_by_peer=True)
    tracking.note_tx("peer", "pool", PACKET, DIRECT, 1.0)
    tracking.note_tx("peer", "pool", build_udp(DST, SRC, 9, 9), DIRECT, 1.0, opened_by_peer=True)
    assert [r.token.role for r in taken(tracking)] == ["initiator", "responder"]
    assert tracking.tracker is not None
    tracking.tracker.handle_rx("peer", ANSWER, 1.5)
    tracking.end_access("peer", "pool", 2.0)
    tracking.shutdown(3.0)
    assert [(r.tx_packets, r.rx_packets) for r in taken(tracking)] == [(1, 1), (1, 0)]
