"""Flows: what starts and ends them, what their records say (spec/tunnel.md §19, §23 items 90 to 93)."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fz_core.packet import Packet, build_echo, build_tcp, build_udp
from fz_core.tunnel.flow_record import FlowRecord, IngestToken, to_json
from fz_core.tunnel.flows import FlowTracker
from tests.unit.tunnel.flow_samples import (
    AUTHORIZATION,
    DIRECT,
    RELAYED,
    assert_conforms,
    nth_path,
    segment,
    token_text,
)

EPOCH = 1_800_000_000.0
CLIENT, SERVER = ip_address("100.64.0.1").packed, ip_address("10.0.0.1").packed
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
PEER = "gateway"


def a_token(**claims: Any) -> IngestToken:
    token = IngestToken.parse(token_text(**claims))
    assert token is not None
    return token


TOKEN = a_token()


class Talk:
    """A client's tracker with one conversation, and everything it reported."""

    def __init__(self, protocol: str = "tcp", path: Any = DIRECT) -> None:
        self.tracker = FlowTracker("client", EPOCH)
        self.protocol, self.path, self.now = protocol, path, 100.0
        self.records: list[FlowRecord] = []

    def tx(self, flags: int = 0, payload: bytes = b"") -> None:
        packet = self._packet(CLIENT, SERVER, 5000, 80, flags, payload)
        self.tracker.handle_tx(PEER, packet, TOKEN, self.path, self.now)
        self._drain()

    def rx(self, flags: int = 0, payload: bytes = b"") -> None:
        self.tracker.handle_rx(PEER, self._packet(SERVER, CLIENT, 80, 5000, flags, payload), self.now)
        self._drain()

    def wait(self, seconds: float) -> None:
        """Jump from deadline to deadline, as a driver does."""
        until = self.now + seconds
        while (due := self.tracker.poll_timeout()) is not None and due <= until:
            self.now = max(self.now, due)
            self.tracker.handle_timeout(self.now)
            next_due = self.tracker.poll_timeout()
            assert next_due is None or next_due > self.now
        self.now = until
        self._drain()

    def end(self) -> list[dict[str, Any]]:
        self.tracker.shutdown(self.now)
        self._drain()
        return self.ends

    @property
    def ends(self) -> list[dict[str, Any]]:
        return [to_json(r) for r in self.records if r.kind.value == "end"]

    @property
    def starts(self) -> list[dict[str, Any]]:
        return [to_json(r) for r in self.records if r.kind.value == "start"]

    def _packet(self, src: bytes, dst: bytes, src_port: int, dst_port: int, flags: int, payload: bytes) -> Packet:
        if self.protocol == "udp":
            return build_udp(src, dst, src_port, dst_port, payload)
        return build_tcp(src, dst, src_port, dst_port, flags=flags, payload=payload)

    def _drain(self) -> None:
        while (record := self.tracker.poll_record()) is not None:
            assert_conforms(to_json(record), record.kind.value)
            self.records.append(record)


def counts(reports: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(r["tx_packets"], r["rx_packets"]) for r in reports]


# records


@pytest.mark.shows("tunnel", 90)
def test_a_request_and_its_reply_are_one_flow() -> None:
    talk = Talk("udp")
    talk.tx(payload=b"question")
    talk.now += 0.25
    talk.rx(payload=b"a longer answer")
    (start,) = talk.starts
    (end,) = talk.end()
    assert start == {
        "protocol": "udp",
        "inner_src_ip": "100.64.0.1",
        "inner_src_port": 5000,
        "inner_dst_ip": "10.0.0.1",
        "inner_dst_port": 80,
        "outers": [
            {
                "src_ip": "192.0.2.1",
                "src_port": 52625,
                "dst_ip": "198.51.100.7",
                "dst_port": 52625,
                "path_activated_at": "2027-01-15T08:01:40.000000Z",
            }
        ],
        "flow_start": "2027-01-15T08:01:40.000000Z",
    }
    assert end == start | {
        "flow_end": "2027-01-15T08:01:40.250000Z",
        "last_packet": "2027-01-15T08:01:40.250000Z",
        "rx_packets": 1,
        "tx_packets": 1,
        "rx_bytes": 15,
        "tx_bytes": 8,
    }


