"""Patterns of DNS resources: which names they match, and which is more specific (`spec/tunnel.md` §9.1, §9.2).

A pattern becomes a finite automaton whose states are the bits of one integer (the "shift-and" of Baeza-Yates and
Gonnet, with loops for the wildcards): each character of a name costs a few integer operations, whatever the
pattern. Pattern and name are read as if every label ended in a dot, the last one too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from string import ascii_lowercase, ascii_uppercase

MAX_PATTERN_LENGTH = 512
MAX_NAME_LENGTH = 1024  # 255 octets, each perhaps written as an escape


@dataclass(frozen=True, slots=True)
class Pattern:
    """A valid pattern. `text` is as configured; the higher of two ranks is the more specific."""

    text: str
    rank: tuple[int, ...] = field(repr=False)
    literal: str | None = field(repr=False, compare=False)
    _suffix: str = field(repr=False, compare=False)
    _automaton: _Automaton = field(repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        """The pattern, or None: empty, too long, `**` inside a label, or a `[` that is never closed."""
        if not 0 < len(text) <= MAX_PATTERN_LENGTH:
            return None
        tokens = _tokenise(text)
        if tokens is None:
            return None
        folded = fold(text)
        is_literal = all(isinstance(token, str) for token in tokens)
        return cls(text, _rank(folded), folded if is_literal else None, _literal_end(tokens), _Automaton(tokens))

    def matches(self, name: str) -> bool:
        """Whether a name without trailing dot matches, ignoring ASCII case."""
        name = fold(name)
        if self.literal is not None:
            return name == self.literal
        return name.endswith(self._suffix) and len(name) <= MAX_NAME_LENGTH and self._automaton.accepts(name)


def fold(text: str) -> str:
    """ASCII letters in lower case, everything else as it is."""
    return text.lower() if text.isascii() else text.translate(_FOLDED)


@dataclass(frozen=True, slots=True)
class _OneOf:
    """One character of a set, or with `negated` one outside of it; never a dot."""

    characters: frozenset[str]
    negated: bool = False


class _Star:
    """Any number of characters of one label."""


class _Labels:
    """Any number of whole labels with their dots."""


_Token = str | _OneOf | _Star | _Labels
_STAR, _LABELS, _ANY = _Star(), _Labels(), _OneOf(frozenset(), negated=True)


class _Automaton:
    """State i: the next character belongs to token i. A `_Labels` has a second state, inside a skipped label."""

    __slots__ = ("_advance", "_advance_other", "_advance_over_dot", "_final", "_inside", "_labels", "_stars", "_start")

    def __init__(self, tokens: list[_Token]) -> None:
        self._stars = self._labels = self._advance_over_dot = at = 0
        consuming: list[tuple[int, _OneOf]] = []
        for token in tokens:
            bit = 1 << at
            at += 1
            if token == ".":
                self._advance_over_dot |= bit
            elif isinstance(token, str):
                consuming.append((bit, _OneOf(frozenset(token))))
            elif isinstance(token, _OneOf):
                consuming.append((bit, token))
            elif isinstance(token, _Star):
                self._stars |= bit
            else:
                self._labels |= bit
                at += 1
        self._final = 1 << at
        self._inside = self._labels << 1
        named = {character for _, one_of in consuming for character in one_of.characters}
        self._advance = {c: self._labels | _bits(bit for bit, o in consuming if (c in o.characters) != o.negated)
                         for c in named}  # fmt: skip
        self._advance_other = self._labels | _bits(bit for bit, one_of in consuming if one_of.negated)
        # `*.example.com` also matches `example.com`: then the first two tokens count as read.
        bare_remainder = 0b100 if len(tokens) > 2 and isinstance(tokens[0], _Star) and tokens[1] == "." else 0
        self._start = self._close(0b1 | bare_remainder)

    def accepts(self, name: str) -> bool:
        states = self._start
        for character in name + "." if name else "":
            if character == ".":
                states = (states & self._advance_over_dot) << 1 | (states & self._inside) >> 1
            else:
                advance = self._advance.get(character, self._advance_other)
                states = (states & advance) << 1 | states & (self._stars | self._inside)
            states = self._close(states)
            if not states:
                return False
        return bool(states & self._final)

    def _close(self, states: int) -> int:
        """Add the states reached without a character: wildcards may match nothing."""
        states |= (states & self._labels) << 2
        return states | (states & self._stars) << 1


def _tokenise(text: str) -> list[_Token] | None:
    tokens: list[_Token] = []
    at = 0
    while at < len(text):
        character = text[at]
        at += 1
        if character == "*" and text[at : at + 1] == "*":
            stands_alone = (at == 1 or text[at - 2] == ".") and text[at + 1 : at + 2] in ("", ".")
            if not stands_alone:
                return None
            if not tokens or tokens[-1] is not _LABELS:
                tokens.append(_LABELS)
            at += 2  # the dot, if any, belongs to it
        elif character == "*":
            tokens.append(_STAR)
        elif character == "?":
            tokens.append(_ANY)
        elif character == "[":
            found = _read_class(text, at)
            if found is None:
                return None
            one_of, at = found
            tokens.append(one_of)
        else:
            tokens.append(fold(character))
    if tokens[-1] is not _LABELS:
        tokens.append(".")
    return tokens


def _read_class(text: str, at: int) -> tuple[_OneOf, int] | None:
    """What follows a `[`: `]` counts as a member where it comes first."""
    negated = text[at : at + 1] == "!"
    at += negated
    end = text.find("]", at + 1)
    if end < 0:
        return None
    characters: set[str] = set()
    while at < end:
        if at + 2 < end and text[at + 1] == "-":
            last = min(ord(text[at + 2]), 0x7F)
            characters.update(fold(chr(code)) for code in range(ord(text[at]), last + 1))
            at += 3
        else:
            characters.add(fold(text[at]))
            at += 1
    return _OneOf(frozenset(characters), negated), end + 1


def _literal_end(tokens: list[_Token]) -> str:
    """What every matching name ends in. A dot in front may stand for no label at all, so it is left out."""
    end = ""
    for token in reversed(tokens[:-1] if tokens[-1] == "." else tokens):
        if not isinstance(token, str):
            return end.removeprefix(".")
        end = token + end
    return end


def _rank(text: str) -> tuple[int, ...]:
    """Numbers to compare from the right: `*`, `?`, other characters by code point, the end (§9.2)."""
    return (*(_WILDCARD_RANK.get(character, 2 + ord(character)) for character in reversed(text)), 2 + 0x110000)


def _bits(bits: Iterable[int]) -> int:
    total = 0
    for bit in bits:
        total |= bit
    return total


_FOLDED = str.maketrans(ascii_uppercase, ascii_lowercase)
_WILDCARD_RANK = {"*": 0, "?": 1}
