"""Translation between proxy and real addresses on the gateway: spec/tunnel.md §15.2 to §15.4, §23 items 81 to 89."""

from __future__ import annotations

from ipaddress import ip_address
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fz_core.packet import (
    DropReason,
    IcmpError,
    IcmpErrorKind,
    Packet,
    TooBig,
    build_echo,
    build_icmp,
    build_icmp_unreachable,
    build_ip,
    build_tcp,
    build_udp,
    verify_checksums,
)
from fz_core.tunnel.nat import NatTable, next_free

SYN, ACK, FIN, RST = 0x02, 0x10, 0x01, 0x04
EXPIRED = DropReason.EXPIRED_NAT_SESSION
UNSUPPORTED = DropReason.UNSUPPORTED_PROTOCOL


def packed(text: str) -> bytes:
    return ip_address(text).packed


CLIENT = (packed("100.64.0.9"), packed("fd00:2021:1111::9"))
PROXIES = [packed(f"100.96.0.{n}") for n in range(1, 5)] + [packed(f"fd00:2021:1111:8000::{n}") for n in range(4)]
REALS = [packed(ip) for ip in ("93.184.216.34", "93.184.216.35", "2606:2800::1", "2606:2800::2")]
PROXY4, PROXY6, REAL4, REAL6 = PROXIES[0], PROXIES[4], REALS[0], REALS[2]


def own_ip(other: bytes) -> bytes:
    """The client's address in the family of `other`."""
    return CLIENT[0] if len(other) == 4 else CLIENT[1]


def to_proxy(kind: str, proxy: bytes, port: int, *, flags: int = ACK, payload: bytes = b"ask") -> Packet:
    if kind == "udp":
        return build_udp(own_ip(proxy), proxy, port, 443, payload)
    if kind == "tcp":
        return build_tcp(own_ip(proxy), proxy, port, 443, flags, payload=payload)
    return build_echo(own_ip(proxy), proxy, port, 7, payload)


def answer_to(packet: Packet, *, flags: int = ACK, payload: bytes = b"answer") -> Packet:
    """What the resource sends back for a packet that it received."""
    if packet.is_echo:
        return build_echo(packet.dst, packet.src, packet.src_port, 7, payload, reply=True)
    if packet.protocol == 17:
        return build_udp(packet.dst, packet.src, packet.dst_port, packet.src_port, payload)
    return build_tcp(packet.dst, packet.src, packet.dst_port, packet.src_port, flags, payload=payload)


def sent(nat: NatTable, packet: Packet, real: bytes, now: float = 0.0) -> Packet:
    result = nat.translate_outgoing(packet, real, now)
    assert isinstance(result, Packet)
    assert verify_checksums(result) == ()
    assert result.src == own_ip(result.dst)
    return result


def received(nat: NatTable, packet: Packet, now: float = 0.0) -> Packet:
    result = nat.translate_incoming(packet, now)
    assert isinstance(result, Packet)
    assert verify_checksums(result) == ()
    assert result.dst == own_ip(result.src)
    return result


def tick(nat: NatTable, now: float) -> None:
    nat.handle_timeout(now)
    deadline = nat.poll_timeout()
    assert deadline is None or deadline > now


kinds = st.sampled_from(["udp", "tcp", "echo"])
ports = st.integers(0, 65535)
flows = st.tuples(kinds, st.sampled_from(PROXIES), ports)


@pytest.mark.shows("tunnel", 81)
@given(st.lists(st.tuples(flows, st.sampled_from(REALS)), min_size=1, max_size=20, unique_by=lambda f: f[0]))
def test_answers_return_to_their_flow_and_flows_do_not_mix(wanted: list[tuple[tuple[str, bytes, int], bytes]]) -> None:
    nat = NatTable(CLIENT)
    outside = []
    for (kind, proxy, port), real in wanted:
        packet = sent(nat, to_proxy(kind, proxy, port), real)
        assert packet.dst == real
        assert packet.payload == b"ask"
        outside.append((packet.protocol, packet.src_port, packet.dst))
        if not packet.is_echo:
            assert packet.dst_port == 443
    assert len(set(outside)) == len(wanted)
    for (kind, proxy, port), real in reversed(wanted):
        packet = sent(nat, to_proxy(kind, proxy, port), real)
        back = received(nat, answer_to(packet))
        assert (back.src, back.dst_port, back.payload) == (proxy, port, b"answer")
        assert back.protocol == to_proxy(kind, proxy, port).protocol
        assert back.icmp_type == (-1 if kind != "echo" else 0 if back.version == 4 else 129)
    assert len(nat) == len(wanted)


