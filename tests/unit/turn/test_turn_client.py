"""One allocation against a scripted relay, in virtual time (connectivity sheet section 11, items 1 to 20)."""

from __future__ import annotations

import pytest
from turn_scene import (
    ALLOCATE,
    BINDING,
    CHANNEL_BIND,
    ERROR,
    KEY,
    LOCAL4,
    LOCAL6,
    MAPPED,
    MAPPED4,
    MAPPED6,
    NONCE,
    PEER,
    REALM,
    REFRESH,
    RELAY4,
    RELAY6,
    RELAYED4,
    RELAYED6,
    Scene,
    allocated,
    answer_keepalives,
    bound,
    times,
)

from fz_core.packet import DropReason
from fz_core.stun import (
    build,
    error_code_value,
    xor_address_value,
)
from fz_core.turn import HostDiscovered, ReflexiveDiscovered, RelayedAdded, RelayedRemoved


@pytest.mark.shows("connectivity", 1)
def test_unanswered_requests_are_repeated_and_given_up() -> None:
    scene = Scene()
    deadlines = []
    while (at := scene.allocation.poll_timeout()) is not None:
        deadlines.append(at - 1000.0)
        scene.advance(at - scene.now)
    assert deadlines == [1.0, 2.5, 4.75, 8.125]
    assert times(scene, 1000.0) == [0, 1.0, 2.5, 4.75]
    assert len({message.data for _, message, _ in scene.sent}) == 1


@pytest.mark.shows("connectivity", 1)
def test_polling_more_often_changes_nothing() -> None:
    scene = Scene()
    for _ in range(1000):
        scene.advance(0.01)
    assert [round(at, 2) for at in times(scene, 1000.0)] == [0, 1.0, 2.5, 4.75]


def test_repeated_authenticated_requests_get_new_ids_and_late_answers_are_ignored() -> None:
    scene = Scene()
    scene.answer_binding(scene.take(BINDING))
    first = scene.take(ALLOCATE)
    scene.advance(0.2)  # the round-trip time is known by now, and is short
    second = scene.take(ALLOCATE)
    assert first.transaction_id != second.transaction_id
    scene.answer_allocate(first, RELAYED4)
    assert scene.allocation.relayed_v4 is None
    scene.answer_allocate(second, RELAYED4)
    assert scene.allocation.relayed_v4 == RELAYED4


@pytest.mark.shows("connectivity", 2)
def test_first_allocate_is_signed_and_has_no_nonce() -> None:
    scene = Scene()
    binding = scene.take(BINDING)
    assert not binding.has_integrity
    assert binding.username is None
    scene.answer_binding(binding)
    allocate = scene.take(ALLOCATE)
    assert (allocate.username, allocate.realm, allocate.nonce) == ("2145916800:salt", "firezone", None)
    assert allocate.check_integrity(KEY)
    assert (allocate.requested_transport, allocate.additional_address_family) == (17, 2)
    assert allocate.lifetime is None
    assert not allocate.has(0x8028)


@pytest.mark.shows("connectivity", 3)
def test_stale_nonce_is_replaced() -> None:
    scene = allocated()
    scene.allocation.refresh(scene.now)
    scene.drain()
    scene.answer_error(scene.take(REFRESH), 438, "nonce-2")
    again = scene.take(REFRESH)
    assert again.nonce == "nonce-2"
    assert again.check_integrity(KEY)


@pytest.mark.shows("connectivity", 3)
def test_unauthorised_with_a_nonce_is_final() -> None:
    scene = Scene()
    scene.answer_binding(scene.take(BINDING))
    scene.answer_error(scene.take(ALLOCATE), 401, "nonce-1")
    second = scene.take(ALLOCATE)
    assert second.nonce == "nonce-1"
    scene.answer_error(second, 401, "nonce-2")
    scene.advance(600)
    assert scene.sent == []
    assert scene.allocation.free_reason == "authentication error"


def test_a_foreign_realm_is_not_answered() -> None:
    scene = Scene()
    scene.answer_binding(scene.take(BINDING))
    attributes = [(ERROR, error_code_value(401, "")), (REALM, b"evil"), (NONCE, b"n")]
    scene.answer(scene.take(ALLOCATE), 3, attributes)
    scene.advance(100)
    assert scene.sent == []


