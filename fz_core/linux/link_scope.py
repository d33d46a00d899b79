"""The host's directly attached networks, copied to a table that beats the internet resource.

Without the copy a default route into the tunnel would hide printers and file servers of the LAN.
Deviations from the reference, pinned by tests/netns/test_linux_netlink.py: IPv6 networks are copied as well,
and a copy whose original is gone is removed. Source: spec/io.md 7.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Iterator
from typing import NamedTuple

from fz_core.linux.rtnetlink import (
    CREATE,
    DELROUTE,
    EXCLUSIVE,
    GETLINK,
    GETROUTE,
    LINK,
    NEWROUTE,
    PROTO_STATIC,
    ROUTE,
    RTA_DST,
    RTA_OIF,
    RTA_TABLE,
    UNICAST,
    NetlinkError,
    RouteSocket,
    attribute,
    attributes,
    number,
)

LINK_SCOPE_TABLE = 0x2021FD01
DEBOUNCE = 0.5  # seconds to wait after the last change
TABLE_MAIN, SCOPE_UNIVERSE, SCOPE_LINK = 254, 0, 253
IFLA_OPERSTATE, OPERATIONAL = 16, b"\6"
RTA_GATEWAY, RTA_PREFSRC, RTA_VIA = 5, 7, 18
LINK_LOCAL = b"\xfe\x80"
# routes, links and addresses of both families
GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400


class AttachedNetwork(NamedTuple):
    """A network reached without a gateway."""

    family: int
    destination: bytes
    length: int
    output: int
    source: bytes | None

    def __str__(self) -> str:
        return f"{socket.inet_ntop(self.family, self.destination)}/{self.length}"


class NetworkMonitor:
    """Readable when routes, links or addresses change: then `drain`, wait `DEBOUNCE`, and copy anew."""

    def __init__(self) -> None:
        flags = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | flags, socket.NETLINK_ROUTE)
        try:
            self._sock.bind((0, GROUPS))
        except BaseException:
            self._sock.close()
            raise

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._sock.fileno()

    def drain(self) -> bool:
        """Forget what has come; whether there was anything."""
        changed = False
        while True:
            try:
                changed = bool(self._sock.recv(65_536)) or changed
            except BlockingIOError:
                return changed
            except OSError as error:  # ENOBUFS: more came than fits, so something changed
                if error.errno != errno.ENOBUFS:
                    raise
                changed = True

    def close(self) -> None:
        """Stop listening; harmless when repeated."""
        self._sock.close()


def copy_link_scope_routes(kernel: RouteSocket, own_index: int) -> list[str]:
    """Make our table hold exactly the networks attached to interfaces that are up. What was refused."""
    up = set(_operational(kernel)) - {own_index}
    refused = []
    for family in (socket.AF_INET, socket.AF_INET6):
        wanted = {n for n in _networks(kernel, family, TABLE_MAIN) if n.output in up}
        present = set(_networks(kernel, family, LINK_SCOPE_TABLE))
        for command, networks in (("del", present - wanted), ("add", wanted - present)):
            for network in networks:
                try:
                    _change(kernel, command, network)
                except NetlinkError as error:
                    if error.errno not in (errno.EEXIST, errno.ESRCH, errno.ENOENT, errno.EOPNOTSUPP):
                        refused.append(f"route {network} was refused ({command}): {error}")
    return refused


def table_routes(kernel: RouteSocket, family: int, table: int) -> Iterator[bytes]:
    """The routes of a table, as the kernel describes them; none if there is no such table or family."""
    try:
        routes = kernel.dump(GETROUTE, ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0) + number(RTA_TABLE, table))
    except NetlinkError as error:
        if error.errno not in (errno.ENOENT, errno.ESRCH, errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
            raise
        return
    for route in routes:  # all tables before Linux 4.20, and those of IPv4 where IPv6 is missing
        named = attributes(route, ROUTE.size).get(RTA_TABLE)
        if route[0] == family and (named is None or int.from_bytes(named, sys.byteorder) == table):
            yield route


def _operational(kernel: RouteSocket) -> Iterator[int]:
    """Indexes of the interfaces that are up and have a carrier."""
    for link in kernel.dump(GETLINK, LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        if attributes(link, LINK.size).get(IFLA_OPERSTATE) == OPERATIONAL:
            yield LINK.unpack_from(link)[2]


def _networks(kernel: RouteSocket, family: int, table: int) -> Iterator[AttachedNetwork]:
    """Unicast routes without a gateway, except host-internal and fe80::/16 ones."""
    for route in table_routes(kernel, family, table):
        _, length, _, _, _, _, scope, kind, _ = ROUTE.unpack_from(route)
        found = attributes(route, ROUTE.size)
        destination, output = found.get(RTA_DST), found.get(RTA_OIF)
        if kind != UNICAST or destination is None or output is None or RTA_GATEWAY in found or RTA_VIA in found:
            continue
        if scope != SCOPE_LINK if family == socket.AF_INET else destination.startswith(LINK_LOCAL):
            continue  # IPv6 knows no link scope
        yield AttachedNetwork(
            family, destination, length, int.from_bytes(output, sys.byteorder), found.get(RTA_PREFSRC)
        )


def _change(kernel: RouteSocket, command: str, network: AttachedNetwork) -> None:
    scope = SCOPE_LINK if network.family == socket.AF_INET else SCOPE_UNIVERSE
    body = (
        ROUTE.pack(network.family, network.length, 0, 0, 0, PROTO_STATIC, scope, UNICAST, 0)
        + attribute(RTA_DST, network.destination)
        + number(RTA_OIF, network.output)
        + number(RTA_TABLE, LINK_SCOPE_TABLE)
        + (b"" if network.source is None else attribute(RTA_PREFSRC, network.source))
    )
    if command == "add":
        kernel.change(NEWROUTE, body, CREATE | EXCLUSIVE)
    else:
        kernel.change(DELROUTE, body)
