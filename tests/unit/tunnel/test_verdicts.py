"""What is said to a flow table: which packets get a verdict, what it refreshes, and what makes it void."""

from __future__ import annotations

from ipaddress import ip_address

import dns.message
import pytest
from bare_client import OWN4, SITE, Client
from gateway_access import Access, cidr, packed, uuid
from hypothesis import given
from hypothesis import strategies as st

from fz_core.dns import ProxyNames
from fz_core.packet import Packet, build_echo, build_icmp_unreachable, build_ip, build_tcp, build_udp
from fz_core.portal import client as c
from fz_core.portal import gateway as g
from fz_core.portal.types import DnsResource, FlowLogs
from fz_core.tunnel.aging import Aging
from fz_core.tunnel.conntrack import ConnTrack
from fz_core.tunnel.flow_tracking import FlowTracking
from fz_core.tunnel.name_setups import NameSetups, SetupKey
from fz_core.tunnel.nat import NatTable
from fz_core.tunnel.verdict import FlowKey, Verdict, is_plain
from tests.unit.tunnel.flow_samples import DIRECT, token_text

SYN, ACK, FIN, RST = 0x02, 0x10, 0x01, 0x04
CLIENT = (packed("100.64.0.9"), packed("fd00:2021:1111::9"))
PROXY, REAL, OTHER = packed("100.96.0.1"), packed("192.0.2.1"), packed("192.0.2.2")
OWN, PEER = packed("100.64.0.1"), packed("100.64.0.2")
RESOURCE = cidr(1, "10.0.0.0/24")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 20)), max_size=40))
def test_a_late_note_keeps_the_order_and_never_takes_from_a_life(uses: list[tuple[bool, int, int]]) -> None:
    aging: Aging[int] = Aging(10.0)
    now, known = 0.0, dict[int, float]()
    for is_late, key, step in uses:
        now += step
        if not is_late:
            aging.touch(key, now)
            known[key] = now
            continue
        at = now - 3
        aging.note(key, at)
        if key in known:
            known[key] = max(known[key], at)
    times = list(aging._used_at.values())
    assert times == sorted(times)
    assert set(aging._used_at) == set(known)
    for key, at in known.items():
        assert at <= aging._used_at[key] <= now


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        (build_udp(OWN, REAL, 1, 2), True),
        (build_echo(OWN, REAL, 7), True),
        (build_echo(OWN, REAL, 7, reply=True), True),
        (build_tcp(OWN, REAL, 1, 2, SYN), True),
        (build_tcp(OWN, REAL, 1, 2, ACK), True),
        (build_tcp(OWN, REAL, 1, 2, ACK | FIN), False),
        (build_tcp(OWN, REAL, 1, 2, RST), False),
        (build_ip(OWN, REAL, 47, bytes(8)), False),
        (build_icmp_unreachable(build_udp(OWN, REAL, 1, 2)), False),
    ],
)
def test_what_a_table_may_carry(packet: Packet, expected: bool) -> None:
    assert is_plain(packet) is expected


# translated flows


class Nat:
    """A translation table and the verdicts about its packets."""

    def __init__(self, max_sessions: int = 64) -> None:
        self.revoked: list[Verdict] = []
        self.nat = NatTable(CLIENT, max_sessions, self.revoked)

    def send(self, port: int = 5000, now: float = 0.0, flags: int = 0, real: bytes = REAL, to: int = 443) -> Verdict:
        packet = build_tcp(CLIENT[0], PROXY, port, to, flags) if flags else build_udp(CLIENT[0], PROXY, port, to)
        before = FlowKey.of(packet)
        translated = self.nat.translate_outgoing(packet, real, now)
        assert isinstance(translated, Packet)
        return Verdict(True, "c", before, FlowKey.of(translated))

    def answer(self, port: int = 5000, now: float = 0.0, flags: int = 0, src: bytes = REAL) -> Verdict:
        packet = build_tcp(src, CLIENT[0], 443, port, flags) if flags else build_udp(src, CLIENT[0], 443, port)
        before = FlowKey.of(packet)
        translated = self.nat.translate_incoming(packet, now)
        assert (translated is None) == (src == OTHER)
        return Verdict(False, "c", before, FlowKey.of(packet))

    def supported(self, verdict: Verdict) -> Verdict:
        assert self.nat.support(verdict)
        return verdict

    def taken(self) -> list[Verdict]:
        taken = list(self.revoked)
        self.revoked.clear()
        return taken


