"""When tunnels act, in virtual time that knows only announced deadlines (spec section 11, items 45 to 47)."""

from __future__ import annotations

import itertools

import pytest
from wireguard_pair import End, Pair, ipv4

from fz_core.packet import DropReason
from fz_core.wireguard import Expired

JITTER = 0.3331


@pytest.mark.shows("connectivity", 46)
@pytest.mark.parametrize(
    ("sends", "receives", "expected"),
    [(True, False, 120.0), (False, True, 165.0), (True, True, 120.0), (False, False, 180.0)],
)
def test_the_initiator_renews_by_age(sends: bool, receives: bool, expected: float) -> None:
    pair = Pair().connect()
    start = pair.now
    if sends:
        pair.send(pair.a, ipv4())
    if receives:
        pair.send(pair.b, ipv4())
    pair.run_until(start + 200)
    at = pair.a.sent_at(1)[1] - start
    assert expected <= at <= expected + JITTER
    assert pair.b.sent_at(1) == []
    assert pair.a.tunnel.has_session
    assert pair.b.tunnel.has_session


@pytest.mark.parametrize("name", ["a", "b"])
def test_keepalives_do_not_age_a_session(name: str) -> None:
    pair = Pair().connect()
    start = pair.now
    pair.send(getattr(pair, name), b"")
    pair.run_until(start + 200)
    assert 180.0 <= pair.a.sent_at(1)[1] - start <= 180.0 + JITTER
    assert len([d for end in (pair.a, pair.b) for _, d in end.sent if len(d) == 32]) == 3


def test_the_age_after_receipt_follows_the_shorter_iceless_timers() -> None:
    pair = Pair(keepalive_timeout=5.0, rekey_timeout=2.0).connect()
    start = pair.now
    pair.send(pair.b, ipv4())
    pair.run_until(start + 179)
    at = pair.a.sent_at(1)[1] - start
    assert 173.0 <= at <= 173.0 + JITTER


@pytest.mark.shows("connectivity", 46)
def test_the_responder_never_renews_by_age() -> None:
    pair = Pair().connect()
    start = pair.now
    pair.send(pair.b, ipv4())
    pair.send(pair.a, ipv4())
    pair.lossy = lambda sender, datagram: sender is pair.a
    pair.run_until(start + 700)
    assert pair.b.sent_at(1) == []
    assert not pair.b.tunnel.has_session


@pytest.mark.shows("connectivity", 46)
@pytest.mark.parametrize("name", ["a", "b"])
def test_unanswered_data_starts_a_handshake_from_either_side(name: str) -> None:
    pair = Pair().connect()
    end: End = getattr(pair, name)
    pair.run_until(pair.now + 3)
    first = pair.now
    before = len(end.sent_at(1))
    pair.lossy = lambda sender, datagram: sender is end and datagram[0] == 4
    for _ in range(13):
        pair.send(end, ipv4())
        pair.run_until(pair.now + 1)
    pair.lossy = lambda sender, datagram: False
    pair.run_until(first + 30)
    at = end.sent_at(1)[before] - first
    assert 15.0 <= at <= 15.0 + JITTER
    assert len(end.sent_at(1)) == before + 1


def test_the_iceless_silence_is_seven_seconds() -> None:
    pair = Pair(keepalive_timeout=5.0, rekey_timeout=2.0).connect()
    start = pair.now
    pair.lossy = lambda sender, datagram: True
    pair.send(pair.a, ipv4())
    pair.run_until(start + 9)
    at = pair.a.sent_at(1)[1] - start
    assert 7.0 <= at <= 7.0 + JITTER


@pytest.mark.shows("connectivity", 45, 46)
def test_with_the_nodes_timers_an_init_is_repeated_each_second() -> None:
    """A node takes 1 s where the sheet has 5 (docs/deviations.md), and what is counted from it follows."""
    timers = {"rekey_timeout": 1.0, "rekey_attempt_time": 20.0}
    lost = Pair(**timers)
    start = lost.now
    lost.lossy = lambda sender, datagram: True
    lost.a.tunnel.start_handshake(lost.now)
    lost.exchange()
    lost.run_until(start + 60)
    times = lost.a.sent_at(1)
    assert all(1.0 <= later - earlier <= 1.0 + JITTER for earlier, later in itertools.pairwise(times))
    assert 15 <= len(times) <= 20
    assert lost.a.events == [Expired(start + 20.0)]

    silent = Pair(**timers).connect()
    start = silent.now
    silent.lossy = lambda sender, datagram: True
    silent.send(silent.a, ipv4())
    silent.run_until(start + 12)
    assert 11.0 <= silent.a.sent_at(1)[1] - start <= 11.0 + JITTER

    receiving = Pair(**timers).connect()
    start = receiving.now
    receiving.send(receiving.b, ipv4())
    receiving.run_until(start + 179)
    assert 169.0 <= receiving.a.sent_at(1)[1] - start <= 169.0 + JITTER


@pytest.mark.shows("connectivity", 46)
def test_one_passive_keepalive_and_no_ping_pong() -> None:
    pair = Pair().connect()
    start = pair.now
    pair.run_until(start + 1)
    pair.send(pair.a, ipv4())
    pair.run_until(start + 5)
    pair.send(pair.a, ipv4())
    pair.run_until(start + 100)
    assert [at - start for at, d in pair.b.sent if d[0] == 4] == [11.0]
    assert all(len(d) == 32 for at, d in pair.b.sent if d[0] == 4)
    assert [at - start for at, d in pair.a.sent if len(d) == 32] == [0.0]


