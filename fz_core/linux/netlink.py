"""Addresses, routes and policy rules of the TUN device (`spec/io.md` §7).

Marked sockets skip the three tables; resource routes beat the LAN, and the LAN beats the internet
resource. Nothing is undone at exit: the routes go with the device, and empty tables do nothing.
"""

from __future__ import annotations

import errno
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from fz_core.linux.errors import HostError
from fz_core.linux.link_scope import LINK_SCOPE_TABLE, copy_link_scope_routes, table_routes
from fz_core.linux.marks import MARK
from fz_core.linux.rtnetlink import (
    ADDRESS,
    CREATE,
    DELADDR,
    DELROUTE,
    EXCLUSIVE,
    GETADDR,
    LINK,
    NEWADDR,
    NEWLINK,
    NEWROUTE,
    NEWRULE,
    PROTO_STATIC,
    ROUTE,
    RTA_DST,
    RTA_OIF,
    RTA_TABLE,
    UNICAST,
    NetlinkError,
    RouteSocket,
    attribute,
    number,
)

Network = IPv4Network | IPv6Network

USER_TABLE, INTERNET_TABLE = 0x2021FD00, 0x2021FD02
RULES = ((USER_TABLE, 100), (LINK_SCOPE_TABLE, 200), (INTERNET_TABLE, 300))
MTU = 1280
IFLA_MTU, IFLA_AF_SPEC, IFLA_INET6_ADDR_GEN_MODE, ADDR_GEN_MODE_NONE = 4, 26, 8, 1
IFF_UP = 1
IFA_ADDRESS, IFA_LOCAL = 1, 2
FRA_PRIORITY, FRA_FWMARK, FRA_TABLE = 6, 10, 15
FIB_RULE_INVERT, TO_TABLE = 2, 1
ANY_SCOPE = 255
IFA_F_NODAD = 2  # an IPv6 address is of use at once: listeners are bound to it next
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
# one dump at a time: the kernel answers a second one with EBUSY
_LOCK = threading.Lock()


class Interface:
    """The host's side of one TUN device.

    Blocks for milliseconds, so a trio program calls it through `trio.to_thread.run_sync`. What the kernel
    refused without harm is put into `warnings`, for the caller to log and clear.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._routes: set[Network] = set()
        self.families: tuple[int, ...] = ()
        self.warnings: list[str] = []

    def flush_tables(self) -> None:
        """Remove what a killed process may have left in our tables."""
        with _netlink() as kernel:
            for family in FAMILIES.values():
                for table, _ in RULES:
                    for route in table_routes(kernel, family, table):
                        with _tolerating(errno.ENOENT, errno.ESRCH, errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
                            kernel.change(DELROUTE, route)

    def set_addresses(self, ipv4: IPv4Address, ipv6: IPv6Address) -> tuple[int, ...]:
        """Replace the addresses, set the MTU, bring the device up, add the rules. The families that work."""
        with _netlink() as kernel:
            index = _index_of(self._name)
            with _tolerating(None):
                _change_link(kernel, index, NO_LINK_LOCAL)
            _flush_addresses(kernel, index)
            _change_link(kernel, index, number(IFLA_MTU, MTU))
            families = [
                family
                for family, address, length in ((4, ipv4, 32), (6, ipv6, 128))
                if self._add_address(kernel, index, address, length)
            ]
            if not families:
                raise HostError(f"{self._name} accepts neither {ipv4} nor {ipv6}: is IP disabled on this host?")
            _change_link(kernel, index, flags=IFF_UP)
            for family in families:
                self._add_rules(kernel, family)
        self.families = tuple(families)
        return self.families

    def set_routes(self, wanted: Iterable[Network]) -> None:
        """Make the device's routes these; of families without an address, none."""
        routes = {n for n in wanted if n.version in self.families}
        with _netlink() as kernel:
            index = _index_of(self._name)
            for network in self._routes - routes:
                self._change_route(kernel, "del", network, index)
            for network in routes:
                self._change_route(kernel, "add", network, index)
        self._routes = routes

    def sync_link_scope_routes(self) -> None:
        """Copy the LAN's own routes, so that they win over the internet resource (`link_scope.py`)."""
        with _netlink() as kernel:
            self.warnings += copy_link_scope_routes(kernel, _index_of(self._name))

    def _add_address(self, kernel: RouteSocket, index: int, address: IPv4Address | IPv6Address, length: int) -> bool:
        try:
            header = ADDRESS.pack(FAMILIES[address.version], length, IFA_F_NODAD, 0, index)
            attributes = attribute(IFA_LOCAL, address.packed) + attribute(IFA_ADDRESS, address.packed)
            kernel.change(NEWADDR, header + attributes, CREATE | EXCLUSIVE)
        except NetlinkError as error:
            self.warnings.append(f"no IPv{address.version} in the tunnel: {error}")
            return False
        return True

    def _add_rules(self, kernel: RouteSocket, family: int) -> None:
        for table, priority in RULES:
            try:
                header = ROUTE.pack(FAMILIES[family], 0, 0, 0, 0, 0, 0, TO_TABLE, FIB_RULE_INVERT)
                attributes = number(FRA_PRIORITY, priority) + number(FRA_FWMARK, MARK) + number(FRA_TABLE, table)
                kernel.change(NEWRULE, header + attributes, CREATE | EXCLUSIVE)
            except NetlinkError as error:
                if error.errno != errno.EEXIST:
                    self.warnings.append(f"policy rule {priority} of IPv{family} was refused: {error}")

    def _change_route(self, kernel: RouteSocket, command: str, network: Network, index: int) -> None:
        silent = (errno.EEXIST, errno.EOPNOTSUPP) if command == "add" else (errno.ENOENT, errno.ESRCH)
        try:
            if command == "add":
                kernel.change(NEWROUTE, _route(network, index, PROTO_STATIC, 0, UNICAST), CREATE | EXCLUSIVE)
            else:
                kernel.change(DELROUTE, _route(network, index, PROTO_STATIC, ANY_SCOPE, UNICAST))
        except NetlinkError as error:
            if error.errno not in silent:
                self.warnings.append(f"route {network} was refused ({command}): {error}")