def test_endless_challenges_end() -> None:
    scene = Scene()
    scene.answer_binding(scene.take(BINDING))
    for number in range(100):
        if not scene.sent:
            break
        scene.answer_error(scene.take(ALLOCATE), 438, f"nonce-{number}")
    assert 3 <= number <= 10


@pytest.mark.shows("connectivity", 4)
def test_start_reports_host_reflexive_relayed_in_order() -> None:
    scene = Scene()
    scene.answer_binding(scene.take(BINDING))
    scene.answer_error(scene.take(ALLOCATE), 401, "nonce-1")
    scene.answer_allocate(scene.take(ALLOCATE), RELAYED4)
    assert scene.events == [
        HostDiscovered(LOCAL4),
        ReflexiveDiscovered(MAPPED4, LOCAL4),
        RelayedAdded(RELAYED4, True),
    ]
    assert scene.allocation.host_addresses == (LOCAL4,)
    assert scene.allocation.reflexive == ((MAPPED4, LOCAL4),)


@pytest.mark.shows("connectivity", 5)
def test_the_family_that_answers_first_is_used() -> None:
    scene = Scene(v6=True)
    four, six = scene.take(BINDING), scene.take(BINDING)
    scene.answer_binding(six, v6=True)
    assert scene.sent[0][2] == RELAY6
    assert scene.allocation.server == RELAY6
    scene.answer_binding(four)
    assert scene.allocation.server == RELAY6
    assert scene.events == [
        HostDiscovered(LOCAL6),
        ReflexiveDiscovered(MAPPED6, LOCAL6),
        HostDiscovered(LOCAL4),
        ReflexiveDiscovered(MAPPED4, LOCAL4),
    ]


@pytest.mark.shows("connectivity", 6)
def test_the_silent_family_is_given_up_without_harm() -> None:
    scene = Scene(v6=True)
    scene.answer_binding(scene.take(BINDING))
    scene.take(BINDING)
    scene.answer_allocate(scene.take(ALLOCATE), RELAYED4)
    scene.events.clear()
    scene.advance(20)
    assert [remote for _, _, remote in scene.sent] == [RELAY6] * 3
    assert scene.events == []
    assert scene.allocation.relayed_v4 == RELAYED4
    assert scene.allocation.free_reason is None


@pytest.mark.shows("connectivity", 7)
def test_disposal_of_a_silent_relay() -> None:
    scene = Scene()
    assert scene.allocation.free_reason is None
    scene.advance(9)
    assert scene.allocation.free_reason == "no response received"


@pytest.mark.shows("connectivity", 8)
def test_unauthorised_refresh_invalidates_all() -> None:
    scene = allocated(RELAYED4, RELAYED6)
    scene.advance(24)
    scene.allocation.refresh(scene.now)
    scene.drain()
    scene.answer_error(scene.take(REFRESH), 401, "nonce-2")
    assert scene.events == [RelayedRemoved(RELAYED4), RelayedRemoved(RELAYED6)]
    assert scene.sent == []
    assert scene.allocation.poll_timeout() is None
    assert scene.allocation.free_reason == "authentication error"


@pytest.mark.shows("connectivity", 9)
def test_mismatch_on_refresh_allocates_again() -> None:
    scene = allocated()
    bound(scene)
    scene.allocation.refresh(scene.now)
    scene.drain()
    scene.answer_error(scene.take(REFRESH), 437)
    assert scene.events == [RelayedRemoved(RELAYED4)]
    assert scene.allocation.channel_to(PEER, scene.now) is None
    assert scene.take(ALLOCATE).nonce == "nonce-1"


@pytest.mark.shows("connectivity", 10)
def test_mismatch_on_bind_allocates_and_binds_again() -> None:
    scene = allocated()
    scene.allocation.bind_channel(PEER, scene.now)
    scene.drain()
    scene.answer_error(scene.take(CHANNEL_BIND), 437)
    scene.answer_allocate(scene.take(ALLOCATE), RELAYED4)
    assert scene.take(CHANNEL_BIND).xor_peer_address == PEER


def test_mismatch_on_allocate_deletes_and_allocates_again() -> None:
    scene = Scene()
    scene.answer_binding(scene.take(BINDING))
    scene.answer_error(scene.take(ALLOCATE), 437)
    delete = scene.take(REFRESH)
    assert delete.lifetime == 0
    scene.answer_refresh(delete, 0)
    scene.answer_allocate(scene.take(ALLOCATE), RELAYED4)
    assert scene.allocation.relayed_v4 == RELAYED4