@pytest.mark.parametrize("kind", ["udp", "tcp", "echo"])
@pytest.mark.parametrize(("proxy", "real"), [(PROXY4, REAL6), (PROXY6, REAL4)])
def test_an_address_of_the_other_family_is_reached(kind: str, proxy: bytes, real: bytes) -> None:
    nat = NatTable(CLIENT)
    first = to_proxy(kind, proxy, 5000)
    packet = sent(nat, first, real)
    assert first == to_proxy(kind, proxy, 5000)
    assert packet.version != first.version
    back = received(nat, answer_to(packet))
    assert (back.src, back.dst, back.dst_port, back.payload) == (proxy, own_ip(proxy), 5000, b"answer")


def test_the_same_family_is_rewritten_in_place() -> None:
    nat = NatTable(CLIENT)
    packet = to_proxy("udp", PROXY4, 5000)
    assert nat.translate_outgoing(packet, REAL4, 0.0) is packet
    answer = answer_to(packet)
    assert nat.translate_incoming(answer, 0.0) is answer


@pytest.mark.shows("tunnel", 88)
def test_a_session_keeps_its_real_address() -> None:
    nat = NatTable(CLIENT)
    assert sent(nat, to_proxy("udp", PROXY4, 5000), REALS[0]).dst == REALS[0]
    assert sent(nat, to_proxy("udp", PROXY4, 5000), REALS[0], 100.0).dst == REALS[0]


@pytest.mark.shows("tunnel", 84)
@pytest.mark.parametrize("new", REALS[1:])
def test_another_real_address_is_for_new_sessions_only(new: bytes) -> None:
    nat = NatTable(CLIENT)
    old = sent(nat, to_proxy("udp", PROXY4, 5000), REALS[0])
    assert sent(nat, to_proxy("udp", PROXY4, 5000), new).dst == REALS[0]
    assert received(nat, answer_to(old)).src == PROXY4
    fresh = sent(nat, to_proxy("udp", PROXY4, 5001), new)
    assert fresh.dst == new
    assert received(nat, answer_to(fresh)).dst_port == 5001


@pytest.mark.shows("tunnel", 85)
def test_clearing_forgets_everything() -> None:
    nat = NatTable(CLIENT)
    live = sent(nat, to_proxy("udp", PROXY4, 5000), REALS[0])
    lapsed = sent(nat, to_proxy("tcp", PROXY4, 5000, flags=RST), REALS[0])
    nat.clear()
    assert len(nat) == 0
    assert nat.poll_timeout() is None
    assert nat.translate_incoming(answer_to(live), 1.0) is None
    assert nat.translate_incoming(answer_to(lapsed), 1.0) is None
    assert sent(nat, to_proxy("udp", PROXY4, 5000), REALS[1]).dst == REALS[1]


# -- ports


def test_a_taken_port_gives_way_to_the_next_free_one() -> None:
    nat = NatTable(CLIENT)
    taken = [sent(nat, to_proxy("udp", proxy, 5000), REAL4).src_port for proxy in PROXIES]
    assert taken == list(range(5000, 5008))
    assert sent(nat, to_proxy("udp", PROXY4, 5000), REALS[1]).src_port == 5000
    assert sent(nat, to_proxy("udp", PROXY4, 5003), REAL4).src_port == 5008
    assert sent(nat, to_proxy("udp", PROXY4, 5003 + 6), REAL4).src_port == 5009
    # Another protocol, and another address, have ports of their own.
    assert sent(nat, to_proxy("tcp", PROXY4, 5003), REAL4).src_port == 5003
    assert sent(nat, to_proxy("udp", PROXY4, 6000), REALS[1]).src_port == 6000


