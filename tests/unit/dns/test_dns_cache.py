"""Which replies are kept, for how long, and what comes back."""

from __future__ import annotations

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fz_core.dns import ProxyNames, Query, ReplyCache, ResourceStub, StubAnswer


@pytest.mark.shows("tunnel", 57)
def test_an_hour_after_100_seconds() -> None:
    cache = ReplyCache()
    cache.store(make_query("example.com", message_id=1), make_reply("example.com 3600 IN A 192.0.2.1"), 1000.0)
    reply = cache.lookup(make_query("EXAMPLE.com", message_id=77), 1100.9)
    assert reply is not None
    message = dns.message.from_wire(reply)
    assert message.id == 77
    assert [rrset.to_text() for rrset in message.answer] == ["EXAMPLE.com. 3500 IN A 192.0.2.1"]
    assert message.flags == dns.flags.QR | dns.flags.RD


@pytest.mark.shows("tunnel", 57)
def test_two_ttls() -> None:
    cache = ReplyCache()
    reply = make_reply("example.com 1800 IN CNAME a.example.net", "a.example.net 3600 IN A 192.0.2.1")
    cache.store(make_query("example.com"), reply, 0.0)
    assert ttls(cache.lookup(make_query("example.com"), 100.0)) == [1700, 3500]
    assert cache.lookup(make_query("example.com"), 1799.9) is not None
    assert cache.lookup(make_query("example.com"), 1800.0) is None
    assert len(cache) == 0


@pytest.mark.shows("tunnel", 57)
def test_stub_answers_are_not_kept() -> None:
    names = ProxyNames()
    names.add_resource("r1", "example.com", "dual")
    answer = ResourceStub(names).resolve(make_query("example.com"), lambda name: False)
    assert isinstance(answer, StubAnswer)
    cache = ReplyCache()
    cache.store(make_query("example.com"), answer.reply, 0.0)
    assert len(cache) == 0


@pytest.mark.parametrize(
    "reply",
    [
        lambda: make_reply("example.com 4 IN A 192.0.2.1"),
        lambda: make_reply(),
        lambda: make_reply("example.com 60 IN CNAME a.example.net"),
        lambda: make_reply("example.com 60 IN AAAA ::1"),
        lambda: make_reply("example.com 1 IN CNAME a.example.net", "a.example.net 60 IN A 192.0.2.1"),
        lambda: make_reply("example.com 60 IN A 192.0.2.1", rcode=dns.rcode.SERVFAIL),
        lambda: make_reply("example.com 60 IN A 192.0.2.1", rcode=dns.rcode.NXDOMAIN),
        lambda: make_reply("example.com 60 IN A 192.0.2.1", flags=dns.flags.TC),
        lambda: make_reply("example.com 60 IN A 192.0.2.1", name="example.org"),
        lambda: make_reply("example.com 60 IN A 192.0.2.1")[:-1],
        lambda: make_reply("example.com 60 IN A 192.0.2.1")[:-6],
        lambda: with_ttl(make_reply("example.com 60 IN A 192.0.2.1"), 0x80000000),
        lambda: b"",
    ],
    ids=[
        "short",
        "empty",
        "alias only",
        "other type",
        "short alias",
        "servfail",
        "nxdomain",
        "truncated",
        "other question",
        "cut",
        "cut length",
        "negative ttl",
        "nothing",
    ],
)  # fmt: skip
def test_not_kept(reply: object) -> None:
    cache = ReplyCache()
    cache.store(make_query("example.com"), reply(), 0.0)  # type: ignore[operator]
    assert len(cache) == 0


def test_five_seconds_are_enough() -> None:
    cache = ReplyCache()
    cache.store(make_query("example.com"), make_reply("example.com 5 IN A 192.0.2.1"), 0.0)
    assert ttls(cache.lookup(make_query("example.com"), 4.0)) == [1]


def test_types_and_dnssec_are_told_apart() -> None:
    cache = ReplyCache()
    cache.store(make_query("example.com"), make_reply("example.com 60 IN A 192.0.2.1"), 0.0)
    assert cache.lookup(make_query("example.com", "AAAA"), 0.0) is None
    secure = parse(dns.message.make_query("example.com", "A", want_dnssec=True).to_wire())
    assert cache.lookup(secure, 0.0) is None


