"""Candidates as ICE-less peers signal them (spec/connectivity.md §4.2)."""

from __future__ import annotations

import pytest

from fz_core.ice import Candidate, CandidateKind, iceless_text, parse_iceless_candidate_untrusted
from fz_core.packet import Address

HOST4, HOST6 = Address.parse("192.168.1.5:52625"), Address.parse("[2001:db8::5]:52625")
PUBLIC4, PUBLIC6 = Address.parse("87.121.72.60:57114"), Address.parse("[2001:db8::60]:57114")


@pytest.mark.shows("connectivity", 30)
@pytest.mark.parametrize(
    "ours",
    [
        Candidate.host(HOST4),
        Candidate.host(HOST6),
        Candidate.srflx(PUBLIC4, HOST4),
        Candidate.srflx(PUBLIC6, HOST6),
        Candidate.srflx(HOST4, HOST4),
        Candidate.relay(PUBLIC4),
        Candidate.relay(PUBLIC6, server_is_ipv4=True),
    ],
    ids=lambda candidate: f"{candidate.kind} {candidate.address}",
)
def test_what_we_signal_is_read_back(ours: Candidate) -> None:
    text = iceless_text(ours)
    assert iceless_text(ours) == text
    theirs = parse_iceless_candidate_untrusted(text)
    assert theirs is not None
    assert (theirs.kind, theirs.address, theirs.base) == (ours.kind, ours.address, ours.base)
    assert "ufrag" not in text


@pytest.mark.shows("connectivity", 30)
def test_kinds_are_ordered() -> None:
    ours = (Candidate.host(HOST4), Candidate.srflx(PUBLIC4, HOST4), Candidate.relay(PUBLIC4))
    parsed = [parse_iceless_candidate_untrusted(iceless_text(candidate)) for candidate in ours]
    priorities = [candidate.priority for candidate in parsed if candidate is not None]
    assert priorities == [2130706431, 1694498815, 16777215]


def test_a_relay_names_what_the_official_programs_name() -> None:
    """The socket they talk to the relay from, which may be of the other family."""
    text = "candidate:1 1 UDP 16777215 2001:db8::60 57114 typ relay raddr 192.168.1.5 rport 52625"
    candidate = parse_iceless_candidate_untrusted(text)
    assert candidate is not None
    assert (candidate.kind, candidate.address, candidate.base) == (CandidateKind.RELAY, PUBLIC6, HOST4)


def test_extra_words_are_ignored() -> None:
    text = "candidate:1 1 udp 1694498815 1.2.3.4 5 typ srflx generation 0 raddr 10.0.0.1 rport 7 ufrag x network"
    candidate = parse_iceless_candidate_untrusted(text)
    assert candidate is not None
    assert candidate.base == Address.parse("10.0.0.1:7")


@pytest.mark.parametrize("ip", ["169.254.1.1", "224.0.0.1", "0.0.0.0", "255.255.255.255", "ff02::1", "::"])
def test_unusable_addresses_are_refused(ip: str) -> None:
    assert parse_iceless_candidate_untrusted(f"candidate:1 1 udp 2130706431 {ip} 5 typ host") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        "candidate:1 1 udp 1694498815 1.2.3.4 5 typ srflx",
        "candidate:1 1 udp 1694498815 1.2.3.4 5 typ srflx raddr 10.0.0.1",
        "candidate:1 1 udp 1694498815 1.2.3.4 5 typ srflx raddr 2001:db8::1 rport 5",
        "candidate:1 1 udp x 1.2.3.4 5 typ host",
        "candidate:1 1 udp 1 1.2.3.4 5 typ prflx raddr 10.0.0.1 rport 7",
        "candidate:1 1 udp 1 1.2.3.4 65536 typ host",
    ],
)
def test_refused_texts(text: str) -> None:
    assert parse_iceless_candidate_untrusted(text) is None


def test_a_relay_of_the_other_family_than_the_way_to_it_says_so() -> None:
    assert Candidate.relay(PUBLIC6, server_is_ipv4=True).is_cross_family
    assert Candidate.relay(PUBLIC4, server_is_ipv4=True).is_cross_family is False
    assert Candidate.relay(PUBLIC4) == Candidate.relay(PUBLIC4, server_is_ipv4=True)
