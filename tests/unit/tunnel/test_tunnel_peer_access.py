"""What a peer client may do here: spec/tunnel.md §12, §23 items 10, 11, 64 to 70."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fz_core.packet import (
    DropReason,
    Packet,
    build_echo,
    build_icmp,
    build_icmp_unreachable,
    build_ip,
    build_tcp,
    build_udp,
)
from fz_core.portal.types import Filter
from fz_core.tunnel.conntrack import ConnTrack
from fz_core.tunnel.peer_access import PeerAccess, PeerDecision

OWN = tuple(ip_address(ip).packed for ip in ("100.64.0.1", "fd00:2021:1111::1"))
PEER = tuple(ip_address(ip).packed for ip in ("100.64.0.2", "fd00:2021:1111::2"))
STRANGER = tuple(ip_address(ip).packed for ip in ("100.64.0.3", "fd00:2021:1111::3"))
TCP, UDP, ICMP, ICMPV6, GRE = 6, 17, 1, 58, 47
ACCEPT, PROHIBITED, ROUTE = PeerDecision.ACCEPT, PeerDecision.PROHIBITED, PeerDecision.ROUTE
SSH, DNS, PING = Filter("tcp", 22, 22), Filter("udp", 53, 53), Filter("icmp")
LOW = "00000000-0000-0000-0000-000000000001"
HIGH = "00000000-0000-0000-0000-00000000000f"


class Host:
    """We, with one peer."""

    def __init__(self) -> None:
        self.access = PeerAccess()
        self.flows = ConnTrack()

    def inbound(self, packet: Packet, now: float = 0.0) -> PeerDecision | DropReason:
        return self.access.decide_inbound(packet, OWN, PEER, self.flows, now)

    def outbound(self, packet: Packet, now: float = 0.0) -> PeerDecision | DropReason:
        return self.access.decide_outbound(packet, self.flows, now)

    def open(self, packet: Packet, now: float = 0.0) -> None:
        """We send in a flow of our own."""
        assert self.outbound(packet, now) is ROUTE
        self.flows.handle_outbound(packet, now)


def udp_in(src_port: int = 4000, dst_port: int = 53, family: int = 0) -> Packet:
    return build_udp(PEER[family], OWN[family], src_port, dst_port)


def udp_out(src_port: int = 53, dst_port: int = 4000, family: int = 0) -> Packet:
    return build_udp(OWN[family], PEER[family], src_port, dst_port)


def granted(*filters: Filter, expires_at: float | None = None) -> Host:
    host = Host()
    host.access.grant(LOW, filters, expires_at)
    return host


def test_without_grants_nothing_may_begin() -> None:
    host = Host()
    assert host.access.is_empty
    for packet in (udp_in(), build_echo(PEER[0], OWN[0], 1), build_ip(PEER[1], OWN[1], GRE, bytes(8))):
        assert host.inbound(packet) is PROHIBITED
    assert len(host.flows) == 0


@pytest.mark.shows("tunnel", 10)
@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP, ICMPV6, GRE])
def test_a_grant_without_filters_opens_everything(protocol: int) -> None:
    host = granted(SSH)
    assert host.access.allows(protocol, 22) is (protocol == TCP)
    host.access.grant(HIGH, (), None)
    assert host.access.allows(protocol, 22)
    assert host.access.allows(protocol, -1)


@pytest.mark.shows("tunnel", 11)
def test_other_icmp_passes_with_icmp() -> None:
    timestamp = build_icmp(PEER[0], OWN[0], 13, 0, bytes(16))
    assert granted(SSH, DNS).inbound(timestamp) is PROHIBITED
    assert granted(PING).inbound(timestamp) is ACCEPT
    assert granted(PING).inbound(build_icmp(PEER[1], OWN[1], 135, 0, bytes(20))) is ACCEPT


def test_grants_add_up() -> None:
    host = granted(SSH)
    host.access.grant(HIGH, [DNS], None)
    assert host.inbound(udp_in()) is ACCEPT
    assert host.inbound(build_tcp(PEER[0], OWN[0], 4000, 22, 2)) is ACCEPT
    assert host.inbound(build_tcp(PEER[0], OWN[0], 4000, 53, 2)) is PROHIBITED
    assert host.access.resource_ids == {LOW, HIGH}


@pytest.mark.shows("tunnel", 64)
@pytest.mark.parametrize("family", [0, 1])
def test_the_reply_to_our_flow_needs_no_grant(family: int) -> None:
    host = Host()
    host.open(udp_out(5000, 443, family))
    assert host.inbound(udp_in(443, 5000, family)) is ACCEPT
    assert host.inbound(udp_in(444, 5000, family)) is PROHIBITED
    assert host.inbound(udp_in(443, 5000, 1 - family)) is PROHIBITED


@pytest.mark.shows("tunnel", 65)
@pytest.mark.parametrize("end", ["revoke", "expire", "deadline", "past", "resync", "filters"])
def test_what_ends_access_ends_the_peers_flows(end: str) -> None:
    host = granted(DNS, expires_at=60.0)
    assert host.inbound(udp_in()) is ACCEPT
    assert host.outbound(udp_out()) is ACCEPT
    now = 1.0
    match end:
        case "revoke":
            assert host.access.revoke(LOW)
        case "expire":
            now = 61.0
            assert host.access.expire(now) == [LOW]
        case "deadline":  # decisions know the time, whoever forgot to call expire
            now = 60.0
        case "past":
            host.access.grant(LOW, [DNS], 0.5)
        case "resync":
            assert host.access.resync({}) == [LOW]
        case "filters":
            assert host.access.update_filters(LOW, [SSH])
    assert host.inbound(udp_in(), now) is PROHIBITED
    assert host.outbound(udp_out(), now) is ROUTE


@pytest.mark.shows("tunnel", 65)
def test_resync_keeps_what_is_listed_with_its_new_expiry() -> None:
    host = granted(DNS, expires_at=60.0)
    host.access.grant(HIGH, [SSH], None)
    assert host.access.resync({LOW: 90.0, "unknown": None}) == [HIGH]
    assert host.access.resource_ids == {LOW}
    assert host.access.next_expiry() == 90.0
    assert host.inbound(udp_in(), 61.0) is ACCEPT
    assert host.access.resync({LOW: None}) == []
    assert host.access.next_expiry() is None


def test_expiry_is_per_grant_and_movable() -> None:
    access = PeerAccess()
    access.grant(LOW, [DNS], 60.0)
    access.grant(HIGH, [SSH], 30.0)
    assert access.next_expiry() == 30.0
    assert access.expire(29.9) == []
    assert access.expire(30.0) == [HIGH]
    access.grant(LOW, [DNS], 90.0)
    assert access.expire(89.0) == []
    assert access.expire(90.0) == [LOW]
    assert access.is_empty
    assert not access.revoke(LOW)
    assert not access.update_filters(LOW, [])


@pytest.mark.shows("tunnel", 66)
@pytest.mark.parametrize("family", [0, 1])
def test_spoofed_source_and_foreign_destination_are_errors(family: int) -> None:
    host = granted()
    refused = [
        build_udp(STRANGER[family], OWN[family], 1, 2),
        build_udp(PEER[family], STRANGER[family], 1, 2),
        build_udp(OWN[family], PEER[family], 1, 2),
        build_icmp_unreachable(build_udp(OWN[family], STRANGER[family], 1, 2)),
    ]
    assert [host.inbound(packet) for packet in refused] == [DropReason.NOT_ALLOWED] * 4
    assert len(host.flows) == 0


@pytest.mark.shows("tunnel", 67)
@pytest.mark.parametrize("family", [0, 1])
def test_errors_are_judged_by_their_quote_not_by_grants(family: int) -> None:
    host = granted()
    mine, stray = udp_out(5000, 443, family), udp_out(5001, 443, family)
    host.open(mine)
    assert host.inbound(build_icmp_unreachable(mine)) is ACCEPT
    assert host.inbound(build_icmp_unreachable(stray)) is DropReason.NOT_ALLOWED
    assert host.inbound(udp_in(7, 8, family)) is ACCEPT
    answer = build_icmp_unreachable(udp_in(7, 8, family))
    assert host.outbound(answer) is ACCEPT
    # The same error, had the peer sent it: it quotes the peer's own packet.
    from_peer = build_icmp_unreachable(udp_in(7, 8, family))
    from_peer.set_src(PEER[family])
    from_peer.set_dst(OWN[family])
    assert host.inbound(from_peer) is DropReason.NOT_ALLOWED


def test_other_protocols_are_not_sent_to_peers() -> None:
    host = granted()
    unsupported = DropReason.UNSUPPORTED_PROTOCOL
    assert host.outbound(build_ip(OWN[0], PEER[0], GRE, bytes(8))) is unsupported
    assert host.outbound(build_icmp(OWN[0], PEER[0], 13, 0, bytes(16))) is unsupported
    assert host.outbound(build_icmp_unreachable(udp_in(9, 9))) is unsupported


@pytest.mark.shows("tunnel", 68, 70)
def test_answers_to_the_peer_need_no_route_and_stay_the_peers() -> None:
    host = granted(DNS)
    assert host.outbound(udp_out()) is ROUTE
    assert host.inbound(udp_in()) is ACCEPT
    assert host.outbound(udp_out(), 100.0) is ACCEPT
    host.flows.handle_outbound(udp_out(), 100.0)
    assert host.inbound(udp_in(), 200.0) is ACCEPT
    host.access.revoke(LOW)
    assert host.inbound(udp_in(), 201.0) is PROHIBITED


@pytest.mark.shows("tunnel", 69)
def test_attribution_names_the_highest_id_that_allows() -> None:
    access = PeerAccess()
    assert access.attribute(UDP, 53) is None
    access.grant(HIGH, [DNS], 60.0)
    access.grant(LOW, [DNS, SSH], None)
    assert access.attribute(UDP, 53) == HIGH
    assert access.attribute(TCP, 22) == LOW
    assert access.attribute(TCP, 23) is None
    assert access.attribute(UDP, 53, 60.0) == LOW


filters = st.lists(st.sampled_from([SSH, DNS, PING, Filter("udp", 50, 60), Filter("tcp")]), max_size=3)
grants = st.dictionaries(st.sampled_from("abcd"), st.tuples(filters, st.none() | st.integers(0, 10)))


@given(grants, st.sampled_from([TCP, UDP, ICMP, ICMPV6, GRE]), st.sampled_from([-1, 22, 53, 55]), st.integers(0, 10))
def test_attribution_and_admission_agree(
    given_grants: dict[str, tuple[list[Filter], int | None]], protocol: int, port: int, now: int
) -> None:
    access = PeerAccess()
    for resource_id, (allowed, expires_at) in given_grants.items():
        access.grant(resource_id, allowed, expires_at)
    name = {TCP: "tcp", UDP: "udp", ICMP: "icmp", ICMPV6: "icmp"}.get(protocol)
    opening = [
        resource_id
        for resource_id, (allowed, expires_at) in given_grants.items()
        if (expires_at is None or expires_at > now)
        and (
            not allowed
            or any(
                f.protocol == name and (name == "icmp" or f.port_range_start <= port <= f.port_range_end)
                for f in allowed
            )
        )
    ]
    assert access.allows(protocol, port, now) is bool(opening)
    assert access.attribute(protocol, port, now) == max(opening, default=None)
    access.expire(now)
    assert access.allows(protocol, port) is bool(opening)
