"""Reading queries and building replies."""

from __future__ import annotations

from ipaddress import ip_address

import dns.flags
import dns.message
import dns.rcode
import dns.rdata
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fz_core.dns import (
    Query,
    build_addresses,
    build_answer,
    build_error,
    build_ptr,
    is_reply_to,
    parse_reverse_name,
    truncate,
    with_id,
)


def test_a_query_is_read() -> None:
    wire = make_wire("WWW.Example.com", "AAAA", message_id=0x1234)
    query = Query.parse_untrusted(wire)
    assert query is not None
    assert (query.id, query.name, query.rdtype, query.rdclass) == (0x1234, "www.example.com", 28, 1)
    assert query.data == wire
    assert query.question == wire[12:]
    assert not query.wants_dnssec


def test_the_root_and_odd_labels() -> None:
    assert parse(header() + b"\0" + b"\0\1\0\1").name == ""
    odd = b"\4a.\\ \2\xffZ\0"
    assert parse(header() + odd + b"\0\1\0\1").name == "a\\046\\092\\032.\\255z"
    reply = build_ptr(parse(make_wire("1.0.96.100.in-addr.arpa", "PTR")), "a\\046\\092\\032.\\255z")
    assert reply.endswith(odd.replace(b"Z", b"z"))


def test_edns_and_what_follows_it_are_not_looked_at() -> None:
    message = dns.message.make_query("example.com", "A", use_edns=0, want_dnssec=True)
    query = parse(message.to_wire())
    assert query.wants_dnssec
    assert not parse(dns.message.make_query("example.com", "A", use_edns=0).to_wire()).wants_dnssec
    assert parse(make_wire("example.com") + b"garbage").name == "example.com"


def test_answers_in_a_query_must_decode() -> None:
    message = dns.message.make_query("example.com", "A")
    message.answer.append(dns.rrset.from_text("example.com.", 5, "IN", "A", "192.0.2.1"))
    wire = message.to_wire()
    assert Query.parse_untrusted(wire) is not None
    assert Query.parse_untrusted(wire[:-1]) is None
    assert Query.parse_untrusted(wire[:-5] + b"\3" + wire[-4:-1]) is None  # an A record of 3 bytes
    assert Query.parse_untrusted(wire[:6] + b"\xff\xff" + wire[8:]) is None


def test_unknown_types_are_not_remembered() -> None:
    """dnspython keeps what it finds out about every class and type it meets."""
    before = len(dns.rdata._rdata_classes)
    for rdtype in range(40_000, 40_100):
        for rdclass in (1, rdtype):
            record = b"\xc0\x0c" + rdtype.to_bytes(2, "big") + rdclass.to_bytes(2, "big") + bytes(4) + b"\0\1x"
            assert Query.parse_untrusted(header()[:6] + b"\0\1" + bytes(4) + b"\0\0\1\0\1" + record) is not None
    assert len(dns.rdata._rdata_classes) == before


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        b"\0" * 11,
        b"\0" * 12,
        b"\0" * 17,
        b"\0\1\x80\0\0\1\0\0\0\0\0\0\0\0\1\0\1",  # a response
        b"\0\1\1\0\0\2\0\0\0\0\0\0\0\0\1\0\1\0\0\1\0\1",  # two questions
        b"\0\1\1\0\0\1\0\0\0\0\0\0\1a",  # cut off in the name
        b"\0\1\1\0\0\1\0\0\0\0\0\0\1a\0\0\1\0",  # cut off in the class
        b"\0\1\1\0\0\1\0\0\0\0\0\0\xc0\x0c\0\1\0\1",  # a name that is itself
        b"\0\1\1\0\0\1\0\0\0\0\0\0\xc0\0\0\1\0\1",
        b"\0\1\1\0\0\1\0\0\0\0\0\0\x40" + b"a" * 64 + b"\0\0\1\0\1",  # a label of 64
        b"\0\1\1\0\0\1\0\0\0\0\0\0" + b"\1a" * 127 + b"\1a\0\0\1\0\1",  # a name of 257
        b"\0\1\1\0\0\1\0\0\0\0\0\0" + b"\x3f" + b"a" * 65_535,
        b"\0\1\1\0\0\1\0\0\0\0\0\0\0\0\1\0\1" + b"\0" * 65_519,
    ],
)
def test_not_a_query(wire: bytes) -> None:
    assert Query.parse_untrusted(wire) is None


