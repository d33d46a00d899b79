"""One path agent, call by call (spec/connectivity.md §7 and §11, 31 to 43)."""

from __future__ import annotations

import pytest
from path_driver import (
    BOTH_RELAYS,
    DIRECT,
    HOST,
    INIT,
    OWN_RELAY,
    PEER_HOST,
    PUBLIC,
    RELAY,
    RESPONSE,
    STRANGER,
    THEIR_RELAY,
    Driver,
    bootstrapped,
    initiator,
    settled,
)

from fz_core.ice import Candidate, IceState
from fz_core.ice import CandidateKind as K
from fz_core.node.path_agent import PathAgent
from fz_core.node.path_probe import build_probe
from fz_core.node.path_score import bucket_of
from fz_core.packet import Address

# Handshakes


@pytest.mark.shows("connectivity", 31)
def test_an_init_fans_out_over_the_relays_with_a_ladder() -> None:
    driver = bootstrapped()
    driver.agent.send_init(INIT, 0.0)
    driver.drain()
    assert sorted(driver.sent_to(INIT)) == sorted([OWN_RELAY, THEIR_RELAY, BOTH_RELAYS])
    assert driver.agent.poll_timeout() == 0.05
    run_until_silence(driver)
    times = [at for at, key, _ in driver.sent if key == BOTH_RELAYS]
    assert times == pytest.approx([0, 0.05, 0.1, 0.15, 0.25, 0.45, 0.85, 1.65, 3.25])
    assert {payload for _, _, payload in driver.sent} == {INIT}
    assert driver.probes == []


@pytest.mark.shows("connectivity", 31)
def test_a_fresh_init_goes_out_once_per_pair() -> None:
    driver = bootstrapped()
    driver.agent.send_init(INIT, 0.0)
    run_until_silence(driver)
    driver.agent.send_init(b"\x01fresh", 4.0)
    driver.now = 4.0
    run_until_silence(driver)
    assert sorted(driver.sent_to(b"\x01fresh")) == sorted([OWN_RELAY, THEIR_RELAY, BOTH_RELAYS])


def test_a_pair_that_comes_later_gets_the_init_too() -> None:
    driver = bootstrapped()
    driver.agent.send_init(INIT, 0.0)
    run_until_silence(driver)
    driver.sent.clear()
    late = Address.parse("203.0.113.77:1")
    driver.agent.add_remote_candidate(Candidate.relay(late), 4.0)
    driver.now = 4.0
    run_until_silence(driver)
    assert driver.sent_to(INIT) == [(HOST, late), (RELAY, late)] * 9


@pytest.mark.shows("connectivity", 32)
def test_a_response_ends_the_fan_out() -> None:
    driver = initiator()
    driver.run(60.0)
    assert driver.sent == []
    assert {key for _, key, _, _ in driver.probes} == {DIRECT, OWN_RELAY, THEIR_RELAY, BOTH_RELAYS}
    assert driver.agent.is_copy(*THEIR_RELAY, RESPONSE, 60.0)
    driver.drain()
    assert driver.sent == []


@pytest.mark.shows("connectivity", 33)
def test_copies_of_an_init_are_answered_for_ten_seconds() -> None:
    driver = bootstrapped()
    agent = driver.agent
    # not known before the tunnel took it, so one that fails there leaves nothing behind
    assert not agent.is_copy(*BOTH_RELAYS, INIT, 0.0)
    assert agent.nominated is None
    assert agent.poll_timeout() is None
    agent.note_init_accepted(*BOTH_RELAYS, INIT, RESPONSE, 1.0)
    assert not agent.is_copy(*BOTH_RELAYS, b"\x01other", 1.0)
    for at, key in ((1.0, OWN_RELAY), (10.9, THEIR_RELAY), (11.0, BOTH_RELAYS)):
        assert agent.is_copy(*key, INIT, at)
    driver.drain()
    assert driver.sent_to(RESPONSE) == [BOTH_RELAYS, OWN_RELAY, THEIR_RELAY]


@pytest.mark.shows("connectivity", 34)
def test_the_establishing_init_makes_its_path_the_primary() -> None:
    driver = bootstrapped()
    driver.agent.note_init_accepted(*BOTH_RELAYS, INIT, RESPONSE, 0.0)
    driver.drain()
    assert driver.primaries == [BOTH_RELAYS]
    assert driver.agent.state is IceState.CONNECTED
    # probes wait until the peer has confirmed the session
    assert driver.agent.poll_timeout() is None
    assert driver.agent.note_data_received(*BOTH_RELAYS, 0.1)
    driver.now = 0.1
    driver.run(0.1)
    assert len(driver.probes) == 4
    driver.agent.note_init_accepted(*DIRECT, b"\x01next", b"\x02next", 0.2)
    driver.drain()
    assert driver.primaries == [BOTH_RELAYS]
    assert driver.sent_to(b"\x02next") == [DIRECT]


