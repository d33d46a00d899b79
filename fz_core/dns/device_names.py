"""Names of dynamic device pools: asked of the portal, remembered for a while (`spec/tunnel.md` §9.4).

Several may wait for one lookup, each with its `token`; a query asked again with the same token waits once.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from enum import Enum
from typing import Final, NamedTuple

from fz_core.dns.messages import AAAA, IN, NOERROR, NXDOMAIN, SERVFAIL, A, Query, build_addresses, build_error
from fz_core.dns.patterns import Pattern, fold

LOOKUP_TIMEOUT = 5.0
REMEMBERED_FOR = 300.0
MAX_REMEMBERED = 4096
MAX_LOOKUPS = 256
MAX_WAITERS = 16


class _Pending(Enum):
    PENDING = "pending"


PENDING: Final = _Pending.PENDING


class _Key(NamedTuple):
    pool_id: str
    name: str


class _Known(NamedTuple):
    v4: tuple[bytes, ...]
    v6: tuple[bytes, ...]
    expires_at: float


class _Lookup:
    __slots__ = ("expires_at", "waiters")

    def __init__(self, expires_at: float) -> None:
        self.expires_at = expires_at
        self.waiters: dict[tuple[Hashable, int], Query] = {}


class DeviceNames:
    """Pools by id, what is known of their names, and the lookups under way."""

    def __init__(self) -> None:
        self._pools: dict[str, Pattern] = {}
        self._known: OrderedDict[_Key, _Known] = OrderedDict()
        self._lookups: dict[_Key, _Lookup] = {}  # the oldest first, so the first to expire
        self._requests: deque[_Key] = deque()
        self._replies: deque[tuple[Hashable, bytes]] = deque()

    def add_pool(self, pool_id: str, pattern_text: str) -> bool:
        """Add a pool or replace its pattern. False where the pattern is invalid: then it matches nothing."""
        pattern = Pattern.parse(pattern_text)
        if pattern is not None and pattern == self._pools.get(pool_id):
            return True
        self.remove_pool(pool_id)
        if pattern is None:
            return False
        self._pools[pool_id] = pattern
        self._pools = dict(sorted(self._pools.items()))
        return True

    def remove_pool(self, pool_id: str) -> None:
        """Forget a pool and its names; those who wait for one get SERVFAIL."""
        self._pools.pop(pool_id, None)
        for key in [key for key in self._lookups if key.pool_id == pool_id]:
            self._fail(key, SERVFAIL)
        for key in [key for key in self._known if key.pool_id == pool_id]:
            del self._known[key]

    def handle_query(self, query: Query, token: Hashable, now: float) -> bytes | _Pending | None:
        """The answer; `PENDING`, and it comes from `poll_reply` with the token; None, no pool matches."""
        pool_id = self._pool_of(query)
        if pool_id is None:
            return None
        if query.rdtype not in (A, AAAA):
            return build_error(query, NOERROR)
        key = _Key(pool_id, query.name)
        known = self._known.get(key)
        if known is not None and now < known.expires_at:
            return _answer(query, known)
        lookup = self._lookups.get(key) or self._start(key, now)
        if lookup is None:
            return build_error(query, SERVFAIL)
        if len(lookup.waiters) >= MAX_WAITERS and (token, query.rdtype) not in lookup.waiters:
            return build_error(query, SERVFAIL)
        lookup.waiters[token, query.rdtype] = query
        return PENDING

    def resolved(self, pool_id: str, domain: str, ipv4: bytes | None, ipv6: bytes | None, now: float) -> None:
        """The portal knows the device. Ignored where nothing waits for it."""
        key = _Key(pool_id, fold(domain))
        lookup = self._lookups.pop(key, None)
        if lookup is None:
            return
        known = _Known((ipv4,) if ipv4 else (), (ipv6,) if ipv6 else (), now + REMEMBERED_FOR)
        self._remember(key, known)
        self._replies.extend((token, _answer(query, known)) for (token, _), query in lookup.waiters.items())

    def failed(self, pool_id: str, domain: str, is_missing: bool, now: float) -> None:
        """The portal cannot tell, or there is no such device. Ignored where nothing waits for it."""
        self._fail(_Key(pool_id, fold(domain)), NXDOMAIN if is_missing else SERVFAIL)

    def poll_request(self) -> tuple[str, str] | None:
        """A resource id and a name to ask the portal for."""
        while self._requests:
            key = self._requests.popleft()
            if key in self._lookups:
                return key.pool_id, key.name
        return None

    def poll_reply(self) -> tuple[Hashable, bytes] | None:
        """A late answer, with the token of its query."""
        return self._replies.popleft() if self._replies else None

    def handle_timeout(self, now: float) -> None:
        """Lookups the portal does not answer end in SERVFAIL."""
        for key in [key for key, lookup in self._lookups.items() if lookup.expires_at <= now]:
            self._fail(key, SERVFAIL)

    def poll_timeout(self) -> float | None:
        """When the oldest lookup ends."""
        return next((lookup.expires_at for lookup in self._lookups.values()), None)

    def _pool_of(self, query: Query) -> str | None:
        if query.rdclass != IN or not query.is_lookup:
            return None
        return next((pool_id for pool_id, pattern in self._pools.items() if pattern.matches(query.name)), None)

    def _start(self, key: _Key, now: float) -> _Lookup | None:
        if len(self._lookups) >= MAX_LOOKUPS:
            return None
        lookup = self._lookups[key] = _Lookup(now + LOOKUP_TIMEOUT)
        self._requests.append(key)
        return lookup

    def _remember(self, key: _Key, known: _Known) -> None:
        self._known.pop(key, None)
        self._known[key] = known
        if len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)

    def _fail(self, key: _Key, rcode: int) -> None:
        lookup = self._lookups.pop(key, None)
        if lookup is not None:
            self._replies.extend((token, build_error(query, rcode)) for (token, _), query in lookup.waiters.items())


def _answer(query: Query, known: _Known) -> bytes:
    return build_addresses(query, known.v4 if query.rdtype == A else known.v6)