@pytest.mark.shows("tunnel", 90)
def test_a_relayed_path_has_no_source() -> None:
    talk = Talk("udp", RELAYED)
    talk.tx()
    (outer,) = talk.starts[0]["outers"]
    assert set(outer) == {"dst_ip", "dst_port", "path_activated_at"}
    assert (outer["dst_ip"], outer["dst_port"]) == ("198.51.100.7", 52625)


def test_a_gateway_names_the_client_as_source() -> None:
    tracker = FlowTracker("gateway", EPOCH)
    scope = ("client", "resource")
    request = build_udp(CLIENT, SERVER, 5000, 53, b"q")
    tracker.handle_tx(scope, request, a_token(role="responder"), RELAYED, 1.0, domain="intranet.example")
    start = tracker.poll_record()
    assert start is not None
    report = to_json(start)
    assert report["domain"] == "intranet.example"
    assert (report["outers"][0]["src_ip"], report["outers"][0]["dst_ip"]) == ("198.51.100.7", "203.0.113.9")


def test_a_gateway_counts_an_answer_that_is_translated_after_it_was_matched() -> None:
    tracker = FlowTracker("gateway", EPOCH)
    tracker.handle_tx(("client", "r"), build_udp(CLIENT, SERVER, 5000, 53, b"q"), TOKEN, DIRECT, 1.0)
    answer = build_udp(SERVER, CLIENT, 53, 5000, b"answer")
    flow = tracker.match_rx("client", answer, 2.0)
    assert flow is not None
    answer.set_src(ip_address("100.96.0.1").packed)
    tracker.count_rx(flow, answer, 2.0)
    tracker.shutdown(3.0)
    ends = drained(tracker)[1:]
    assert [(r.rx_packets, r.rx_bytes) for r in ends] == [(1, 6)]


def test_what_another_client_opened_is_told_from_its_side() -> None:
    tracker = FlowTracker("client", EPOCH)
    question = build_udp(SERVER, CLIENT, 7, 9, b"q")
    tracker.handle_tx("other", question, a_token(role="responder"), DIRECT, 1.0, opened_by_peer=True)
    tracker.handle_rx("other", build_udp(CLIENT, SERVER, 9, 7, b"aa"), 1.0)
    tracker.shutdown(2.0)
    _, end = drained(tracker)
    report = to_json(end)
    assert (report["inner_src_ip"], report["tx_bytes"], report["rx_bytes"]) == ("10.0.0.1", 1, 2)
    assert report["outers"][0]["src_ip"] == "198.51.100.7"


# starts and splits


@pytest.mark.shows("tunnel", 91)
@pytest.mark.parametrize(
    ("talked", "expected"),
    [
        ("S S", [(2, 0)]),
        ("S r S", [(2, 1)]),
        ("S r A S", [(2, 1), (1, 0)]),
        ("S r A D d S", [(3, 2), (1, 0)]),
    ],
)
def test_a_syn_after_more_than_syns_is_another_flow(talked: str, expected: list[tuple[int, int]]) -> None:
    talk = Talk()
    steps = {
        "S": lambda: talk.tx(SYN),
        "r": lambda: talk.rx(SYN | ACK),
        "A": lambda: talk.tx(ACK),
        "D": lambda: talk.tx(PSH | ACK, b"data"),
        "d": lambda: talk.rx(PSH | ACK, b"data"),
    }
    for step in talked.split():
        steps[step]()
    assert counts(talk.end()) == expected


@pytest.mark.shows("tunnel", 92)
@pytest.mark.parametrize("flags", [ACK, FIN, FIN | ACK, RST, RST | ACK, SYN | FIN, SYN | RST])
def test_the_tail_of_an_unseen_connection_is_no_flow(flags: int) -> None:
    talk = Talk()
    talk.tx(flags)
    assert talk.end() == []


@pytest.mark.shows("tunnel", 92)
@pytest.mark.parametrize(("flags", "payload"), [(ACK, b"x"), (PSH | ACK, b"x"), (SYN, b""), (SYN | ACK, b"")])
def test_what_starts_a_flow(flags: int, payload: bytes) -> None:
    talk = Talk()
    talk.tx(flags, payload)
    assert counts(talk.end()) == [(1, 0)]