def test_behind_the_last_port_comes_port_one() -> None:
    nat = NatTable(CLIENT)
    taken = [sent(nat, to_proxy("echo", proxy, 65534), REAL6).src_port for proxy in PROXIES]
    assert taken == [65534, 65535, 1, 2, 3, 4, 5, 6]


def test_without_a_free_port_the_packet_is_dropped() -> None:
    nat = NatTable(CLIENT, max_sessions=70000)
    for port in range(65536):
        nat.translate_outgoing(to_proxy("udp", PROXY4, port), REAL4, 0.0)
    assert nat.translate_outgoing(to_proxy("udp", PROXIES[1], 9), REAL4, 0.0) is DropReason.NAT_EXHAUSTED
    assert len(nat) == 65536
    tick(nat, 60.0)
    assert sent(nat, to_proxy("udp", PROXIES[1], 9), REAL4, 60.0).src_port == 9


@given(st.sets(st.integers(0, 40)), st.integers(0, 40))
def test_next_free_is_the_smallest_number_missing(taken: set[int], wanted: int) -> None:
    expected = next(n for n in range(wanted, 100) if n not in taken)
    assert next_free(sorted(taken), wanted) == expected


# -- lifetimes


@pytest.mark.shows("tunnel", 82)
@pytest.mark.parametrize("real", [REAL4, REAL6])
@pytest.mark.parametrize(("kind", "ttl"), [("udp", 120), ("echo", 120), ("tcp", 7440)])
def test_an_answered_session_ends_when_idle(kind: str, ttl: int, real: bytes) -> None:
    nat = NatTable(CLIENT)
    packet = sent(nat, to_proxy(kind, PROXY4, 5000), real)
    received(nat, answer_to(packet))
    tick(nat, ttl - 1.0)
    received(nat, answer_to(packet), ttl - 1.0)
    tick(nat, 2 * ttl - 1.5)
    received(nat, answer_to(packet), 2 * ttl - 1.5)
    assert nat.poll_timeout() == 3 * ttl - 1.5
    tick(nat, 3 * ttl - 1.5)
    assert nat.translate_incoming(answer_to(packet), 3 * ttl - 1.5) is EXPIRED
    assert nat.poll_timeout() is None


@pytest.mark.shows("tunnel", 83)
def test_a_udp_answer_after_30_seconds_passes_and_120_later_has_expired() -> None:
    nat = NatTable(CLIENT)
    packet = sent(nat, to_proxy("udp", PROXY4, 5000), REAL4)
    tick(nat, 30.0)
    received(nat, answer_to(packet), 30.0)
    tick(nat, 149.9)
    assert len(nat) == 1
    tick(nat, 150.0)
    assert nat.translate_incoming(answer_to(packet), 150.0) is EXPIRED


@pytest.mark.parametrize("kind", ["udp", "tcp", "echo"])
def test_an_unanswered_session_ends_a_minute_after_the_last_question(kind: str) -> None:
    nat = NatTable(CLIENT)
    packet = sent(nat, to_proxy(kind, PROXY4, 5000), REAL4)
    tick(nat, 59.0)
    sent(nat, to_proxy(kind, PROXY4, 5000), REAL4, 59.0)
    tick(nat, 118.9)
    assert nat.poll_timeout() == 119.0
    tick(nat, 119.0)
    assert nat.translate_incoming(answer_to(packet), 119.0) is EXPIRED


@pytest.mark.parametrize("who", ["client", "resource"])
@pytest.mark.shows("tunnel", 82)
def test_a_reset_ends_the_session_at_the_next_tick(who: str) -> None:
    nat = NatTable(CLIENT)
    packet = sent(nat, to_proxy("tcp", PROXY4, 5000, flags=SYN), REAL4)
    received(nat, answer_to(packet, flags=SYN | ACK))
    if who == "client":
        sent(nat, to_proxy("tcp", PROXY4, 5000, flags=RST), REAL4, 1.0)
    else:
        received(nat, answer_to(packet, flags=RST | ACK), 1.0)
    received(nat, answer_to(packet), 1.5)
    tick(nat, 2.0)
    assert nat.translate_incoming(answer_to(packet), 2.0) is EXPIRED