def test_compressed_names_survive() -> None:
    cache = ReplyCache()
    texts = [f"example.com 60 IN MX {n} mail{n}.example.com" for n in range(3)]
    cache.store(make_query("example.com", "MX"), make_reply(*texts, rdtype="MX"), 0.0)
    reply = cache.lookup(make_query("exAMPle.com", "MX"), 0.0)
    assert reply is not None
    (rrset,) = dns.message.from_wire(reply).answer
    assert sorted(rdata.to_text().lower() for rdata in rrset) == [f"{n} mail{n}.example.com." for n in range(3)]


def test_other_sections_are_lost() -> None:
    cache = ReplyCache()
    response = dns.message.from_wire(make_reply("example.com 60 IN A 192.0.2.1"))
    response.authority.append(dns.rrset.from_text("example.com.", 60, "IN", "NS", "ns.example.com."))
    cache.store(make_query("example.com"), response.to_wire(), 0.0)
    reply = cache.lookup(make_query("example.com"), 0.0)
    assert reply is not None
    assert not dns.message.from_wire(reply).authority


def test_flush() -> None:
    cache = ReplyCache()
    cache.store(make_query("example.com"), make_reply("example.com 60 IN A 192.0.2.1"), 0.0)
    cache.flush()
    assert cache.lookup(make_query("example.com"), 0.0) is None


def test_the_least_recently_used_makes_room() -> None:
    cache = ReplyCache(max_entries=2)
    for name in ("a", "b", "a", "c"):
        if cache.lookup(make_query(name), 0.0) is None:
            cache.store(make_query(name), make_reply(f"{name} 60 IN A 192.0.2.1", name=name), 0.0)
    assert [cache.lookup(make_query(name), 0.0) is not None for name in "abc"] == [True, False, True]


def test_bytes_are_bounded() -> None:
    cache = ReplyCache(max_bytes=100)
    for n in range(100):
        cache.store(make_query(f"{n}"), make_reply(f"{n} 60 IN A 192.0.2.1", name=f"{n}"), 0.0)
        assert len(cache) <= 100 // 16
    big = make_reply('example.com 60 IN TXT "' + "x" * 200 + '"', rdtype="TXT")
    cache.store(make_query("example.com", "TXT"), big, 0.0)
    assert cache.lookup(make_query("example.com", "TXT"), 0.0) is None


@given(st.binary(max_size=200), st.integers(0, 65535))
def test_untrusted_replies_never_raise(tail: bytes, answers: int) -> None:
    query = make_query("example.com")
    head = make_reply()[:6] + answers.to_bytes(2, "big") + bytes(4) + query.question
    cache = ReplyCache()
    for data in (head + tail, tail):
        cache.store(query, data, 0.0)
        reply = cache.lookup(query, 1.0)
        assert reply is None or len(reply) <= len(data)


def make_query(name: str, rdtype: str = "A", message_id: int = 1) -> Query:
    return parse(dns.message.make_query(name, rdtype, id=message_id).to_wire())


def make_reply(*records: str, name: str = "example.com", rdtype: str = "A", rcode: int = 0, flags: int = 0) -> bytes:
    """A reply with id 1, its records as `name ttl IN type data`."""
    response = dns.message.make_response(dns.message.make_query(name, rdtype, id=1))
    response.set_rcode(dns.rcode.Rcode(rcode))
    response.flags |= flags
    for record in records:
        owner, ttl, rdclass, kind, data = record.split(" ", 4)
        response.answer.append(dns.rrset.from_text(f"{owner}.", int(ttl), rdclass, kind, _absolute(kind, data)))
    return response.to_wire()


def _absolute(kind: str, data: str) -> str:
    return f"{data}." if kind in ("CNAME", "MX") else data


def with_ttl(reply: bytes, ttl: int) -> bytes:
    return reply[:-10] + ttl.to_bytes(4, "big") + reply[-6:]


def ttls(reply: bytes | None) -> list[int]:
    assert reply is not None
    return [rrset.ttl for rrset in dns.message.from_wire(reply).answer]


def parse(wire: bytes) -> Query:
    query = Query.parse_untrusted(wire)
    assert query is not None
    return query