def test_the_longest_name() -> None:
    query = parse(header() + b"\1a" * 127 + b"\0\0\1\0\1")
    assert len(query.name) == 253


@pytest.mark.parametrize("opcode_and_rd", [0x0000, 0x0100, 0x2100, 0x7800])
def test_the_header_of_replies(opcode_and_rd: int) -> None:
    flags = opcode_and_rd | 0x06F0 & 0x87FF  # AA, TC, RA, Z, AD, CD are not copied
    query = parse(header(0xBEEF, flags) + b"\1A\0\0\1\0\1")
    for reply, rcode, answers in [
        (build_error(query, 3), 3, 0),
        (build_error(query, 0), 0, 0),
        (build_addresses(query, [b"\x01\x02\x03\x04"] * 4), 0, 4),
    ]:
        assert reply[:2] == b"\xbe\xef"
        assert int.from_bytes(reply[2:4], "big") == 0x8000 | opcode_and_rd | rcode
        assert reply[4:12] == bytes([0, 1, 0, answers, 0, 0, 0, 0])
        assert reply[12:19] == b"\1A\0\0\1\0\1"
        assert is_reply_to(query, reply)


def test_addresses_are_read_by_others() -> None:
    query = parse(make_wire("Foo.example.com", "A"))
    ips = [ip_address(f"100.96.0.{n}").packed for n in range(1, 5)]
    message = dns.message.from_wire(build_addresses(query, ips))
    (rrset,) = message.answer
    assert rrset.to_text() == "\n".join(f"Foo.example.com. 1 IN A 100.96.0.{n}" for n in range(1, 5))
    v6 = dns.message.from_wire(build_addresses(parse(make_wire("a.b", "AAAA")), [bytes(15) + b"\1"]))
    assert v6.answer[0].to_text() == "a.b. 1 IN AAAA ::1"


def test_text_and_wire_data() -> None:
    query = parse(make_wire("example.com", "SRV"))
    reply = build_answer(query, [(33, "1 2 443 host.example.com."), (16, b"\2hi")], ttl=60)
    texts = [rrset.to_text() for rrset in dns.message.from_wire(reply).answer]
    assert texts == ["example.com. 60 IN SRV 1 2 443 host.example.com.", 'example.com. 60 IN TXT "hi"']


def test_a_ptr_names_the_name() -> None:
    query = parse(make_wire("1.0.96.100.in-addr.arpa", "PTR"))
    reply = dns.message.from_wire(build_ptr(query, "foo.example.com"))
    assert reply.answer[0].to_text() == "1.0.96.100.in-addr.arpa. 1 IN PTR foo.example.com."
    with pytest.raises(ValueError, match="not valid"):
        build_ptr(query, "a..b")


def test_is_reply_to() -> None:
    query = parse(make_wire("example.com", "A", message_id=7))
    good = build_error(query, 0)
    assert is_reply_to(query, good)
    assert is_reply_to(query, good.replace(b"example", b"eXaMPLe"))
    assert is_reply_to(query, good + b"anything")
    for bad in [
        b"",
        good[:-1],
        with_id(good, 8),
        query.data,
        good.replace(b"example", b"exbmple"),
        good[:4] + b"\0\0" + good[6:],
        good[:-3] + b"\x1c" + good[-2:],  # AAAA
        good[:-1] + b"\3",
    ]:
        assert not is_reply_to(query, bad)


