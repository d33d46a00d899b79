"""Two agents over a virtual network: connecting, nominating, failing (connectivity sheet section 5)."""

from __future__ import annotations

import random

import pytest
from ice_network import Network, Side

from fz_core.ice import (
    CLIENT_DEFAULT,
    CLIENT_IDLE,
    SERVER_DEFAULT,
    SERVER_IDLE,
    Agent,
    Candidate,
    CandidateKind,
    Credentials,
    IceState,
    Nominated,
    TimingProfile,
)
from fz_core.packet import Address, DropReason
from fz_core.stun import Message, build, u32_value, u64_value

LOCAL = Address.parse("192.0.2.1:52625")
REMOTE = Address.parse("192.0.2.2:52625")
A, B = Credentials("aaaa", "a" * 22), Credentials("bbbb", "b" * 22)


def chosen(side: Side) -> Nominated:
    nominated = side.agent.nominated
    assert nominated is not None
    return nominated


def test_direct_path_is_nominated_after_one_round_trip() -> None:
    net = Network(latency=(0.01, 0.01))
    net.gather()
    net.run(0.1)
    assert net.a.nominated[0][0] - 100.0 == pytest.approx(0.02)
    assert net.b.nominated[0][0] - 100.0 == pytest.approx(0.03)
    assert (chosen(net.a).local, chosen(net.a).remote) == (net.a.host, net.b.host)
    assert (chosen(net.b).local, chosen(net.b).remote) == (net.b.host, net.a.host)
    assert chosen(net.a).remote_kind is CandidateKind.HOST
    assert net.a.states == [(100.0, IceState.CHECKING), (pytest.approx(100.02), IceState.CONNECTED)]


def test_hole_punching_takes_two_round_trips() -> None:
    net = Network(nats=("cone", "cone"), latency=(0.02, 0.02))
    net.gather()
    net.run(0.1)
    assert net.a.nominated[0][0] - 100.0 <= 0.06
    assert net.b.nominated[0][0] - 100.0 <= 0.081
    assert chosen(net.a).remote_kind is CandidateKind.SRFLX


def test_two_symmetric_nats_need_a_relay() -> None:
    net = Network(nats=("symmetric", "symmetric"), relays=(True, False))
    net.gather()
    net.run(1)
    assert chosen(net.a).local == net.a.relay
    assert chosen(net.b).remote == net.a.relay


def test_a_better_path_takes_over() -> None:
    net = Network(nats=("cone", "cone"), relays=(True, True))
    net.blocked = {Address(b"\xcb\0\x71\x01", 40000)}
    net.gather()
    net.run(0.5)
    assert chosen(net.a).local == net.a.relay
    net.blocked = set()
    net.run(3)
    assert chosen(net.a).local == net.a.host
    assert chosen(net.b).local == net.b.host


def test_every_check_on_a_once_nominated_pair_says_so() -> None:
    net = Network()
    net.gather()
    net.run(10)
    at = net.a.nominated[0][0]
    later = [parse(t.payload) for when, t in net.a.sent if when >= at]
    requests = [message for message in later if message.is_request]
    assert len(requests) > 5
    assert all(message.use_candidate for message in requests)
    theirs = [parse(t.payload) for _, t in net.b.sent]
    assert not any(message.use_candidate for message in theirs)


def parse(data: bytes) -> Message:
    message = Message.parse_untrusted(data)
    assert isinstance(message, Message)
    return message


def test_check_format() -> None:
    net = Network()
    net.gather()
    request = parse(net.a.sent[0][1].payload)
    assert request.username == "bbbb:aaaa"
    assert request.priority == 1862270719
    assert request.ice_controlling is not None
    assert request.check_integrity(b"b" * 22)
    assert request.has_fingerprint_ok
    net.run(0.015)
    answer = next(parse(t.payload) for _, t in net.b.sent if parse(t.payload).is_success)
    assert answer.xor_mapped_address == net.a.host
    assert answer.check_integrity(b"b" * 22)
    assert answer.has_fingerprint_ok