@pytest.mark.shows("connectivity", 11)
def test_server_error_on_allocate_suspends() -> None:
    scene = Scene()
    scene.answer_binding(scene.take(BINDING))
    scene.allocation.bind_channel(PEER, scene.now)
    scene.answer_error(scene.take(ALLOCATE), 508)
    scene.advance(500)
    scene.allocation.bind_channel(PEER, scene.now)
    scene.drain()
    assert scene.sent == []
    assert scene.allocation.free_reason is None
    scene.allocation.refresh(scene.now)
    scene.drain()
    scene.answer_binding(scene.take(BINDING))
    scene.answer_allocate(scene.take(ALLOCATE), RELAYED4)
    assert scene.sent == []


@pytest.mark.shows("connectivity", 12)
def test_refresh_at_half_of_the_lifetime_once() -> None:
    scene = allocated()
    start = scene.now
    while not any(message.method == REFRESH for _, message, _ in scene.sent):
        answer_keepalives(scene)
        scene.advance(1)
    at, request, _ = next(entry for entry in scene.sent if entry[1].method == REFRESH)
    assert at - start == 300
    assert request.lifetime is None
    scene.sent.clear()
    scene.answer_refresh(request)
    scene.advance(20)
    assert not any(message.method == REFRESH for _, message, _ in scene.sent)


@pytest.mark.shows("connectivity", 12)
def test_proactive_refresh_is_a_single_attempt() -> None:
    scene = allocated()
    scene.allocation.refresh(scene.now)
    scene.drain()
    assert scene.take(REFRESH).lifetime is None
    scene.allocation.refresh(scene.now)
    scene.drain()
    assert scene.sent == []
    assert scene.allocation.poll_timeout() == scene.now + 1
    scene.advance(1)
    assert scene.sent == []
    assert scene.events == [RelayedRemoved(RELAYED4)]
    assert scene.allocation.free_reason == "no response received"


@pytest.mark.shows("connectivity", 12)
def test_proactive_refresh_waits_for_an_allocate_in_flight() -> None:
    scene = Scene()
    scene.answer_binding(scene.take(BINDING))
    scene.take(ALLOCATE)
    scene.allocation.refresh(scene.now)
    scene.drain()
    assert scene.sent == []


def test_refresh_repeats_the_wishes_of_allocate_only_for_official_relays() -> None:
    official, other = allocated(), Scene(accept_unsigned_challenge=True)
    official.allocation.refresh(official.now)
    official.drain()
    request = official.take(REFRESH)
    assert (request.requested_transport, request.additional_address_family) == (17, 2)
    other.answer_binding(other.take(BINDING))
    other.answer_allocate(other.take(ALLOCATE), RELAYED4)
    other.allocation.refresh(other.now)
    other.drain()
    request = other.take(REFRESH)
    assert (request.requested_transport, request.additional_address_family) == (None, None)


def test_a_refused_refresh_is_not_repeated_at_once() -> None:
    scene = allocated()
    scene.allocation.refresh(scene.now + 0)
    scene.drain()
    scene.answer_error(scene.take(REFRESH), 500)
    assert scene.sent == []
    at = scene.allocation.poll_timeout()
    assert at is not None
    assert at >= scene.now + 5


@pytest.mark.shows("connectivity", 13)
def test_a_lifetime_that_ran_out_invalidates() -> None:
    scene = allocated(RELAYED4, RELAYED6)
    scene.now += 601
    scene.allocation.handle_timeout(scene.now)
    scene.drain()
    assert scene.events == [RelayedRemoved(RELAYED4), RelayedRemoved(RELAYED6)]
    assert scene.take(BINDING).method == BINDING  # and a new start, so that a resumed machine recovers


@pytest.mark.shows("connectivity", 13)
def test_unanswered_keepalives_invalidate() -> None:
    scene = allocated(RELAYED4, RELAYED6)
    scene.advance(25 + 8.125)
    assert scene.events == [RelayedRemoved(RELAYED4), RelayedRemoved(RELAYED6)]
    assert scene.allocation.free_reason == "no response received"