def test_with_id() -> None:
    assert with_id(b"\0\0rest", 0xABCD) == b"\xab\xcdrest"
    assert with_id(b"x", 1) == b"x"


@pytest.mark.shows("tunnel", 55)
def test_truncation() -> None:
    query = parse(make_wire("example.com", "A"))
    reply = build_addresses(query, [n.to_bytes(4, "big") for n in range(1000)])
    assert len(reply) > 16_000
    assert truncate(reply, len(reply)) == reply
    cut = truncate(reply, 1000)
    message = dns.message.from_wire(cut)
    assert message.flags & dns.flags.TC
    assert message.id == query.id
    assert not message.answer
    assert cut[12:] == query.question
    assert cut[4:12] == b"\0\1\0\0\0\0\0\0"


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 2000, b"\0\0\x80\0\0\1" + b"\0" * 2000, b"\0\1\x80\0\0\2" + b"\1a" * 900]
)
def test_garbage_is_truncated_too(garbage: bytes) -> None:
    cut = truncate(garbage, 1212)
    assert len(cut) <= 1212
    assert cut[:2] == garbage[:2]
    assert cut[2] & 2


@pytest.mark.shows("tunnel", 46)
@pytest.mark.parametrize(
    ("name", "ip"),
    [
        ("1.0.96.100.in-addr.arpa", "100.96.0.1"),
        ("255.255.255.255.in-addr.arpa", "255.255.255.255"),
        (".".join(reversed("fd00202111118000" + "0" * 15 + "1")) + ".ip6.arpa", "fd00:2021:1111:8000::1"),
    ],
)
def test_reverse_names(name: str, ip: str) -> None:
    assert parse_reverse_name(name) == ip_address(ip).packed


@pytest.mark.shows("tunnel", 46)
@pytest.mark.parametrize(
    "name",
    [
        "",
        "in-addr.arpa",
        "0.96.100.in-addr.arpa",
        "1.1.0.96.100.in-addr.arpa",
        "256.0.96.100.in-addr.arpa",
        "x.0.96.100.in-addr.arpa",
        "-1.0.96.100.in-addr.arpa",
        "1.0.96.100.in-addr.example",
        "1.0.96.100.ip6.arpa",
        ".".join("0" * 31) + ".ip6.arpa",
        ".".join("0" * 33) + ".ip6.arpa",
        ".".join("0" * 31) + ".g.ip6.arpa",
        ".".join("0" * 31) + ".00.ip6.arpa",
        ".".join("0" * 32) + ".in-addr.arpa",
        ".".join("0" * 32) + ".ip6.example",
    ],
)
def test_not_reverse_names(name: str) -> None:
    assert parse_reverse_name(name) is None


@given(st.binary(max_size=300), st.integers(0, 300))
def test_untrusted_bytes_never_raise(data: bytes, limit: int) -> None:
    query = parse(make_wire("example.com"))
    is_reply_to(query, data)
    assert len(truncate(data, max(12, limit))) <= max(12, limit)
    found = Query.parse_untrusted(data)
    if found is not None:
        assert is_reply_to(found, build_error(found, 2))


@given(st.lists(st.binary(min_size=1, max_size=63), max_size=5))
def test_any_name_survives_text(labels: list[bytes]) -> None:
    wire = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    query = parse(header() + wire + b"\0\1\0\1") if len(wire) <= 255 else None
    if query is not None:
        assert len(query.name.split(".")) == max(1, len(labels))
        assert build_ptr(query, query.name).endswith(wire.lower())


def parse(wire: bytes) -> Query:
    query = Query.parse_untrusted(wire)
    assert query is not None
    return query


def make_wire(name: str, rdtype: str = "A", message_id: int = 1) -> bytes:
    return dns.message.make_query(name, rdtype, id=message_id).to_wire()


def header(message_id: int = 1, flags: int = 0x0100) -> bytes:
    return message_id.to_bytes(2, "big") + flags.to_bytes(2, "big") + b"\0\1\0\0\0\0\0\0"