@pytest.mark.parametrize("nats", [(None, None), ("cone", None), ("cone", "cone"), ("symmetric", "cone")])
@pytest.mark.parametrize("loss", [0.0, 0.3])
def test_many_seeds_connect_and_agree(nats: tuple[str | None, str | None], loss: float) -> None:
    for seed in range(250):
        relays = (seed % 2 == 0, seed % 3 == 0) if nats != ("symmetric", "cone") else (True, seed % 3 == 0)
        net = Network(seed, nats=nats, relays=relays, loss=loss, latency=(0.005, 0.06))
        net.gather()
        net.run(6)
        net.loss = 0.0
        net.run(20)  # past one 15 s round of the gateway's slow schedule
        assert net.a.agent.state is IceState.CONNECTED, f"seed {seed}"
        assert net.b.agent.state is IceState.CONNECTED, f"seed {seed}"
        assert_same_path(net, seed)
        if loss == 0.0:
            assert net.b.nominated[0][0] < 100.0 + 0.35, f"seed {seed}"


def assert_same_path(net: Network, seed: int) -> None:
    """What one sends to is where the other receives, seen through its NAT.

    Two relayed pairs may rank differently on the two sides when a symmetric NAT shows another address than
    the signalled one. Then each direction has its own path, and both must work.
    """
    for here, there in ((net.a, net.b), (net.b, net.a)):
        remote, local = chosen(here).remote, chosen(there).local
        if net.a.nat is not None and net.a.nat.kind == "symmetric":
            assert can_reach(there, here, remote), f"seed {seed}"
        elif there.nat is None or remote == there.relay:
            assert remote == local, f"seed {seed}"
        else:
            assert (remote.ip, local) == (there.nat.ip, there.host), f"seed {seed}"


def can_reach(there: Side, here: Side, remote: Address) -> bool:
    """Whether what `here` sends on its chosen path comes in over there."""
    source = chosen(here).local
    if source == here.host and here.nat is not None:
        source = here.nat.outward(source, remote)
    return remote == there.relay or (there.nat is not None and there.nat.inward(source, remote) is not None)


def test_many_seeds_of_both_roles_equal_settle() -> None:
    for seed in range(200):
        role = seed % 2 == 0
        net = Network(seed, roles=(role, role), latency=(0.005, 0.06))
        net.gather()
        net.run(5)
        assert net.a.agent.is_controlling != net.b.agent.is_controlling, f"seed {seed}"
        assert net.a.agent.state is net.b.agent.state is IceState.CONNECTED, f"seed {seed}"


def test_role_conflict_is_settled_by_tie_breaker_without_error_messages() -> None:
    """Official peers lose error responses; the requests alone must be enough."""
    ours = Agent(A, B, True, random.Random(1).randbytes, 0.0, CLIENT_DEFAULT)
    ours.add_local_candidate(Candidate.host(LOCAL), 0.0)
    attributes = [(0x06, b"aaaa:bbbb"), (0x802A, u64_value(2**64 - 1)), (0x24, u32_value(1))]
    request = parse(build(1, 0, bytes(12), attributes, integrity_key=A.key))
    assert ours.handle_input(LOCAL, REMOTE, request, 0.0) is None
    assert not ours.is_controlling
    low = [(0x06, b"aaaa:bbbb"), (0x8029, u64_value(0)), (0x24, u32_value(1))]
    request = parse(build(1, 0, bytes(12), low, integrity_key=A.key))
    while ours.poll_transmit() is not None:
        pass
    assert ours.handle_input(LOCAL, REMOTE, request, 0.0) is None
    answer = ours.poll_transmit()
    assert answer is not None
    assert parse(answer.payload).error_code == 487
    assert not ours.is_controlling


def request_to_a(**overrides: object) -> Message:
    attributes = [(0x06, b"aaaa:bbbb"), (0x802A, u64_value(5)), (0x24, u32_value(77))]
    for kind, value in overrides.pop("more", ()):  # type: ignore[attr-defined]
        attributes.append((kind, value))
    key = overrides.get("key", A.key)
    assert isinstance(key, bytes)
    return parse(build(1, 0, bytes(range(12)), attributes, integrity_key=key))


def controlled() -> Agent:
    agent = Agent(A, B, False, random.Random(1).randbytes, 0.0, SERVER_DEFAULT)
    agent.add_local_candidate(Candidate.host(LOCAL), 0.0)
    return agent


def test_a_check_from_an_unknown_address_makes_a_peer_reflexive_candidate() -> None:
    agent = controlled()
    assert agent.handle_input(LOCAL, REMOTE, request_to_a(), 0.0) is None
    assert [(c.kind, c.address, c.priority) for c in agent.remote_candidates] == [(CandidateKind.PRFLX, REMOTE, 77)]
    answer, check = agent.poll_transmit(), agent.poll_transmit()
    assert answer is not None
    assert check is not None
    assert parse(answer.payload).is_success
    assert (parse(check.payload).is_request, check.remote, check.local) == (True, REMOTE, LOCAL)
    signalled = Candidate.parse_untrusted(Candidate.host(REMOTE).to_sdp("bbbb"))
    assert signalled is not None
    agent.add_remote_candidate(signalled, 0.0)
    assert [c.kind for c in agent.remote_candidates] == [CandidateKind.HOST]
    assert agent.poll_transmit() is None