def test_a_verdict_ends_before_its_session_would() -> None:
    nat = Nat()
    assert nat.supported(nat.send()).ttl == 58.0
    assert nat.supported(nat.answer()).ttl == 118.0
    assert nat.supported(nat.send()).ttl == 118.0
    nat.send(flags=SYN)
    nat.answer(flags=SYN | ACK)
    assert nat.supported(nat.send(flags=ACK)).ttl == 120.0


def test_what_was_carried_keeps_a_session_alive() -> None:
    nat = Nat()
    nat.send()
    there, back = nat.supported(nat.send()), nat.supported(nat.answer())
    there.note(3, 100, 100.0)
    nat.nat.handle_timeout(200.0)
    back.note(1, 100, 190.0)
    nat.nat.handle_timeout(309.0)
    assert (len(nat.nat), nat.taken()) == (1, [])
    nat.nat.handle_timeout(310.0)
    assert (len(nat.nat), nat.taken()) == (0, [there, back])
    there.note(1, 1, 311.0)
    assert nat.nat.poll_timeout() is None


def test_an_unanswered_session_goes_60_seconds_after_the_last_packet_that_was_carried() -> None:
    nat = Nat()
    verdict = nat.supported(nat.send())
    verdict.note(1, 1, 50.0)
    nat.nat.handle_timeout(109.0)
    assert len(nat.nat) == 1
    nat.nat.handle_timeout(110.0)
    assert nat.taken() == [verdict]


@pytest.mark.parametrize("is_reset", [True, False])
def test_a_session_about_to_end_is_carried_by_nobody(is_reset: bool) -> None:
    nat = Nat()
    nat.send(flags=SYN)
    back, there = nat.supported(nat.answer(flags=SYN | ACK)), nat.supported(nat.send(flags=ACK))
    if is_reset:
        nat.answer(flags=RST)
    else:
        nat.answer(flags=ACK | FIN)
        assert nat.taken() == []
        assert nat.nat.support(nat.send(flags=ACK)), "half closed, it goes on"
        there = nat.supported(nat.send(flags=ACK))
        nat.send(flags=ACK | FIN)
    assert nat.taken() == [back, there]
    assert not nat.nat.support(nat.send(flags=ACK))
    assert not nat.nat.support(nat.answer(flags=ACK))


def test_a_session_that_makes_room_takes_its_verdicts_along() -> None:
    nat = Nat(max_sessions=2)
    verdicts = [nat.supported(nat.send(port, now=port)) for port in (1, 2, 3)]
    assert nat.taken() == verdicts[:1]
    nat.nat.clear()
    assert nat.taken() == verdicts[1:]


def test_what_passed_as_it_is_does_not_when_a_session_takes_its_place_outside() -> None:
    nat = Nat()
    plain, elsewhere = nat.supported(nat.answer(src=OTHER)), nat.supported(nat.answer(port=5001, src=OTHER))
    assert plain.before == plain.after
    nat.send(real=REAL)
    assert nat.taken() == []
    nat.send(real=OTHER, port=5000)  # the session of 5000 keeps its address
    assert nat.taken() == []
    nat.nat.clear()
    assert nat.taken() == [plain, elsewhere]
    plain = nat.supported(nat.answer(src=OTHER))
    nat.send(real=OTHER)
    assert nat.taken() == [plain]