@pytest.mark.shows("connectivity", 34)
def test_a_response_over_a_relay_seeds_the_primary() -> None:
    driver = initiator(THEIR_RELAY)
    assert driver.primaries == [THEIR_RELAY]
    driver.agent.note_response_accepted(*BOTH_RELAYS, b"\x02later", 0.1)
    driver.agent.note_response_accepted(*OWN_RELAY, b"\x02better", 0.2)
    driver.drain()
    assert driver.primaries == [THEIR_RELAY, OWN_RELAY]


def test_an_init_from_a_new_address_registers_it() -> None:
    driver = bootstrapped()
    driver.agent.note_init_accepted(HOST, STRANGER, INIT, RESPONSE, 0.0)
    driver.drain()
    assert driver.primaries == [(HOST, STRANGER)]
    assert driver.sent_to(RESPONSE) == [(HOST, STRANGER)]


# Probes and choice


@pytest.mark.shows("connectivity", 35)
def test_a_host_reply_promotes_and_a_relay_reply_never_demotes() -> None:
    driver = initiator()
    driver.run(0.01)
    driver.reply_now(DIRECT)
    assert driver.primaries == [OWN_RELAY, DIRECT]
    driver.reply_now(BOTH_RELAYS)
    driver.reply_now(OWN_RELAY)
    assert driver.primaries == [OWN_RELAY, DIRECT]


@pytest.mark.shows("connectivity", 36)
def test_a_pair_sends_its_budget_and_no_more() -> None:
    driver = initiator()
    driver.run(60.0)
    times = driver.probes_of(DIRECT)
    assert times == pytest.approx([0, 0.2, 0.5, *range(1, 10)])
    primary = driver.probes_of(OWN_RELAY)
    assert primary[12:] == pytest.approx([34.0, 59.0])


@pytest.mark.shows("connectivity", 36)
def test_without_a_primary_every_pair_goes_on() -> None:
    driver = initiator()
    driver.agent.add_remote_candidate(Candidate.host(STRANGER), 0.0)
    driver.run(100.0)
    assert driver.agent.nominated is None
    assert len([at for at in driver.probes_of(DIRECT) if at <= 30.0]) > 12
    assert all(pair.outstanding <= 12 for pair in driver.agent._pairs)
    assert len(driver.probes_of(DIRECT)) > 100


@pytest.mark.shows("connectivity", 37)
def test_a_reply_with_a_wrong_id_or_seq_is_ignored() -> None:
    driver = initiator()
    driver.run(0.01)
    _, _, id, seq = next(probe for probe in driver.probes if probe[1] == DIRECT)
    driver.reply_now(DIRECT, id ^ 1)
    driver.agent.handle_probe(*DIRECT, build_probe(False, id, seq + 1), 0.01)
    driver.agent.handle_probe(HOST, STRANGER, build_probe(False, id, seq), 0.01)
    driver.drain()
    assert driver.primaries == [OWN_RELAY]
    driver.reply_now(DIRECT)
    driver.reply_now(DIRECT)
    assert driver.primaries == [OWN_RELAY, DIRECT]


def test_a_request_is_answered_where_it_came_from() -> None:
    driver = initiator()
    for key in (BOTH_RELAYS, (HOST, STRANGER), (STRANGER, STRANGER)):
        driver.request(key)
        assert driver.replies[-1] == (key, 7, 9)


def test_a_request_on_a_quiet_unmeasured_pair_triggers_a_check() -> None:
    driver = settled(OWN_RELAY)
    driver.request(DIRECT)
    driver.request(OWN_RELAY)
    driver.run(30.1)
    assert {key for _, key, _, _ in driver.probes} == {DIRECT}


def test_of_one_bucket_the_clearly_faster_pair_wins() -> None:
    other = Address.parse("10.0.0.3:52625")
    driver = initiator()
    driver.agent.add_remote_candidate(Candidate.host(other), 0.0)
    driver.run(0.05)
    driver.now = 0.05
    driver.reply_now(DIRECT)
    driver.now = 0.19
    driver.reply_now((HOST, other))
    assert driver.primaries[-1] == DIRECT
    driver.answered |= {DIRECT, (HOST, other)}
    driver.rtt = 0.045
    driver.run(5.0)
    assert driver.primaries[-1] == DIRECT
    driver.agent.handle_timeout(5.0)
    driver.answered = {(HOST, other)}
    driver.rtt = 0.001
    driver.run(10.0)
    assert driver.primaries[-1] == (HOST, other)