def test_the_controlled_side_follows_use_candidate_at_once() -> None:
    agent = controlled()
    agent.handle_input(LOCAL, REMOTE, request_to_a(more=[(0x25, b"")]), 0.0)
    nominated = agent.nominated
    assert nominated is not None
    assert (nominated.local, nominated.remote) == (LOCAL, REMOTE)


def test_forged_and_misdirected_messages_change_nothing() -> None:
    agent = controlled()
    forged = request_to_a(key=b"wrong")
    assert agent.handle_input(LOCAL, REMOTE, forged, 0.0) is DropReason.STUN_UNAUTHENTICATED
    elsewhere = Address(LOCAL.ip, 1)
    assert agent.handle_input(elsewhere, REMOTE, request_to_a(), 0.0) is DropReason.STUN_UNEXPECTED
    attributes = [(0x06, b"aaaa:cccc"), (0x24, u32_value(1))]
    stranger = parse(build(1, 0, bytes(12), attributes, integrity_key=A.key))
    assert not agent.accepts(stranger)
    assert agent.handle_input(LOCAL, REMOTE, stranger, 0.0) is DropReason.STUN_UNEXPECTED
    no_priority = parse(build(1, 0, bytes(12), [(0x06, b"aaaa:bbbb")], integrity_key=A.key))
    assert agent.handle_input(LOCAL, REMOTE, no_priority, 0.0) is DropReason.STUN_UNEXPECTED
    unasked = parse(build(1, 2, bytes(12), [], integrity_key=B.key))
    assert agent.handle_input(LOCAL, REMOTE, unasked, 0.0) is DropReason.STUN_UNEXPECTED
    assert agent.state is IceState.NEW
    assert agent.poll_transmit() is None
    assert agent.remote_candidates == ()


def test_an_answer_must_come_back_the_way_it_went() -> None:
    net = Network()
    net.gather()
    request = parse(net.a.sent[0][1].payload)
    answer = parse(build(1, 2, request.transaction_id, [(0x20, b"\0\1" + bytes(6))], integrity_key=b"b" * 22))
    agent = net.a.agent
    assert agent.handle_input(net.a.host, REMOTE, answer, net.now) is DropReason.STUN_UNEXPECTED
    forged = parse(build(1, 2, request.transaction_id, [(0x20, b"\0\1" + bytes(6))], integrity_key=b"x"))
    assert agent.handle_input(net.a.host, net.b.host, forged, net.now) is DropReason.STUN_UNAUTHENTICATED
    assert agent.nominated is None


def test_a_withdrawn_candidate_ends_its_pairs_until_announced_again() -> None:
    net = Network(relays=(False, True), nats=("cone", "symmetric"))
    net.gather()
    net.run(1)
    relay = next(c for c in net.b.signalled if c.kind is CandidateKind.RELAY)
    assert chosen(net.a).remote == relay.address
    withdrawal = Candidate.parse_untrusted(relay.to_invalidation())
    assert withdrawal is not None
    net.a.agent.remove_remote_candidate(withdrawal, net.now)
    assert net.a.agent.nominated is None
    net.run(20)
    assert net.a.agent.nominated is None
    again = Candidate.parse_untrusted(relay.to_sdp("bbbb"))
    assert again is not None
    net.a.agent.add_remote_candidate(again, net.now)
    net.flush()
    net.run(1)
    assert chosen(net.a).remote == relay.address


def test_removing_a_local_relay_moves_to_the_next_best() -> None:
    net = Network(relays=(True, True), nats=("symmetric", "symmetric"))
    net.gather()
    net.run(2)
    relay = next(c for c in net.a.signalled if c.kind is CandidateKind.RELAY)
    net.a.agent.remove_local_candidate(relay, net.now)
    net.flush()
    net.run(16)
    assert chosen(net.a).remote == net.b.relay
    assert chosen(net.a).local == net.a.host