def test_a_session_bears_few_verdicts_at_a_time() -> None:
    nat = Nat()
    verdicts = [nat.supported(nat.send(to=port)) for port in range(8)]
    again = nat.supported(nat.send(to=0))
    assert nat.taken() == []
    nat.supported(nat.send(to=8))
    assert nat.taken() == [verdicts[1]]
    nat.nat.clear()
    assert again in nat.taken()


# flows between clients


def outbound(port: int = 1000) -> Packet:
    return build_udp(OWN, PEER, port, 53)


def drafted(packet: Packet, *, is_inbound: bool) -> Verdict:
    return Verdict(is_inbound, "p", FlowKey.of(packet), FlowKey.of(packet))


@pytest.mark.parametrize("is_ours", [True, False])
def test_what_was_carried_keeps_a_flow_between_clients_alive(is_ours: bool) -> None:
    revoked: list[Verdict] = []
    flows = ConnTrack(revoked=revoked)
    there, back = outbound(), build_udp(PEER, OWN, 53, 1000)
    verdicts = [drafted(there, is_inbound=False), drafted(back, is_inbound=True)]
    assert not flows.support(verdicts[0], 0.0)
    if is_ours:
        flows.handle_outbound(there, 0.0)
    else:
        flows.handle_inbound(back, 0.0)
    assert all(flows.support(verdict, 0.0) for verdict in verdicts)
    assert {verdict.ttl for verdict in verdicts} == {118.0}
    verdicts[0].note(1, 10, 100.0)
    verdicts[1].note(1, 10, 90.0)
    assert (flows.is_reply(back, 219.0), flows.is_peer_opened(there, 219.0)) == (is_ours, not is_ours)
    flows.handle_timeout(338.9)
    assert revoked == []
    flows.handle_timeout(339.0)
    assert revoked == verdicts


def test_a_flow_between_clients_that_makes_room_takes_its_verdicts_along() -> None:
    revoked: list[Verdict] = []
    flows = ConnTrack(max_flows=4, revoked=revoked)
    verdicts = []
    for port in (1, 2, 3):
        packet = outbound(port)
        flows.handle_outbound(packet, port)
        verdicts.append(drafted(packet, is_inbound=False))
        assert flows.support(verdicts[-1], port)
    assert revoked == verdicts[:1]
    flows.clear()
    assert revoked == verdicts


# flow logs


class Logged:
    """Flow logs of a client with one peer."""

    def __init__(self) -> None:
        self.flows = FlowTracking("client", 0.0, has_spool=True)
        self.flows.configure(FlowLogs("https://api.example", 60, 0), 0.0)
        self.flows.learn("p", "r", token_text())

    def tx(self, flags: int = ACK, now: float = 0.0, payload: bytes = b"ask") -> Verdict:
        packet = build_tcp(OWN, REAL, 1000, 443, flags, payload=payload)
        self.flows.note_tx("p", "r", packet, DIRECT, now)
        return drafted(packet, is_inbound=False)

    def rx(self, flags: int = ACK, now: float = 0.0) -> Verdict:
        assert self.flows.tracker is not None
        packet = build_tcp(REAL, OWN, 443, 1000, flags, payload=b"answer")
        self.flows.tracker.handle_rx("p", packet, now)
        return drafted(packet, is_inbound=True)

    def ends(self) -> list[tuple[int, int, int, int, int]]:
        records = []
        while (record := self.flows.poll_record()) is not None:
            if record.kind.value == "end":
                counts = record.tx_packets, record.tx_bytes, record.rx_packets, record.rx_bytes
                records.append((*counts, record.last_packet))
        return records


