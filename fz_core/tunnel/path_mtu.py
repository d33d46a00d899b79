"""Paths too narrow for a full packet: which peers they concern, and what becomes of packets that do not fit.

A full inner packet of 1280 bytes needs an underlay of 1340 bytes (IPv4) or 1360 (IPv6), 4 more through our relay.
On a narrower path TCP is made to fit: the MSS of its SYNs is lowered both ways, and segments that are too large all
the same are cut in two. Anything else is dropped and its sender told "packet too big". `docs/path-mtu.md` says why.

Sans-IO: what the kernel knows of a path's MTU is asked for by `take_questions` and told by `set_mtu`. There are no
timers; a question that is due is asked when there is traffic. Source: RFC 1191, RFC 8201, RFC 8900.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from fz_core.packet import (
    Address,
    Packet,
    build_icmp_too_big,
    clamp_mss,
    shorten_error,
    split_tcp,
)
from fz_core.tunnel.ranges import is_multicast

MAX_PACKET = 1280
WIREGUARD, UDP_HEADER = 32, 8
IP_HEADER = {4: 20, 16: 40}
# Only so that sums stay sane: what the kernel says is what it enforces, and it has a floor of its own against forged
# errors (552 for IPv4, net.ipv4.route.min_pmtu; 1280 for IPv6).
LEAST_MTU = {4: 256, 16: 1280}
TCP, SYN = 6, 2
WATCH_TIME = 2.0
WATCH_INTERVAL = 0.005
RECHECK_INTERVAL = 30.0
MAX_QUESTIONS = 16
COMPLAINTS_PER_SECOND = 100
NEVER = float("inf")


class Hop(NamedTuple):
    """Where datagrams of a path go first, from where (None: the kernel chooses), and the bytes a relay adds."""

    remote: Address
    local: Address | None
    extra: int


class PathMtus:
    """The inner limits of all peers.

    `limits` is empty unless a path is narrow, so that this costs one test per packet; it is another object once it has
    changed. `asks_at` is when `take_questions` next has something.
    """

    def __init__(self) -> None:
        self.limits: dict[str, int] = {}
        self.asks_at = NEVER
        self._changes: list[tuple[str, int]] = []
        self._hops: dict[str, Hop] = {}
        self._users: Counter[bytes] = Counter()  # hops by their remote IP
        self._mtus: dict[bytes, int] = {}
        self._watched: dict[Hop, float] = {}
        self._complaints = 0
        self._complaints_until = 0.0

    # paths

    def use_path(self, peer_id: str, hop: Hop, now: float) -> None:
        """A peer is reached another way: find out what fits there."""
        former = self._hops.get(peer_id)
        self._hops[peer_id] = hop
        self._users[hop.remote.ip] += 1
        if former is not None:
            self._leave(former)
        self._refresh((peer_id,))
        self._watch(hop, now)

    def forget(self, peer_id: str) -> None:
        """A peer is gone."""
        hop = self._hops.pop(peer_id, None)
        if hop is not None:
            self._leave(hop)
            if peer_id in self.limits:
                self.limits = {peer: limit for peer, limit in self.limits.items() if peer != peer_id}

    def clear(self) -> None:
        """Another network: nothing that was learnt holds."""
        self._hops.clear()
        self._users.clear()
        self._mtus.clear()
        self._watched.clear()
        self.limits = {}
        self.asks_at = NEVER

    # what the kernel knows

    def doubt(self, remote: Address, now: float) -> None:
        """The kernel refused a datagram as too large for its path."""
        for hop in set(self._hops.values()):
            if hop.remote.ip == remote.ip:
                self._watch(hop, now)

    def take_questions(self, now: float) -> list[Hop]:
        """The ways whose MTU the kernel should be asked for now, at most 16.

        A new path is asked about whenever there is traffic in its first seconds, because a router's answer must be
        known before the first SYN passes; a narrow one every 30 s, because it may have grown.
        """
        if now < self.asks_at:
            return []
        asked = list(islice(self._watched, MAX_QUESTIONS))
        for hop in asked:
            until = self._watched.pop(hop)
            if until > now:
                self._watched[hop] = until  # behind the others
        if not asked:
            asked = [hop for hop in set(self._hops.values()) if hop.remote.ip in self._mtus][:MAX_QUESTIONS]
        self._plan(now)
        return asked

    def set_mtu(self, remote: Address, mtu: int, now: float) -> list[str]:
        """The largest IP packet that passes to `remote` now; the peers whose limit this raised.

        Send them a packet of full size: if a router in between is still narrow, it says so again.
        """
        size = len(remote.ip)
        known = None if mtu >= full_mtu(size) else max(mtu, LEAST_MTU[size])
        if known == self._mtus.get(remote.ip):
            return []
        if known is None:
            del self._mtus[remote.ip]
        else:
            self._mtus[remote.ip] = known
        raised = self._refresh([peer_id for peer_id, hop in self._hops.items() if hop.remote.ip == remote.ip])
        for peer_id in raised:
            self._watch(self._hops[peer_id], now)
        if self.asks_at == NEVER:
            self._plan(now)
        return raised

    def take_changes(self) -> list[tuple[str, int]]:
        """Peers whose limit changed since the last call, and what fits now."""
        changes, self._changes = self._changes, []
        return changes

    # packets

    def clamp(self, peer_id: str, packet: Packet) -> None:
        """Lower the MSS of a SYN that comes from a peer: the answer's segments must fit."""
        limit = self.limits.get(peer_id)
        if limit is not None:
            clamp_mss(packet, limit)

    def fit(self, peer_id: str, packet: Packet) -> Sequence[Packet] | None:
        """What to send to a peer instead of a packet that does not fit; None if it does.

        Empty: nothing can be sent. `complaint` is what to tell the sender.
        """
        limit = self.limits.get(peer_id)
        if limit is None:
            return None
        if packet.tcp_flags & SYN:
            clamp_mss(packet, limit)
        if len(packet) <= limit:
            return None
        if packet.is_icmp_error:
            shortened = shorten_error(packet, limit)
            return () if shortened is None else (shortened,)
        return split_tcp(packet, limit) or ()

    def complaint(self, peer_id: str, packet: Packet, growth: int, now: float) -> Packet | None:
        """A "too big" for the sender of `packet`, which translation made larger by `growth`; None for silence.

        At most 100 a second; never about ICMP errors, multicast and what has no sender. IPv6 hosts may not go below
        1280 and ignore us, but some programs read the error, so only TCP, which got through in pieces, is spared.
        An IPv4 packet without DF gets one too: neither end of a tunnel takes fragments, so we cannot make any.
        """
        limit = self.limits.get(peer_id)
        if limit is None or packet.is_icmp_error or packet.is_fz_control or is_multicast(packet.dst):
            return None
        if not any(packet.src) or (packet.version == 6 and packet.protocol == TCP) or not self._may_complain(now):
            return None
        return build_icmp_too_big(packet, limit - growth)

    def _may_complain(self, now: float) -> bool:
        if now >= self._complaints_until:
            self._complaints, self._complaints_until = 0, now + 1.0
        self._complaints += 1
        return self._complaints <= COMPLAINTS_PER_SECOND

    # inside

    def _watch(self, hop: Hop, now: float) -> None:
        self._watched[hop] = now + WATCH_TIME
        self.asks_at = now

    def _plan(self, now: float) -> None:
        if self._watched:
            self.asks_at = now + WATCH_INTERVAL
        else:
            self.asks_at = now + RECHECK_INTERVAL if self._mtus else NEVER

    def _leave(self, hop: Hop) -> None:
        """A path is not used any more; what is known of it ends with its last user."""
        ip = hop.remote.ip
        self._users[ip] -= 1
        if not self._users[ip]:
            del self._users[ip]
            self._mtus.pop(ip, None)

    def _refresh(self, peers: Iterable[str]) -> list[str]:
        """Derive the limits of these; the peers whose limit rose or fell away."""
        before = {peer_id: self.limits.get(peer_id, MAX_PACKET) for peer_id in peers}
        after = {peer_id: min(self._limit(self._hops[peer_id]), MAX_PACKET) for peer_id in before}
        changed = {peer_id: limit for peer_id, limit in after.items() if limit != before[peer_id]}
        if changed:
            limits = {**self.limits, **changed}
            self.limits = {peer_id: limit for peer_id, limit in limits.items() if limit < MAX_PACKET}
            self._changes += changed.items()
        return [peer_id for peer_id, limit in changed.items() if limit > before[peer_id]]

    def _limit(self, hop: Hop) -> int:
        mtu = self._mtus.get(hop.remote.ip)
        return MAX_PACKET if mtu is None else inner_limit(mtu, hop)


def inner_limit(mtu: int, hop: Hop) -> int:
    """The largest inner packet whose datagram fits an underlay packet of `mtu` bytes."""
    return mtu - IP_HEADER[len(hop.remote.ip)] - UDP_HEADER - hop.extra - WIREGUARD


def full_mtu(address_size: int) -> int:
    """The underlay MTU from which on every inner packet fits, even through a relay."""
    return IP_HEADER[address_size] + UDP_HEADER + 4 + WIREGUARD + MAX_PACKET
