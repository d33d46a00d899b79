"""What a client agrees with gateways about names, and the proxies on the gateway's side."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from fz_core.dns import NameEntry, ProxyNames
from fz_core.packet import build_udp
from fz_core.tunnel.name_setups import MAX_BUFFERS, MAX_SETUPS, NameSetups, SetupKey
from fz_core.tunnel.proxies import MAX_NAMES, Proxies
from fz_core.tunnel.resolutions import MAX_PER_CLIENT, Resolution, Resolutions

OWN, PROXY = bytes([100, 64, 0, 9]), bytes([100, 96, 0, 1])


def entry_for(*resources: tuple[str, str]) -> NameEntry:
    names = ProxyNames()
    for resource_id, stack in resources or (("r", "dual"),):
        names.add_resource(resource_id, "*.example", stack)
    entry = names.assign("a.example", lambda name: False)
    assert entry is not None
    return entry


def key(resource_id: str = "r", gateway_id: str = "g", name: str = "a.example") -> SetupKey:
    return SetupKey(gateway_id, name, resource_id)


def packet(payload: bytes = b"x") -> object:
    return build_udp(OWN, PROXY, 1, 2, payload)


@pytest.mark.shows("tunnel", 61)
def test_packets_wait_for_the_answer_and_leave_unchanged() -> None:
    setups, entry = NameSetups(), entry_for()
    may_go, announced = setups.handle_packet(key(), entry, packet(b"1"), 0.0)
    assert not may_go
    assert announced is not None
    assert [str(ip) for ip in announced.proxy_ips][:5] == [
        "100.96.0.1", "100.96.0.2", "100.96.0.3", "100.96.0.4", "fd00:2021:1111:8000::",
    ]  # fmt: skip
    assert setups.handle_packet(key(), entry, packet(b"2"), 0.1) == (False, None)
    assert [p.payload for p in setups.handle_status(key(), True)] == [b"1", b"2"]
    assert setups.handle_packet(key(), entry, packet(b"3"), 0.2) == (True, None)


@pytest.mark.shows("tunnel", 61)
def test_a_refused_name_loses_what_waited_and_is_tried_again_when_queried() -> None:
    setups, entry = NameSetups(), entry_for()
    setups.handle_packet(key(), entry, packet(), 0.0)
    assert setups.handle_status(key(), False) == []
    assert setups.handle_packet(key(), entry, packet(), 100.0) == (True, None)  # the gateway refuses it visibly
    assert setups.update(key(), entry, 100.0) is None
    setups.handle_queried("a.example", 100.0)
    assert setups.update(key(), entry, 100.0) is not None
    assert setups.handle_packet(key(), entry, packet(), 100.1) == (False, None)


@pytest.mark.shows("tunnel", 62)
def test_a_confirmed_name_is_renewed_without_holding_packets_back() -> None:
    setups, entry = NameSetups(), entry_for()
    setups.update(key(), entry, 0.0)
    setups.handle_status(key(), True)
    setups.handle_queried("a.example", 0.5)
    assert setups.update(key(), entry, 0.5) is None  # within the TTL of our answer
    setups.handle_queried("a.example", 1.0)
    assert setups.update(key(), entry, 1.0) is not None
    assert setups.handle_packet(key(), entry, packet(), 1.1) == (True, None)


@pytest.mark.shows("tunnel", 63)
def test_repeats_after_two_seconds_by_update_or_packet_and_not_before() -> None:
    setups, entry = NameSetups(), entry_for()
    assert setups.update(key(), entry, 0.0) is not None
    assert setups.update(key(), entry, 1.9) is None
    assert setups.handle_packet(key(), entry, packet(), 1.9) == (False, None)
    assert setups.update(key(), entry, 2.0) is not None
    assert setups.handle_packet(key(), entry, packet(), 3.9)[1] is None
    assert setups.handle_packet(key(), entry, packet(), 4.0)[1] is not None


@pytest.mark.shows("tunnel", 7, 63)
def test_resources_that_share_a_name_are_set_up_each_with_their_families() -> None:
    setups, entry = NameSetups(), entry_for(("r", "ipv4_only"), ("s", "dual"))
    first, second = setups.update(key("r"), entry, 0.0), setups.update(key("s"), entry, 0.0)
    assert first is not None
    assert second is not None
    assert ([ip.version for ip in first.proxy_ips], len(second.proxy_ips)) == ([4] * 4, 8)


def test_statuses_nobody_asked_for_and_forgetting() -> None:
    setups, entry = NameSetups(), entry_for()
    assert setups.handle_status(key(), True) == []
    setups.update(key(), entry, 0.0)
    setups.update(key("r", "h"), entry, 0.0)
    assert setups.is_set_up("g", "a.example")
    setups.forget_gateway("g")
    assert (setups.is_set_up("g", "a.example"), setups.is_set_up("h", "a.example")) == (False, True)
    setups.forget_resource("r")
    assert len(setups) == 0


def test_names_in_use_are_those_with_recent_packets() -> None:
    setups, entry = NameSetups(), entry_for()
    assert not setups.is_in_use("a.example", 0.0)
    setups.handle_packet(key(), entry, packet(), 0.0)
    assert setups.is_in_use("a.example", 7439.0)
    assert not setups.is_in_use("a.example", 7440.0)


def test_many_names_and_packets_have_a_bound() -> None:
    setups, entry = NameSetups(), entry_for()
    for number in range(MAX_SETUPS + 10):
        setups.update(key(name=f"{number}.example"), entry, float(number))
    assert len(setups) == MAX_SETUPS
    for number in range(MAX_SETUPS, MAX_SETUPS + 10):
        for payload in (b"1", b"2", b"3"):
            setups.handle_packet(key(name=f"{number}.example"), entry, packet(payload), 1e6)
        released = setups.handle_status(key(name=f"{number}.example"), True)
        assert [p.payload for p in released] == [b"3"], f"more than {MAX_BUFFERS} full buffers"


# the gateway's side


def addresses(*texts: str) -> list[bytes]:
    return [ip_address(text).packed for text in texts]


V4 = addresses("100.96.0.1", "100.96.0.2", "100.96.0.3", "100.96.0.4")
V6 = addresses(*(f"fd00:2021:1111:8000::{n}" for n in range(1, 5)))


def real(proxies: Proxies, ip: bytes) -> str | None:
    proxy = proxies.get(ip)
    assert proxy is not None
    address = proxy.real(ip)
    return None if address is None else str(ip_address(address))


@pytest.mark.shows("tunnel", 88)
def test_addresses_are_paired_in_order_and_repeat() -> None:
    proxies = Proxies()
    assert not proxies.assign("r", "a", V4, addresses("10.0.0.2", "10.0.0.1"), mix=False)
    assert [real(proxies, ip) for ip in V4] == ["10.0.0.1", "10.0.0.2", "10.0.0.1", "10.0.0.2"]
    proxies.assign("r", "a", V4, addresses(*(f"10.0.0.{n}" for n in range(1, 7))), mix=False)
    assert [real(proxies, ip) for ip in V4] == [f"10.0.0.{n}" for n in range(1, 5)]


@pytest.mark.shows("tunnel", 86)
def test_a_missing_family_leads_nowhere_or_to_the_other() -> None:
    proxies = Proxies()
    proxies.assign("r", "a", V4 + V6, addresses("10.0.0.1"), mix=False)
    assert {real(proxies, ip) for ip in V4} == {"10.0.0.1"}
    assert {real(proxies, ip) for ip in V6} == {None}
    proxies.assign("r", "a", V4 + V6, addresses("10.0.0.1"), mix=True)
    assert {real(proxies, ip) for ip in V6} == {"10.0.0.1"}
    proxies.assign("r", "a", V4 + V6, [], mix=True)
    assert {real(proxies, ip) for ip in V4 + V6} == {None}


@pytest.mark.shows("tunnel", 85)
def test_an_address_of_another_name_clears_everything() -> None:
    proxies = Proxies()
    proxies.assign("r", "a", V4, addresses("10.0.0.1"), mix=False)
    proxies.assign("r", "b", V6, addresses("fd20::1"), mix=False)
    assert proxies.assign("r", "c", V4[:1], addresses("10.0.0.3"), mix=False)
    assert [proxies.get(ip) is not None for ip in (V4[0], V4[1], V6[0])] == [True, False, False]


@pytest.mark.shows("tunnel", 87)
def test_resources_gather_at_an_address() -> None:
    proxies = Proxies()
    proxies.assign("r", "a", V4, addresses("10.0.0.1"), mix=False)
    proxies.assign("s", "a", V4, addresses("10.0.0.1"), mix=False)
    proxy = proxies.get(V4[0])
    assert proxy is not None
    assert set(proxy.resource_ids) == {"r", "s"}


def test_names_of_a_client_have_a_bound() -> None:
    proxies = Proxies()
    for number in range(MAX_NAMES + 5):
        proxies.assign("r", str(number), [(0x64600000 + number).to_bytes(4, "big")], [], mix=False)
    assert len(proxies) == MAX_NAMES


def test_look_ups_join_are_bounded_and_end_once() -> None:
    resolutions = Resolutions()
    first = resolutions.begin(Resolution("c", "r", "a", (V4[0],)))
    assert first
    assert resolutions.begin(Resolution("c", "r", "a", (V4[1],))) == 0
    ended = resolutions.end(first)
    assert ended is not None
    assert ended.proxy_ips == (V4[1],)  # the newest addresses count
    assert resolutions.end(first) is None
    tokens = [resolutions.begin(Resolution("c", "r", str(n), ())) for n in range(MAX_PER_CLIENT + 1)]
    assert tokens[-1] is None
    assert resolutions.begin(Resolution("d", "r", "a", ()))
    for token in tokens[:-1]:
        assert token is not None
        resolutions.end(token)
    assert len(resolutions) == 1