def test_fins_after_a_reset_prolong_nothing() -> None:
    nat = NatTable(CLIENT)
    packet = sent(nat, to_proxy("tcp", PROXY4, 5000, flags=SYN), REAL4)
    received(nat, answer_to(packet, flags=RST | ACK))
    received(nat, answer_to(packet, flags=FIN | ACK))
    sent(nat, to_proxy("tcp", PROXY4, 5000, flags=FIN | ACK), REAL4, 0.5)
    tick(nat, 1.0)
    assert len(nat) == 0


def test_a_reset_ends_an_unanswered_session_too() -> None:
    nat = NatTable(CLIENT)
    sent(nat, to_proxy("tcp", PROXY4, 5000, flags=SYN), REAL4)
    sent(nat, to_proxy("tcp", PROXY4, 5000, flags=RST), REAL4, 1.0)
    tick(nat, 1.0)
    assert len(nat) == 0


@pytest.mark.parametrize("first", [FIN, RST, FIN | RST])
def test_the_packet_that_opens_a_session_does_not_close_it(first: int) -> None:
    nat = NatTable(CLIENT)
    packet = sent(nat, to_proxy("tcp", PROXY4, 5000, flags=first), REAL4)
    received(nat, answer_to(packet, flags=FIN | ACK))
    tick(nat, 7439.0)
    assert len(nat) == 1


def test_after_both_fins_five_idle_seconds_remain() -> None:
    nat = NatTable(CLIENT)
    packet = sent(nat, to_proxy("tcp", PROXY4, 5000, flags=SYN), REAL4)
    received(nat, answer_to(packet, flags=SYN | ACK))
    sent(nat, to_proxy("tcp", PROXY4, 5000, flags=FIN | ACK), REAL4, 1.0)
    assert nat.poll_timeout() == 7441.0
    received(nat, answer_to(packet, flags=FIN | ACK), 100.0)
    assert nat.poll_timeout() == 105.0
    sent(nat, to_proxy("tcp", PROXY4, 5000), REAL4, 104.0)
    tick(nat, 108.9)
    assert len(nat) == 1
    tick(nat, 109.0)
    assert nat.translate_incoming(answer_to(packet), 109.0) is EXPIRED


def test_two_fins_of_one_side_close_nothing() -> None:
    nat = NatTable(CLIENT)
    packet = sent(nat, to_proxy("tcp", PROXY4, 5000, flags=SYN), REAL4)
    received(nat, answer_to(packet, flags=FIN | ACK))
    received(nat, answer_to(packet, flags=FIN | ACK), 1.0)
    assert nat.poll_timeout() == 7441.0


def test_an_icmp_error_counts_as_an_answer() -> None:
    nat = NatTable(CLIENT)
    packet = sent(nat, to_proxy("udp", PROXY4, 5000), REAL4)
    received(nat, build_icmp_unreachable(packet), 50.0)
    assert nat.poll_timeout() == 170.0


def test_a_lapsed_session_is_remembered_until_its_port_is_used_again() -> None:
    nat = NatTable(CLIENT)
    packet = sent(nat, to_proxy("udp", PROXY4, 5000), REAL4)
    tick(nat, 60.0)
    assert nat.translate_incoming(answer_to(packet), 9999.0) is EXPIRED
    assert nat.translate_incoming(build_icmp_unreachable(packet), 9999.0) is EXPIRED
    again = sent(nat, to_proxy("udp", PROXIES[1], 5000), REAL4, 9999.0)
    assert received(nat, answer_to(again), 9999.0).src == PROXIES[1]


# -- what is not of a session


def test_strangers_pass_untranslated() -> None:
    nat = NatTable(CLIENT)
    packet = sent(nat, to_proxy("udp", PROXY4, 5000), REAL4)
    own = own_ip(PROXY4)
    for stranger in (
        build_udp(REALS[1], own, 443, 5000),
        build_udp(REAL4, own, 443, 5001),
        build_tcp(REAL4, own, 443, 5000),
        build_echo(REAL4, own, 5000, reply=True),
        build_icmp_unreachable(build_udp(own, REAL4, 5001, 443)),
        build_icmp_unreachable(build_udp(own, REALS[1], 5000, 443)),
    ):
        before = stranger.data
        assert nat.translate_incoming(stranger, 0.0) is None
        assert stranger.data == before
    assert received(nat, answer_to(packet)).src == PROXY4


