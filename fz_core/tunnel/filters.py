"""Which traffic a resource allows (`spec/tunnel.md` §5).

Traffic is named by `(protocol, port)`: the IP protocol number and the port on the resource's
side; ICMP of both families is one protocol and its port is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable

from fz_core.portal.types import Filter

TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58


class FilterSet:
    """A union of filters; an empty one allows everything."""

    __slots__ = ("_allow_all", "_icmp", "_ranges")

    def __init__(self, filters: Iterable[Filter]) -> None:
        filters = tuple(filters)
        self._allow_all = not filters
        self._icmp = any(f.protocol == "icmp" for f in filters)
        self._ranges = {
            number: tuple((f.port_range_start, f.port_range_end) for f in filters if f.protocol == name)
            for number, name in ((TCP, "tcp"), (UDP, "udp"))
        }

    def allows(self, protocol: int, port: int) -> bool:
        """Whether traffic of this IP protocol to this port may pass."""
        if self._allow_all:
            return True
        if protocol in (ICMP, ICMPV6):
            return self._icmp
        return any(start <= port <= end for start, end in self._ranges.get(protocol, ()))
