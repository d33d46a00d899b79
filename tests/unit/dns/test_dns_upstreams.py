"""Which servers are asked, and the sentinels that stand for them."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fz_core.dns import Sentinels, Upstream, effective_upstreams

DOH = "https://dns.example/dns-query"


@pytest.mark.shows("tunnel", 36)
def test_do53_beats_doh_beats_system() -> None:
    assert effective(["192.0.2.1"], [DOH], ["192.0.2.2"]) == [Upstream(ip=packed("192.0.2.1"))]
    assert effective([], [DOH], ["192.0.2.2"]) == [Upstream(url=DOH)]
    assert effective([], [], ["192.0.2.2"]) == [Upstream(ip=packed("192.0.2.2"), is_system=True)]
    assert effective([], [], []) == []


@pytest.mark.shows("tunnel", 36)
def test_order_is_kept_and_repetitions_are_not() -> None:
    servers = ["192.0.2.3", "2001:db8::1", "192.0.2.1", "192.0.2.3"]
    assert [u.ip for u in effective(servers, [], [])] == [packed(ip) for ip in servers[:3]]
    assert [u.url for u in effective([], ["b", "a", "b"], [])] == ["b", "a"]


@pytest.mark.shows("tunnel", 37)
def test_sentinels_are_no_servers() -> None:
    sentinel, other, v6 = "100.100.111.1", "100.100.112.1", "fd00:2021:1111:8000:100:100:111:ff"
    for servers in ([sentinel, other, v6], [other]):
        assert [u.ip for u in effective(servers, [], [])] == [packed(other)]
        assert [u.ip for u in effective([], [], servers)] == [packed(other)]
    assert effective([sentinel], [], ["192.0.2.1"])[0].is_system


@pytest.mark.shows("tunnel", 36)
def test_one_sentinel_each_in_order_and_of_its_family() -> None:
    sentinels = Sentinels()
    upstreams = effective(["192.0.2.3", "2001:db8::1", "192.0.2.1"], [], [])
    assert sentinels.update(upstreams)
    assert [(str(ip_address(ip)), u) for ip, u in sentinels.mapping] == [
        ("100.100.111.1", upstreams[0]),
        ("fd00:2021:1111:8000:100:100:111:0", upstreams[1]),
        ("100.100.111.2", upstreams[2]),
    ]
    assert sentinels.upstream_of(packed("100.100.111.2")) == upstreams[2]
    assert sentinels.upstream_of(packed("100.100.111.3")) is None


def test_doh_has_ipv4_sentinels() -> None:
    sentinels = Sentinels()
    sentinels.update(effective([], [DOH], []))
    assert sentinels.mapping == ((packed("100.100.111.1"), Upstream(url=DOH)),)


@pytest.mark.shows("tunnel", 38)
def test_the_same_set_keeps_its_sentinels() -> None:
    sentinels = Sentinels()
    upstreams = effective(["192.0.2.1", "192.0.2.2"], [], [])
    assert sentinels.update(upstreams)
    before = sentinels.mapping
    assert not sentinels.update(list(reversed(upstreams)))
    assert sentinels.mapping == before


@pytest.mark.shows("tunnel", 38, 39)
@given(st.lists(st.lists(st.integers(0, 400), max_size=8, unique=True), max_size=8))
def test_another_set_has_other_sentinels(sets: list[list[int]]) -> None:
    sentinels = Sentinels()
    last: set[bytes] = set()
    for numbers in sets:
        before = sentinels.mapping
        upstreams = [Upstream(ip=n.to_bytes(4 if n % 2 else 16, "big")) for n in numbers]
        changed = sentinels.update(upstreams)
        now = {ip for ip, _ in sentinels.mapping}
        assert changed == ({u for _, u in before} != set(upstreams))
        assert len(now) == len(upstreams)
        if changed and now:
            assert now.isdisjoint(last)
            assert all(sentinels.upstream_of(ip) is None for ip in last)
            last = now


def test_upstreams_without_end() -> None:
    sentinels = Sentinels()
    for base in (0, 1000):
        sentinels.update([Upstream(ip=(base + n).to_bytes(4, "big")) for n in range(500)])
        assert len(sentinels.mapping) == 127


def effective(do53: list[str], doh: list[str], system: list[str]) -> list[Upstream]:
    return list(effective_upstreams(map(packed, do53), doh, map(packed, system)))


def packed(ip: str) -> bytes:
    return ip_address(ip).packed
