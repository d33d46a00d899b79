"""RFC 1071 sums and RFC 1624 updates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packet_strategies import words_sum

from fz_core.packet import checksum, ones_complement_sum, update_checksum

words = st.integers(0, 0xFFFF)


def test_rfc_1071_example() -> None:
    assert ones_complement_sum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2


@pytest.mark.shows("tunnel", 2)
def test_rfc_1624_example_is_stored_as_all_ones() -> None:
    assert update_checksum(0xDD2F, 0x5555, 0x3285) == 0xFFFF


@pytest.mark.shows("tunnel", 2)
def test_replacing_zero_by_zero_keeps_all_ones() -> None:
    assert update_checksum(0xFFFF, 0, 0) == 0xFFFF


@pytest.mark.shows("tunnel", 2)
@given(st.integers(1, 0xFFFF), words)
def test_replacing_a_word_by_itself_changes_nothing(current: int, word: int) -> None:
    assert update_checksum(current, word, word) == current


@given(st.binary(max_size=300), words)
def test_sum_equals_the_word_by_word_sum(data: bytes, initial: int) -> None:
    expected = words_sum(initial.to_bytes(2, "big") + data)
    assert ones_complement_sum(data, initial) == expected
    assert checksum(data, initial) == ~expected & 0xFFFF


@given(st.binary(min_size=2, max_size=40), words)
def test_update_equals_recomputing(data: bytes, new: int) -> None:
    old = int.from_bytes(data[:2], "big")
    updated = update_checksum(checksum(data), old, new)
    assert updated == (checksum(new.to_bytes(2, "big") + data[2:]) or 0xFFFF)