def test_what_was_carried_is_counted() -> None:
    logged = Logged()
    there, back = logged.tx(), logged.rx()
    assert logged.flows.support(there, is_tx=True)
    assert logged.flows.support(back, is_tx=False)
    assert (there.ttl, back.ttl) == (118.0, 118.0)
    there.note(10, 500, 100.0)
    back.note(20, 9000, 99.0)
    logged.flows.handle_timeout(219.0)
    assert logged.ends() == []
    logged.flows.handle_timeout(221.0)
    assert logged.ends() == [(11, 503, 21, 9006, 100_000_000)]
    assert logged.flows.revoked == [there, back]
    there.note(1, 1, 222.0)
    assert logged.ends() == []


def test_what_is_noted_of_a_flow_that_ended_counts_until_it_is_reported() -> None:
    logged = Logged()
    there = logged.tx()
    assert logged.flows.support(there, is_tx=True)
    logged.rx(RST, now=2.0)
    there.note(5, 50, 1.9)
    assert logged.ends() == [(6, 53, 1, 6, 2_000_000)]
    there.note(5, 50, 1.9)
    assert logged.ends() == []


def test_after_nothing_but_syns_the_next_packet_is_counted_before_any_is_carried() -> None:
    """What is carried is noted later: until then another SYN would look like one more of the same connection."""
    logged = Logged()
    assert not logged.flows.support(logged.tx(SYN, payload=b""), is_tx=True)
    answer = logged.rx(ACK | SYN)
    assert logged.flows.support(answer, is_tx=False)
    assert not logged.flows.support(logged.tx(SYN, payload=b""), is_tx=True)
    there = logged.tx(ACK)
    assert logged.flows.support(there, is_tx=True)
    logged.tx(SYN, payload=b"")
    there.note(1, 6, 0.0)
    assert [count for count, *_ in logged.ends()] == [4]


@pytest.mark.parametrize("is_reset", [True, False])
def test_a_closing_flow_is_carried_by_nobody(is_reset: bool) -> None:
    logged = Logged()
    there = logged.tx()
    assert logged.flows.support(there, is_tx=True)
    if not is_reset:
        logged.tx(ACK | FIN)
        assert logged.flows.revoked == []
    logged.rx(RST if is_reset else ACK | FIN)
    assert logged.flows.revoked == [there]
    assert not logged.flows.support(drafted(build_tcp(OWN, REAL, 1000, 443, ACK), is_inbound=False), is_tx=True)


def test_a_closing_flow_is_counted_even_when_its_token_is_gone() -> None:
    logged = Logged()
    logged.tx()
    logged.tx(ACK | FIN)
    there = logged.rx(ACK | FIN)
    logged.flows.end_access("p", "r", 0.0)
    assert not logged.flows.support(there, is_tx=False)


def test_what_may_yet_start_a_flow_is_carried_by_nobody() -> None:
    logged = Logged()
    bare = logged.tx(payload=b"")
    assert not logged.flows.support(bare, is_tx=True)
    assert logged.flows.support(drafted(build_echo(OWN, REAL, 1), is_inbound=False), is_tx=True)
    logged.flows.end_access("p", "r", 0.0)
    assert logged.flows.support(bare, is_tx=True), "nothing starts without a token"
    logged.flows.learn("p", "r", token_text())
    assert not logged.flows.support(bare, is_tx=True)


# names


def test_a_set_up_name_is_carried_while_it_is_confirmed() -> None:
    unsettled: list[str] = []
    setups, names = NameSetups(unsettled.append), ProxyNames()
    names.add_resource("r", "*.example", "dual")
    entry = names.assign("a.example", lambda _: False)
    assert entry is not None
    key, packet = SetupKey("g", "a.example", "r"), build_udp(OWN, entry.v4[0], 1, 2)

    def is_carried() -> bool:
        return setups.support(drafted(packet, is_inbound=False), key)

    assert not is_carried()
    setups.handle_packet(key, entry, packet, 0.0)
    assert not is_carried()
    setups.handle_status(key, True)
    assert is_carried()
    assert unsettled == []
    setups.handle_queried("a.example", 10.0)
    assert setups.update(key, entry, 10.0) is not None
    assert unsettled == ["g"]
    assert not is_carried()
    setups.handle_status(key, True)
    assert unsettled == ["g"]
    setups.handle_status(key, False)
    assert unsettled == ["g", "g"]
    assert not is_carried()
    setups.forget_gateway("g")
    assert unsettled == ["g"] * 3