def test_ranking() -> None:
    four, six = HOST, Address.parse("[2001:db8::1]:52625")
    ranked = [
        bucket_of(six, (K.HOST, K.HOST, False)),
        bucket_of(four, (K.HOST, K.HOST, False)),
        bucket_of(six, (K.HOST, K.SRFLX, False)),
        bucket_of(four, (K.SRFLX, K.PRFLX, False)),
        bucket_of(four, (K.RELAY, K.HOST, False)),
        bucket_of(six, (K.RELAY, K.HOST, True)),
        bucket_of(six, (K.HOST, K.RELAY, False)),
        bucket_of(four, (K.RELAY, K.SRFLX, False)),
        bucket_of(six, (K.RELAY, K.RELAY, False)),
        bucket_of(six, (K.RELAY, K.RELAY, True)),
    ]
    assert ranked == sorted(ranked)
    assert len(set(ranked)) == len(ranked)


# Distress


@pytest.mark.shows("connectivity", 38)
def test_the_second_unanswered_init_clears_the_primary() -> None:
    driver = settled(OWN_RELAY)
    agent = driver.agent
    agent.send_init(b"\x01one", 30.0)
    assert agent.primary == OWN_RELAY
    agent.send_init(b"\x01two", 32.0)
    driver.drain()
    assert driver.sent_to(b"\x01one") == driver.sent_to(b"\x01two") == [OWN_RELAY]
    assert agent.nominated is None
    agent.send_init(b"\x01three", 34.0)
    driver.drain()
    assert driver.sent_to(b"\x01three") == []
    driver.now = 34.0
    driver.answered = {BOTH_RELAYS}
    driver.run(34.1)
    assert driver.primaries == [BOTH_RELAYS]


@pytest.mark.shows("connectivity", 38)
def test_a_response_or_another_primary_resets_the_count() -> None:
    driver = settled(OWN_RELAY)
    agent = driver.agent
    agent.send_init(b"\x01one", 30.0)
    agent.note_response_accepted(*OWN_RELAY, b"\x02one", 30.1)
    agent.send_init(b"\x01two", 40.0)
    assert agent.primary == OWN_RELAY
    driver.request(DIRECT)
    driver.now = 40.0
    driver.run(40.0)
    driver.reply_now(DIRECT)
    assert agent.primary == DIRECT
    agent.send_init(b"\x01three", 42.0)
    assert agent.primary == DIRECT


@pytest.mark.shows("connectivity", 39)
def test_two_inits_of_the_peer_without_data_clear_the_primary() -> None:
    driver = bootstrapped()
    agent = driver.agent
    agent.note_init_accepted(*BOTH_RELAYS, INIT, RESPONSE, 0.0)
    assert agent.primary == BOTH_RELAYS
    for number in range(5):
        agent.note_data_received(*BOTH_RELAYS, number + 0.5)
        agent.note_init_accepted(*BOTH_RELAYS, b"\x01%d" % number, RESPONSE, number + 1)
        assert agent.primary == BOTH_RELAYS
    agent.note_init_accepted(*BOTH_RELAYS, b"\x01last", RESPONSE, 9.0)
    assert agent.primary is None


@pytest.mark.shows("connectivity", 40)
def test_a_new_candidate_clears_the_primary_and_one_reply_brings_it_back() -> None:
    driver = settled(DIRECT)
    driver.agent.add_remote_candidate(Candidate.srflx(STRANGER, STRANGER), 30.0)
    assert driver.agent.nominated is None
    driver.answered.clear()
    driver.run(30.0)
    assert driver.primaries == []
    driver.reply_now(DIRECT)
    assert driver.primaries == [DIRECT]


def test_a_relay_that_answers_first_does_not_take_over_from_a_working_path() -> None:
    driver = settled(DIRECT)
    driver.agent.add_remote_candidate(Candidate.srflx(STRANGER, STRANGER), 30.0)
    driver.run(30.0)
    driver.reply_now(BOTH_RELAYS)
    driver.run(30.1)
    assert driver.primaries == [DIRECT]


def test_but_it_does_if_that_path_stays_silent() -> None:
    driver = settled(DIRECT)
    driver.answered = {BOTH_RELAYS}
    driver.agent.add_remote_candidate(Candidate.srflx(STRANGER, STRANGER), 30.0)
    driver.run(30.4)
    assert driver.primaries == [BOTH_RELAYS]


def test_the_same_address_as_another_kind_changes_nothing() -> None:
    driver = settled(DIRECT)
    driver.agent.add_remote_candidate(Candidate.srflx(PEER_HOST, PEER_HOST), 30.0)
    assert driver.agent.add_local_candidate(Candidate.srflx(PUBLIC, HOST), 30.0) is not None
    assert driver.agent.primary == DIRECT
    driver.agent.remove_local_candidate(Candidate.srflx(PUBLIC, HOST), 31.0)
    assert driver.agent.primary == DIRECT


