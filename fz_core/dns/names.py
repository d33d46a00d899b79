"""The names of DNS resources, their proxy addresses, and the resources behind them (`spec/tunnel.md` §9.3).

A name is a slot number: slot n has the n-th four addresses of either proxy range, so that no table of
addresses is needed. Not here: queries (`stub.py`), routes (`tunnel/`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import islice
from typing import NamedTuple

from fz_core.dns.patterns import Pattern, fold

IPS_PER_NAME = 4
MAX_NAMES = 65_536
MAX_NAME_LENGTH = 255
MAX_EXAMINED = 1024
MAX_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Match:
    """A resource that matches a name, and the families it supports."""

    resource_id: str
    pattern: Pattern
    has_v4: bool
    has_v6: bool


class DnsRecord(NamedTuple):
    """A name as it survives a session: its (pattern, resource id) pairs and packed addresses, IPv4 first."""

    name: str
    resources: tuple[tuple[str, str], ...]
    ips: tuple[bytes, ...]

    def __repr__(self) -> str:
        return "<DnsRecord (redacted)>"


class NameEntry:
    """A name that has proxy addresses."""

    __slots__ = ("_generation", "_matches", "_table", "name", "recorded", "slot")

    def __init__(self, table: ProxyNames, name: str, slot: int, recorded: tuple[tuple[str, str], ...]) -> None:
        self._table = table
        self._generation = -1
        self._matches: tuple[Match, ...] = ()
        self.name = name
        self.slot = slot
        self.recorded = recorded

    @property
    def v4(self) -> tuple[bytes, ...]:
        """Its IPv4 proxy addresses, ascending."""
        return _slot_v4(self.slot)

    @property
    def v6(self) -> tuple[bytes, ...]:
        """Its IPv6 proxy addresses, ascending."""
        return _slot_v6(self.slot)

    @property
    def matches(self) -> tuple[Match, ...]:
        """The resources recorded for it that exist now, best first."""
        if self._generation != self._table.generation:
            self._generation = self._table.generation
            self._matches = self._table.live(self.recorded)
        return self._matches

    def forget_matches(self) -> None:
        """`recorded` has changed."""
        self._generation = -1

    def __repr__(self) -> str:
        return f"<NameEntry slot {self.slot} (redacted)>"


class ProxyNames:
    """The table. Names are case-insensitive; the table is full of at most `max_names`."""

    def __init__(self, max_names: int = MAX_NAMES) -> None:
        if not 0 < max_names <= SLOTS:
            raise ValueError(f"max_names {max_names} is out of range, use 1 to {SLOTS}")
        self._max_names = max_names
        self._by_name: OrderedDict[str, NameEntry] = OrderedDict()  # the longest not queried first
        self._by_slot: dict[int, NameEntry] = {}
        self._next_slot = 0
        self._resources: dict[str, Match] = {}
        self._literals: dict[str, list[Match]] = {}
        self._wildcards: list[Match] = []
        self._pairs: dict[str, dict[str, tuple[str, str]]] = {}  # recorded pairs by id and pattern, shared by names
        self._remembered: dict[str, tuple[Match, ...]] = {}
        self._changed = False
        self.generation = 0

    # resources

    def add_resource(self, resource_id: str, pattern_text: str, ip_stack: str) -> bool:
        """Add or replace a resource. False where the pattern is invalid: then it matches nothing.

        `ip_stack` is `ipv4_only` or `ipv6_only`; anything else is both.
        """
        self.remove_resource(resource_id)
        self._forget_other_patterns(resource_id, pattern_text)
        pattern = Pattern.parse(pattern_text)
        if pattern is None:
            return False
        match = Match(resource_id, pattern, ip_stack != "ipv6_only", ip_stack != "ipv4_only")
        self._resources[resource_id] = match
        self._same_kind(match).append(match)
        self._advance_generation()
        return True

    def remove_resource(self, resource_id: str) -> None:
        """Remove a resource; names keep their addresses and remember it."""
        match = self._resources.pop(resource_id, None)
        if match is None:
            return
        same_kind = self._same_kind(match)
        same_kind.remove(match)
        if not same_kind and match.pattern.literal is not None:
            del self._literals[match.pattern.literal]
        self._advance_generation()

    def resources_matching(self, name: str) -> tuple[Match, ...]:
        """The resources whose pattern matches, best first: by rank, then the higher id (§9.2)."""
        name = fold(name)
        if len(name) > MAX_NAME_LENGTH:
            return ()
        found = self._remembered.get(name)
        if found is None:
            if len(self._remembered) >= MAX_REMEMBERED:
                self._remembered.clear()
            wild = (match for match in self._wildcards if match.pattern.matches(name))
            found = self._remembered[name] = _best_first((*self._literals.get(name, ()), *wild))
        return found

    # names

    def assign(self, name: str, is_in_use: Callable[[str], bool]) -> NameEntry | None:
        """The entry of a name just queried, with every resource that matches recorded.

        A new name takes four addresses of either family; the name queried longest ago makes room if it must.
        None: no resource matches a new name, or the table is full of names in use.
        """
        name = fold(name)
        matches = self.resources_matching(name)
        entry = self._by_name.get(name)
        if entry is None:
            if not matches or not self._make_room(is_in_use):
                return None
            entry = self._insert(name, self._take_slot())
        else:
            self._by_name.move_to_end(name)
        self._record(entry, matches)
        return entry

    def entry_of(self, ip: bytes) -> NameEntry | None:
        """The name a proxy address belongs to."""
        slot = _slot_of(ip)
        return None if slot is None else self._by_slot.get(slot)

    def entry(self, name: str) -> NameEntry | None:
        """The entry of a name, if it has addresses."""
        return self._by_name.get(fold(name))

    def names(self) -> tuple[NameEntry, ...]:
        """All entries, the one queried longest ago first."""
        return tuple(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    # the table as a whole

    def records(self) -> tuple[DnsRecord, ...]:
        """The whole table, the name queried longest ago first."""
        return tuple(DnsRecord(e.name, e.recorded, (*e.v4, *e.v6)) for e in self._by_name.values())

    def restore(self, records: Iterable[DnsRecord]) -> None:
        """Take over the table of an earlier session. What `records()` cannot have made is passed over."""
        for record in list(records)[-self._max_names :]:
            name = fold(record.name)
            slot = _slot_of_ips(record.ips)
            room = len(self._by_name) < self._max_names
            if slot is None or slot in self._by_slot or name in self._by_name or not room:
                continue
            entry = self._insert(name, slot)
            entry.recorded = tuple(self._pair(pattern, resource_id) for pattern, resource_id in record.resources)
            self._next_slot = max(self._next_slot, slot + 1)
        for match in self._resources.values():
            self._forget_other_patterns(match.resource_id, match.pattern.text)
        self._advance_generation()

    def take_changed(self) -> bool:
        """Whether `records()` differs from when this was last asked."""
        changed, self._changed = self._changed, False
        return changed

    def live(self, recorded: tuple[tuple[str, str], ...]) -> tuple[Match, ...]:
        """Of recorded (pattern, resource id) pairs those that exist now, best first."""
        found = (self._resources.get(resource_id) for _, resource_id in recorded)
        texts = (pattern for pattern, _ in recorded)
        return _best_first(m for m, text in zip(found, texts, strict=True) if m is not None and m.pattern.text == text)

    # inside

    def _record(self, entry: NameEntry, matches: tuple[Match, ...]) -> None:
        if entry.matches == matches:
            return
        pairs = (self._pair(match.pattern.text, match.resource_id) for match in matches)
        entry.recorded += tuple(pair for pair in pairs if pair not in entry.recorded)
        entry.forget_matches()
        self._changed = True

    def _forget_other_patterns(self, resource_id: str, pattern_text: str) -> None:
        """What was recorded under this id with another pattern is stale."""
        pairs = self._pairs.get(resource_id, {})
        stale = {pair for pattern, pair in pairs.items() if pattern != pattern_text}
        if not stale:
            return
        for entry in self._by_name.values():
            if not stale.isdisjoint(entry.recorded):
                entry.recorded = tuple(pair for pair in entry.recorded if pair not in stale)
                self._changed = True
        for pattern, _ in stale:
            del pairs[pattern]
        self._advance_generation()

    def _pair(self, pattern_text: str, resource_id: str) -> tuple[str, str]:
        return self._pairs.setdefault(resource_id, {}).setdefault(pattern_text, (pattern_text, resource_id))

    def _same_kind(self, match: Match) -> list[Match]:
        literal = match.pattern.literal
        return self._wildcards if literal is None else self._literals.setdefault(literal, [])

    def _advance_generation(self) -> None:
        self.generation += 1
        self._remembered.clear()

    def _make_room(self, is_in_use: Callable[[str], bool]) -> bool:
        """Let the oldest unused name go. Names in use that are found on the way count as just queried."""
        if len(self._by_name) < self._max_names:
            return True
        for name in list(islice(self._by_name, MAX_EXAMINED)):
            if not is_in_use(name):
                del self._by_slot[self._by_name.pop(name).slot]
                return True
            self._by_name.move_to_end(name)
        return False

    def _take_slot(self) -> int:
        """The next free slot in turn. There are more slots than names, so one is free."""
        slot = self._next_slot % SLOTS
        while slot in self._by_slot:
            slot = (slot + 1) % SLOTS
        self._next_slot = slot + 1
        return slot

    def _insert(self, name: str, slot: int) -> NameEntry:
        entry = self._by_name[name] = self._by_slot[slot] = NameEntry(self, name, slot, ())
        return entry


def _best_first(matches: Iterable[Match]) -> tuple[Match, ...]:
    return tuple(sorted(matches, key=lambda match: (match.pattern.rank, match.resource_id), reverse=True))


# Addresses: hosts 1 to 2^21 - 2 of the IPv4 range without the block of the sentinels; hosts 0 to 2^21 - 1 of the
# IPv6 range (§1). A slot never spans the sentinel block by address order: it takes what comes after it.

V4_BASE = int(ip_address("100.96.0.0"))
V6_BASE = int(ip_address("fd00:2021:1111:8000::"))
RANGE_SIZE = 1 << 21
SENTINEL_BLOCK = int(ip_address("100.100.111.0")) - V4_BASE
SENTINEL_BLOCK_SIZE = 256
SLOTS = (RANGE_SIZE - 2 - SENTINEL_BLOCK_SIZE) // IPS_PER_NAME


def _slot_v4(slot: int) -> tuple[bytes, ...]:
    first = 1 + slot * IPS_PER_NAME
    hosts = (n if n < SENTINEL_BLOCK else n + SENTINEL_BLOCK_SIZE for n in range(first, first + IPS_PER_NAME))
    return tuple([(V4_BASE + host).to_bytes(4, "big") for host in hosts])


def _slot_v6(slot: int) -> tuple[bytes, ...]:
    first = V6_BASE + slot * IPS_PER_NAME
    return tuple([n.to_bytes(16, "big") for n in range(first, first + IPS_PER_NAME)])


def _slot_of(ip: bytes) -> int | None:
    host = int.from_bytes(ip, "big") - (V4_BASE if len(ip) == 4 else V6_BASE)
    if not 0 <= host < RANGE_SIZE:
        return None
    if len(ip) == 4:
        if SENTINEL_BLOCK <= host < SENTINEL_BLOCK + SENTINEL_BLOCK_SIZE:
            return None
        host -= 1 if host < SENTINEL_BLOCK else 1 + SENTINEL_BLOCK_SIZE
    slot = host // IPS_PER_NAME
    return slot if 0 <= slot < SLOTS else None


def _slot_of_ips(ips: tuple[bytes, ...]) -> int | None:
    slot = _slot_of(ips[0]) if ips else None
    return slot if slot is not None and ips == (*_slot_v4(slot), *_slot_v6(slot)) else None
