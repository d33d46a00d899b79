"""Which names a pattern matches, and which of two patterns is more specific."""

from __future__ import annotations

import re
from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fz_core.dns import Pattern

POSITIVE = [
    ("**.example.com", "example.com"),
    ("**.example.com", "foo.example.com"),
    ("**.example.com", "a.b.example.com"),
    ("app.**.example.com", "app.bar.foo.example.com"),
    ("app.**.example.com", "app.example.com"),
    ("app.**.web.**.example.com", "app.web.example.com"),
    ("app.**.web.**.example.com", "app.x.web.y.z.example.com"),
    ("*.example.com", "foo.example.com"),
    ("*.example.com", "example.com"),
    ("*.example.com", "EXAMPLE.com"),
    ("*.Example.COM", "example.com"),
    ("foo.*.example.com", "foo.bar.example.com"),
    ("app.f??.example.com", "app.foo.example.com"),
    ("*?*.example.com", "app.example.com"),
    ("*", "localhost"),
    ("**", "a.b.c"),
    ("example.com", "Example.Com"),
    ("app.**", "app"),
    ("app.**", "app.x.y"),
    ("**.**.example.com", "example.com"),
    ("**.*.com", "a.b.com"),
    ("[abc].example.com", "b.example.com"),
    ("[a-c]x.example.com", "Cx.example.com"),
    ("[A-C]x.example.com", "cx.example.com"),
    ("[!x].example.com", "y.example.com"),
    ("[]-].example.com", "].example.com"),
    ("[a-].example.com", "-.example.com"),
    ("_ldap._tcp.*.com", "_ldap._tcp.example.com"),
]
NEGATIVE = [
    ("app.*.example.com", "app.foo.bar.example.com"),
    ("app.*.example.com", "app.example.com"),
    ("app.*com", "app.foo.com"),
    ("app?com", "app.com"),
    ("?.example.com", "example.com"),
    ("*.example.com", "a.b.example.com"),
    ("*.example.com", "fooexample.com"),
    ("**.example.com", "fooexample.com"),
    ("example.com", "foo.example.com"),
    ("example.com", "_ldap._tcp.example.com"),
    ("app[.]com", "app.com"),
    ("app[!x]com", "app.com"),
    ("[a-c].example.com", "d.example.com"),
    ("[!x].example.com", "X.example.com"),
    ("*?*.example.com", "example.org"),
    ("**.*.com", "com"),
]
ORDER = [
    "example.com",
    "bar.example.com",
    "*.bar.example.com",
    "foo.example.com",
    "?.example.com",
    "*.example.com",
    "**.example.com",
    "*ample.com",
    "*.com",
]


@pytest.mark.shows("tunnel", 40)
@pytest.mark.parametrize(("pattern", "name"), POSITIVE)
def test_matches(pattern: str, name: str) -> None:
    assert parse(pattern).matches(name)


@pytest.mark.shows("tunnel", 40)
@pytest.mark.parametrize(("pattern", "name"), NEGATIVE)
def test_does_not_match(pattern: str, name: str) -> None:
    assert not parse(pattern).matches(name)


@pytest.mark.parametrize(
    "text", ["***", "**x", "x**", "a.**x.com", "a.x**.com", "***.com", "[a", "a[", "[]", "[!]", ""]
)
def test_invalid(text: str) -> None:
    assert Pattern.parse(text) is None


def test_a_pattern_of_absurd_length_is_invalid() -> None:
    assert Pattern.parse("a" * 512) is not None
    assert Pattern.parse("a" * 513) is None


@pytest.mark.shows("tunnel", 40)
def test_order() -> None:
    ranks = [parse(text).rank for text in ORDER]
    assert all(better > worse for better, worse in pairwise(ranks))
    assert parse("foo.example.com").rank > parse("**.example.com").rank


@given(st.lists(st.text("ab.*?", min_size=1, max_size=6), min_size=2, max_size=4, unique=True))
def test_order_is_by_the_first_difference_from_the_right(texts: list[str]) -> None:
    for a, b in permutations([t for t in texts if Pattern.parse(t)], 2):
        assert (parse(a).rank > parse(b).rank) == is_more_specific(a, b)


@given(st.text("ab.*?", min_size=1, max_size=9), st.text("ab.", min_size=1, max_size=12))
def test_agrees_with_regular_expressions(text: str, name: str) -> None:
    pattern = Pattern.parse(text)
    if pattern is None or ".." in f".{name}." or ".." in f".{text}.":
        return
    assert pattern.matches(name) == (as_regex(text).fullmatch(f"{name}.") is not None)


@pytest.mark.parametrize("text", ["*a*a*a*a*a*a*a*a*a*a*b", "**.a.**.a.**.a.**.a.**.a.**.b", "*?" * 100 + "b"])
def test_no_pattern_is_slow(text: str) -> None:
    """Backtracking would need ages here; the test's own time limit is the assertion."""
    pattern = parse(text)
    for _ in range(100):
        assert not pattern.matches("a" * 250)
        assert not pattern.matches(".".join("a" * 125))


def parse(text: str) -> Pattern:
    pattern = Pattern.parse(text)
    assert pattern is not None
    return pattern


def is_more_specific(a: str, b: str) -> bool:
    """The rules of §9.2 one by one."""
    for x, y in zip(reversed("\0" + a), reversed("\0" + b), strict=False):
        if x != y:
            break
    order = {"*": 0, "?": 1}
    if x in order or y in order:
        return order.get(x, 2) > order.get(y, 2)
    if "\0" in (x, y):
        return x == "\0"
    return x > y


def as_regex(text: str) -> re.Pattern[str]:
    """A slow and simple reading of §9.1, for names with a dot after every label."""
    labels = text.split(".")
    parts = [_label_regex(label) for label in labels]
    if len(labels) > 1 and labels[0] == "*":
        parts[0] += "?"
    return re.compile("".join(parts))


def _label_regex(label: str) -> str:
    if label == "**":
        return r"(?:[^.]+\.)*"
    return "(?:" + label.replace("*", "[^.]*").replace("?", "[^.]") + r"\.)"
