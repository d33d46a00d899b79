"""Addresses, routes and policy rules of the TUN device (`spec/io.md` §7).

Marked sockets skip the three tables; resource routes beat the LAN, and the LAN beats the internet
resource. Nothing is undone at exit: the routes go with the device, and empty tables do nothing.
Importing pyroute2 takes a while, so that this module is imported in a thread (`driver/tunnel.py`).
"""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from fz_core.linux.errors import HostError
from fz_core.linux.iproute import IPRoute, NetlinkError
from fz_core.linux.link_scope import LINK_SCOPE_TABLE, copy_link_scope_routes
from fz_core.linux.marks import MARK

Network = IPv4Network | IPv6Network

USER_TABLE, INTERNET_TABLE = 0x2021FD00, 0x2021FD02
RULES = ((USER_TABLE, 100), (LINK_SCOPE_TABLE, 200), (INTERNET_TABLE, 300))
MTU = 1280
FIB_RULE_INVERT = 2
ADDR_GEN_MODE_NONE = 1
IFA_F_NODAD = 2  # an IPv6 address is of use at once: listeners are bound to it next
PROTO_STATIC = 4
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
        with _netlink() as ip:
            for family in FAMILIES.values():
                for table, _ in RULES:
                    with _tolerating(errno.ENOENT, errno.ESRCH, errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
                        ip.flush_routes(family=family, table=table)

    def set_addresses(self, ipv4: IPv4Address, ipv6: IPv6Address) -> tuple[int, ...]:
        """Replace the addresses, set the MTU, bring the device up, add the rules. The families that work."""
        with _netlink() as ip:
            index = _index_of(ip, self._name)
            with _tolerating(None):
                ip.link("set", index=index, IFLA_AF_SPEC=_no_link_local())
            ip.flush_addr(index=index)
            ip.link("set", index=index, mtu=MTU)
            families = [
                family
                for family, address, length in ((4, ipv4, 32), (6, ipv6, 128))
                if self._add_address(ip, index, address, length)
            ]
            if not families:
                raise HostError(f"{self._name} accepts neither {ipv4} nor {ipv6}: is IP disabled on this host?")
            ip.link("set", index=index, state="up")
            for family in families:
                self._add_rules(ip, family)
        self.families = tuple(families)
        return self.families

    def set_routes(self, wanted: Iterable[Network]) -> None:
        """Make the device's routes these; of families without an address, none."""
        routes = {n for n in wanted if n.version in self.families}
        with _netlink() as ip:
            index = _index_of(ip, self._name)
            for network in self._routes - routes:
                self._change_route(ip, "del", network, index)
            for network in routes:
                self._change_route(ip, "add", network, index)
        self._routes = routes

    def sync_link_scope_routes(self) -> None:
        """Copy the LAN's own routes, so that they win over the internet resource (`link_scope.py`)."""
        with _netlink() as ip:
            self.warnings += copy_link_scope_routes(ip, _index_of(ip, self._name))

    def _add_address(self, ip: Any, index: int, address: IPv4Address | IPv6Address, length: int) -> bool:
        try:
            ip.addr("add", index=index, address=str(address), prefixlen=length, flags=IFA_F_NODAD)
        except NetlinkError as error:
            self.warnings.append(f"no IPv{address.version} in the tunnel: {error}")
            return False
        return True

    def _add_rules(self, ip: Any, family: int) -> None:
        for table, priority in RULES:
            try:
                ip.rule(
                    "add",
                    family=FAMILIES[family],
                    priority=priority,
                    table=table,
                    fwmark=MARK,
                    flags=FIB_RULE_INVERT,
                )
            except NetlinkError as error:
                if error.code != errno.EEXIST:
                    self.warnings.append(f"policy rule {priority} of IPv{family} was refused: {error}")

    def _change_route(self, ip: Any, command: str, network: Network, index: int) -> None:
        silent = (errno.EEXIST, errno.EOPNOTSUPP) if command == "add" else (errno.ENOENT, errno.ESRCH)
        try:
            ip.route(
                command,
                family=FAMILIES[network.version],
                dst=str(network),
                oif=index,
                table=INTERNET_TABLE if network.prefixlen == 0 else USER_TABLE,
                proto=PROTO_STATIC,
            )
        except NetlinkError as error:
            if error.code not in silent:
                self.warnings.append(f"route {network} was refused ({command}): {error}")


@contextmanager
def _netlink() -> Iterator[Any]:
    """A netlink socket of its own for each use; HostError for what nobody below tolerated."""
    with _LOCK:
        try:
            with IPRoute() as ip:
                yield ip
        except (NetlinkError, OSError) as error:
            raise HostError(f"cannot configure the network ({error}): is CAP_NET_ADMIN missing?") from error


@contextmanager
def _tolerating(*codes: int | None) -> Iterator[None]:
    """Swallow these netlink errors; None stands for all of them."""
    try:
        yield
    except NetlinkError as error:
        if None not in codes and error.code not in codes:
            raise


def _index_of(ip: Any, name: str) -> int:
    found: list[int] = ip.link_lookup(ifname=name)
    if not found:
        raise HostError(f"the device {name} is gone")
    return found[0]


def _no_link_local() -> dict[str, Any]:
    return {"attrs": [["AF_INET6", {"attrs": [["IFLA_INET6_ADDR_GEN_MODE", ADDR_GEN_MODE_NONE]]}]]}