@pytest.mark.shows("connectivity", 14)
def test_keepalive_after_silence() -> None:
    scene = allocated()
    start = scene.now
    scene.advance(25)
    assert times(scene, start) == [25]
    assert scene.sent[0][1].method == BINDING


@pytest.mark.shows("connectivity", 14)
def test_data_puts_the_keepalive_off() -> None:
    scene = allocated()
    bound(scene)
    start = scene.now
    scene.advance(10)
    assert not isinstance(scene.allocation.encapsulate(PEER, b"data", scene.now), DropReason)
    scene.advance(24)
    assert scene.sent == []
    scene.advance(1)
    assert times(scene, start) == [35]


@pytest.mark.shows("connectivity", 19)
def test_round_trip_time_is_smoothed() -> None:
    scene = Scene(v6=True)
    four, six = scene.take(BINDING), scene.take(BINDING)
    scene.advance(0.04)
    scene.answer_binding(four)
    assert scene.allocation.rtt == pytest.approx(0.040)
    scene.advance(0.16)
    scene.answer_binding(six, v6=True)
    assert scene.allocation.rtt == pytest.approx(0.060)


@pytest.mark.shows("connectivity", 20)
def test_restart_begins_anew() -> None:
    scene = allocated()
    scene.allocation.restart(scene.now)
    scene.drain()
    assert scene.events == [RelayedRemoved(RELAYED4)]
    assert scene.allocation.free_reason is None
    scene.answer_binding(scene.take(BINDING))
    assert scene.take(ALLOCATE).nonce is None
    assert scene.events[1:] == [HostDiscovered(LOCAL4), ReflexiveDiscovered(MAPPED4, LOCAL4)]


# what strangers may not do
def test_unsigned_and_badly_signed_answers_are_ignored() -> None:
    scene = Scene()
    scene.answer_binding(scene.take(BINDING))
    request = scene.take(ALLOCATE)
    scene.answer_error(request, 401, "nonce-1", key=None)
    scene.answer_error(request, 420, key=b"wrong")
    scene.answer_allocate(request, RELAYED4, key=b"wrong")
    assert scene.sent == []
    assert scene.allocation.relayed_v4 is None
    scene.advance(1)
    assert scene.take(ALLOCATE).nonce is None


def test_answers_from_elsewhere_or_to_no_question_are_ignored() -> None:
    scene = Scene(v6=True)
    request = scene.take(BINDING)
    mapped = [(MAPPED, xor_address_value(MAPPED4, request.transaction_id))]
    assert not scene.allocation.handle_input(LOCAL4, PEER, build(1, 2, request.transaction_id, mapped), 0.0)
    scene.answer(request, 2, mapped, remote=RELAY6, key=None)
    assert scene.events == []
    stray = build(1, 2, bytes(12), mapped)
    assert scene.allocation.handle_input(LOCAL4, RELAY4, stray, scene.now)
    assert not scene.allocation.handle_input(LOCAL4, RELAY4, b"\x00\x01", scene.now)
    assert scene.allocation.free_reason is None


def test_protocol_failure() -> None:
    scene = Scene()
    scene.answer_binding(scene.take(BINDING))
    scene.answer_error(scene.take(ALLOCATE), 420)
    assert scene.allocation.free_reason == "TURN protocol failure"


def test_an_allocate_answer_without_address_is_ignored() -> None:
    scene = Scene()
    scene.answer_binding(scene.take(BINDING))
    scene.answer_allocate(scene.take(ALLOCATE))
    assert scene.allocation.relayed_v4 is None
    assert not any(isinstance(event, RelayedAdded) for event in scene.events)


# the other dialect
def test_unsigned_challenges_are_followed_once_when_allowed() -> None:
    scene = Scene(accept_unsigned_challenge=True)
    scene.answer_binding(scene.take(BINDING))
    first = scene.take(ALLOCATE)
    assert not first.has_integrity
    assert (first.username, first.realm) == ("2145916800:salt", "firezone")
    scene.answer_error(first, 401, "nonce-1", key=None)
    second = scene.take(ALLOCATE)
    assert second.check_integrity(KEY)
    scene.answer_error(second, 401, "nonce-2", key=None)
    scene.answer_error(second, 438, "nonce-3", key=None)
    assert scene.sent == []
    assert scene.allocation.free_reason is None


def test_credentials_do_not_show() -> None:
    assert "secret" not in repr(vars(allocated().allocation).get("_credentials", ""))