def test_what_has_no_ports_is_not_translated() -> None:
    nat = NatTable(CLIENT)
    own = own_ip(PROXY4)
    for icmp_type, code in ((13, 0), (5, 0), (8, 1)):
        assert nat.translate_outgoing(build_icmp(own, PROXY4, icmp_type, code, bytes(4)), REAL4, 0.0) is UNSUPPORTED
        assert nat.translate_incoming(build_icmp(REAL4, own, icmp_type, code, bytes(4)), 0.0) is UNSUPPORTED
    assert nat.translate_outgoing(build_ip(own, PROXY4, 47, bytes(8)), REAL4, 0.0) is UNSUPPORTED
    assert nat.translate_incoming(build_ip(REAL4, own, 47, bytes(8)), 0.0) is UNSUPPORTED
    assert nat.translate_incoming(build_icmp(REAL4, own, 3, 0, bytes(9)), 0.0) is DropReason.MALFORMED_PACKET
    assert len(nat) == 0


# -- ICMP errors

V4_ERRORS = [(3, 0), (3, 1), (3, 3), (3, 4), (3, 13), (3, 200), (11, 0)]
V6_ERRORS = [(1, 0), (1, 1), (1, 3), (1, 4), (1, 77), (2, 0), (3, 0)]


@pytest.mark.shows("tunnel", 89)
@pytest.mark.parametrize("kind", ["udp", "tcp", "echo"])
@pytest.mark.parametrize(
    ("proxy", "real", "icmp"),
    [(PROXIES[1], REAL4, e) for e in V4_ERRORS] + [(PROXIES[5], REAL6, e) for e in V6_ERRORS],
)
def test_errors_quote_the_clients_own_packet(kind: str, proxy: bytes, real: bytes, icmp: tuple[int, int]) -> None:
    nat = NatTable(CLIENT)
    sent(nat, to_proxy(kind, PROXIES[0 if len(proxy) == 4 else 4], 5000), real)
    packet = sent(nat, to_proxy(kind, proxy, 5000), real)
    assert packet.src_port == 5001
    router = REALS[1] if len(real) == 4 else REALS[3]
    back = received(nat, build_icmp(router, packet.src, *icmp, b"\0\0\5\0" + packet.data))
    assert (back.src, back.dst, back.icmp_type, back.icmp_code) == (proxy, own_ip(proxy), *icmp)
    error = back.icmp_error()
    assert isinstance(error, IcmpError)
    assert error.mtu == (1280 if icmp in ((3, 4), (2, 0)) else None)
    assert error.quote == to_proxy(kind, proxy, 5000).data


@pytest.mark.shows("tunnel", 89)
@pytest.mark.parametrize("kind", ["udp", "tcp", "echo"])
@pytest.mark.parametrize(
    ("proxy", "real", "icmp", "told"),
    [(PROXIES[5], REAL4, (3, 3), (1, 4)), (PROXIES[5], REAL4, (11, 0), (3, 0)), (PROXIES[5], REAL4, (3, 4), (2, 0)),
     (PROXIES[1], REAL6, (1, 4), (3, 3)), (PROXIES[1], REAL6, (3, 0), (11, 0)), (PROXIES[1], REAL6, (2, 0), (3, 4))],
)  # fmt: skip
def test_errors_cross_families(
    kind: str, proxy: bytes, real: bytes, icmp: tuple[int, int], told: tuple[int, int]
) -> None:
    nat = NatTable(CLIENT)
    sent(nat, to_proxy(kind, PROXIES[0], 5000), real)
    packet = sent(nat, to_proxy(kind, proxy, 5000), real)
    assert packet.src_port == 5001
    router = REALS[1] if len(real) == 4 else REALS[3]
    back = received(nat, build_icmp(router, packet.src, *icmp, b"\0\0\5\0" + packet.data))
    assert (back.src, back.dst, back.icmp_type, back.icmp_code) == (proxy, own_ip(proxy), *told)
    error = back.icmp_error()
    assert isinstance(error, IcmpError)
    if error.kind is IcmpErrorKind.PACKET_TOO_BIG:
        assert error.mtu == (1260 if len(proxy) == 4 else 1280)
    own = to_proxy(kind, proxy, 5000)
    assert (error.src, error.dst, error.src_port, error.dst_port) == (own.src, own.dst, own.src_port, own.dst_port)
    assert error.quote[error.l4_offset :] == own.data[own.l4_offset :]


