"""The channel in virtual time (`spec/portal-protocol.md` §2, §3)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fz_core.portal import (
    Channel,
    Connect,
    Connected,
    Fatal,
    Hiccup,
    MessageDropped,
    MessageReceived,
    client_channel,
    relay_channel,
)
from fz_core.portal.client import NoRelays, ResourceDeleted, SetSnownetCapabilities

RESOURCE = "3f9fd1b1-0000-4000-8000-000000000001"


def zeros(size: int) -> bytes:
    return bytes(size)


def events(channel: Channel) -> list[Any]:
    return list(iter(channel.poll_event, None))


def sent(channel: Channel) -> list[dict[str, Any]]:
    return [json.loads(text) for text in iter(channel.poll_transmit, None)]


def reply(ref: int, *, topic: str = "client", status: str = "ok", response: Any = None) -> str:
    payload = {"status": status, "response": response or {}}
    return json.dumps({"topic": topic, "event": "phx_reply", "ref": ref, "payload": payload})


def push(event: str, payload: Any) -> str:
    return json.dumps({"topic": "client", "event": event, "payload": payload})


def joined(now: float = 0.0, budget: float | None = None) -> Channel:
    channel = client_channel(zeros, budget)
    channel.handle_connected(now)
    sent(channel)
    channel.handle_text(reply(0), now)
    assert events(channel)[-1] == Connected()
    return channel


def test_it_dials_at_once_and_joins_first() -> None:
    channel = client_channel(zeros)
    assert events(channel) == [Connect(0.0)]
    channel.handle_connected(0.0)
    assert sent(channel) == [{"topic": "client", "event": "phx_join", "payload": None, "ref": 0}]
    assert channel.send(NoRelays(), 0.0) is False


def test_a_relay_joins_with_its_secret() -> None:
    channel = relay_channel(zeros, "ab" * 32)
    channel.handle_connected(0.0)
    assert sent(channel)[0]["payload"] == {"stamp_secret": "ab" * 32}


def test_messages_follow_the_join_in_order_with_one_counter() -> None:
    channel = joined()
    assert channel.send(SetSnownetCapabilities(False), 0.0)
    assert channel.send(NoRelays(), 0.0)
    channel.send(NoRelays(), 0.0)  # equal to one still queued
    assert [(f["event"], f["ref"], f["payload"]) for f in sent(channel)] == [
        ("set_snownet_capabilities", 1, {"iceless": False}),
        ("no_relays", 2, {}),
    ]


def test_typed_messages_come_out_and_others_are_dropped_alone() -> None:
    channel = joined()
    for text in (push("resource_deleted", RESOURCE), push("mystery", {}), push("resource_deleted", {}), "{}"):
        channel.handle_text(text, 1.0)
    first, *rest = events(channel)
    assert first == MessageReceived(ResourceDeleted(RESOURCE))
    assert [type(e) for e in rest] == [MessageDropped] * 3
    assert channel.is_joined


def test_heartbeats_every_ten_seconds_until_three_are_unanswered() -> None:
    channel = joined()
    refs = []
    for n in range(1, 4):
        assert channel.poll_timeout() == 10.0 * n
        channel.handle_timeout(10.0 * n)
        (beat,) = sent(channel)
        assert (beat["topic"], beat["event"], beat["payload"]) == ("phoenix", "heartbeat", {})
        refs.append(beat["ref"])
    channel.handle_text(reply(refs[1], topic="phoenix"), 31.0)
    channel.handle_timeout(40.0)
    assert events(channel) == []
    channel.handle_timeout(50.0)
    hiccup, again = events(channel)
    assert isinstance(hiccup, Hiccup)
    assert "heartbeats" in hiccup.error
    assert again == Connect(0.5)


def test_a_join_without_answer_is_a_hiccup_after_five_seconds() -> None:
    channel = client_channel(zeros)
    channel.handle_connected(0.0)
    events(channel)
    assert channel.poll_timeout() == 5.0
    channel.handle_timeout(5.0)
    assert [type(e) for e in events(channel)] == [Hiccup, Connect]
    assert channel.poll_timeout() is None


@pytest.mark.parametrize(
    "text", [push("phx_close", {}), '{"topic":"client","event":"in', ""], ids=["phx_close", "truncated", "empty"]
)
def test_what_ends_the_connection(text: str) -> None:
    channel = joined()
    channel.handle_text(text, 1.0)
    assert [type(e) for e in events(channel)] == [Hiccup, Connect]


@pytest.mark.parametrize(
    "text",
    [
        push("phx_error", {}),
        push("disconnect", {"reason": "certificate_revoked"}),
        push("disconnect", None),
        reply(9, status="error", response={"reason": "disabled"}),
        push("phx_reply", {"status": "ok", "response": {}}),
    ],
)
def test_what_does_not_end_the_connection(text: str) -> None:
    channel = joined()
    channel.handle_text(text, 1.0)
    assert channel.is_joined
    assert all(isinstance(e, MessageDropped) for e in events(channel))


def test_an_expired_token_is_fatal() -> None:
    channel = joined()
    channel.handle_text(push("disconnect", {"reason": "token_expired"}), 1.0)
    (fatal,) = events(channel)
    assert isinstance(fatal, Fatal)
    assert fatal.is_token_dead
    channel.handle_closed("closed", 2.0)
    assert events(channel) == []


def test_a_refused_join_is_fatal_but_the_token_lives() -> None:
    channel = client_channel(zeros)
    channel.handle_connected(0.0)
    events(channel)
    channel.handle_text(reply(0, status="error", response={"reason": "nope"}), 0.0)
    (fatal,) = events(channel)
    assert isinstance(fatal, Fatal)
    assert "nope" in fatal.error
    assert not fatal.is_token_dead


def test_an_unmatched_topic_joins_again_on_the_same_socket() -> None:
    channel = joined()
    channel.handle_text(reply(5, status="error", response={"reason": "unmatched topic"}), 1.0)
    (join,) = sent(channel)
    assert join["event"] == "phx_join"
    channel.handle_text(reply(join["ref"]), 1.0)
    assert events(channel) == [Connected()]


PROBLEM = {"content-type": "application/problem+json; charset=utf-8"}


@pytest.mark.parametrize(
    ("headers", "body", "dead"),
    [
        (PROBLEM, '{"code":"invalid_token"}', True),
        (PROBLEM, '{"code":"missing_token"}', True),
        (PROBLEM, '{"code":"proxy"}', False),
        (PROBLEM, "not json", False),
        ({"content-type": "text/html"}, '{"code":"invalid_token"}', False),
    ],
)
def test_401_is_fatal_and_only_the_portals_own_codes_kill_the_token(
    headers: dict[str, str], body: str, dead: bool
) -> None:
    channel = client_channel(zeros)
    events(channel)
    channel.handle_refused(401, headers, body, 0.0, 0.0)
    (fatal,) = events(channel)
    assert isinstance(fatal, Fatal)
    assert fatal.is_token_dead is dead


@pytest.mark.parametrize("status", [302, 400, 402, 403, 404, 408, 409, 429, 500, 503])
def test_other_refusals_are_hiccups(status: int) -> None:
    channel = client_channel(zeros)
    events(channel)
    channel.handle_refused(status, {}, "", 0.0, 0.0)
    assert [type(e) for e in events(channel)] == [Hiccup, Connect]


@pytest.mark.parametrize(
    ("value", "delay"),
    [
        ("7", 7.0), ("0", 0.0), ("Sun, 06 Nov 1994 08:49:37 GMT", 10.0), ("Sun, 06 Nov 1994 08:49:00 GMT", 0.0),
        ("soon", 1.0), ("-3", 1.0),
    ],
)  # fmt: skip
def test_retry_after_replaces_the_delay(value: str, delay: float) -> None:
    channel = client_channel(zeros)
    events(channel)
    channel.handle_refused(503, {"retry-after": value}, "", 784111767.0, 0.0)
    hiccup, again = events(channel)
    assert again == Connect(delay)
    assert hiccup.delay == delay


def test_retry_after_does_not_consume_the_budget() -> None:
    channel = client_channel(zeros)
    for _ in range(15):
        channel.handle_refused(503, {"retry-after": "5"}, "", 0.0, 0.0)
        channel.handle_closed("down", 0.0)
    assert not any(isinstance(e, Fatal) for e in events(channel))
    channel.handle_closed("down", 0.0)
    assert isinstance(events(channel)[-1], Fatal)


def test_the_strategy_is_made_anew_after_a_join() -> None:
    channel = joined(budget=1.0)
    for expected in (0.5, None):
        channel.handle_closed("down", 100.0)
        last = events(channel)[-1]
        assert last == Connect(expected) if expected else isinstance(last, Fatal)
    channel = joined(budget=1.0)
    for _ in range(5):
        channel.handle_closed("down", 100.0)
        assert events(channel)[-1] == Connect(0.5)
        channel.handle_connected(101.0)
        ref = sent(channel)[0]["ref"]
        assert ref == 0
        channel.handle_text(reply(ref), 101.0)
        assert events(channel) == [Connected()]


def test_roaming_starts_over_at_once_and_forgets_the_queue() -> None:
    channel = joined()
    channel.send(NoRelays(), 1.0)
    channel.reconnect(1.0)
    assert events(channel) == [Hiccup(0.0, None, "starting over on request"), Connect(0.0)]
    assert sent(channel) == []
    assert not channel.send(NoRelays(), 1.0)


def test_the_queue_is_bounded() -> None:
    channel = joined()
    taken = [channel.send(SetSnownetCapabilities(False), 0.0) for _ in range(5000)]
    assert all(taken)
    assert len(sent(channel)) == 1


def probed(now: float = 20.0, budget: float | None = None) -> tuple[Channel, dict[str, Any]]:
    channel = joined(budget=budget)
    channel.probe(now)
    (beat,) = sent(channel)
    return channel, beat


def test_a_probe_is_a_heartbeat_and_an_answer_in_time_is_all_it_takes() -> None:
    channel, beat = probed(3.0)
    assert (beat["topic"], beat["event"], beat["payload"]) == ("phoenix", "heartbeat", {})
    assert channel.poll_timeout() == 5.0
    channel.handle_text(reply(beat["ref"], topic="phoenix"), 4.9)
    assert channel.poll_timeout() == 10.0
    channel.handle_timeout(5.0)
    assert events(channel) == []
    assert channel.is_joined


def test_an_unanswered_probe_starts_over_at_once_and_costs_no_budget() -> None:
    channel, _ = probed(3.0, budget=1.0)
    channel.handle_timeout(4.9)
    assert events(channel) == []
    channel.handle_timeout(5.0)
    hiccup, again = events(channel)
    assert isinstance(hiccup, Hiccup)
    assert "probe" in hiccup.error
    assert again == Connect(0.0)
    channel.handle_closed("no route", 6.0)
    assert events(channel)[-1] == Connect(0.5), "from there the usual way, from its start"


def test_another_frame_of_the_portal_does_not_answer_a_probe() -> None:
    channel, beat = probed(3.0)
    channel.handle_text(push("resource_deleted", RESOURCE), 4.0)
    channel.handle_text(reply(beat["ref"] - 1, topic="phoenix"), 4.0)
    events(channel)
    channel.handle_timeout(5.0)
    assert events(channel)[-1] == Connect(0.0)


def test_a_connection_found_broken_by_a_probe_is_replaced_at_once() -> None:
    channel, _ = probed(3.0)
    channel.handle_closed("connection reset", 3.1)
    assert events(channel)[-1] == Connect(0.0)


def test_there_is_one_probe_at_a_time() -> None:
    channel, beat = probed(3.0)
    channel.probe(4.0)
    assert sent(channel) == []
    assert channel.poll_timeout() == 5.0
    channel.handle_text(reply(beat["ref"], topic="phoenix"), 4.5)
    channel.probe(4.6)
    assert len(sent(channel)) == 1


def test_nothing_is_probed_before_the_join() -> None:
    channel = client_channel(zeros)
    channel.probe(0.0)
    channel.handle_connected(0.0)
    sent(channel)
    channel.probe(0.0)
    assert sent(channel) == []
    assert channel.poll_timeout() == 5.0


def test_probes_leave_the_heartbeats_alone() -> None:
    channel, beat = probed(9.0)
    channel.handle_timeout(10.0)
    (regular,) = sent(channel)
    assert regular["ref"] == beat["ref"] + 1
    assert channel.poll_timeout() == 11.0
    channel.handle_text(reply(beat["ref"], topic="phoenix"), 10.5)
    assert channel.poll_timeout() == 20.0
