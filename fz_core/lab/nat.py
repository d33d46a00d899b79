"""A router's nftables rules, for each way routers translate addresses. Source: spec/binaries.md 12.1."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from ipaddress import ip_address

OUTSIDE, INSIDE = "internet", "internal"


class Nat(Enum):
    """How a router treats UDP from inside.

    NONE        no translation and no filter: the host has a public address of its own
    CONE        one outside port per inside port, whatever the destination; only known peers may answer
    SYMMETRIC   another random outside port for each destination: hole punching fails
    UDP_BLOCKED like CONE, but UDP only to the allowed addresses (relays)
    """

    NONE = "none"
    CONE = "cone"
    SYMMETRIC = "symmetric"
    UDP_BLOCKED = "udp-blocked"


def ruleset(nat: Nat, udp_allowed: Collection[str], forwards: Mapping[tuple[str, int], Collection[str]]) -> str:
    """nft text. `forwards` maps ("udp" or "tcp", port) to the inside addresses, one per family."""
    return f"""
table inet router {{
  chain input {{
    type filter hook input priority filter; policy drop;
    iif lo accept
    ct state established,related accept
    meta l4proto {{ icmp, ipv6-icmp }} accept
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    {_udp_filter(nat, udp_allowed)}
  }}
  chain prerouting {{
    type nat hook prerouting priority dstnat;
    {_forwarding(forwards)}
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat;
    {_masquerade(nat)}
  }}
}}
"""


def gateway_ruleset(inside: str) -> str:
    """What the installation of a gateway sets up: tunnel addresses leave as its own (spec/io.md 12)."""
    return f"""
table inet gateway_{inside} {{
  chain postrouting {{
    type nat hook postrouting priority srcnat;
    ip saddr 100.64.0.0/10 oifname "{inside}" masquerade
    ip6 saddr fd00:2021:1111::/48 oifname "{inside}" masquerade
  }}
}}
"""


def _masquerade(nat: Nat) -> str:
    if nat is Nat.NONE:
        return ""
    # for both families: the reference's test networks translate IPv6 as well
    return f'oifname "{OUTSIDE}" masquerade{" random" if nat is Nat.SYMMETRIC else ""}'


def _udp_filter(nat: Nat, allowed: Collection[str]) -> str:
    if nat is not Nat.UDP_BLOCKED:
        return ""
    rules = []
    for version, keyword in ((4, "ip"), (6, "ip6")):
        listed = [a for a in allowed if ip_address(a).version == version]
        if listed:
            rules.append(f'oifname "{OUTSIDE}" {keyword} daddr {{ {", ".join(listed)} }} accept')
    rules.append("ct state established,related accept")
    rules.append("meta l4proto udp drop")
    return "\n    ".join(rules)


def _forwarding(forwards: Mapping[tuple[str, int], Collection[str]]) -> str:
    rules = []
    for (protocol, port), addresses in forwards.items():
        for address in addresses:
            keyword = "ip" if ip_address(address).version == 4 else "ip6"
            rules.append(
                f'iifname "{OUTSIDE}" meta nfproto ipv{ip_address(address).version} '
                f"{protocol} dport {port} dnat {keyword} to {address}"
            )
    return "\n    ".join(rules)