def test_an_error_without_equivalent_is_dropped() -> None:
    nat = NatTable(CLIENT)
    packet = sent(nat, to_proxy("udp", PROXY6, 5000), REAL4)
    assert nat.translate_incoming(build_icmp(REAL4, packet.src, 3, 14, bytes(4) + packet.data), 0.0) is UNSUPPORTED


# -- sizes


def test_a_question_that_does_not_fit_the_other_family() -> None:
    nat = NatTable(CLIENT)
    large = to_proxy("udp", PROXY4, 5000, payload=bytes(1261 - 28))
    assert nat.translate_outgoing(large, REAL6, 0.0) == TooBig(1260)
    assert len(nat) == 0
    fitting = sent(nat, to_proxy("udp", PROXY4, 5000, payload=bytes(1260 - 28)), REAL6)
    assert len(fitting) == 1280
    assert nat.translate_outgoing(large, REAL6, 1.0) == TooBig(1260)
    assert large == to_proxy("udp", PROXY4, 5000, payload=bytes(1261 - 28))


def test_an_answer_that_does_not_fit_the_other_family() -> None:
    nat = NatTable(CLIENT)
    packet = sent(nat, to_proxy("udp", PROXY6, 5000), REAL4)
    large = answer_to(packet, payload=bytes(1280 - 28))
    assert nat.translate_incoming(large, 0.0) == TooBig(1260)
    assert large == answer_to(packet, payload=bytes(1280 - 28))
    assert len(received(nat, answer_to(packet, payload=bytes(1260 - 28)))) == 1280


def test_packets_from_v6_carry_different_identifications() -> None:
    nat = NatTable(CLIENT)
    packets = [sent(nat, to_proxy("udp", PROXY6, 5000), REAL4).data[4:6] for _ in range(3)]
    assert all(a != b for a, b in pairwise(packets))


# -- bounds


def test_a_flood_ends_the_oldest_unanswered_session_first() -> None:
    nat = NatTable(CLIENT, max_sessions=64)
    answered = [sent(nat, to_proxy("tcp", PROXY4, port), REAL4) for port in range(1, 33)]
    for packet in answered:
        received(nat, answer_to(packet), 1.0)
    for number in range(1000):
        sent(nat, to_proxy("udp", PROXY4, 10000 + number), REAL4, 2.0)
    assert len(nat) == 64
    assert nat.evictions == 1000 - 32
    for packet in answered:
        received(nat, answer_to(packet), 3.0)
    newest = build_udp(REAL4, own_ip(REAL4), 443, 10999)
    assert received(nat, newest, 3.0).dst_port == 10999
    assert nat.translate_incoming(build_udp(REAL4, own_ip(REAL4), 443, 10967), 3.0) is EXPIRED


def test_among_answered_sessions_the_longest_unused_goes() -> None:
    nat = NatTable(CLIENT, max_sessions=3)
    packets = [sent(nat, to_proxy(kind, PROXY4, 5000), REAL4) for kind in ("udp", "tcp", "echo")]
    for packet, at in zip(packets, (1.0, 2.0, 3.0), strict=True):
        received(nat, answer_to(packet), at)
    received(nat, answer_to(packets[0]), 4.0)
    sent(nat, to_proxy("udp", PROXY4, 6000), REAL4, 5.0)
    results = [nat.translate_incoming(answer_to(packet), 5.0) for packet in packets]
    assert [isinstance(result, Packet) for result in results] == [True, False, True]
    assert nat.evictions == 1


def test_the_use_that_counts_is_the_last_one() -> None:
    nat = NatTable(CLIENT, max_sessions=3)
    packets = [sent(nat, to_proxy("udp", PROXY4, port), REAL4) for port in (1, 2, 3)]
    for packet, at in zip(packets, (1.0, 2.0, 3.0), strict=True):
        received(nat, answer_to(packet), at)
    received(nat, answer_to(packets[0]), 4.0)
    sent(nat, to_proxy("udp", PROXY4, 4), REAL4, 5.0)
    assert nat.translate_incoming(answer_to(packets[1]), 5.0) is EXPIRED
    received(nat, answer_to(packets[0]), 5.0)
    received(nat, answer_to(packets[2]), 5.0)