@pytest.mark.parametrize("flags", [FIN | ACK, RST])
def test_a_packet_with_payload_that_ends_a_connection_starts_none(flags: int) -> None:
    talk = Talk()
    talk.tx(flags, b"last words")
    assert talk.end() == []


def test_answers_start_nothing() -> None:
    talk = Talk("udp")
    talk.rx(payload=b"x")
    assert talk.end() == []


def test_without_token_or_path_no_flow_starts_but_a_known_one_goes_on() -> None:
    tracker = FlowTracker("client", EPOCH)
    packet = build_udp(CLIENT, SERVER, 1, 2)
    tracker.handle_tx(PEER, packet, None, DIRECT, 1.0)
    tracker.handle_tx(PEER, packet, TOKEN, None, 1.0)
    assert len(tracker) == 0
    tracker.handle_tx(PEER, packet, TOKEN, DIRECT, 1.0)
    tracker.handle_tx(PEER, packet, None, None, 1.0)
    tracker.shutdown(2.0)
    assert [r.tx_packets for r in drained(tracker)] == [0, 2]


def test_what_is_neither_tcp_nor_udp_is_no_flow() -> None:
    tracker = FlowTracker("client", EPOCH)
    tracker.handle_tx(PEER, build_echo(CLIENT, SERVER, 1), TOKEN, DIRECT, 1.0)
    tracker.handle_rx(PEER, build_echo(SERVER, CLIENT, 1, reply=True), 1.0)
    assert len(tracker) == 0


# paths


@pytest.mark.shows("tunnel", 92)
def test_a_new_path_is_stamped_and_the_first_one_kept() -> None:
    talk = Talk("udp", nth_path(1))
    talk.tx()
    talk.now += 10
    talk.path = nth_path(2)
    talk.tx()
    talk.now += 10
    talk.path = nth_path(1)
    talk.tx()
    talk.path = nth_path(1)  # an equal one is no change
    talk.tx()
    (end,) = talk.end()
    assert [(o["src_port"], o["path_activated_at"][17:19]) for o in end["outers"]] == [
        (10_001, "40"),
        (10_002, "50"),
        (10_001, "00"),
    ]
    assert len(talk.starts[0]["outers"]) == 1


@pytest.mark.shows("tunnel", 92)
def test_the_17th_path_is_another_flow() -> None:
    talk = Talk()
    for number in range(17):
        talk.path = nth_path(number)
        talk.tx(SYN if number == 0 else ACK)
    first, second = talk.end()
    assert [len(r["outers"]) for r in (first, second)] == [16, 1]
    assert counts([first, second]) == [(16, 0), (1, 0)]


def test_a_fin_on_the_17th_path_divides_nothing() -> None:
    talk = Talk()
    for number in range(17):
        talk.path = nth_path(number)
        talk.tx(SYN if number == 0 else FIN | ACK if number == 16 else ACK)
    assert counts(talk.end()) == [(17, 0)]


# ends


def test_idle_for_more_than_120_seconds() -> None:
    talk = Talk("udp")
    talk.tx()
    talk.wait(120.0)
    talk.rx()
    talk.wait(120.0)
    assert talk.ends == []
    talk.wait(1.0)
    (end,) = talk.ends
    assert end["last_packet"] < end["flow_end"] == "2027-01-15T08:05:40.000000Z"
    assert talk.tracker.poll_timeout() is None


def test_a_packet_after_the_pause_belongs_to_another_flow_even_before_the_sweep() -> None:
    talk = Talk("udp")
    talk.tx()
    talk.now += 121.0
    talk.rx()
    talk.tx()
    assert counts(talk.end()) == [(1, 0), (1, 0)]


@pytest.mark.parametrize("by_initiator", [True, False])
def test_a_reset_ends_at_once(by_initiator: bool) -> None:
    talk = Talk()
    talk.tx(SYN)
    talk.now += 5
    (talk.tx if by_initiator else talk.rx)(RST)
    (end,) = talk.ends
    assert end["flow_end"] == end["last_packet"] == "2027-01-15T08:01:45.000000Z"
    assert sum(counts([end])[0]) == 2


