"""Answers that need nobody else: the table of §9.3, the canary, PTR."""

from __future__ import annotations

import dns.message
import dns.rcode
import dns.reversename
import pytest

from fz_core.dns import ProxyNames, Query, ResourceStub, SiteQuery, StubAnswer

V4 = [f"100.96.0.{n}" for n in range(1, 5)]
V6 = ["fd00:2021:1111:8000::", *(f"fd00:2021:1111:8000::{n}" for n in (1, 2, 3))]


@pytest.mark.shows("tunnel", 41)
def test_addresses() -> None:
    stub = Stub(("r1", "*.example.com", "dual"))
    for _ in range(2):
        assert stub.ask("foo.example.com", "A") == ("NOERROR", V4)
        assert stub.ask("FOO.example.com", "AAAA") == ("NOERROR", V6)
    answer = stub.resolve("foo.example.com", "A")
    assert isinstance(answer, StubAnswer)
    assert answer.entry is stub.names.entry("foo.example.com")
    (rrset,) = dns.message.from_wire(answer.reply).answer
    assert rrset.ttl == 1


@pytest.mark.shows("tunnel", 41)
def test_a_repeated_query_changes_nothing() -> None:
    stub = Stub(("r1", "*.example.com", "dual"))
    stub.ask("foo.example.com", "A")
    assert stub.names.take_changed()
    stub.ask("foo.example.com", "A")
    stub.ask("foo.example.com", "AAAA")
    assert not stub.names.take_changed()


def test_names_stay_out_of_representations() -> None:
    stub = Stub(("r1", "*.example.com", "dual"))
    answer = stub.resolve("foo.example.com", "A")
    for value in (answer, stub.names.records(), make_query("foo.example.com", "A")):
        assert "foo" not in repr(value)


@pytest.mark.shows("tunnel", 42)
@pytest.mark.parametrize(("stack", "v4", "v6"), [("ipv4_only", V4, []), ("ipv6_only", [], V6)])
def test_one_family(stack: str, v4: list[str], v6: list[str]) -> None:
    stub = Stub(("r1", "foo.example.com", stack))
    assert stub.ask("foo.example.com", "A") == ("NOERROR", v4)
    assert stub.ask("foo.example.com", "AAAA") == ("NOERROR", v6)
    assert stub.names.entry("foo.example.com") is not None


@pytest.mark.shows("tunnel", 42)
def test_one_family_after_narrowing_and_from_a_reseeded_table() -> None:
    stub = Stub(("r1", "foo.example.com", "dual"))
    assert stub.ask("foo.example.com", "A") == ("NOERROR", V4)
    stub.names.add_resource("r1", "foo.example.com", "ipv6_only")
    assert stub.ask("foo.example.com", "A") == ("NOERROR", [])
    later = Stub(("r1", "foo.example.com", "ipv4_only"))
    later.names.restore(stub.names.records())
    assert later.ask("foo.example.com", "AAAA") == ("NOERROR", [])
    assert later.ask("foo.example.com", "A") == ("NOERROR", V4)


@pytest.mark.shows("tunnel", 43)
def test_two_resources_of_different_families() -> None:
    stub = Stub(("r1", "*.example.com", "ipv4_only"), ("r2", "foo.example.com", "ipv6_only"))
    assert stub.ask("foo.example.com", "A") == ("NOERROR", V4)
    assert stub.ask("foo.example.com", "AAAA") == ("NOERROR", V6)
    entry = stub.names.entry("foo.example.com")
    assert entry is not None
    assert [m.resource_id for m in entry.matches if m.has_v4] == ["r1"]
    assert [m.resource_id for m in entry.matches if m.has_v6] == ["r2"]


@pytest.mark.shows("tunnel", 45)
@pytest.mark.parametrize("rdtype", ["A", "AAAA", "HTTPS", "TXT", "PTR", "MX"])
def test_the_canary(rdtype: str) -> None:
    stub = Stub(("r1", "**", "dual"))
    assert stub.ask("use-application-DNS.net", rdtype) == ("NXDOMAIN", [])
    assert len(stub.names) == 0