@contextmanager
def _netlink() -> Iterator[RouteSocket]:
    """A netlink socket of its own for each use; HostError for what nobody below tolerated."""
    with _LOCK:
        try:
            with RouteSocket() as kernel:
                yield kernel
        except OSError as error:
            raise HostError(f"cannot configure the network ({error}): is CAP_NET_ADMIN missing?") from error


@contextmanager
def _tolerating(*codes: int | None) -> Iterator[None]:
    """Swallow these netlink errors; None stands for all of them."""
    try:
        yield
    except NetlinkError as error:
        if None not in codes and error.errno not in codes:
            raise


def _index_of(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise HostError(f"the device {name} is gone") from None


def _change_link(kernel: RouteSocket, index: int, attributes: bytes = b"", flags: int = 0) -> None:
    kernel.change(NEWLINK, LINK.pack(socket.AF_UNSPEC, 0, index, flags, flags) + attributes)


def _flush_addresses(kernel: RouteSocket, index: int) -> None:
    """Remove every address of the device."""
    for address in kernel.dump(GETADDR, ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        if ADDRESS.unpack_from(address)[4] == index:
            with _tolerating(errno.EADDRNOTAVAIL):  # it went with another one
                kernel.change(DELADDR, address)


def _route(network: Network, index: int, protocol: int, scope: int, kind: int) -> bytes:
    header = ROUTE.pack(FAMILIES[network.version], network.prefixlen, 0, 0, 0, protocol, scope, kind, 0)
    table = INTERNET_TABLE if network.prefixlen == 0 else USER_TABLE
    destination = attribute(RTA_DST, network.network_address.packed)
    return header + destination + number(RTA_OIF, index) + number(RTA_TABLE, table)


# no fe80:: address: nothing behind the tunnel answers for one
NO_LINK_LOCAL = attribute(
    IFLA_AF_SPEC,
    attribute(socket.AF_INET6, attribute(IFLA_INET6_ADDR_GEN_MODE, struct.pack("B", ADDR_GEN_MODE_NONE))),
)