def test_both_fins_end_with_the_last_packet() -> None:
    talk = Talk()
    talk.tx(SYN)
    talk.tx(FIN | ACK)
    talk.now += 2
    talk.rx(FIN | ACK)
    talk.now += 0.5
    talk.tx(ACK)
    talk.tx(ACK, b"again, since a router lost the first one")
    talk.wait(2.0)
    (end,) = talk.ends
    assert end["flow_end"] == end["last_packet"] == "2027-01-15T08:01:42.500000Z"
    assert counts([end]) == [(4, 1)]


def test_one_fin_is_not_the_end() -> None:
    talk = Talk()
    talk.tx(SYN)
    talk.rx(FIN | ACK)
    talk.rx(FIN | ACK)
    talk.wait(119.0)
    assert talk.ends == []


def test_a_port_reused_right_after_the_fins_is_another_flow() -> None:
    talk = Talk()
    for _ in range(3):
        talk.tx(SYN)
        talk.tx(FIN | ACK)
        talk.rx(FIN | ACK)
    assert counts(talk.end()) == [(2, 1)] * 3
    assert len({r["flow_start"] for r in talk.ends}) == 3


def test_access_that_ends_takes_its_flows_along() -> None:
    tracker = FlowTracker("gateway", EPOCH)
    for port, scope in enumerate([("c", "r1"), ("c", "r1"), ("c", "r2"), ("d", "r1")]):
        tracker.handle_tx(scope, build_udp(CLIENT, SERVER, port, 53), TOKEN, DIRECT, 1.0)
    assert len(drained(tracker)) == 4
    tracker.end_scope(("c", "r1"), 2.0)
    assert [r.inner_src.port for r in drained(tracker)] == [0, 1]
    tracker.end_peer("c", 2.0)
    assert [r.inner_src.port for r in drained(tracker)] == [2]
    tracker.end_peer("c", 2.0)
    tracker.end_scope(("x", "r1"), 2.0)
    assert len(tracker) == 1


@pytest.mark.parametrize("changed", ["resource", "name"])
def test_another_resource_or_name_behind_the_same_addresses_is_another_flow(changed: str) -> None:
    tracker = FlowTracker("gateway", EPOCH)
    packet = build_udp(CLIENT, SERVER, 1, 53)
    tracker.handle_tx(("c", "r1"), packet, TOKEN, DIRECT, 1.0, domain="a.example")
    scope, domain = (("c", "r2"), "a.example") if changed == "resource" else (("c", "r1"), "b.example")
    tracker.handle_tx(scope, packet, TOKEN, DIRECT, 1.0, domain=domain)
    assert [r.kind.value for r in drained(tracker)] == ["start", "end", "start"]


def test_too_many_flows_end_the_one_unused_for_longest() -> None:
    tracker = FlowTracker("client", EPOCH, max_flows=3)
    packets = [build_udp(CLIENT, SERVER, port, 53) for port in range(4)]
    for now, port in enumerate([0, 1, 2, 0, 3]):
        tracker.handle_tx(PEER, packets[port], TOKEN, DIRECT, float(now))
    assert [(r.kind.value, r.inner_src.port) for r in drained(tracker)] == [
        ("start", 0), ("start", 1), ("start", 2), ("end", 1), ("start", 3),
    ]  # fmt: skip
    assert (len(tracker), tracker.evictions) == (3, 1)


def test_short_flows_leave_nothing_behind() -> None:
    tracker = FlowTracker("client", EPOCH, max_flows=4)
    for number in range(20_000):
        now = number * 1e-4
        tracker.handle_tx(PEER, build_tcp(CLIENT, SERVER, 1, 2, flags=SYN), TOKEN, DIRECT, now)
        tracker.handle_tx(PEER, build_tcp(CLIENT, SERVER, 1, 2, flags=RST), TOKEN, DIRECT, now)
        drained(tracker)
    assert len(tracker) == 0
    assert len(tracker._due) < 2000
    assert not tracker._by_peer


# properties


