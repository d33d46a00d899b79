"""The parts of a lab: the internet segment, routers, hosts, and private networks behind gateways.

Addresses follow spec/binaries.md 12.1: everything public is in 203.0.113.0/24 and 203:0:113::/64, and hosts
have routes to these two networks only, no default route.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import Enum
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from fz_core.lab.nat import INSIDE, OUTSIDE, Nat, gateway_ruleset, ruleset
from fz_core.lab.namespace import Namespace

INTERNET_V4 = IPv4Network("203.0.113.0/24")
INTERNET_V6 = IPv6Network("203:0:113::/64")
ROUTER_NUMBER, HOST_NUMBER = 254, 100
BRIDGE = "segment"
QUEUE_LENGTH = 100_000


class Underlay(Enum):
    """The families a part of the network has."""

    V4 = "v4"
    V6 = "v6"
    DUAL = "dual"

    @property
    def has_ipv4(self) -> bool:
        """Whether IPv4 is there."""
        return self is not Underlay.V6

    @property
    def has_ipv6(self) -> bool:
        """Whether IPv6 is there."""
        return self is not Underlay.V4


class Segment:
    """A switch in a namespace of its own."""

    def __init__(self, namespace: Namespace, v4: IPv4Network | None, v6: IPv6Network | None) -> None:
        self.namespace, self.v4, self.v6 = namespace, v4, v6
        self._ports = 0
        namespace.ip(f"link add {BRIDGE} type bridge", f"link set {BRIDGE} up")

    def attach(self, namespace: Namespace, interface: str, number: int, underlay: Underlay) -> str:
        """Connect a namespace, with the address of that number in each family; the name of its port."""
        port = f"port{self._ports}"
        self._ports += 1
        self.namespace.ip(
            f"link add {port} type veth peer name {interface} netns {namespace.name}",
            f"link set {port} master {BRIDGE} up",
        )
        namespace.ip(f"link set {interface} up", *self._addresses(interface, number, underlay))
        return port

    def addresses(self, number: int, underlay: Underlay) -> tuple[str | None, str | None]:
        """The IPv4 and IPv6 address of a member, None for a family it lacks. .100 goes with ::100."""
        v4 = str(self.v4[number]) if self.v4 and underlay.has_ipv4 else None
        v6 = str(self.v6[int(str(number), 16)]) if self.v6 and underlay.has_ipv6 else None
        return v4, v6

    def _addresses(self, interface: str, number: int, underlay: Underlay) -> list[str]:
        v4, v6 = self.addresses(number, underlay)
        lines = []
        if v4 and self.v4:
            lines.append(f"address add {v4}/{self.v4.prefixlen} dev {interface}")
        if v6 and self.v6:
            lines.append(f"address add {v6}/{self.v6.prefixlen} dev {interface} nodad")
        return lines


class Node:
    """Something with a namespace: a host or a router."""

    def __init__(self, namespace: Namespace, v4: str | None, v6: str | None) -> None:
        self.namespace, self.v4, self.v6 = namespace, v4, v6
        self.run, self.spawn, self.socket = namespace.run, namespace.spawn, namespace.socket
        self.entered, self.sysctl = namespace.entered, namespace.sysctl
        self.write_hosts, self.write_resolv_conf = namespace.write_hosts, namespace.write_resolv_conf

    @property
    def addresses(self) -> list[str]:
        """The addresses there are, IPv4 first."""
        return [a for a in (self.v4, self.v6) if a]


class Host(Node):
    """A machine that runs programs. `v4` and `v6` are its own addresses, `interface` leads to the internet."""

    interface = "eth0"

    def web_server(self, port: int = 80) -> str:
        """Start `webserver.py`; the base URL under its first address."""
        import sys

        server = self.spawn(sys.executable, "-m", "fz_core.lab.webserver", "--port", str(port))
        server.wait_for_line("listening on port")
        return self.url(port)

    def url(self, port: int = 80) -> str:
        """The base URL under its first address."""
        return f"http://{self.v4}:{port}" if self.v4 else f"http://[{self.v6}]:{port}"


class PublicHost(Host):
    """A host on the internet segment itself."""

    def __init__(self, namespace: Namespace, internet: Segment, number: int, underlay: Underlay) -> None:
        super().__init__(namespace, *internet.addresses(number, underlay))
        self._internet = internet
        self._port = internet.attach(namespace, self.interface, number, underlay)

    def set_conditions(self, delay_ms: float = 0, loss_percent: float = 0) -> None:
        """Round trips to here take `delay_ms` longer, half each way; each way loses `loss_percent`."""
        impair(self.namespace, self.interface, delay_ms / 2, loss_percent)
        impair(self._internet.namespace, self._port, delay_ms / 2, loss_percent)


class Router(Node):
    """Connects one private segment to the internet. `v4` and `v6` are its public addresses."""

    def __init__(
        self,
        namespace: Namespace,
        internet: Segment,
        inside: Segment,
        number: int,
        nat: Nat,
        underlay: Underlay,
        udp_allowed: Collection[str],
    ) -> None:
        super().__init__(namespace, *internet.addresses(number, underlay))
        self.nat, self.underlay, self.inside = nat, underlay, inside
        self.inside_v4, self.inside_v6 = inside.addresses(ROUTER_NUMBER, underlay)
        self._udp_allowed = tuple(udp_allowed)
        self._forwards: dict[tuple[str, int], list[str]] = {}
        internet.attach(namespace, OUTSIDE, number, underlay)
        inside.attach(namespace, INSIDE, ROUTER_NUMBER, underlay)
        enable_forwarding(namespace)
        self._load_rules()

    def set_nat(self, nat: Nat, udp_allowed: Collection[str] = ()) -> None:
        """Change the behaviour for new flows; translations in use live on. Not from or to NONE."""
        if Nat.NONE in (nat, self.nat):
            raise ValueError("a router without translation stays so: its hosts have public addresses")
        self.nat, self._udp_allowed = nat, tuple(udp_allowed)
        self._load_rules()

    def forward_port(self, protocol: str, port: int, host: Host) -> None:
        """Let the internet reach a port of a host under the router's addresses."""
        self._forwards[protocol, port] = host.addresses
        self._load_rules()

    def set_conditions(self, delay_ms: float = 0, loss_percent: float = 0) -> None:
        """Round trips through here take `delay_ms` longer, half each way; each way loses `loss_percent`."""
        for interface in (OUTSIDE, INSIDE):
            impair(self.namespace, interface, delay_ms / 2, loss_percent)

    def _load_rules(self) -> None:
        rules = ruleset(self.nat, self._udp_allowed, self._forwards)
        self.namespace.nft("table inet router\ndelete table inet router\n" + rules)


