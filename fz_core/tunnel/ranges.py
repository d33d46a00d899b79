"""The address plan: which addresses mean a peer, a proxy or a DNS sentinel (`spec/tunnel.md` §1)."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network

Network = IPv4Network | IPv6Network

PEERS: tuple[Network, ...] = (IPv4Network("100.64.0.0/11"), IPv6Network("fd00:2021:1111::/107"))
PROXIES: tuple[Network, ...] = (IPv4Network("100.96.0.0/11"), IPv6Network("fd00:2021:1111:8000::/107"))
SENTINELS: tuple[Network, ...] = (
    IPv4Network("100.100.111.0/24"),
    IPv6Network("fd00:2021:1111:8000:100:100:111:0/120"),
)
DEFAULT_ROUTES: tuple[Network, ...] = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))

# What an internet resource never reaches (§14).
INTERNET_REJECTED: tuple[Network, ...] = (
    *map(
        IPv4Network,
        (
            "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8",
            "169.254.0.0/16", "100.64.0.0/10", "224.0.0.0/4", "240.0.0.0/4",
        ),
    ),
    *map(IPv6Network, ("::1/128", "::ffff:0:0/96", "fc00::/7", "fe80::/10", "ff00::/8")),
)  # fmt: skip


REMEMBERED_ANSWERS = 4096


class RangeSet:
    """Membership of packed addresses in networks: one set lookup per distinct prefix length, or a remembered answer."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self._by_family: dict[int, dict[int, set[int]]] = {4: {}, 16: {}}
        self._remembered: dict[bytes, bool] = {}
        for network in networks:
            packed = network.network_address.packed
            shift = network.max_prefixlen - network.prefixlen
            prefixes = self._by_family[len(packed)].setdefault(shift, set())
            prefixes.add(int.from_bytes(packed, "big") >> shift)

    def __contains__(self, ip: bytes) -> bool:
        answer = self._remembered.get(ip)
        if answer is None:
            number = int.from_bytes(ip, "big")
            answer = any(number >> shift in prefixes for shift, prefixes in self._by_family[len(ip)].items())
            if len(self._remembered) >= REMEMBERED_ANSWERS:
                self._remembered.clear()
            self._remembered[ip] = answer
        return answer


PEER_RANGE = RangeSet(PEERS)
PROXY_RANGE = RangeSet(PROXIES)
SENTINEL_RANGE = RangeSet(SENTINELS)
INTERNET_REJECTED_RANGE = RangeSet(INTERNET_REJECTED)


def is_multicast(ip: bytes) -> bool:
    """Whether the packed address is IPv4 (224/4) or IPv6 (ff00::/8) multicast."""
    return ip[0] >> 4 == 0xE if len(ip) == 4 else ip[0] == 0xFF