def test_sending_makes_the_passive_keepalive_needless() -> None:
    pair = Pair().connect()
    start = pair.now
    pair.send(pair.a, ipv4())
    pair.run_until(start + 9)
    pair.send(pair.b, ipv4())
    pair.run_until(start + 18)
    assert [at - start for at, d in pair.b.sent if d[0] == 4] == [9.0]


def test_no_keepalive_while_an_initiation_is_unanswered() -> None:
    pair = Pair().connect()
    start = pair.now
    pair.send(pair.b, ipv4())
    pair.run_until(start + 8)
    pair.lossy = lambda sender, datagram: sender is pair.a
    pair.a.tunnel.start_handshake(pair.now)
    pair.send(pair.b, ipv4())
    pair.run_until(start + 40)
    assert [at for at, d in pair.a.sent if d[0] == 4 and at > start] == []


@pytest.mark.shows("connectivity", 47)
def test_the_initiator_stops_at_170_and_the_responder_at_180() -> None:
    pair = Pair().connect()
    start = pair.now
    pair.lossy = lambda sender, datagram: datagram[0] in (1, 2)
    pair.now = start + 169.9
    assert isinstance(pair.a.tunnel.seal(ipv4(), pair.now), bytes)
    pair.now = start + 170.0
    assert pair.a.tunnel.seal(ipv4(), pair.now) is DropReason.WG_NO_SESSION
    pair.now = start + 179.9
    pair.send(pair.b, ipv4(b"late"))
    assert pair.a.received == [ipv4(b"late")]
    sealed = pair.b.tunnel.seal(ipv4(), pair.now)
    assert isinstance(sealed, bytes)
    pair.now = start + 180.0
    assert pair.b.tunnel.seal(ipv4(), pair.now) is DropReason.WG_NO_SESSION
    assert pair.a.tunnel.handle_untrusted(sealed, None, pair.now) is DropReason.WG_EXPIRED_SESSION


@pytest.mark.shows("connectivity", 47)
def test_everything_is_wiped_after_540_seconds() -> None:
    pair = Pair().connect()
    start = pair.now
    pair.lossy = lambda sender, datagram: True
    pair.run_until(start + 1000)
    assert pair.b.events[-1] == Expired(start + 540.0)
    assert len(pair.b.events) == 2
    assert pair.b.tunnel.poll_timeout() is None
    assert pair.b.sent_at(1) == []


def test_a_failed_renewal_expires_and_then_rests() -> None:
    pair = Pair(rekey_attempt_time=20.0).connect()
    start = pair.now
    pair.send(pair.a, ipv4())
    pair.lossy = lambda sender, datagram: True
    pair.run_until(start + 539)
    expiries = [event for event in pair.a.events if isinstance(event, Expired)]
    (expired,) = expiries
    # Its data went unanswered for 15 s, then the attempt took 20 s.
    assert 0 <= expired.at - start - (15.0 + 20.0) <= JITTER
    assert len(pair.a.sent_at(1)) == 5


@pytest.mark.parametrize(("lazy", "attempts"), [(False, 1), (True, 2)])
def test_data_after_a_failed_attempt_tries_again_only_where_data_may(lazy: bool, attempts: int) -> None:
    pair = Pair(rekey_attempt_time=20.0, handshake_on_data=lazy).connect()
    start = pair.now
    pair.lossy = lambda sender, datagram: True
    for at in (0, 60):
        pair.run_until(start + at)
        assert isinstance(pair.a.tunnel.seal(ipv4(), pair.now), bytes)
    pair.run_until(start + 110)
    assert len([event for event in pair.a.events if isinstance(event, Expired)]) == attempts


def test_an_idle_tunnel_renews_every_180_seconds() -> None:
    pair = Pair().connect()
    start = pair.now
    pair.run_until(start + 3600)
    times = pair.a.sent_at(1)
    assert 19 <= len(times) <= 20
    assert all(180.0 <= b - a <= 180.0 + JITTER for a, b in itertools.pairwise(times))
    assert not any(isinstance(event, Expired) for event in pair.a.events + pair.b.events)


def test_persistent_keepalives() -> None:
    pair = Pair(persistent_keepalive=25.0, handshake_on_data=True)
    start = pair.now
    pair.run_until(start + 100)
    assert pair.a.tunnel.has_session
    sent = [at - start for at, d in pair.a.sent if len(d) == 32]
    assert sent[-3:] == [25.0, 50.0, 75.0] or sent[-4:] == [25.0, 50.0, 75.0, 100.0]


def test_polling_more_often_changes_nothing() -> None:
    calm, nervous = Pair(), Pair()
    for pair in (calm, nervous):
        pair.connect()
        pair.send(pair.a, ipv4())
    end = calm.now + 400
    calm.run_until(end)
    while nervous.now < end:
        due = nervous.next_deadline()
        assert due is not None
        for at in (nervous.now + (due - nervous.now) / 2, due):
            if at <= end:
                nervous.run_until(at)
        if due > end:
            nervous.run_until(end)
    assert nervous.a.sent == calm.a.sent
    assert nervous.b.sent == calm.b.sent


def test_times_of_traffic() -> None:
    pair = Pair()
    assert pair.a.tunnel.last_rx_at is None
    assert pair.a.tunnel.last_tx_at is None
    pair.connect()
    pair.now += 5
    pair.send(pair.a, ipv4())
    assert pair.a.tunnel.last_tx_at == pair.now
    assert pair.b.tunnel.last_rx_at == pair.now
    assert pair.b.tunnel.last_tx_at == pair.now - 5