def test_what_was_carried_keeps_a_name_in_use() -> None:
    setups, names = NameSetups(), ProxyNames()
    names.add_resource("r", "*.example", "dual")
    entry = names.assign("a.example", lambda _: False)
    assert entry is not None
    key, packet = SetupKey("g", "a.example", "r"), build_udp(OWN, entry.v4[0], 1, 2)
    setups.handle_packet(key, entry, packet, 0.0)
    setups.handle_status(key, True)
    verdict = drafted(packet, is_inbound=False)
    assert setups.support(verdict, key)
    verdict.note(1, 1, 5000.0)
    verdict.note(1, 1, 4000.0)
    assert setups.is_in_use("a.example", 12_439.0)
    assert not setups.is_in_use("a.example", 12_440.0)


# a client


def test_a_name_that_gets_addresses_voids_all_and_one_that_has_them_nothing() -> None:
    client = Client(DnsResource(uuid(1), "*.example", "n", (), (SITE,)))
    client.state.set_system_resolvers([REAL], client.now)

    def generation_after(name: str) -> int:
        wire = dns.message.make_query(name, "A").to_wire()
        client.give(build_udp(OWN4.packed, packed("100.100.111.1"), 5353, 53, wire))
        assert len(client.tun()) == 1
        return client.state.generation

    generation = client.state.generation
    first = generation_after("a.example")
    assert first > generation
    assert generation_after("a.example") == first
    assert generation_after("b.example") > first


def test_name_servers_decide_whose_questions_are_nobodys_flow() -> None:
    client = Client()
    generation = client.state.generation
    client.state.set_system_resolvers([REAL], client.now)
    changed = client.state.generation
    assert changed > generation
    client.state.set_system_resolvers([REAL], client.now)
    assert client.state.generation == changed


def test_only_candidates_and_relays_leave_verdicts_alone() -> None:
    client = Client(RESOURCE)
    generation = client.state.generation
    client.tell(c.GatewayIceCandidates("g", ()))
    client.tell(c.InvalidateClientIceCandidates("d", ()))
    client.tell(c.RelaysPresence((), ()))
    assert client.state.generation == generation
    client.tell(c.ResourceDeleted(RESOURCE.id))
    assert client.state.generation > generation
    generation = client.state.generation
    client.state.set_internet_resource(True, client.now)
    assert client.state.generation > generation
    generation = client.state.generation
    client.state.reset(client.now)
    assert client.state.generation > generation


# a whole gateway, over a network


class Carried(Access):
    """A gateway in front of which stands a flow table."""

    def __init__(self, expires_in: float | None = None) -> None:
        super().__init__()
        self.grant(RESOURCE, expires_in)
        self.world.run_for(1.0)
        self.state.wants_verdicts = True
        self.void()

    def void(self) -> tuple[int, set[str], list[Verdict]]:
        return self.state.generation, self.state.take_stale(), self.state.take_revoked()

    def ask(self, flags: int = ACK) -> Verdict | None:
        self.give(build_tcp(packed(self.own()), packed("10.0.0.5"), 1000, 80, flags))
        return self.state.take_verdict()


def test_a_verdict_says_whose_packet_it_is_and_where_it_goes() -> None:
    gateway = Carried()
    verdict = gateway.ask()
    assert verdict is not None
    key = FlowKey(4, 6, packed(gateway.own()), packed("10.0.0.5"), 1000, 80)
    assert (verdict.is_inbound, verdict.peer_id) == (True, gateway.client_id)
    assert (verdict.before, verdict.after) == (key, key)
    assert (verdict.ttl, verdict.until) == (120.0, float("inf"))
    assert gateway.state.take_verdict() is None, "it was taken"
    assert gateway.answer("10.0.0.5") is None
    back = gateway.state.take_verdict()
    assert back is not None
    assert (back.is_inbound, back.before.src, back.before.dst) == (False, key.dst, key.src)


