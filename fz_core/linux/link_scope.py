"""The host's directly attached networks, copied to a table that beats the internet resource.

Without the copy a default route into the tunnel would hide printers and file servers of the LAN.
Deviations from the reference, pinned by tests/netns/test_linux_netlink.py: IPv6 networks are copied as well,
and a copy whose original is gone is removed. Source: spec/io.md 7.
"""

from __future__ import annotations

import errno
import socket
from typing import Any, NamedTuple

from fz_core.linux.iproute import NetlinkError

LINK_SCOPE_TABLE = 0x2021FD01
TABLE_MAIN, SCOPE_UNIVERSE, SCOPE_LINK, UNICAST = 254, 0, 253, 1


class AttachedNetwork(NamedTuple):
    """A network reached without a gateway."""

    family: int
    destination: str
    output: int
    source: str | None


def copy_link_scope_routes(ip: Any, own_index: int) -> list[str]:
    """Make our table hold exactly the networks attached to interfaces that are up. What was refused."""
    up = {link["index"] for link in ip.get_links() if link.get_attr("IFLA_OPERSTATE") == "UP"} - {own_index}
    refused = []
    for family in (socket.AF_INET, socket.AF_INET6):
        wanted = {n for n in _networks(ip, family, TABLE_MAIN) if n.output in up}
        present = _networks(ip, family, LINK_SCOPE_TABLE)
        for command, networks in (("del", present - wanted), ("add", wanted - present)):
            for network in networks:
                try:
                    _change(ip, command, network)
                except NetlinkError as error:
                    if error.code not in (errno.EEXIST, errno.ESRCH, errno.ENOENT, errno.EOPNOTSUPP):
                        refused.append(f"route {network.destination} was refused ({command}): {error}")
    return refused


def _networks(ip: Any, family: int, table: int) -> set[AttachedNetwork]:
    """Unicast routes without a gateway, except host-internal and fe80::/10 ones."""
    return {
        AttachedNetwork(
            family,
            f"{route.get_attr('RTA_DST')}/{route['dst_len']}",
            route.get_attr("RTA_OIF"),
            route.get_attr("RTA_PREFSRC"),
        )
        for route in ip.get_routes(family=family, table=table)
        if route["type"] == UNICAST
        and route["family"] == family  # a kernel without IPv6 answers with IPv4 routes
        and route.get_attr("RTA_DST") is not None
        and route.get_attr("RTA_OIF") is not None
        and route.get_attr("RTA_GATEWAY") is None
        and route.get_attr("RTA_VIA") is None
        and not route.get_attr("RTA_DST").startswith("fe80:")
        # IPv6 knows no link scope
        and (family == socket.AF_INET6 or route["scope"] == SCOPE_LINK)
    }


def _change(ip: Any, command: str, network: AttachedNetwork) -> None:
    source = {} if network.source is None else {"prefsrc": network.source}
    ip.route(
        command,
        family=network.family,
        dst=network.destination,
        oif=network.output,
        table=LINK_SCOPE_TABLE,
        scope=SCOPE_LINK if network.family == socket.AF_INET else SCOPE_UNIVERSE,
        **source,
    )
