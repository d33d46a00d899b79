"""Candidate texts and priorities (connectivity sheet sections 4.2 to 4.4; section 11 items 24, 30, 53)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fz_core.ice import (
    Candidate,
    CandidateKind,
    Credentials,
    is_usable,
    optimistic_candidates,
    parse_iceless_untrusted,
    to_iceless_sdp,
)
from fz_core.packet import Address

HOST4 = Address.parse("192.168.1.5:52625")
HOST6 = Address.parse("[2001:db8::5]:52625")
PUBLIC4 = Address.parse("87.121.72.60:57114")
PUBLIC6 = Address.parse("[2001:db8::60]:57114")


@pytest.mark.shows("connectivity", 30)
@pytest.mark.parametrize(
    ("candidate", "priority"),
    [
        (Candidate.host(HOST4), 2130706175),
        (Candidate.host(HOST6), 2130706431),
        (Candidate.srflx(PUBLIC4, HOST4), 1686109951),
        (Candidate.srflx(PUBLIC6, HOST6), 1686110207),
        (Candidate.relay(PUBLIC4, True), 37748479),
        (Candidate.relay(PUBLIC6, False), 37748735),
        (Candidate.relay(PUBLIC4, False), 37492479),
        (Candidate.relay(PUBLIC6, True), 37492735),
    ],
)
def test_first_priorities(candidate: Candidate, priority: int) -> None:
    assert candidate.priority == priority


def test_check_priority() -> None:
    assert Candidate.host(HOST4).check_priority == 1862270719


@pytest.mark.shows("connectivity", 30)
def test_text_of_the_sheet_is_understood() -> None:
    text = (
        "candidate:fffe7f6435be70ddbf995982 1 udp 1686109951 87.121.72.60 57114 typ srflx "
        "raddr 0.0.0.0 rport 0 ufrag ab2c"
    )
    candidate = Candidate.parse_untrusted(text)
    assert candidate is not None
    assert candidate.kind is CandidateKind.SRFLX
    assert candidate.address == candidate.base == PUBLIC4
    assert (candidate.priority, candidate.ufrag) == (1686109951, "ab2c")


@pytest.mark.shows("connectivity", 30)
def test_announced_text() -> None:
    relay = Candidate.relay(PUBLIC6, False)
    assert relay.to_sdp("ab2c") == (
        f"candidate:{relay.foundation} 1 udp 37748735 2001:db8::60 57114 typ relay raddr :: rport 0 ufrag ab2c"
    )
    host = Candidate.host(HOST4)
    assert host.to_sdp() == f"candidate:{host.foundation} 1 udp 2130706175 192.168.1.5 52625 typ host"


@pytest.mark.shows("connectivity", 53)
@pytest.mark.parametrize(("address", "priority"), [(PUBLIC4, 50331391), (PUBLIC6, 50331647)])
def test_withdrawal_text(address: Address, priority: int) -> None:
    words = Candidate.relay(address).to_invalidation().split()
    assert words[3] == str(priority)
    assert words[8:] == ["raddr", "0.0.0.0" if address.is_ipv4 else "::", "rport", "0"]


@pytest.mark.shows("connectivity", 30)
@pytest.mark.parametrize(
    "candidate",
    [
        Candidate.host(HOST4),
        Candidate.srflx(PUBLIC6, HOST6),
        Candidate.relay(PUBLIC4),
        Candidate.relay(PUBLIC6).ranked_after(3),
    ],
)
def test_round_trip_keeps_what_matters(candidate: Candidate) -> None:
    parsed = Candidate.parse_untrusted(candidate.to_sdp("wxyz"))
    assert parsed is not None
    assert (parsed.kind, parsed.address, parsed.priority) == (
        candidate.kind,
        candidate.address,
        candidate.priority,
    )
    assert (parsed.ufrag, parsed.foundation) == ("wxyz", candidate.foundation)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        "candidate: 1 udp 1 1.2.3.4 5 typ host",
        "candidate:x 2 udp 1 1.2.3.4 5 typ host",
        "candidate:x 1 tcp 1 1.2.3.4 5 typ host",
        "candidate:x 1 udp 4294967296 1.2.3.4 5 typ host",
        "candidate:x 1 udp -1 1.2.3.4 5 typ host",
        "candidate:x 1 udp ١ 1.2.3.4 5 typ host",
        "candidate:x 1 udp 1 1.2.3 5 typ host",
        "candidate:x 1 udp 1 fe80::1%eth0 5 typ host",
        "candidate:x 1 udp 1 1.2.3.4 65536 typ host",
        "candidate:x 1 udp 1 1.2.3.4 5 typ magic",
        "candidate:x 1 udp 1 1.2.3.4 5 kind host",
        "candidate:x 1 udp 1 1.2.3.4 5 typ host" + " a b" * 200,
    ],
)
def test_refused_texts(text: str) -> None:
    assert Candidate.parse_untrusted(text) is None


def test_unknown_extensions_are_skipped() -> None:
    text = "candidate:x 1 UDP 7 1.2.3.4 5 typ prflx generation 0 ufrag q network-cost 9"
    candidate = Candidate.parse_untrusted(text)
    assert candidate is not None
    assert (candidate.kind, candidate.ufrag) == (CandidateKind.PRFLX, "q")


@given(st.text(max_size=600))
def test_any_text_is_survived(text: str) -> None:
    Candidate.parse_untrusted(text)
    Candidate.parse_untrusted("candidate:" + text)
    parse_iceless_untrusted("candidate:" + text)


@pytest.mark.shows("connectivity", 30)
def test_iceless_check_values() -> None:
    loopback, base = Address.parse("127.0.0.1:1234"), Address.parse("192.168.1.5:1234")
    host = to_iceless_sdp(CandidateKind.HOST, loopback)
    assert host == "candidate:3980819833808343013 1 udp 2130706431 127.0.0.1 1234 typ host"
    srflx = to_iceless_sdp(CandidateKind.SRFLX, loopback, base)
    assert srflx == (
        "candidate:16447672801229755014 1 udp 1694498815 127.0.0.1 1234 typ srflx raddr 192.168.1.5 rport 1234"
    )
    relay = to_iceless_sdp(CandidateKind.RELAY, loopback, base)
    assert relay.startswith("candidate:453059077433216087 1 udp 16777215 ")
    for text, kind, expected in (
        (host, CandidateKind.HOST, loopback),
        (srflx, CandidateKind.SRFLX, base),
        (relay, CandidateKind.RELAY, base),
    ):
        assert parse_iceless_untrusted(text) == (kind, loopback, expected)


@pytest.mark.shows("connectivity", 30)
@pytest.mark.parametrize(
    ("kind", "address", "base"),
    [
        (CandidateKind.HOST, HOST4, None),
        (CandidateKind.HOST, HOST6, None),
        (CandidateKind.SRFLX, PUBLIC4, HOST4),
        (CandidateKind.SRFLX, PUBLIC6, HOST6),
        (CandidateKind.RELAY, PUBLIC4, HOST4),
        (CandidateKind.RELAY, PUBLIC6, HOST6),
    ],
)
def test_iceless_round_trip_keeps_the_base(kind: CandidateKind, address: Address, base: Address | None) -> None:
    text = to_iceless_sdp(kind, address, base)
    assert parse_iceless_untrusted(text) == (kind, address, base or address)
    assert to_iceless_sdp(kind, address, base) == text
    assert text.removeprefix("candidate:").split()[0].isdigit()


@pytest.mark.shows("connectivity", 30)
def test_the_kinds_rank_as_in_both_dialects() -> None:
    host, srflx, relay = Candidate.host(HOST4), Candidate.srflx(PUBLIC4, HOST4), Candidate.relay(PUBLIC4)
    assert host.priority > srflx.priority > relay.priority
    texts = [
        to_iceless_sdp(CandidateKind.HOST, HOST4),
        to_iceless_sdp(CandidateKind.SRFLX, PUBLIC4, HOST4),
        to_iceless_sdp(CandidateKind.RELAY, PUBLIC4, HOST4),
    ]
    priorities = [int(text.split()[3]) for text in texts]
    assert priorities == sorted(priorities, reverse=True)
    assert len(set(priorities)) == 3
    assert [Candidate.host(HOST4).to_sdp("wxyz") for _ in range(2)] == [host.to_sdp("wxyz")] * 2


@pytest.mark.shows("connectivity", 30)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        "candidate:",
        "candidate:1 1 udp 1694498815 1.2.3.4 5 typ srflx",
        "candidate:1 1 tcp 2130706431 1.2.3.4 5 typ host",
        "candidate:1 1 udp 2130706431 1.2.3.4.5 5 typ host",
        "candidate:1 1 udp 2130706431 1.2.3.4 5 typ prflx",
        "candidate:1 1 udp 16777215 1.2.3.4 5 typ relay raddr x rport 1",
    ],
)
def test_refused_iceless_texts(text: str) -> None:
    assert parse_iceless_untrusted(text) is None


def test_iceless_text_needs_the_right_base() -> None:
    with pytest.raises(ValueError, match="base"):
        to_iceless_sdp(CandidateKind.RELAY, HOST4)


def remote(kind: CandidateKind, text: str) -> Candidate:
    address = Address.parse(text)
    return Candidate(kind, address, address, 1, "f")


@pytest.mark.shows("connectivity", 24)
def test_optimistic_candidates() -> None:
    host, srflx = remote(CandidateKind.HOST, "10.0.0.1:52625"), remote(CandidateKind.SRFLX, "1.1.1.1:40000")
    assert [str(c.address) for c in optimistic_candidates([host, srflx])] == ["1.1.1.1:52625"]
    more = [remote(CandidateKind.SRFLX, f"{n}.{n}.{n}.{n}:40000") for n in (2, 3)]
    found = optimistic_candidates([host, srflx, *more])
    assert [str(c.address) for c in found] == ["1.1.1.1:52625", "2.2.2.2:52625"]
    again = optimistic_candidates([host, srflx, *more, *found])
    assert [str(c.address) for c in again] == ["3.3.3.3:52625"]


@pytest.mark.shows("connectivity", 24)
def test_no_optimism_for_ipv6() -> None:
    six = [remote(CandidateKind.HOST, "[2001:db8::1]:52625"), remote(CandidateKind.SRFLX, "[2001:db8::1]:4")]
    assert optimistic_candidates(six) == []


@pytest.mark.parametrize(
    ("host", "usable"),
    [
        ("192.0.2.1", True),
        ("127.0.0.1", True),
        ("169.254.1.1", False),
        ("255.255.255.255", False),
        ("224.0.0.1", False),
        ("0.0.0.0", False),
    ],
)
def test_usable_ipv4(host: str, usable: bool) -> None:
    assert is_usable(Address.parse(f"{host}:1").ip) is usable


@pytest.mark.parametrize(("host", "usable"), [("2001:db8::1", True), ("::1", True), ("ff02::1", False), ("::", False)])
def test_usable_ipv6(host: str, usable: bool) -> None:
    assert is_usable(Address.parse(f"[{host}]:1").ip) is usable


def test_a_base_of_another_family_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="families"):
        Candidate.srflx(PUBLIC4, HOST6)


def test_passwords_do_not_show() -> None:
    assert "hunter2" not in repr(Credentials("ab2c", "hunter2"))