def test_nobody_offers_what_nobody_wants() -> None:
    gateway = Carried()
    gateway.state.wants_verdicts = False
    assert gateway.ask() is None
    gateway.tell(c.RejectAccess(gateway.client_id, RESOURCE.id))
    assert gateway.state.take_stale() == set()


def test_no_verdict_about_what_ends_is_refused_or_is_not_sent() -> None:
    gateway = Carried()
    assert gateway.ask(ACK | FIN) is None
    assert gateway.ask(RST) is None
    assert gateway.udp("172.16.0.1") == "prohibited"
    assert gateway.state.take_verdict() is None
    gateway.ask()
    gateway.state.handle_tun_input(b"no packet", gateway.world.now)
    assert gateway.state.take_verdict() is None, "that was about another packet"
    gateway.state.node.remove(gateway.client_id)
    assert gateway.answer("10.0.0.5") is not None
    assert gateway.state.take_verdict() is None


def test_a_verdict_ends_with_the_grant() -> None:
    gateway = Carried(expires_in=50.0)
    verdict = gateway.ask()
    assert verdict is not None
    left = verdict.until - gateway.world.now
    assert 40.0 < left < 50.0
    gateway.world.run_for(left + 2.0)
    assert gateway.void()[1] == {gateway.client_id}


def test_access_voids_what_concerns_the_client_and_the_rest_voids_all() -> None:
    gateway = Carried()
    generation = gateway.state.generation
    gateway.grant(cidr(2, "10.2.0.0/24"))
    assert gateway.void() == (generation, {gateway.client_id}, [])
    gateway.tell(c.RejectAccess(gateway.client_id, uuid(2)))
    assert gateway.void() == (generation, {gateway.client_id}, [])
    gateway.tell(g.IceCandidates(gateway.client_id, ()))
    assert gateway.void() == (generation, set(), [])
    gateway.tell(g.ResourceUpdated(RESOURCE))
    assert gateway.void()[0] > generation


def test_a_verdict_that_was_not_taken_does_not_outlive_a_void() -> None:
    gateway = Carried()
    gateway.give(build_tcp(packed(gateway.own()), packed("10.0.0.5"), 1000, 80, ACK))
    gateway.tell(g.ResourceUpdated(RESOURCE))
    assert gateway.state.take_verdict() is None


def test_what_somebody_else_opened_is_handled_alike() -> None:
    gateway = Carried()
    node_packet = build_udp(packed(gateway.own()), packed("10.0.0.5"), 1000, 80, b"question")
    path = gateway.state.node.path(gateway.client_id)
    assert path is not None
    before = len(gateway.system.gateway.packets)
    where = gateway.client_id, path.local, path.remote, 0
    assert gateway.state.handle_opened(*where, node_packet.data, gateway.world.now) is None
    verdict = gateway.state.take_verdict()
    assert verdict is not None
    assert verdict.before == FlowKey.of(node_packet)
    error = gateway.state.handle_opened(*where, b"no packet", gateway.world.now)
    assert error is not None
    assert gateway.state.handle_opened(*where, b"", gateway.world.now) is None
    assert (
        gateway.state.handle_opened("nobody", path.local, path.remote, 0, node_packet.data, gateway.world.now) is None
    )
    gateway.system.gateway.drain()
    assert [p.data for p in gateway.system.gateway.packets[before:]] == [node_packet.data]


def test_keys_of_answers_are_turned_around() -> None:
    key = FlowKey(6, 17, ip_address("::1").packed, ip_address("::2").packed, 1, 2)
    assert key.back == FlowKey(6, 17, ip_address("::2").packed, ip_address("::1").packed, 2, 1)
    assert key.back.back == key