@pytest.mark.shows("connectivity", 43)
def test_a_signalled_peer_reflexive_address_keeps_what_is_known_of_it() -> None:
    driver = settled(OWN_RELAY)
    key = HOST, STRANGER
    driver.request(key)
    driver.answered.add(key)
    driver.run(33.3)
    assert driver.agent.primary == key
    due = driver.agent.poll_timeout()
    driver.events.clear()
    driver.agent.add_remote_candidate(Candidate.srflx(STRANGER, STRANGER), 33.3)
    driver.drain()
    assert driver.events == []
    assert driver.agent.primary == key
    assert driver.agent.poll_timeout() == due
    assert [c.kind for c in driver.agent.remote_candidates if c.address == STRANGER] == ["srflx"]


@pytest.mark.shows("connectivity", 41)
def test_roaming_needs_no_handshake() -> None:
    driver = settled(DIRECT)
    driver.agent.rebuild(30.0)
    driver.drain()
    assert driver.agent.local_candidates == ()
    assert len(driver.agent.remote_candidates) == 2
    assert driver.agent.nominated is None
    moved = Address.parse("10.9.9.9:52625")
    driver.agent.add_local_candidate(Candidate.host(moved), 30.5)
    driver.now = 30.5
    driver.run(31.4)
    assert (moved, PEER_HOST) in {key for _, key, _, _ in driver.probes}
    driver.reply_now((moved, PEER_HOST))
    assert driver.primaries == [(moved, PEER_HOST)]
    assert driver.sent == []


@pytest.mark.shows("connectivity", 42)
def test_a_lost_relay_is_left_at_once() -> None:
    driver = settled(OWN_RELAY)
    driver.agent.remove_local_candidate(Candidate.relay(RELAY), 30.0)
    assert driver.agent.nominated is None
    driver.run(30.0)
    assert {key for _, key, _, _ in driver.probes} == {DIRECT, THEIR_RELAY}
    driver.reply_now(THEIR_RELAY)
    replacement = Address.parse("203.0.113.55:50000")
    driver.agent.add_local_candidate(Candidate.relay(replacement), 31.0)
    driver.now = 31.0
    driver.answered = {THEIR_RELAY, (replacement, PEER_HOST)}
    driver.run(32.0)
    assert driver.primaries[0] == THEIR_RELAY
    assert driver.primaries[-1] == (replacement, PEER_HOST)
    assert RELAY not in {key[0] for _, key, _, _ in driver.probes}


# Limits


def test_at_most_six_remotes_of_a_kind_and_never_without_the_primary() -> None:
    driver = settled(DIRECT)
    for number in range(20):
        address = Address(bytes((10, 1, 1, number)), 1)
        driver.agent.add_remote_candidate(Candidate.host(address), 30.0)
        driver.answered = {DIRECT}
        driver.run(30.0 + number)
    hosts = [c for c in driver.agent.remote_candidates if c.kind == "host"]
    assert len(hosts) == 6
    assert driver.agent.primary == DIRECT


def test_at_most_four_peer_reflexive_ones_unless_one_is_long_silent() -> None:
    driver = settled(DIRECT)
    strangers = [Address(bytes((198, 51, 100, number)), 1) for number in range(6)]
    for stranger in strangers[:5]:
        driver.request((HOST, stranger))
    assert known(driver) == strangers[:4]
    driver.run(50.0)
    for stranger in strangers[1:4]:
        driver.request((HOST, stranger))
    driver.run(61.0)
    driver.request((HOST, strangers[5]))
    assert known(driver) == [*strangers[1:4], strangers[5]]


@pytest.mark.parametrize("text", ["169.254.1.1:1", "224.0.0.1:1", "0.0.0.0:1", "255.255.255.255:1", "[ff02::1]:1"])
def test_unusable_addresses_are_refused(text: str) -> None:
    agent = PathAgent(False, 0.0)
    candidate = Candidate.host(Address.parse(text))
    assert agent.add_local_candidate(candidate, 0.0) is None
    agent.add_remote_candidate(candidate, 0.0)
    assert agent.local_candidates == agent.remote_candidates == ()


def test_families_do_not_mix() -> None:
    agent = PathAgent(False, 0.0)
    agent.add_local_candidate(Candidate.host(HOST), 0.0)
    agent.add_remote_candidate(Candidate.host(Address.parse("[2001:db8::1]:1")), 0.0)
    assert agent.pairs == ()
    assert agent.state is IceState.NEW


def run_until_silence(driver: Driver) -> None:
    driver.drain()
    while (due := driver.agent.poll_timeout()) is not None:
        driver.now = due
        driver.agent.handle_timeout(due)
        driver.drain()


def known(driver: Driver) -> list[Address]:
    return [c.address for c in driver.agent.remote_candidates if c.kind == "prflx"]
