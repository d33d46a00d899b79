"""The table of names: addresses, recorded resources, memory."""

from __future__ import annotations

import tracemalloc
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fz_core.dns import DnsRecord, NameEntry, ProxyNames

SLOTS = (2**21 - 2 - 256) // 4
FIRST_V4 = ["100.96.0.1", "100.96.0.2", "100.96.0.3", "100.96.0.4"]
FIRST_V6 = ["fd00:2021:1111:8000::", *(f"fd00:2021:1111:8000::{n}" for n in (1, 2, 3))]


@pytest.mark.shows("tunnel", 41)
def test_a_first_query_assigns_and_a_second_changes_nothing() -> None:
    names = make_names(("r1", "*.example.com"))
    entry = assign(names, "foo.example.com")
    assert text(entry.v4) == FIRST_V4
    assert text(entry.v6) == FIRST_V6
    assert names.take_changed()
    assert names.records() == (
        DnsRecord("foo.example.com", (("*.example.com", "r1"),), (*entry.v4, *entry.v6)),
    )  # fmt: skip
    assert assign(names, "FOO.Example.com") is entry
    assert not names.take_changed()


def test_addresses_lead_to_their_name() -> None:
    names = make_names(("r1", "**.example.com"))
    foo, bar = assign(names, "foo.example.com"), assign(names, "bar.example.com")
    for entry in (foo, bar):
        assert all(names.entry_of(ip) is entry for ip in (*entry.v4, *entry.v6))
        assert names.entry(entry.name.upper()) is entry
    for other in [
        "100.96.0.0",
        "100.96.0.9",
        "100.95.255.255",
        "100.128.0.1",
        "fd00:2021:1111:8000::8",
        "::",
        "0.0.0.0",
    ]:
        assert names.entry_of(ip_address(other).packed) is None
    assert names.entry_of(b"") is None
    assert names.names() == (foo, bar)


def test_unmatched_names_get_nothing() -> None:
    names = make_names(("r1", "*.example.com"))
    assert names.assign("example.org", never) is None
    assert not names.take_changed()
    assert not names.add_resource("r2", "a**", "dual")
    assert names.resources_matching("a") == ()
    assert names.resources_matching("\\255" * 80 + ".example.com") == ()


def test_best_resource_first() -> None:
    names = make_names(("r1", "**.example.com"), ("r2", "foo.example.com"), ("r3", "foo.example.com"))
    assert ids(names.resources_matching("Foo.example.com")) == ["r3", "r2", "r1"]
    assert ids(assign(names, "foo.example.com").matches) == ["r3", "r2", "r1"]
    assert ids(names.resources_matching("bar.example.com")) == ["r1"]
    names.remove_resource("r3")
    assert ids(names.resources_matching("foo.example.com")) == ["r2", "r1"]


def test_a_new_resource_is_recorded_with_the_next_query() -> None:
    names = make_names(("r1", "**.example.com"))
    entry = assign(names, "foo.example.com")
    names.take_changed()
    names.add_resource("r2", "foo.example.com", "dual")
    assert ids(entry.matches) == ["r1"]
    assert not names.take_changed()
    assign(names, "foo.example.com")
    assert ids(entry.matches) == ["r2", "r1"]
    assert names.take_changed()


def test_a_removed_resource_is_remembered() -> None:
    names = make_names(("r1", "*.example.com"))
    entry = assign(names, "foo.example.com")
    names.take_changed()
    names.remove_resource("r1")
    assert entry.matches == ()
    assert names.entry_of(entry.v4[0]) is entry
    names.add_resource("r1", "*.example.com", "dual")
    assert ids(entry.matches) == ["r1"]
    assert not names.take_changed()


def test_a_changed_pattern_is_forgotten() -> None:
    names = make_names(("r1", "*.example.com"))
    entry = assign(names, "foo.example.com")
    names.take_changed()
    names.remove_resource("r1")
    names.add_resource("r1", "**.example.com", "dual")
    assert entry.matches == ()
    assert names.take_changed()
    assert names.records()[0].resources == ()
    names.add_resource("r1", "*.example.com", "dual")
    assert entry.matches == ()
    assert assign(names, "foo.example.com") is entry
    assert ids(entry.matches) == ["r1"]


@pytest.mark.shows("tunnel", 42)
def test_narrowing_shows_in_the_recorded_resources() -> None:
    names = make_names(("r1", "foo.example.com"))
    entry = assign(names, "foo.example.com")
    names.add_resource("r1", "foo.example.com", "ipv6_only")
    (match,) = entry.matches
    assert (match.has_v4, match.has_v6) == (False, True)
    assert text(entry.v4) == FIRST_V4


@pytest.mark.shows("tunnel", 44)
def test_a_reseeded_record_of_a_changed_resource() -> None:
    earlier = make_names(("r1", "foo.example.com"), ("r2", "**.example.com"))
    assign(earlier, "foo.example.com")
    names = ProxyNames()
    names.restore(earlier.records())
    assert not names.take_changed()
    names.add_resource("r1", "other.example.com", "dual")
    names.add_resource("r2", "**.example.com", "dual")
    entry = names.entry_of(ip_address("100.96.0.1").packed)
    assert entry is not None
    assert ids(entry.matches) == ["r2"]
    assert names.take_changed()
    assert names.records()[0].resources == (("**.example.com", "r2"),)
    assert text(entry.v4) == FIRST_V4


@pytest.mark.shows("tunnel", 44)
def test_the_same_when_the_resources_come_first() -> None:
    names = make_names(("r1", "other.example.com"))
    names.restore([DnsRecord("foo.example.com", (("foo.example.com", "r1"),), packed(*FIRST_V4, *FIRST_V6))])
    assert names.records()[0].resources == ()