@given(st.data())
def test_counters_add_up_to_what_was_sent(data: st.DataObject) -> None:
    """Whatever is said when: each packet of a flow is in exactly one record, and records come in pairs."""
    tracker = FlowTracker("client", EPOCH, max_flows=data.draw(st.integers(1, 4)))
    now, sent, sent_bytes, received_by_flow = 0.0, 0, 0, 0
    records: list[FlowRecord] = []
    for _ in range(data.draw(st.integers(1, 40))):
        now += data.draw(st.sampled_from([0.0, 0.5, 30.0, 120.0, 121.0]))
        port, size = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 50))
        step = data.draw(st.sampled_from(["udp", "syn", "data", "answer", "timeout", "reset"]))
        path = nth_path(data.draw(st.integers(0, 30)))
        if step == "timeout":
            tracker.handle_timeout(now)
            due = tracker.poll_timeout()
            assert due is None or due > now
        elif step == "answer":
            answer = build_udp(SERVER, CLIENT, 80, port, bytes(size))
            flow = tracker.match_rx(PEER, answer, now)
            if flow is not None:
                received_by_flow += 1
                tracker.count_rx(flow, answer, now)
        elif step == "reset":
            tracker.end_scope(PEER, now)
        else:
            packet = (
                build_udp(CLIENT, SERVER, port, 80, bytes(size))
                if step == "udp"
                else build_tcp(
                    CLIENT, SERVER, port, 80, flags=SYN if step == "syn" else ACK, payload=bytes(size) + b"x"
                )
            )
            tracker.handle_tx(PEER, packet, TOKEN, path, now, domain=data.draw(st.sampled_from([None, "a.example"])))
            sent, sent_bytes = sent + 1, sent_bytes + packet.payload_length
        records += drained(tracker)
    tracker.shutdown(now)
    records += drained(tracker)
    ends = [r for r in records if r.kind.value == "end"]
    assert sum(r.tx_packets for r in ends) == sent
    assert sum(r.tx_bytes for r in ends) == sent_bytes
    assert sum(r.rx_packets for r in ends) == received_by_flow
    starts = {r.flow_start: r for r in records if r.kind.value == "start"}
    assert len(starts) == len(ends)
    for end in ends:
        assert end.tx_packets > 0
        start = starts.pop(end.flow_start)
        assert (start.protocol, start.inner_src, start.inner_dst) == (end.protocol, end.inner_src, end.inner_dst)


@pytest.mark.shows("tunnel", 93)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 63), st.integers(0, 20), st.floats(0, 130)), max_size=40))
def test_every_record_conforms_to_the_schema(steps: list[tuple[bool, int, int, float]]) -> None:
    talk = Talk()  # asserts conformance of each record
    for is_tx, flags, size, pause in steps:
        talk.now += pause
        talk.path = nth_path(size) if size % 3 else RELAYED
        (talk.tx if is_tx else talk.rx)(flags, bytes(size))
    talk.end()
    assert len(talk.starts) == len(talk.ends)


# tokens


@pytest.mark.shows("tunnel", 93)
def test_tokens_that_count() -> None:
    plain = a_token()
    assert plain.claims["policy_authorization_id"] == AUTHORIZATION
    assert (plain.role, plain.uploads_enabled, plain.expires_at) == ("initiator", True, 1_900_000_000)
    full = a_token(resource_address="10.0.0.0/8", initiator_device_os_name="Linux", future_claim=[1])
    assert full.claims["resource_address"] == "10.0.0.0/8"
    assert "future_claim" not in full.claims


@pytest.mark.shows("tunnel", 93)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "a.b.c",
        token_text(policy_id=None),
        token_text(alg="none"),
        token_text(signature=""),
        token_text(role="observer"),
        token_text(exp="soon"),
        token_text(uploads_enabled=1),
        token_text() + ".more",
        token_text(signature="c2ln\r\nHost: x"),
        f"{segment({'alg': 'HS256'})}.bm90IGpzb24.c2ln",
    ],
)
def test_tokens_that_do_not(text: str) -> None:
    assert IngestToken.parse(text) is None


def test_a_token_is_not_shown() -> None:
    text = token_text()
    tracker = FlowTracker("client", EPOCH)
    tracker.handle_tx(PEER, build_udp(CLIENT, SERVER, 1, 2), a_token(), DIRECT, 1.0)
    (record,) = drained(tracker)
    for shown in (repr(a_token()), str(a_token()), repr(record)):
        assert text not in shown
        assert text.split(".")[2] not in shown


def drained(tracker: FlowTracker) -> list[FlowRecord]:
    records = []
    while (record := tracker.poll_record()) is not None:
        assert_conforms(to_json(record), record.kind.value)
        records.append(record)
    return records