def test_candidates_of_another_agent_of_the_peer_are_ignored() -> None:
    agent = controlled()
    other = Candidate.parse_untrusted(Candidate.host(REMOTE).to_sdp("zzzz"))
    assert other is not None
    agent.add_remote_candidate(other, 0.0)
    assert agent.remote_candidates == ()


def test_a_reflexive_address_that_is_the_host_address_is_redundant() -> None:
    agent = controlled()
    assert agent.add_local_candidate(Candidate.srflx(LOCAL, LOCAL), 0.0) is None
    other = agent.add_local_candidate(Candidate.host(Address(LOCAL.ip, 7)), 0.0)
    assert other is not None
    assert Candidate.host(LOCAL).priority - other.priority == 2 << 8


def test_families_do_not_mix() -> None:
    agent = controlled()
    agent.add_remote_candidate(Candidate.host(Address(bytes(15) + b"\1", 1)), 0.0)
    assert agent.poll_transmit() is None
    assert agent.state is IceState.NEW


def test_at_most_a_hundred_pairs_the_best_ones() -> None:
    agent = controlled()
    agent.add_local_candidate(Candidate.relay(Address.parse("198.51.100.1:50000")), 0.0)
    for port in range(1, 81):
        agent.add_remote_candidate(Candidate.host(Address(REMOTE.ip, port)), 0.0)
    agent.handle_timeout(1.0)
    while agent.poll_transmit() is not None:
        pass
    agent.handle_timeout(100.0)
    checked = []
    while (transmit := agent.poll_transmit()) is not None:
        checked.append(transmit)
    assert len(checked) == 100
    assert sum(transmit.local == LOCAL for transmit in checked) == 80


@pytest.mark.shows("connectivity", 23)
@pytest.mark.parametrize(
    ("profile", "seconds"),
    [(CLIENT_DEFAULT, 16.5), (CLIENT_IDLE, 100.0), (SERVER_DEFAULT, 615.5), (SERVER_IDLE, 1000.0)],
)
def test_time_until_a_silent_peer_is_given_up(profile: TimingProfile, seconds: float) -> None:
    assert profile.timeout == seconds
    net = Network(profiles=(profile, profile), latency=(0.001, 0.001))
    net.gather()
    net.run(2000)
    first_lost = net.a.agent.poll_timeout()
    net.blocked = {net.b.host}
    net.run(2000)
    assert first_lost is not None
    at, state = net.a.states[-1]
    assert state is IceState.DISCONNECTED
    assert at - first_lost == pytest.approx(seconds, abs=1e-6)
    assert net.a.agent.poll_timeout() is None


@pytest.mark.shows("connectivity", 23)
def test_a_client_gives_a_path_up_before_its_handshake_does() -> None:
    """The connection fails 2 s after ICE, and WireGuard's attempt would end it at 20 s."""
    assert CLIENT_DEFAULT.timeout + 2 < 20


def test_a_peer_whose_requests_still_arrive_is_not_given_up() -> None:
    agent = Agent(A, B, False, random.Random(1).randbytes, 0.0, CLIENT_DEFAULT)
    agent.add_local_candidate(Candidate.host(LOCAL), 0.0)
    agent.add_remote_candidate(Candidate.host(REMOTE), 0.0)
    now = 0.0
    while now < 60:
        agent.handle_input(LOCAL, REMOTE, request_to_a(), now)
        now += 10
        while (at := agent.poll_timeout()) is not None and at <= now:
            agent.handle_timeout(at)
    assert agent.state is IceState.CHECKING


def test_checks_go_on_for_ever() -> None:
    net = Network(profiles=(CLIENT_DEFAULT, SERVER_DEFAULT))
    net.gather()
    net.run(600)
    start = net.now - 60
    requests = [when for when, t in net.a.sent if when > start and parse(t.payload).is_request]
    assert len(requests) == 40
    theirs = [when for when, t in net.b.sent if when > start and parse(t.payload).is_request]
    assert len(theirs) == 4


def test_waking_from_idle_checks_at_once() -> None:
    net = Network()
    net.gather()
    net.run(30)
    net.a.agent.set_profile(CLIENT_IDLE, net.now)
    net.flush()
    net.run(60)
    assert 1 <= len([1 for when, t in net.a.sent if when > 131 and parse(t.payload).is_request]) <= 3
    net.run(10)
    before = len(net.a.sent)
    net.a.agent.set_profile(CLIENT_DEFAULT, net.now)
    net.flush()
    assert len(net.a.sent) == before + 1
    assert net.a.agent.state is IceState.CONNECTED