def test_a_reseeded_table_goes_on_where_it_ended() -> None:
    earlier = make_names(("r1", "**.example.com"))
    for n in range(3):
        assign(earlier, f"{n}.example.com")
    names = make_names(("r1", "**.example.com"))
    names.restore(earlier.records())
    assert names.records() == earlier.records()
    assert text(assign(names, "new.example.com").v4)[0] == "100.96.0.13"
    assert ids(assign(names, "1.example.com").matches) == ["r1"]


@pytest.mark.parametrize(
    "ips",
    [
        [],
        ["100.96.0.1"],
        [*FIRST_V4, *reversed(FIRST_V6)],
        ["192.0.2.1", *FIRST_V4[1:], *FIRST_V6],
        ["100.96.0.2", "100.96.0.3", "100.96.0.4", "100.96.0.5", *FIRST_V6],
        FIRST_V6,
    ],
)
def test_records_that_nobody_made_are_passed_over(ips: list[str]) -> None:
    names = ProxyNames()
    names.restore([DnsRecord("foo.example.com", (), packed(*ips))])
    assert len(names) == 0


def test_restoring_twice_or_too_much() -> None:
    earlier = make_names(("r1", "**.example.com"))
    for n in range(5):
        assign(earlier, f"{n}.example.com")
    names = ProxyNames(max_names=3)
    names.restore(earlier.records())
    names.restore(earlier.records())
    assert [entry.name for entry in names.names()] == ["2.example.com", "3.example.com", "4.example.com"]


def test_a_full_table_lets_the_oldest_unused_name_go() -> None:
    names = make_names(("r1", "*.example.com"), max_names=3)
    first, second, third = (assign(names, f"{n}.example.com") for n in (1, 2, 3))
    assign(names, "1.example.com")  # now 2 is the oldest, but in use
    fourth = names.assign("4.example.com", lambda name: name == "2.example.com")
    assert fourth is not None
    assert [entry.name for entry in names.names()] == ["1.example.com", "2.example.com", "4.example.com"]
    assert names.entry_of(third.v4[0]) is None
    assert names.entry("3.example.com") is None
    assert text(fourth.v4)[0] == "100.96.0.13"
    assert names.entry_of(first.v4[0]) is first
    assert names.entry_of(second.v6[3]) is second


def test_a_table_full_of_names_in_use() -> None:
    names = make_names(("r1", "*.example.com"), max_names=2)
    assign(names, "1.example.com")
    assign(names, "2.example.com")
    assert names.assign("3.example.com", always) is None
    assert names.assign("1.example.com", always) is not None
    assert len(names) == 2


def test_the_whole_pool_is_used_before_anything_twice() -> None:
    names = make_names(("r1", "*.example.com"))
    first = assign(names, "0.example.com")
    names.restore([slot_record("late.example.com", SLOTS - 2)])
    last = assign(names, "1.example.com")
    assert text(last.v4) == ["100.127.255.249", "100.127.255.250", "100.127.255.251", "100.127.255.252"]
    wrapped = assign(names, "2.example.com")
    assert text(wrapped.v4)[0] == "100.96.0.5"  # the first four are still in use
    assert names.entry_of(ip_address("100.127.255.254").packed) is None
    assert names.entry_of(first.v4[0]) is first


def test_no_name_gets_a_sentinel() -> None:
    names = make_names(("r1", "*.example.com"))
    names.restore([slot_record("before.example.com", 72_638)])
    across = assign(names, "1.example.com")
    assert text(across.v4) == ["100.100.110.253", "100.100.110.254", "100.100.110.255", "100.100.112.0"]
    assert all(names.entry_of(ip) is across for ip in across.v4)
    assert names.entry_of(ip_address("100.100.111.1").packed) is None


@given(st.integers(0, SLOTS - 1))
def test_every_slot_is_sound(slot: int) -> None:
    names = ProxyNames()
    names.restore([slot_record("a", slot)])
    (entry,) = names.names()
    v4 = [ip_address(ip) for ip in entry.v4]
    v6 = [ip_address(ip) for ip in entry.v6]
    assert all(ip in ip_network("100.96.0.0/11") and ip not in ip_network("100.100.111.0/24") for ip in v4)
    assert all(ip in ip_network("fd00:2021:1111:8000::/107") for ip in v6)
    assert v4 == sorted(set(v4))
    assert all((found := names.entry_of(ip)) and found.name == "a" for ip in (*entry.v4, *entry.v6))


def test_memory_per_name() -> None:
    names = make_names(*((f"r{n}", "*.example.com") for n in range(5)), max_names=65_536)
    labels = [f"{n:040}.example.com" for n in range(10_000)]
    assign(names, "warm.example.com")
    tracemalloc.start()
    try:
        for label in labels:
            assert assign(names, label).matches
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used / len(labels) < 1024


def make_names(*resources: tuple[str, str], max_names: int = 65_536) -> ProxyNames:
    names = ProxyNames(max_names)
    for resource_id, pattern in resources:
        assert names.add_resource(resource_id, pattern, "dual")
    return names


def assign(names: ProxyNames, name: str) -> NameEntry:
    entry = names.assign(name, never)
    assert entry is not None
    return entry


def slot_record(name: str, slot: int) -> DnsRecord:
    entry = NameEntry(ProxyNames(), name, slot, ())
    return DnsRecord(name, (), (*entry.v4, *entry.v6))


def never(name: str) -> bool:
    return False


def always(name: str) -> bool:
    return True


def ids(matches: object) -> list[str]:
    return [match.resource_id for match in matches]  # type: ignore[attr-defined]


def text(ips: tuple[bytes, ...]) -> list[str]:
    return [str(ip_address(ip)) for ip in ips]


def packed(*ips: str) -> tuple[bytes, ...]:
    return tuple(ip_address(ip).packed for ip in ips)