@pytest.mark.shows("tunnel", 45)
def test_https_is_empty() -> None:
    stub = Stub(("r1", "foo.example.com", "dual"))
    assert stub.ask("foo.example.com", "HTTPS") == ("NOERROR", [])
    assert len(stub.names) == 0
    assert stub.resolve("bar.example.com", "HTTPS") is None


@pytest.mark.parametrize("rdtype", ["SRV", "TXT"])
def test_site_queries_go_to_the_most_specific_resource(rdtype: str) -> None:
    stub = Stub(("r9", "**.example.com", "dual"), ("r1", "foo.example.com", "dual"), ("r2", "foo.example.com", "dual"))
    assert stub.resolve("foo.example.com", rdtype) == SiteQuery("r2")
    assert stub.resolve("_ldap._tcp.example.com", rdtype) == SiteQuery("r9")
    assert stub.resolve("example.org", rdtype) is None


@pytest.mark.parametrize("rdtype", ["MX", "NS", "CNAME", "SVCB", "ANY", "SOA", "DS"])
def test_other_types_recurse(rdtype: str) -> None:
    assert Stub(("r1", "foo.example.com", "dual")).resolve("foo.example.com", rdtype) is None


def test_what_is_not_ours_recurses() -> None:
    stub = Stub(("r1", "foo.example.com", "dual"))
    assert stub.resolve("bar.example.com", "A") is None
    chaos = dns.message.make_query("foo.example.com", "A", rdclass="CH").to_wire()
    assert stub.stub.resolve(parse(chaos), lambda name: False) is None
    ordinary = dns.message.make_query("foo.example.com", "A").to_wire()
    update = ordinary[:2] + b"\x29" + ordinary[3:]
    assert stub.stub.resolve(parse(update), lambda name: False) is None


@pytest.mark.shows("tunnel", 46)
def test_ptr() -> None:
    stub = Stub(("r1", "foo.example.com", "dual"))
    stub.ask("foo.example.com", "A")
    for ip in (*V4, *V6):
        assert stub.ask(str(dns.reversename.from_address(ip)), "PTR") == ("NOERROR", ["foo.example.com."])
    stub.names.remove_resource("r1")
    assert stub.ask("1.0.96.100.in-addr.arpa", "PTR") == ("NOERROR", ["foo.example.com."])
    for other in ("9.0.96.100.in-addr.arpa", "1.100.96.in-addr.arpa", "1.0.96.100.ip6.arpa", "foo.example.com"):
        assert stub.resolve(other, "PTR") is None


def test_a_full_table_is_a_failure() -> None:
    stub = Stub(("r1", "*.example.com", "dual"), max_names=1)
    stub.ask("foo.example.com", "A")
    answer = stub.stub.resolve(make_query("bar.example.com", "A"), lambda name: True)
    assert isinstance(answer, StubAnswer)
    assert answer.entry is None
    assert dns.message.from_wire(answer.reply).rcode() == dns.rcode.SERVFAIL


class Stub:
    """A stub with its resources."""

    def __init__(self, *resources: tuple[str, str, str], max_names: int = 100) -> None:
        self.names = ProxyNames(max_names)
        self.stub = ResourceStub(self.names)
        for resource in resources:
            assert self.names.add_resource(*resource)

    def resolve(self, name: str, rdtype: str) -> StubAnswer | SiteQuery | None:
        return self.stub.resolve(make_query(name, rdtype), lambda name: False)

    def ask(self, name: str, rdtype: str) -> tuple[str, list[str]]:
        """Response code and the texts of the answer's records."""
        answer = self.resolve(name, rdtype)
        assert isinstance(answer, StubAnswer)
        message = dns.message.from_wire(answer.reply)
        texts = [rdata.to_text() for rrset in message.answer for rdata in rrset]
        return dns.rcode.to_text(message.rcode()), texts


def make_query(name: str, rdtype: str) -> Query:
    return parse(dns.message.make_query(name, rdtype).to_wire())


def parse(wire: bytes) -> Query:
    query = Query.parse_untrusted(wire)
    assert query is not None
    return query
