"""Addresses a gateway keeps, and for how long."""

from __future__ import annotations

from ipaddress import ip_address

import dns.message
import dns.rcode
import dns.rrset
import pytest

from fz_core.dns import AddressCache

A, AAAA = 1, 28
SOA = "example.com. {} IN SOA ns.example.com. root.example.com. 1 2 3 4 {}"


def test_addresses_live_as_long_as_their_ttl() -> None:
    cache = AddressCache()
    assert cache.lookup("example.com", A, 0.0) is None
    response = make_response("example.com. 30 IN A 192.0.2.1", "example.com. 30 IN A 192.0.2.2")
    assert cache.store("Example.com", A, response, 0.0) == ips("192.0.2.1", "192.0.2.2")
    assert cache.lookup("exAMple.com", A, 29.9) == ips("192.0.2.1", "192.0.2.2")
    assert cache.lookup("example.com", AAAA, 0.0) is None
    assert cache.lookup("example.com", A, 30.0) is None
    assert len(cache) == 0


def test_aliases_are_followed_and_the_smallest_ttl_counts() -> None:
    cache = AddressCache()
    response = make_response(
        "b.example.net. 60 IN A 192.0.2.1",
        "example.com. 300 IN CNAME a.example.net.",
        "a.example.net. 10 IN CNAME B.example.net.",
        "c.example.net. 60 IN A 192.0.2.9",
    )
    assert cache.store("example.com", A, response, 0.0) == ips("192.0.2.1")
    assert cache.lookup("example.com", A, 9.9) is not None
    assert cache.lookup("example.com", A, 10.0) is None


def test_zero_is_used_once() -> None:
    cache = AddressCache()
    assert cache.store("example.com", A, make_response("example.com. 0 IN A 192.0.2.1"), 0.0) == ips("192.0.2.1")
    assert len(cache) == 0


@pytest.mark.parametrize("rcode", [dns.rcode.NOERROR, dns.rcode.NXDOMAIN])
@pytest.mark.parametrize(("ttl", "minimum", "lifetime"), [(60, 20, 20), (20, 60, 20), (100_000, 100_000, 10_800)])
def test_nothing_is_remembered_too(rcode: int, ttl: int, minimum: int, lifetime: int) -> None:
    cache = AddressCache()
    response = make_response(authority=[SOA.format(ttl, minimum)], rcode=rcode)
    assert cache.store("example.com", A, response, 0.0) == ()
    assert cache.lookup("example.com", A, lifetime - 0.1) == ()
    assert cache.lookup("example.com", A, lifetime) is None


def test_an_alias_to_nothing() -> None:
    cache = AddressCache()
    response = make_response("example.com. 5 IN CNAME a.example.com.", authority=[SOA.format(60, 60)])
    assert cache.store("example.com", A, response, 0.0) == ()
    assert cache.lookup("example.com", A, 4.9) == ()
    assert cache.lookup("example.com", A, 5.0) is None


@pytest.mark.parametrize(
    "response",
    [
        lambda: make_response(),
        lambda: make_response(rcode=dns.rcode.NXDOMAIN),
        lambda: make_response("example.com. 60 IN A 192.0.2.1", rcode=dns.rcode.SERVFAIL),
        lambda: make_response("example.com. 60 IN CNAME example.com."),
        lambda: make_response("example.com. 60 IN CNAME b.", "b. 60 IN CNAME example.com."),
    ],
    ids=["no soa", "nxdomain without soa", "servfail", "loop", "long loop"],
)
def test_not_kept(response: object) -> None:
    cache = AddressCache()
    assert cache.store("example.com", A, response(), 0.0) == ()  # type: ignore[operator]
    assert len(cache) == 0


def test_a_name_that_is_none() -> None:
    cache = AddressCache()
    assert cache.store("a..b", A, make_response(), 0.0) == ()
    assert cache.store("x" * 300, A, make_response(), 0.0) == ()


def test_a_new_answer_replaces_the_old_one_even_if_it_is_not_kept() -> None:
    cache = AddressCache()
    cache.store("example.com", A, make_response("example.com. 60 IN A 192.0.2.1"), 0.0)
    cache.store("example.com", A, make_response("example.com. 0 IN A 192.0.2.2"), 1.0)
    assert cache.lookup("example.com", A, 1.0) is None


def test_bounds() -> None:
    cache = AddressCache(max_entries=2)
    for name in ("a", "b"):
        cache.store(name, A, make_response(f"{name}. 60 IN A 192.0.2.1"), 0.0)
    cache.lookup("a", A, 0.0)
    cache.store("c", A, make_response("c. 60 IN A 192.0.2.1"), 0.0)
    assert [cache.lookup(name, A, 0.0) is not None for name in "abc"] == [True, False, True]
    many = make_response(*(f"d. 999999 IN A 192.0.2.{n}" for n in range(100)))
    assert len(cache.store("d", A, many, 0.0)) == 64
    assert cache.lookup("d", A, 86_400.0) is None


def make_response(*answer: str, authority: list[str] | None = None, rcode: int = 0) -> dns.message.Message:
    """A response with records in zone-file form."""
    lines = ["id 1", "opcode QUERY", f"rcode {dns.rcode.to_text(dns.rcode.Rcode(rcode))}", "flags QR", ";QUESTION"]
    lines += ["example.com. IN A", ";ANSWER", *answer, ";AUTHORITY", *(authority or [])]
    return dns.message.from_text("\n".join(lines))


def ips(*texts: str) -> tuple[bytes, ...]:
    return tuple(ip_address(text).packed for text in texts)
