"""Replies of upstream servers, kept for as long as they say (`spec/tunnel.md` §10).

An entry is the reply up to the end of its answer section, as it came: what a compressed name points at always
lies before it. Only TTLs, id and the spelling of the question change. Bounded in entries and bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from fz_core.dns.messages import HEADER, NOERROR, OPCODE_AND_RD, QR, RECORD, TC, Query, is_reply_to
from fz_core.dns.wire import HEADER_BYTES, skip_name_untrusted

MAX_ENTRIES = 4096
MAX_BYTES = 4 * 1024 * 1024
MIN_TTL = 5
RCODE = 0x000F

_Key = tuple[str, int, int, bool]


class _Entry(NamedTuple):
    answers: int
    section: bytes
    ttls: tuple[tuple[int, int], ...]  # offset in the section and seconds
    stored_at: float
    expires_at: float


class ReplyCache:
    """By name, type, class and whether DNSSEC records were asked for. The least recently used makes room."""

    def __init__(self, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def lookup(self, query: Query, now: float) -> bytes | None:
        """The answer records of the reply kept, their TTLs less by the whole seconds since."""
        key = _key(query)
        entry = self._entries.get(key)
        if entry is None or not query.is_lookup:
            return None
        if now >= entry.expires_at:
            self._remove(key)
            return None
        self._entries.move_to_end(key)
        return _build(query, entry, int(now - entry.stored_at))

    def store(self, query: Query, reply: bytes, now: float) -> None:
        """Keep an untrusted reply, if it is one to this query and worth it."""
        found = _read_answers_untrusted(query, reply) if query.is_lookup else None
        if found is None:
            return
        answers, section, ttls, lifetime = found
        key = _key(query)
        self._remove(key)
        self._entries[key] = _Entry(answers, section, ttls, now, now + lifetime)
        self._bytes += len(section)
        while len(self._entries) > self._max_entries or self._bytes > self._max_bytes:
            self._remove(next(iter(self._entries)))

    def flush(self) -> None:
        """Forget everything: servers or resources have changed."""
        self._entries.clear()
        self._bytes = 0

    def _remove(self, key: _Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= len(entry.section)


def _key(query: Query) -> _Key:
    return query.name, query.rdtype, query.rdclass, query.wants_dnssec


def _build(query: Query, entry: _Entry, elapsed: int) -> bytes:
    section = bytearray(entry.section)
    for at, ttl in entry.ttls:
        section[at : at + 4] = max(0, ttl - elapsed).to_bytes(4, "big")
    flags = QR | (query.data[2] << 8 & OPCODE_AND_RD)
    return HEADER.pack(query.id, flags, 1, entry.answers, 0, 0) + query.question + section


def _read_answers_untrusted(query: Query, reply: bytes) -> tuple[int, bytes, tuple[tuple[int, int], ...], int] | None:
    """Count, bytes and TTLs of the answer section, and how long to keep them; None for never.

    No record may outlive its TTL, so the smallest of all counts, not only of those of the type asked for.
    """
    if not is_reply_to(query, reply):
        return None
    _, flags, _, answers, _, _ = HEADER.unpack_from(reply)
    start = at = HEADER_BYTES + len(query.question)
    if flags & (TC | RCODE) != NOERROR or answers == 0 or (len(reply) - start) // MIN_RECORD_BYTES < answers:
        return None
    ttls = []
    has_type = False
    for _ in range(answers):
        end = skip_name_untrusted(reply, at)
        if end is None or end + RECORD.size > len(reply):
            return None
        rdtype, rdclass, ttl, length = RECORD.unpack_from(reply, end)
        at = end + RECORD.size + length
        if at > len(reply):
            return None
        has_type = has_type or (rdtype == query.rdtype and rdclass == query.rdclass)
        ttls.append((end + 4 - start, ttl if ttl < 1 << 31 else 0))  # RFC 2181 §8
    lifetime = min(ttl for _, ttl in ttls)
    return (answers, reply[start:at], tuple(ttls), lifetime) if has_type and lifetime >= MIN_TTL else None


MIN_RECORD_BYTES = 1 + RECORD.size
