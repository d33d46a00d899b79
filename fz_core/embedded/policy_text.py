"""Small texts of the policy file: addresses and filters. ValueError says what to write instead."""

from __future__ import annotations

import re
from ipaddress import ip_network

from fz_core.portal.types import Filter, Network

RESERVED = (ip_network("100.64.0.0/10"), ip_network("fd00:2021:1111::/48"))
KINDS: dict[str, tuple[str, ...]] = {
    "dns": ("site", "address", "filters", "ip_stack"),
    "cidr": ("site", "address", "filters"),
    "ip": ("site", "address", "filters"),
    "internet": ("site",),
    "static_device_pool": ("devices", "filters"),
    "dynamic_device_pool": ("address",),
}
PLAIN_LABEL = re.compile(r"[a-z0-9_-]{1,63}", re.IGNORECASE)
LABEL = re.compile(r"[a-z0-9_*?-]{1,63}", re.IGNORECASE)
FILTER = re.compile(r"(tcp|udp)(?:/(\d{1,5})(?:-(\d{1,5}))?)?")


def read_address(kind: str, text: str | None) -> str | Network:
    """A name pattern, or a network without host bits and outside the reserved ranges."""
    if not text:
        raise ValueError("the address is missing")
    if kind == "dynamic_device_pool":
        star, *suffix = text.split(".")
        if star != "*" or not suffix or not all(PLAIN_LABEL.fullmatch(label) for label in suffix):
            raise ValueError(f"address {text!r} does not say where device names go, write for example *.devices.corp")
        return text
    if kind == "dns":
        for label in text.split("."):
            if not LABEL.fullmatch(label):
                raise ValueError(f"address {text!r} is no name, write for example app.example.com or *.example.com")
            if "**" in label and label != "**":
                raise ValueError(f"address {text!r} mixes ** with other characters, ** stands for whole labels")
        return text
    try:
        network = ip_network(text)
    except ValueError as error:
        raise ValueError(f"address {text!r} is no network: {error}") from None
    if kind == "ip" and network.num_addresses != 1:
        raise ValueError(f"address {text!r} is a network, use type cidr")
    if any(network.version == r.version and network.overlaps(r) for r in RESERVED):
        raise ValueError(f"address {text} overlaps the range reserved for tunnels, {', '.join(map(str, RESERVED))}")
    return network


def read_filter(text: str) -> Filter:
    """`icmp`, `tcp`, `udp/53` or `tcp/8000-8999`."""
    if text == "icmp":
        return Filter("icmp")
    match = FILTER.fullmatch(text)
    if not match:
        raise ValueError(f"filter {text!r} is unknown, write icmp, tcp, udp/53 or tcp/8000-8999")
    start = int(match[2]) if match[2] else 0
    end = int(match[3] or match[2] or 65535)
    if not start <= end <= 65535:
        raise ValueError(f"filter {text!r} has no valid ports, they run from 0 to 65535")
    return Filter(match[1], start, end)
