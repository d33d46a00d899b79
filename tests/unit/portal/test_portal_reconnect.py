"""`spec/portal-protocol.md` §3, sentence by sentence: when a link is tried again, how often, and what survives.

Constants are restated here. The jitter of a test's channel is 0 unless it says otherwise.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from fz_core.portal import (
    Channel,
    Connect,
    Connected,
    Fatal,
    Hiccup,
    client_channel,
    gateway_channel,
    relay_channel,
)
from fz_core.portal.client import NoRelays, SetSnownetCapabilities

DAY = 86_400.0
PROBLEM = {"content-type": "application/problem+json; charset=utf-8"}
ROLES: dict[str, Callable[..., Channel]] = {
    "client": client_channel,
    "gateway": gateway_channel,
    "relay": lambda random_bytes, *budget: relay_channel(random_bytes, "ab" * 32, *budget),
}


def zeros(size: int) -> bytes:
    return bytes(size)


def ones(size: int) -> bytes:
    return b"\xff" * size


def events(channel: Channel) -> list[Any]:
    return list(iter(channel.poll_event, None))


def sent(channel: Channel) -> list[dict[str, Any]]:
    return [json.loads(text) for text in iter(channel.poll_transmit, None)]


def fresh(random_bytes: Callable[[int], bytes] = zeros, budget: float | None = None) -> Channel:
    """Never joined; its first dial is under way."""
    channel = client_channel(random_bytes, budget)
    assert events(channel) == [Connect(0.0)]
    return channel


def join(channel: Channel, now: float = 0.0) -> Channel:
    channel.handle_connected(now)
    (frame,) = [f for f in sent(channel) if f["event"] == "phx_join"]
    payload = {"status": "ok", "response": {}}
    reply = {"topic": frame["topic"], "event": "phx_reply", "ref": frame["ref"], "payload": payload}
    channel.handle_text(json.dumps(reply), now)
    assert events(channel)[-1] == Connected()
    return channel


def joined(random_bytes: Callable[[int], bytes] = zeros, budget: float | None = None) -> Channel:
    return join(fresh(random_bytes, budget))


def lose(channel: Channel, now: float = 1.0) -> float | None:
    """The delay after a loss; None if the link is given up."""
    channel.handle_closed("lost", now)
    *_, last = events(channel)
    if isinstance(last, Fatal):
        assert not last.is_token_dead, "the token is kept"
        return None
    assert isinstance(last, Connect)
    return last.delay


# the two strategies


def test_initial_strategy_every_second_until_15_s_are_spent() -> None:
    channel = fresh()
    assert [lose(channel) for _ in range(16)] == [1.0] * 15 + [None]


def test_initial_strategy_has_no_jitter() -> None:
    assert lose(fresh(ones)) == 1.0


def test_reconnect_strategy_starts_at_half_a_second_and_grows_by_half() -> None:
    channel = joined()
    delays = [lose(channel) or 0.0 for _ in range(12)]
    assert delays[0] == 0.5
    assert all(later == pytest.approx(earlier * 1.5) for earlier, later in pairwise(delays))


def test_reconnect_strategy_is_capped_at_60_s() -> None:
    channel = joined()
    assert [lose(channel) for _ in range(20)][-3:] == [60.0] * 3


def test_jitter_adds_up_to_the_interval_itself() -> None:
    assert lose(joined(ones)) == pytest.approx(1.0)
    channel = joined(ones)
    assert [lose(channel) for _ in range(20)][-1] == pytest.approx(120.0)
    rng = random.Random(1)
    first = [lose(joined(rng.randbytes)) or 0.0 for _ in range(200)]
    assert min(first) >= 0.5
    assert max(first) <= 1.0
    assert max(first) - min(first) > 0.4, "it is spread over the whole of it"


@pytest.mark.parametrize(("role", "budget"), [("gateway", DAY), ("relay", DAY), ("client", None)])
def test_default_budgets_are_a_day_for_gateways_and_relays_and_none_for_clients(
    role: str, budget: float | None
) -> None:
    channel = ROLES[role](zeros)
    events(channel)
    join(channel)
    spent = 0.0
    while spent < 3 * DAY and (delay := lose(channel)) is not None:
        spent += delay
    if budget is None:
        assert spent >= 3 * DAY
    else:
        assert budget - 60.0 < spent <= budget


def test_the_budget_is_the_sum_of_delays_not_time() -> None:
    channel = joined(budget=1.0)
    assert lose(channel, now=1e6) == 0.5
    assert lose(channel, now=2e6) is None


def test_which_strategy_depends_on_a_join_ever_in_this_process() -> None:
    channel = joined()
    channel.reconnect(1.0)
    events(channel)
    assert lose(channel) == 0.5, "not joined now, but once"
    channel = fresh()
    channel.handle_connected(0.0)
    assert lose(channel) == 1.0, "a WebSocket is no join"


# when a strategy begins and ends


def test_the_strategy_is_made_at_the_first_failure() -> None:
    """A link that was up for longer than its budget survives a hiccup."""
    channel = joined(budget=15.0)
    for at in range(10, 200, 10):
        channel.handle_timeout(float(at))
        for frame in sent(channel):
            payload = {"status": "ok", "response": {}}
            reply = {"topic": "phoenix", "event": "phx_reply", "ref": frame["ref"], "payload": payload}
            channel.handle_text(json.dumps(reply), float(at))
    assert lose(channel, now=200.0) == 0.5


def test_a_join_throws_the_strategy_away() -> None:
    channel = joined(budget=2.0)
    for _ in range(20):
        assert [lose(channel), lose(channel)] == [0.5, 0.75]
        join(channel)


def test_connecting_without_delay_throws_the_strategy_away() -> None:
    channel = joined(budget=2.0)
    for _ in range(20):
        assert [lose(channel), lose(channel)] == [0.5, 0.75]
        channel.reconnect(2.0)
        assert events(channel) == [Connect(0.0)]


def test_the_strategy_survives_ordinary_hiccups() -> None:
    channel = joined()
    delays = []
    for _ in range(4):
        delays.append(lose(channel))
        channel.handle_connected(1.0)  # open, but never joined
    assert delays == [0.5, 0.75, 1.125, 1.6875]


# Retry-After


@pytest.mark.parametrize("status", [302, 400, 403, 408, 409, 429, 500, 503])
def test_retry_after_replaces_the_delay_on_any_refusal_but_401(status: int) -> None:
    channel = joined()
    channel.handle_refused(status, {"retry-after": "17"}, "", 0.0, 1.0)
    assert events(channel)[-1] == Connect(17.0)


@pytest.mark.parametrize(
    ("value", "delay"),
    [
        ("7", 7.0),
        (" 7 ", 7.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40.0),
        ("Thu, 01 Jan 1970 00:01:40 +0000", 40.0),
        ("Thu, 01 Jan 1970 00:00:01 GMT", 0.0),
        ("soon", 0.5),
        ("-3", 0.5),
        ("1.5", 0.5),
        ("", 0.5),
        ("99999999999999999999", 0.5),
    ],
)
def test_retry_after_is_seconds_or_a_date_the_past_is_0_and_junk_is_ignored(value: str, delay: float) -> None:
    channel = joined()
    channel.handle_refused(503, {"retry-after": value}, "", 60.0, 1.0)
    assert events(channel)[-1] == Connect(delay)


def test_retry_after_does_not_use_the_budget() -> None:
    channel = joined(budget=0.6)
    for _ in range(100):
        channel.handle_refused(503, {"retry-after": "60"}, "", 0.0, 1.0)
        assert events(channel)[-1] == Connect(60.0)
    assert [lose(channel), lose(channel)] == [0.5, None]


def test_retry_after_0_renews_the_strategy() -> None:
    channel = joined(budget=0.6)
    assert lose(channel) == 0.5
    channel.handle_refused(503, {"retry-after": "0"}, "", 0.0, 1.0)
    assert events(channel)[-1] == Connect(0.0)
    assert lose(channel) == 0.5


def test_retry_after_0_again_and_again_does_not_make_us_spin() -> None:
    """Every other attempt waits as if nothing had been said; the strategy begins anew with each 0."""
    channel = joined()
    delays = []
    for _ in range(6):
        channel.handle_refused(503, {"retry-after": "0"}, "", 0.0, 1.0)
        delays.append(events(channel)[-1].delay)
    assert delays == [0.0, 0.5] * 3


def test_an_exhausted_budget_is_the_end_and_keeps_the_token() -> None:
    channel = joined(budget=0.5)
    assert [lose(channel), lose(channel)] == [0.5, None]
    assert channel.is_dead
    channel.handle_closed("again", 2.0)
    assert events(channel) == []


# classes of events


@pytest.mark.parametrize("code", ["invalid_token", "missing_token"])
def test_401_of_the_portal_is_fatal_and_discards_the_token(code: str) -> None:
    assert refused(401, PROBLEM, json.dumps({"code": code})) == (Fatal, True)


@pytest.mark.parametrize(
    ("headers", "body"),
    [(PROBLEM, '{"code":"other"}'), (PROBLEM, "{}"), ({"content-type": "text/html"}, "<html>"), ({}, "")],
)
def test_401_of_anybody_else_is_fatal_but_keeps_the_token(headers: dict[str, str], body: str) -> None:
    assert refused(401, headers, body) == (Fatal, False)


@pytest.mark.parametrize("status", [301, 302, 402, 403, 404, 408, 409, 429, 500, 502, 503, 504])
def test_other_statuses_are_transient(status: int) -> None:
    assert refused(status, PROBLEM, '{"code":"x"}') == (Hiccup, False)


def refused(status: int, headers: dict[str, str], body: str) -> tuple[type, bool]:
    channel = fresh()
    channel.handle_refused(status, headers, body, 0.0, 0.0)
    first = events(channel)[0]
    return type(first), getattr(first, "is_token_dead", False)


def test_a_refused_join_is_fatal() -> None:
    channel = fresh()
    channel.handle_connected(0.0)
    payload = {"status": "error", "response": {"reason": "no"}}
    channel.handle_text(json.dumps({"topic": "client", "event": "phx_reply", "ref": 0, "payload": payload}), 0.0)
    assert [type(e) for e in events(channel)] == [Fatal]


def test_token_expired_is_fatal() -> None:
    channel = joined()
    push = {"topic": "client", "event": "disconnect", "payload": {"reason": "token_expired"}}
    channel.handle_text(json.dumps(push), 1.0)
    assert [type(e) for e in events(channel)] == [Fatal]


def close(channel: Channel) -> None:
    channel.handle_closed("no addresses for portal.example", 5.0)


def push_close(channel: Channel) -> None:
    channel.handle_text('{"topic":"client","event":"phx_close","payload":{}}', 5.0)


def truncate(channel: Channel) -> None:
    channel.handle_text('{"topic":"client"', 5.0)


def starve(channel: Channel) -> None:
    for at in (10.0, 20.0, 30.0, 40.0):
        channel.handle_timeout(at)


def never_answer_the_join(channel: Channel) -> None:
    channel.handle_connected(5.0)
    channel.handle_timeout(10.0)


@pytest.mark.parametrize("trouble", [close, push_close, truncate, starve, never_answer_the_join])
def test_everything_else_is_transient(trouble: Callable[[Channel], None]) -> None:
    channel = joined()
    trouble(channel)
    assert [type(e) for e in events(channel)] == [Hiccup, Connect]
    assert not channel.is_dead


def test_a_hiccup_tells_delay_budget_and_reason() -> None:
    channel = joined(budget=77.0)
    channel.handle_closed("cable pulled", 1.0)
    assert events(channel) == [Hiccup(0.5, 77.0, "cable pulled"), Connect(0.5)]
    channel = fresh()
    channel.handle_closed("cable pulled", 1.0)
    assert events(channel)[0] == Hiccup(1.0, 15.0, "cable pulled")


# what survives


def test_the_queue_exists_only_while_joined_and_is_discarded_by_a_reconnect() -> None:
    channel = fresh()
    assert not channel.send(NoRelays(), 0.0)
    channel.handle_connected(0.0)
    assert not channel.send(NoRelays(), 0.0), "open but not joined"
    channel = joined()
    assert channel.send(NoRelays(), 1.0)
    lose(channel)
    assert not channel.send(NoRelays(), 1.0)
    join(channel, 2.0)
    assert sent(channel) == []


def test_a_message_equal_to_one_still_queued_is_not_queued_again() -> None:
    channel = joined()
    for _ in range(3):
        channel.send(NoRelays(), 1.0)
        channel.send(SetSnownetCapabilities(True), 1.0)
    assert [f["event"] for f in sent(channel)] == ["no_relays", "set_snownet_capabilities"]
    channel.send(NoRelays(), 1.0)
    assert len(sent(channel)) == 1, "but again once it is sent"


def test_references_begin_anew_on_each_connection() -> None:
    channel = joined()
    channel.send(NoRelays(), 1.0)
    assert sent(channel)[0]["ref"] == 1
    lose(channel)
    channel.handle_connected(2.0)
    assert sent(channel)[0]["ref"] == 0


def test_answers_of_an_old_connection_do_not_count_on_the_new_one() -> None:
    channel = joined()
    channel.handle_timeout(10.0)
    lose(channel, 10.5)
    join(channel, 11.0)
    starve_refs = []
    for at in (21.0, 31.0, 41.0):
        channel.handle_timeout(at)
        starve_refs += [f["ref"] for f in sent(channel)]
    assert starve_refs == [1, 2, 3]
    assert events(channel) == []


def test_a_day_of_outage_is_a_bounded_number_of_timers() -> None:
    """The budget's 24 h hold about a thousand attempts: nothing spins."""
    rng = random.Random(3)
    channel, at, dials = joined(rng.randbytes), 0.0, 0
    while at < DAY:
        at += lose(channel, at) or 0.0
        assert channel.poll_timeout() is None, "nothing is due between attempts"
        dials += 1
        assert len(channel._events) == 0
    assert DAY / 120 < dials < DAY / 60 + 50
