"""Flows between clients, by who opened them: spec/tunnel.md §12, §23 items 64, 67, 68."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from fz_core.packet import Packet, build_echo, build_icmp, build_icmp_unreachable, build_ip, build_tcp, build_udp
from fz_core.tunnel.conntrack import ConnTrack

US4, PEER4, OTHER4 = (ip_address(ip).packed for ip in ("100.64.0.1", "100.64.0.2", "100.64.0.3"))
US6, PEER6 = (ip_address(ip).packed for ip in ("fd00:2021:1111::1", "fd00:2021:1111::2"))


def ours(our_port: int = 5000, peer_port: int = 443, *, kind: str = "udp", v6: bool = False) -> Packet:
    """A packet from us to the peer."""
    return packet(kind, *((US6, PEER6) if v6 else (US4, PEER4)), our_port, peer_port)


def theirs(peer_port: int = 443, our_port: int = 5000, *, kind: str = "udp", v6: bool = False) -> Packet:
    """A packet from the peer to us."""
    return packet(kind, *((PEER6, US6) if v6 else (PEER4, US4)), peer_port, our_port)


def packet(kind: str, src: bytes, dst: bytes, src_port: int, dst_port: int) -> Packet:
    if kind == "udp":
        return build_udp(src, dst, src_port, dst_port)
    if kind == "tcp":
        return build_tcp(src, dst, src_port, dst_port, 16)
    return build_echo(src, dst, src_port, reply=kind == "reply")


@pytest.mark.shows("tunnel", 64)
@pytest.mark.parametrize("v6", [False, True])
def test_only_the_reply_to_our_flow_is_a_reply(v6: bool) -> None:
    flows = ConnTrack()
    flows.handle_outbound(ours(v6=v6), 0.0)
    assert flows.is_reply(theirs(v6=v6), 1.0)
    assert not flows.is_reply(theirs(peer_port=444, v6=v6), 1.0)
    assert not flows.is_reply(theirs(our_port=5001, v6=v6), 1.0)
    assert not flows.is_reply(theirs(kind="tcp", v6=v6), 1.0)
    assert not flows.is_reply(theirs(v6=not v6), 1.0)
    assert not flows.is_reply(build_udp(OTHER4, US4, 443, 5000), 1.0)
    assert not flows.is_peer_opened(ours(v6=v6), 1.0)


@pytest.mark.shows("tunnel", 68)
def test_our_reply_does_not_make_a_peers_flow_ours() -> None:
    flows = ConnTrack()
    flows.handle_inbound(theirs(), 0.0)
    assert flows.is_peer_opened(ours(), 1.0)
    flows.handle_outbound(ours(), 1.0)
    assert not flows.is_reply(theirs(), 2.0)
    assert flows.is_peer_opened(ours(), 2.0)


@pytest.mark.shows("tunnel", 68)
@pytest.mark.parametrize("v6", [False, True])
def test_echo_replies_match_by_identifier(v6: bool) -> None:
    flows = ConnTrack()
    flows.handle_outbound(ours(7, kind="request", v6=v6), 0.0)
    assert flows.is_reply(theirs(7, kind="reply", v6=v6), 1.0)
    assert not flows.is_reply(theirs(8, kind="reply", v6=v6), 1.0)


@pytest.mark.shows("tunnel", 68)
@pytest.mark.parametrize(("kind", "ttl"), [("udp", 120.0), ("reply", 120.0), ("tcp", 7440.0)])
@pytest.mark.parametrize("opener", ["us", "peer"])
@pytest.mark.parametrize("refreshed_by", ["us", "peer", None])
def test_a_flow_lapses_after_its_last_packet(kind: str, ttl: float, opener: str, refreshed_by: str | None) -> None:
    flows = ConnTrack()

    def pass_by(who: str, now: float) -> None:
        if who == "us":
            flows.handle_outbound(ours(7, 7, kind=kind), now)
        elif not flows.is_reply(theirs(7, 7, kind=kind), now):
            flows.handle_inbound(theirs(7, 7, kind=kind), now)

    def lives(now: float) -> bool:
        if opener == "us":
            return flows.is_reply(theirs(7, 7, kind=kind), now)
        return flows.is_peer_opened(ours(7, 7, kind=kind), now)

    pass_by(opener, 0.0)
    if refreshed_by is not None:
        pass_by(refreshed_by, ttl - 1)
    assert flows.poll_timeout() == (ttl if refreshed_by is None else 2 * ttl - 1)
    assert lives(ttl + 1) is (refreshed_by is not None)


def test_a_flow_that_lapsed_may_be_opened_by_the_other_side() -> None:
    flows = ConnTrack()
    flows.handle_inbound(theirs(), 0.0)
    flows.handle_outbound(ours(), 120.0)
    assert flows.is_reply(theirs(), 121.0)
    assert not flows.is_peer_opened(ours(), 121.0)


@pytest.mark.shows("tunnel", 68)
def test_a_flow_of_ours_that_lapsed_unseen_stays_the_peers() -> None:
    flows = ConnTrack()
    flows.handle_outbound(ours(), 0.0)
    flows.handle_inbound(theirs(), 130.0)
    flows.handle_outbound(ours(), 131.0)
    assert not flows.is_reply(theirs(), 132.0)
    assert flows.is_peer_opened(ours(), 132.0)


def error_about(quoted: Packet) -> Packet:
    return build_icmp_unreachable(quoted)


@pytest.mark.shows("tunnel", 67)
@pytest.mark.parametrize("v6", [False, True])
def test_errors_need_a_known_flow_and_the_right_sender(v6: bool) -> None:
    flows = ConnTrack()
    flows.handle_outbound(ours(v6=v6), 0.0)
    flows.handle_inbound(theirs(1000, 22, kind="tcp", v6=v6), 0.0)
    about_ours, about_theirs = error_about(ours(v6=v6)), error_about(theirs(1000, 22, kind="tcp", v6=v6))
    assert flows.may_accept_error(about_ours, 1.0)
    assert not flows.may_send_error(about_ours, 1.0)
    assert flows.may_send_error(about_theirs, 1.0)
    assert not flows.may_accept_error(about_theirs, 1.0)
    for unknown in (error_about(ours(5001, v6=v6)), error_about(theirs(1001, 22, kind="tcp", v6=v6))):
        assert not flows.may_accept_error(unknown, 1.0)
        assert not flows.may_send_error(unknown, 1.0)
    assert not flows.may_accept_error(about_ours, 120.0)


@pytest.mark.shows("tunnel", 67)
def test_errors_about_answers_within_a_flow() -> None:
    flows = ConnTrack()
    flows.handle_outbound(ours(), 0.0)
    flows.handle_inbound(theirs(1000, 22), 0.0)
    assert flows.may_accept_error(error_about(ours(22, 1000)), 1.0)  # our answer to the peer's flow
    assert flows.may_send_error(error_about(theirs()), 1.0)  # the peer's answer to our flow


def test_only_readable_errors_are_about_a_flow() -> None:
    flows = ConnTrack()
    flows.handle_outbound(ours(), 0.0)
    for other in (ours(), build_icmp(PEER4, US4, 3, 0, bytes(9)), build_icmp(PEER4, US4, 13, 0, bytes(16))):
        assert not flows.may_accept_error(other, 0.0)
        assert not flows.may_send_error(other, 0.0)


def test_what_has_no_ports_is_no_flow() -> None:
    flows = ConnTrack()
    flows.handle_inbound(build_ip(PEER4, US4, 47, bytes(8)), 0.0)
    flows.handle_outbound(build_ip(US4, PEER4, 47, bytes(8)), 0.0)
    assert len(flows) == 0
    assert not flows.is_reply(build_ip(PEER4, US4, 47, bytes(8)), 0.0)


def test_a_flood_of_the_peer_leaves_our_flows_alone() -> None:
    flows = ConnTrack(max_flows=64)
    flows.handle_outbound(ours(), 0.0)
    for port in range(1000):
        flows.handle_inbound(theirs(port, 22), 1.0)
    assert len(flows) == 33
    assert flows.is_reply(theirs(), 2.0)
    assert flows.is_peer_opened(ours(22, 999), 2.0)
    assert not flows.is_peer_opened(ours(22, 967), 2.0)


def test_the_longest_unused_flow_makes_room() -> None:
    flows = ConnTrack(max_flows=4)
    flows.handle_outbound(ours(1, kind="tcp"), 0.0)
    flows.handle_outbound(ours(2), 1.0)
    assert flows.is_reply(theirs(our_port=1, kind="tcp"), 2.0)
    flows.handle_outbound(ours(3), 3.0)
    assert not flows.is_reply(theirs(our_port=2), 3.0)
    assert flows.is_reply(theirs(our_port=1, kind="tcp"), 3.0)


def test_lapsed_flows_are_freed_by_time_and_by_new_flows() -> None:
    flows = ConnTrack()
    for port in range(10):
        flows.handle_outbound(ours(port), 0.0)
        flows.handle_inbound(theirs(443, 100 + port), 60.0)
    assert (len(flows), flows.poll_timeout()) == (20, 120.0)
    flows.handle_timeout(120.0)
    assert (len(flows), flows.poll_timeout()) == (10, 180.0)
    flows.handle_inbound(theirs(444), 300.0)
    assert len(flows) == 1
    flows.clear()
    assert (len(flows), flows.poll_timeout()) == (0, None)