class PrivateNetwork:
    """A network behind a gateway host, with the servers that are the resources."""

    def __init__(self, gateway: Host, segment: Segment, interface: str) -> None:
        self._segment = segment
        segment.attach(gateway.namespace, interface, ROUTER_NUMBER, Underlay.DUAL)
        enable_forwarding(gateway.namespace)
        gateway.namespace.nft(gateway_ruleset(interface))

    @property
    def v4(self) -> IPv4Network | None:
        """The IPv4 network, to be made a resource."""
        return self._segment.v4

    @property
    def v6(self) -> IPv6Network | None:
        """The IPv6 network, to be made a resource."""
        return self._segment.v6

    def connect(self, namespace: Namespace, number: int) -> Host:
        """Make a namespace a server in here."""
        host = Host(namespace, *self._segment.addresses(number, Underlay.DUAL))
        self._segment.attach(namespace, host.interface, number, Underlay.DUAL)
        return host


def connect_behind(router: Router, namespace: Namespace, number: int) -> Host:
    """Make a namespace a host behind a router, with routes to the internet segment."""
    if router.nat is Nat.NONE:
        return _connect_without_nat(router, namespace, number)
    host = Host(namespace, *router.inside.addresses(number, router.underlay))
    router.inside.attach(namespace, host.interface, number, router.underlay)
    namespace.ip(*_routes(router, host))
    return host


def _connect_without_nat(router: Router, namespace: Namespace, number: int) -> Host:
    """The host has an address of the internet segment; the router answers for it there."""
    v4 = str(INTERNET_V4[number]) if router.v4 else None
    v6 = str(INTERNET_V6[int(str(number), 16)]) if router.v6 else None
    host = Host(namespace, v4, v6)
    router.inside.attach(namespace, host.interface, number, router.underlay)
    namespace.ip(f"address flush dev {host.interface} scope global")
    lines = []
    if v4:
        router.sysctl(f"ipv4.conf.{OUTSIDE}.proxy_arp", 1)
        router.namespace.ip(f"route add {v4}/32 dev {INSIDE}")
        lines += [f"address add {v4}/32 dev eth0", f"route add {router.inside_v4}/32 dev eth0"]
    if v6:
        router.sysctl(f"ipv6.conf.{OUTSIDE}.proxy_ndp", 1)
        router.namespace.ip(f"-6 route add {v6}/128 dev {INSIDE}", f"-6 neigh add proxy {v6} dev {OUTSIDE}")
        lines += [f"address add {v6}/128 dev eth0 nodad", f"-6 route add {router.inside_v6}/128 dev eth0"]
    namespace.ip(*lines, *_routes(router, host))
    return host


def _routes(router: Router, host: Host) -> list[str]:
    lines = []
    if host.v4:
        lines.append(f"route add {INTERNET_V4} via {router.inside_v4} dev {host.interface}")
    if host.v6:
        lines.append(f"-6 route add {INTERNET_V6} via {router.inside_v6} dev {host.interface}")
    return lines


def enable_forwarding(namespace: Namespace) -> None:
    """Make a namespace pass packets on."""
    for key in ("ipv4.ip_forward", "ipv6.conf.all.forwarding", "ipv6.conf.default.forwarding"):
        namespace.sysctl(key, 1)


def impair(namespace: Namespace, interface: str, delay_ms: float, loss_percent: float) -> None:
    """Delay and drop what leaves an interface."""
    namespace.ip(f"link set {interface} txqueuelen {QUEUE_LENGTH}")
    namespace.run(
        *f"tc qdisc replace dev {interface} root netem limit {QUEUE_LENGTH}".split(),
        *f"delay {delay_ms}ms loss {loss_percent}%".split(),
    )
