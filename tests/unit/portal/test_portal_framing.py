"""Frames, login and backoff against `spec/portal-protocol.md` §1 to §3."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fz_core.portal import BadUrl, Login, external_id, user_agent
from fz_core.portal.backoff import Backoff
from fz_core.portal.framing import Frame, Truncated, parse_frame_untrusted

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
)


def login(url: str, role: str = "client", token: str | None = None, **params: str) -> Login:
    return Login(role, url, "Debian/12 headless-client/1.5.11 (x86_64)", params, token)


def test_frames_have_the_documented_shape() -> None:
    assert json.loads(Frame("client", "phx_join", None, 0).encode()) == {
        "topic": "client", "event": "phx_join", "payload": None, "ref": 0,
    }  # fmt: skip


@given(JSON, st.none() | st.integers(0, 2**64 - 1))
def test_a_frame_survives_the_wire(payload: Any, ref: int | None) -> None:
    frame = Frame("client", "event", payload, ref)
    assert parse_frame_untrusted(frame.encode()) == frame


def test_every_proper_prefix_of_a_frame_is_truncated() -> None:
    text = Frame("gateway", "init", {"a": [1, "two", None, True, {"ä": 1.5}]}, 7).encode()
    for end in range(len(text)):
        with pytest.raises(Truncated):
            parse_frame_untrusted(text[:end])


@pytest.mark.parametrize(
    "text",
    [
        "[]", "1", "null", '{"topic":"c"}', '{"event":"e"}', '{"topic":1,"event":"e"}', "{]",
        '{"topic":"c","event":"e"}}',
        '{"topic":"c","event":"e","ref":"0"}', '{"topic":"c","event":"e","ref":true}', "[" * 100_000 + "]",
        '{"topic":"c","event":"e","payload":' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_what_is_no_frame_is_dropped(text: str) -> None:
    try:
        assert parse_frame_untrusted(text) is None
    except Truncated:
        assert text.startswith("[[")


def test_unknown_members_and_a_missing_ref_are_fine() -> None:
    assert parse_frame_untrusted('{"topic":"c","event":"e","join_ref":"1"}') == Frame("c", "e", None, None)


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("ws://portal:8081", ("portal", 8081, False)),
        ("wss://api.firezone.dev", ("api.firezone.dev", 443, True)),
        ("ws://portal", ("portal", 443, False)),
        ("ws://portal:80", ("portal", 443, False)),
        ("http://portal:80/", ("portal", 443, False)),
        ("ws://portal:443", ("portal", 443, False)),
        ("https://portal:8443", ("portal", 8443, True)),
        ("ws://[::1]:8081", ("::1", 8081, False)),
    ],
)
def test_the_port_is_443_unless_explicit(url: str, endpoint: tuple[str, int, bool]) -> None:
    assert login(url).endpoint() == endpoint


@pytest.mark.parametrize(
    ("role", "base", "wanted"),
    [
        ("client", "wss://a.b", "wss://a.b/client/v2/websocket"),
        ("gateway", "https://a.b/", "wss://a.b/gateway/v2/websocket"),
        ("relay", "http://a.b:1/x/?q=1", "ws://a.b:1/x/relay/websocket"),
    ],
)
def test_the_path_follows_the_role_and_keeps_a_prefix(role: str, base: str, wanted: str) -> None:
    assert login(base, role).url() == wanted


def test_parameters_are_form_encoded_and_the_key_comes_last() -> None:
    key = "+/" * 21 + "A="
    url = login("wss://a.b", external_id="x y", name="ü").url(key)
    query = urlsplit(url).query
    assert query.startswith("external_id=x+y&name=%C3%BC&public_key=%2B%2F")
    assert parse_qs(query)["public_key"] == [key]


def test_other_schemes_are_a_configuration_error() -> None:
    with pytest.raises(BadUrl, match="ftp"):
        login("ftp://a.b").url()


def test_the_token_travels_in_a_header_without_whitespace_and_is_not_shown() -> None:
    made = login("wss://a.b", token=" .se\tcret \n")
    assert ("X-Authorization", "Bearer .secret") in made.headers()
    assert "cret" not in repr(made)


@pytest.mark.parametrize(
    "spelling",
    ["0f8fad5b-d9cb-469f-a165-70867728950e", "0F8FAD5BD9CB469FA16570867728950E",
     "{0f8fad5b-d9cb-469f-a165-70867728950e}", "urn:uuid:0f8fad5b-d9cb-469f-a165-70867728950e"],
)  # fmt: skip
def test_a_uuid_is_hashed(spelling: str) -> None:
    assert external_id(spelling) == hashlib.sha256(spelling.encode()).hexdigest()


@pytest.mark.parametrize("other", ["my-gateway", "ab" * 32, "0f8fad5b-d9cb-469f-a165-70867728950", "1_2" * 10 + "34"])
def test_any_other_id_is_passed_on(other: str) -> None:
    assert external_id(other) == other


def test_the_user_agent_is_ascii_without_spaces_in_the_system() -> None:
    assert user_agent("Debian GNU", "12 ü", "gateway", "1.6.0", "x86_64", "6.1") == (
        "DebianGNU/12 gateway/1.6.0 (x86_64; 6.1)"
    )


def test_the_first_strategy_waits_a_second_fifteen_times() -> None:
    backoff = Backoff.initial()
    assert [backoff.next_delay() for _ in range(16)] == [1.0] * 15 + [None]


def test_the_later_strategy_grows_to_a_minute_and_doubles_at_most() -> None:
    low, high = Backoff.reconnect(None, lambda: 0.0), Backoff.reconnect(None, lambda: 1.0)
    assert [low.next_delay() for _ in range(4)] == [0.5, 0.75, 1.125, 1.6875]
    assert [high.next_delay() for _ in range(40)][-1] == 120.0


def test_the_budget_counts_delays_handed_out() -> None:
    backoff = Backoff.reconnect(2.0, lambda: 0.0)
    assert [backoff.next_delay() for _ in range(3)] == [0.5, 0.75, None]