def test_a_closing_session_may_be_the_longest_unused() -> None:
    nat = NatTable(CLIENT, max_sessions=2)
    closing = sent(nat, to_proxy("tcp", PROXY4, 1, flags=SYN), REAL4)
    received(nat, answer_to(closing, flags=FIN | ACK))
    sent(nat, to_proxy("tcp", PROXY4, 1, flags=FIN | ACK), REAL4)
    other = sent(nat, to_proxy("tcp", PROXY4, 2), REAL4)
    received(nat, answer_to(other), 1.0)
    sent(nat, to_proxy("tcp", PROXY4, 3), REAL4, 2.0)
    assert nat.translate_incoming(answer_to(closing), 2.0) is EXPIRED
    received(nat, answer_to(other), 2.0)


def test_a_full_table_leaves_new_sessions_time_for_their_answer() -> None:
    nat = NatTable(CLIENT, max_sessions=64)
    for port in range(1, 65):
        received(nat, answer_to(sent(nat, to_proxy("tcp", PROXY4, port), REAL4)))
    fresh = [sent(nat, to_proxy("tcp", PROXY4, 1000 + n, flags=SYN), REAL4, 1.0) for n in range(8)]
    for packet in fresh:
        received(nat, answer_to(packet), 2.0)


def test_reset_sessions_make_room_first() -> None:
    nat = NatTable(CLIENT, max_sessions=2)
    first = sent(nat, to_proxy("tcp", PROXY4, 1, flags=SYN), REAL4)
    second = sent(nat, to_proxy("tcp", PROXY4, 2, flags=SYN), REAL4)
    received(nat, answer_to(second, flags=RST))
    sent(nat, to_proxy("tcp", PROXY4, 3, flags=SYN), REAL4)
    received(nat, answer_to(first))


def test_the_memory_of_lapsed_sessions_is_bounded() -> None:
    nat = NatTable(CLIENT, max_sessions=16)
    old = sent(nat, to_proxy("udp", PROXY4, 1), REAL4)
    now = 0.0
    for _ in range(4):
        for port in range(2, 18):
            sent(nat, to_proxy("udp", PROXY4, port), REALS[1], now)
        now += 60.0
        tick(nat, now)
    assert len(nat) == 0
    assert nat.translate_incoming(answer_to(old), now) is None
    assert len(nat._lapsed) == 16


def test_a_session_that_lapses_twice_is_remembered_from_the_second_time() -> None:
    nat = NatTable(CLIENT, max_sessions=2)
    for port, at in ((1, 0.0), (2, 60.0), (1, 120.0), (3, 180.0)):
        packet = sent(nat, to_proxy("udp", PROXY4, port), REAL4, at)
        tick(nat, at + 60.0)
    packet.set_src_port(1)
    assert nat.translate_incoming(answer_to(packet), 240.0) is EXPIRED
    packet.set_src_port(2)
    assert nat.translate_incoming(answer_to(packet), 240.0) is None


@given(st.data(), st.sampled_from([1, 6, 17, 58, 47]), st.sampled_from([4, 6]), st.sampled_from(REALS))
def test_no_packet_raises(data: st.DataObject, protocol: int, version: int, real: bytes) -> None:
    size = data.draw(st.integers(0, 60))
    l4 = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
    l4[4:6] = size.to_bytes(2, "big") if protocol == 17 else l4[4:6]
    client, far = (CLIENT[0], PROXY4) if version == 4 else (CLIENT[1], PROXY6)
    nat = NatTable(CLIENT)
    for src, dst in ((client, far), (far, client)):
        try:
            packet = build_ip(src, dst, protocol, bytes(l4))
        except ValueError:  # not a packet
            continue
        if dst is far:
            result = nat.translate_outgoing(packet, real, 0.0)
            assert isinstance(result, Packet | DropReason)
        else:
            incoming = nat.translate_incoming(packet, 0.0)
            assert incoming is None or isinstance(incoming, Packet | DropReason)
