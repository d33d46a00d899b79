"""Batching outgoing datagrams (spec/io.md 3.4)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fz_core.fastpath import GsoQueue
from fz_core.packet import Address, Transmit

A = Address(bytes([192, 0, 2, 1]), 1000)
B = Address(bytes([192, 0, 2, 2]), 1000)
A6 = Address(bytes(15) + b"\1", 1000)
LOCAL = Address(bytes([10, 0, 0, 1]), 1)
OTHER_LOCAL = Address(bytes([10, 0, 0, 2]), 1)

Batch = tuple[bytes, int, Address, Address | None, int]


def drain(queue: GsoQueue) -> list[Batch]:
    return [(bytes(buffer), size, remote, local, ecn) for buffer, size, remote, local, ecn in queue.drain()]


def lengths(queue: GsoQueue) -> list[int]:
    return [len(batch[0]) for batch in drain(queue)]


@pytest.mark.shows("io", 15)
def test_equal_segments_and_a_short_last_one_share_a_batch() -> None:
    queue = GsoQueue()
    for payload in (b"aaaaaa", b"bbbbbb", b"cccccc", b"ddd", b"eeeeee"):
        assert queue.append(payload, A)
    assert drain(queue) == [(b"aaaaaabbbbbbccccccddd", 6, A, None, 0), (b"eeeeee", 6, A, None, 0)]
    assert len(queue) == 0


@pytest.mark.shows("io", 15)
def test_a_longer_datagram_starts_a_batch() -> None:
    queue = GsoQueue()
    for size in (4, 6, 3, 2):
        queue.append(bytes(size), A)
    assert lengths(queue) == [4, 9, 2]


@pytest.mark.shows("io", 15)
def test_peers_interleave_without_losing_their_order() -> None:
    queue = GsoQueue()
    for number in range(6):
        queue.append(b"A%d" % number, A)
        queue.append(b"B%d" % number, B)
    assert [(batch[0], batch[2]) for batch in drain(queue)] == [(b"A0A1A2A3A4A5", A), (b"B0B1B2B3B4B5", B)]


def test_an_older_batch_is_never_extended() -> None:
    queue = GsoQueue()
    queue.append(b"aaaa", A)
    queue.append(b"bbbbbb", A)
    queue.append(b"cccc", A)
    queue.append(b"dddd", A)
    assert [batch[0] for batch in drain(queue)] == [b"aaaa", b"bbbbbbcccc", b"dddd"]


@pytest.mark.parametrize(
    ("remote", "size", "most"),
    [
        (A, 1316, 49),
        (A6, 1316, 49),
        (A, 100, 64),
        (A, 1023, 63),
        (A6, 1023, 64),
        (A, 65467, 1),
        (A6, 65487, 1),
    ],
)
@pytest.mark.shows("io", 16)
def test_segments_per_batch(remote: Address, size: int, most: int) -> None:
    queue = GsoQueue()
    for _ in range(most + 1):
        queue.append(bytes(size), remote)
    assert lengths(queue) == [size * most, size]


@pytest.mark.parametrize(("remote", "most"), [(A, 65467), (A6, 65487)])
def test_size_limits_of_one_datagram(remote: Address, most: int) -> None:
    queue = GsoQueue()
    for size in (0, most + 1):
        with pytest.raises(ValueError, match=f"datagram of {size} bytes"):
            queue.append(bytes(size), remote)


def test_source_and_ecn_are_part_of_the_key_but_the_source_port_is_not() -> None:
    queue = GsoQueue()
    queue.append(b"a", A, LOCAL, 0)
    queue.append(b"b", A, Address(LOCAL.ip, 7), 0)
    queue.append(b"c", A, OTHER_LOCAL, 0)
    queue.append(b"d", A, None, 0)
    queue.append(b"e", A, LOCAL, 2)
    queue.append(b"f", A, LOCAL, 0)
    assert drain(queue) == [
        (b"abf", 1, A, LOCAL, 0),
        (b"c", 1, A, OTHER_LOCAL, 0),
        (b"d", 1, A, None, 0),
        (b"e", 1, A, LOCAL, 2),
    ]


def test_equal_but_distinct_addresses_meet() -> None:
    queue = GsoQueue()
    for _ in range(3):
        queue.append(b"x", Address(bytes([192, 0, 2, 1]), int("1000")))
    assert lengths(queue) == [3]


def test_the_queue_is_bounded_and_counts_what_it_drops() -> None:
    queue = GsoQueue(max_batches=2)
    assert queue.append(b"a", A)
    assert queue.append(b"b", B)
    assert not queue.append(b"c", A6)
    assert queue.append(b"d", A)
    assert not queue.append(b"ee", A)
    assert queue.dropped == 2
    assert [batch[0] for batch in drain(queue)] == [b"ad", b"b"]
    assert queue.append(b"c", A6)


@pytest.mark.shows("io", 5)
def test_an_interrupted_drain_loses_nothing() -> None:
    queue = GsoQueue()
    for remote in (A, B, A6):
        queue.append(b"abc", remote)
    for _, _, remote, _, _ in queue.drain():
        if remote is B:
            break
    queue.append(b"def", B)
    assert [(batch[0], batch[2]) for batch in drain(queue)] == [(b"abc", B), (b"abc", A6), (b"def", B)]


@pytest.mark.shows("io", 5)
def test_partial_progress_is_not_repeated() -> None:
    queue = GsoQueue()
    for number in range(4):
        queue.append(b"%d" % number * 3, A)
    for _ in queue.drain():
        queue.consume(6)
        break
    assert drain(queue) == [(b"222333", 3, A, None, 0)]
    queue.append(b"abc", A)
    queue.consume(3)
    assert drain(queue) == []
    with pytest.raises(ValueError, match="no batch"):
        queue.consume(1)
    queue.append(b"abc", A)
    with pytest.raises(ValueError, match="consume 4 of 3"):
        queue.consume(4)


def test_what_a_sender_looks_at_does_not_change() -> None:
    queue = GsoQueue()
    queue.append(b"abc", A)
    buffer, *_ = next(iter(queue.drain()))
    view = memoryview(buffer)
    queue.append(b"def", A)
    assert bytes(view) == b"abc"
    assert view.readonly
    queue.clear()
    for _ in range(100):
        queue.append(b"zzz", A)
    assert bytes(view) == b"abc"


def test_clear_forgets_everything_even_while_draining() -> None:
    queue = GsoQueue()
    queue.append(b"abc", A)
    queue.append(b"abc", B)
    for _ in queue.drain():
        queue.clear()
        queue.append(b"new", A)
        break
    assert [batch[0] for batch in drain(queue)] == [b"new"]


def test_datagrams_added_while_draining_are_yielded_too() -> None:
    queue = GsoQueue()
    queue.append(b"abc", A)
    seen = []
    for buffer, *_ in queue.drain():
        seen.append(bytes(buffer))
        if len(seen) < 3:
            queue.append(b"more", A)
    assert seen == [b"abc", b"more", b"more"]


def test_transmits_and_other_buffers() -> None:
    queue = GsoQueue()
    queue.append_transmit(Transmit(b"abc", A, LOCAL, 1))
    queue.append(bytearray(b"def"), A, LOCAL, 1)
    queue.append(memoryview(b"xghi")[1:], A, LOCAL, 1)
    assert drain(queue) == [(b"abcdefghi", 3, A, LOCAL, 1)]


@given(st.lists(st.tuples(st.sampled_from([A, B, A6]), st.integers(1, 1316)), max_size=150))
def test_every_datagram_leaves_once_in_order_per_destination(sends: list[tuple[Address, int]]) -> None:
    queue = GsoQueue(max_batches=1000)
    sent: dict[Address, list[bytes]] = {A: [], B: [], A6: []}
    for number, (remote, size) in enumerate(sends):
        payload = bytes([number]) * size
        sent[remote].append(payload)
        queue.append(payload, remote)
    got: dict[Address, list[bytes]] = {A: [], B: [], A6: []}
    for data, size, remote, _, _ in drain(queue):
        segments = [data[at : at + size] for at in range(0, len(data), size)]
        assert len(segments) <= 64
        assert len(data) <= 65535 - (68 if len(remote.ip) == 4 else 48)
        got[remote] += segments
    assert got == sent
