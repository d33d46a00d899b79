"""An internet in network namespaces: hosts, routers with NAT flavours, latency and loss.

    with Lab() as lab:
        portal = lab.public_host("portal", 10)
        office = lab.router("office", 30, nat="symmetric")
        laptop = lab.host("laptop", office)
        laptop.run("ping", "-c1", portal.ipv4)

Everything is named after this process and removed on the way out, also after a failure.
Addresses as in `spec/binaries.md` §12.1: the internet is 203.0.113.0/24 and 203:0:113::/64.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from fz_core.lab.processes import LabError, Process, run

BRIDGE = "internet"
INTERNET_V4, INTERNET_V6 = "203.0.113.0/24", "203:0:113::/64"
CLONE_NEWNET = 0x40000000
NETLINK_NETFILTER, IPCTNL_MSG_CT_DELETE, NLM_F_REQUEST, NLM_F_ACK = 12, 0x102, 1, 4
NETNS_FOLDER, ETC_FOLDER = Path("/run/netns"), Path("/run/fz-lab")
_numbers = itertools.count()
REAL_ETC = ".real"
NSSWITCH = "passwd: files\ngroup: files\nhosts: files dns\n"  # never the real machine's systemd-resolved
MOUNT_ETC = f'mount -o bind,ro /etc "$0/{REAL_ETC}" && mount --rbind "$0" /etc && exec "$@"'
NAT_FLAVOURS = ("none", "cone", "symmetric")
SYSCTLS = (
    "net.ipv6.conf.all.disable_ipv6=0",
    "net.ipv6.conf.default.accept_dad=0",
    "net.ipv6.conf.all.accept_dad=0",
    "net.ipv4.conf.all.rp_filter=0",
    "net.ipv4.conf.default.rp_filter=0",
)


class Namespace:
    """A network namespace with the programs in it."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab, self.name, self.netns = lab, name, f"{lab.prefix}{name}"
        self._delay_lines: dict[str, Process] = {}
        run(["ip", "netns", "add", self.netns])
        lab.namespaces.append(self)
        self.ip("link", "set", "lo", "up")
        self.sysctl(*SYSCTLS)

    def ip(self, *arguments: str) -> None:
        """`ip` in this namespace."""
        run(["ip", "-n", self.netns, *arguments])

    def sysctl(self, *settings: str) -> None:
        """Set kernel parameters of this namespace."""
        run(["ip", "netns", "exec", self.netns, "sysctl", "-qw", *settings])

    def nft(self, rules: str) -> None:
        """Load an nftables file."""
        command = ["ip", "netns", "exec", self.netns, "nft", "-f", "-"]
        result = subprocess.run(command, input=rules, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise LabError(f"nft in {self.name}: {result.stderr.strip()}")

    def run(self, *command: str, check: bool = True, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a program to its end."""
        return run([*self._enter(), *command], check=check, timeout=timeout)

    def spawn(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> Process:
        """Start a program; it is ended with the lab."""
        log = self.lab.folder / f"{name}.log"
        process = Process(name, [*self._enter(), *command], env, log)
        self.lab.processes.append(process)
        return process

    def _enter(self) -> list[str]:
        """What goes before a command to run it in this namespace."""
        return ["ip", "netns", "exec", self.netns]

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_DGRAM, protocol: int = 0) -> socket.socket:
        """A socket of this namespace, usable from ours."""
        with self.entered():
            return socket.socket(family, kind, protocol)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Move this thread into the namespace; sockets and devices opened meanwhile stay in it."""
        with open("/proc/thread-self/ns/net", "rb") as ours, open(f"/run/netns/{self.netns}", "rb") as theirs:
            _setns(theirs.fileno())
            try:
                yield
            finally:
                _setns(ours.fileno())

    def delay(
        self,
        device: str,
        milliseconds: float = 0.0,
        loss: float = 0.0,
        *,
        reorder: float = 0.0,
        duplicate: float = 0.0,
        seed: int | None = None,
    ) -> None:
        """Delay, in one direction, what leaves by this device, and lose, reorder or double some of it (percent).

        Each packet has a fate of its own, also one of a super packet. Zeros remove everything.
        """
        line = self._delay_lines.pop(device, None)
        if line is not None:
            line.stop()
        for root in ("root", "clsact"):
            run(["tc", "-n", self.netns, "qdisc", "del", "dev", device, root], check=False)
        if not (milliseconds or loss or reorder or duplicate):
            return
        if not (loss or reorder or duplicate):  # netem would do these to whole super packets
            netem = ["root", "netem", "limit", "100000", "delay", f"{milliseconds}ms"]
            added = run(["tc", "-n", self.netns, "qdisc", "add", "dev", device, *netem], check=False)
            if added.returncode == 0:  # this kernel has netem
                return
        options = {"delay": milliseconds, "loss": loss, "reorder": reorder, "duplicate": duplicate, "seed": seed}
        flags = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
        line = self.spawn(
            f"{self.name}-{device}-delay{len(self.lab.processes)}",
            [sys.executable, "-m", "fz_core.lab.delay_line", device, *flags],
        )
        line.wait_for_line("^holding")
        self._delay_lines[device] = line


class Host(Namespace):
    """A machine. `ipv4` and `ipv6` are None for a family it has not."""

    ipv4: str | None = None
    ipv6: str | None = None
    device = "eth0"

    def add_address(self, ip: str) -> None:
        """One more address on its only cable, of a network it is already in."""
        flags = ["nodad"] if ":" in ip else []
        self.ip("addr", "add", f"{ip}/{64 if ':' in ip else 24}", "dev", self.device, *flags)

    def unplug(self) -> None:
        """Pull the cable out: the device goes, and addresses and routes with it. `Router.attach` is the way back."""
        self.ip("link", "del", self.device)
        self.ipv4 = self.ipv6 = None

    def write_etc(self, name: str, text: str) -> None:
        """Write /etc/<name> of this machine.

        From the first time on it has an /etc of its own. Programs started since then all see the same one and may
        change it as they like, replace files, leave others beside them; the real one stays untouched. Only the
        folders in it are the real ones, read-only.
        """
        if not self._etc.exists():
            self._make_etc()
        path = self._etc / name
        if path.is_symlink():
            path.unlink()
        path.write_text(text)

    def read_etc(self, name: str) -> str:
        """/etc/<name> as the machine's programs see it."""
        return (self._etc / name).read_text()

    @property
    def _etc(self) -> Path:
        return ETC_FOLDER / self.netns

    def _make_etc(self) -> None:
        """Copies of the real files, links to the real folders."""
        (self._etc / REAL_ETC).mkdir(parents=True)
        for entry in Path("/etc").iterdir():
            if entry.is_symlink() or entry.is_file():
                shutil.copy2(entry, self._etc / entry.name, follow_symlinks=False)
            elif entry.is_dir():
                (self._etc / entry.name).symlink_to(f"{REAL_ETC}/{entry.name}")
        (self._etc / "nsswitch.conf").write_text(NSSWITCH)

    def _enter(self) -> list[str]:
        """`ip netns exec` gives every program a mount namespace of its own, so mounts need no undoing."""
        outside = super()._enter()
        return [*outside, "sh", "-c", MOUNT_ETC, str(self._etc)] if self._etc.exists() else outside


class Router(Namespace):
    """Between the internet and one local network; `public_ipv4` and `public_ipv6` are its outer addresses."""

    def __init__(self, lab: Lab, name: str, number: int, nat: str, families: tuple[int, ...]) -> None:
        if nat not in NAT_FLAVOURS:
            raise LabError(f"unknown NAT flavour {nat!r}, use one of {', '.join(NAT_FLAVOURS)}")
        super().__init__(lab, name)
        self.number, self.families = number, families
        self.public_ipv4 = f"203.0.113.{number}" if 4 in families else None
        self.public_ipv6 = f"203:0:113::{number}" if 6 in families else None
        lab.plug(self, "internet", self.public_ipv4, self.public_ipv6)
        self.sysctl("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        self.ip("link", "add", "lan", "type", "bridge")
        if 4 in families:
            self.ip("addr", "add", f"172.{number}.0.254/24", "dev", "lan")
        if 6 in families:
            self.ip("addr", "add", f"172:{number}::254/64", "dev", "lan", "nodad")
        self.ip("link", "set", "lan", "up")
        self.is_open = nat == "none"
        self.hosts: list[Host] = []
        if not self.is_open:
            self._masquerade("random,fully-random" if nat == "symmetric" else "")

    def attach(self, host: Host) -> None:
        """Give a host an address and the routes to the internet, and nowhere else."""
        self.hosts.append(host)
        port = f"lan{len(self.hosts)}"
        link(host, host.device, self, port)
        self.ip("link", "set", port, "master", "lan")
        self.give_address(host, 99 + len(self.hosts))

    def give_address(self, host: Host, last: int) -> None:
        """Addresses that end in `last` instead of those it has, and the routes they need."""
        run(["ip", "-n", host.netns, "addr", "flush", "dev", host.device, "scope", "global"], check=False)
        host.ipv4 = host.ipv6 = None
        if 4 in self.families:
            host.ipv4 = f"172.{self.number}.0.{last}"
            host.ip("addr", "add", f"{host.ipv4}/24", "dev", host.device)
            host.ip("route", "replace", INTERNET_V4, "via", f"172.{self.number}.0.254")
        if 6 in self.families:
            host.ipv6 = f"172:{self.number}::{last}"
            host.ip("addr", "add", f"{host.ipv6}/64", "dev", host.device, "nodad")
            host.ip("route", "replace", INTERNET_V6, "via", f"172:{self.number}::254")

    def forward_port(self, protocol: str, port: int, host: Host) -> None:
        """Let the internet reach a host's port ("udp" or "tcp") under the router's own addresses."""
        for family, keyword, address in (("ipv4", "ip", host.ipv4), ("ipv6", "ip6", host.ipv6)):
            if address is not None:
                match = f'iifname "internet" meta nfproto {family} {protocol} dport {port}'
                self.nft(f"add rule inet nat prerouting {match} dnat {keyword} to {address}")

    def block_udp(self, *but_to: str, way: str = "both") -> None:
        """Drop all UDP that is not to or from these addresses: what a strict firewall does to direct paths.

        `way` is "in" or "out" for a firewall that does so in one direction only.
        """
        v4 = [a for a in but_to if ":" not in a]
        v6 = [a for a in but_to if ":" in a]
        allowed = [
            f"{family} {end} {{ {', '.join(ips)} }} accept"
            for family, ips in (("ip", v4), ("ip6", v6))
            if ips
            for end in ("saddr", "daddr")
        ]
        match = {"both": "", "in": 'iifname "internet" ', "out": 'oifname "internet" '}[way]
        self._add_filter("block", [*allowed, f"{match}meta l4proto udp drop"])

    def unblock_udp(self) -> None:
        """Undo `block_udp`."""
        self._remove_filter("block")

    def cut(self) -> None:
        """Let nothing pass any more, and tell nobody."""
        self._add_filter("cut", ["drop"])

    def mend(self) -> None:
        """Undo `cut`."""
        self._remove_filter("cut")

    def change_public_address(self, number: int) -> None:
        """Other outer addresses, 203.0.113.<number>; what was translated is forgotten."""
        run(["ip", "-n", self.netns, "addr", "flush", "dev", "internet", "scope", "global"], check=False)
        if self.public_ipv4 is not None:
            self.public_ipv4 = f"203.0.113.{number}"
            self.ip("addr", "add", f"{self.public_ipv4}/24", "dev", "internet")
        if self.public_ipv6 is not None:
            self.public_ipv6 = f"203:0:113::{number}"
            self.ip("addr", "add", f"{self.public_ipv6}/64", "dev", "internet", "nodad")
        self.forget_connections()

    def remap_ports(self, first: int) -> None:
        """Forget what was translated; UDP gets source ports from `first` on, the same towards everybody."""
        udp = f"meta l4proto udp masquerade to :{first}-{first + 4999}"
        rules = [f'add rule inet nat postrouting oifname "internet" {rule}' for rule in (udp, "masquerade")]
        self.nft("\n".join(["flush chain inet nat postrouting", *rules]))
        self.forget_connections()

    def forget_connections(self) -> None:
        """Flush connection tracking, as a reboot does."""
        request = struct.pack("=IHHII", 20, IPCTNL_MSG_CT_DELETE, NLM_F_REQUEST | NLM_F_ACK, 1, 0) + bytes(4)
        with self.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as sock:
            sock.send(request)
            (code,) = struct.unpack_from("=i", sock.recv(4096), 16)
        if code:
            raise LabError(f"cannot flush connection tracking of {self.name}: {os.strerror(-code)}")

    def shorten_nat(self, seconds: int) -> None:
        """Forget what was translated after this long without traffic."""
        names = ("nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream")
        self.sysctl(*(f"net.netfilter.{name}={seconds}" for name in names))

    def _add_filter(self, table: str, rules: Sequence[str]) -> None:
        chain = "\n".join(rules)
        self.nft(
            f"table inet {table} {{\nchain forward {{\ntype filter hook forward priority -10; policy accept\n"
            f"{chain}\n}}\n}}"
        )

    def _remove_filter(self, table: str) -> None:
        self.nft(f"table inet {table}\ndelete table inet {table}")

    def _masquerade(self, mode: str) -> None:
        self.nft(
            f"""table inet nat {{
              chain postrouting {{
                type nat hook postrouting priority srcnat
                oifname "internet" masquerade {mode}
              }}
              chain prerouting {{
                type nat hook prerouting priority dstnat
              }}
              chain forward {{
                type filter hook forward priority filter; policy accept
                iifname "internet" ct state established,related accept
                iifname "internet" ct status dnat accept
                iifname "internet" drop
              }}
              # What nobody asked for must leave no trace: an entry of connection tracking would take the
              # port from the host inside, which is about to send to that very peer.
              chain input {{
                type filter hook input priority filter; policy accept
                iifname "internet" ct state established,related accept
                iifname "internet" meta l4proto {{ icmp, ipv6-icmp }} accept
                iifname "internet" drop
              }}
            }}"""
        )


class Lab:
    """Builds namespaces and removes them. Use it as a context manager."""

    def __init__(self, folder: Path | None = None) -> None:
        missing = [name for name in ("ip", "nft", "tc", "sysctl") if shutil.which(name) is None]
        if missing:
            raise LabError(f"programs are missing: {', '.join(missing)}; run 'make system-packages'")
        if os.geteuid() != 0:
            raise LabError("network namespaces need root: run as root")
        self._own_folder = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="fz-lab-"))
        self.namespaces: list[Namespace] = []
        self.processes: list[Process] = []
        self._routers: list[Router] = []
        self._public: list[Host] = []
        self.prefix = f"fz{os.getpid()}.{next(_numbers)}-"
        self._ports = 0

    def __enter__(self) -> Lab:
        remove_stale()
        try:
            self.internet = Namespace(self, "internet")
            self.internet.ip("link", "add", BRIDGE, "type", "bridge")
            self.internet.ip("link", "set", BRIDGE, "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every program and remove every namespace; harmless when repeated."""
        with ExitStack() as steps:  # each step runs even if another fails or is interrupted
            if self._own_folder:
                steps.callback(shutil.rmtree, self.folder, ignore_errors=True)
            for namespace in self.namespaces:
                steps.callback(_remove_namespace, namespace.netns)
            for process in self.processes:
                steps.callback(process.kill)
        self.processes.clear()
        self.namespaces.clear()

    def leftovers(self) -> list[str]:
        """Namespaces, files and programs of this lab that still exist; empty after `close`."""
        places = [f for folder in (NETNS_FOLDER, ETC_FOLDER) if folder.is_dir() for f in folder.iterdir()]
        found = [str(f) for f in places if f.name.startswith(self.prefix)]
        return found + [process.name for process in self.processes if process.is_running]

    def router(self, name: str, number: int, *, nat: str = "cone", families: tuple[int, ...] = (4, 6)) -> Router:
        """A router with the outer address 203.0.113.<number> and the local network 172.<number>.0.0/24."""
        router = Router(self, name, number, nat, families)
        self._routers.append(router)
        self._route_to_open_networks()
        return router

    def host(self, name: str, router: Router) -> Host:
        """A machine behind a router."""
        host = Host(self, name)
        router.attach(host)
        self._route_to_open_networks()
        return host

    def public_host(self, name: str, number: int, *, families: tuple[int, ...] = (4, 6)) -> Host:
        """A machine on the internet itself, 203.0.113.<number>."""
        host = Host(self, name)
        host.ipv4 = f"203.0.113.{number}" if 4 in families else None
        host.ipv6 = f"203:0:113::{number}" if 6 in families else None
        self.plug(host, host.device, host.ipv4, host.ipv6)
        self._public.append(host)
        self._route_to_open_networks()
        return host

    def private_network(self, gateway: Host, host: str, number: int) -> Host:
        """A machine only `gateway` can reach, 10.<number>.0.80 and fd<number>::80; the gateway masquerades for it."""
        server = Host(self, host)
        device = f"lan{number}"
        link(server, server.device, gateway, device)
        gateway.ip("addr", "add", f"10.{number}.0.1/24", "dev", device)
        gateway.ip("addr", "add", f"fd{number}::1/64", "dev", device, "nodad")
        server.ipv4, server.ipv6 = f"10.{number}.0.80", f"fd{number}::80"
        server.ip("addr", "add", f"{server.ipv4}/24", "dev", server.device)
        server.ip("addr", "add", f"{server.ipv6}/64", "dev", server.device, "nodad")
        gateway.sysctl("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        gateway.nft(
            f"""table inet masquerade{number} {{
              chain postrouting {{
                type nat hook postrouting priority srcnat
                ip saddr 100.64.0.0/11 oifname "{device}" masquerade
                ip6 saddr fd00:2021:1111::/107 oifname "{device}" masquerade
              }}
            }}"""
        )
        return server

    def plug(self, namespace: Namespace, device: str, ipv4: str | None, ipv6: str | None) -> None:
        """Connect a namespace to the internet."""
        self._ports += 1
        port = f"port{self._ports}"
        link(namespace, device, self.internet, port)
        self.internet.ip("link", "set", port, "master", BRIDGE)
        if ipv4 is not None:
            namespace.ip("addr", "add", f"{ipv4}/24", "dev", device)
        if ipv6 is not None:
            namespace.ip("addr", "add", f"{ipv6}/64", "dev", device, "nodad")

    def _route_to_open_networks(self) -> None:
        """Without translation, everybody needs a route to the network behind the router."""
        for router in (r for r in self._routers if r.is_open):
            nets = (
                ("-4", f"172.{router.number}.0.0/24", router.public_ipv4, "0.254"),
                ("-6", f"172:{router.number}::/64", router.public_ipv6, ":254"),
            )
            for family, network, via, last in nets:
                if via is None:
                    continue
                for other in (*self._public, *self._routers):
                    if other is not router:
                        _replace_route(other, family, network, via)
                for other in (r for r in self._routers if r is not router):
                    inner = f"172.{other.number}.{last}" if family == "-4" else f"172:{other.number}:{last}"
                    for host in other.hosts:
                        _replace_route(host, family, network, inner)


def _replace_route(namespace: Namespace, family: str, network: str, via: str) -> None:
    """A member without this family refuses, and needs no route."""
    run(["ip", "-n", namespace.netns, family, "route", "replace", network, "via", via], check=False)


def link(a: Namespace, device_a: str, b: Namespace, device_b: str) -> None:
    """A cable between two namespaces, both ends up."""
    run(["ip", "link", "add", device_a, "netns", a.netns, "type", "veth", "peer", "name", device_b, "netns", b.netns])
    for namespace, device in ((a, device_a), (b, device_b)):
        namespace.ip("link", "set", device, "txqueuelen", "10000", "up")


def remove_stale() -> None:
    """Remove the namespaces of labs whose process was killed."""
    for folder in (NETNS_FOLDER, ETC_FOLDER):
        for path in folder.iterdir() if folder.is_dir() else ():
            found = re.match(r"fz(\d+)\.\d+-", path.name)
            if found and not Path("/proc", found[1]).exists():
                _remove_namespace(path.name)


def _remove_namespace(netns: str) -> None:
    """With the programs that outlived their parents in it, by process id."""
    for pid in run(["ip", "netns", "pids", netns], check=False).stdout.split():
        if int(pid) != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    run(["ip", "netns", "del", netns], check=False)
    shutil.rmtree(ETC_FOLDER / netns, ignore_errors=True)


def _setns(fd: int) -> None:
    """os.setns, which Python has from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET):
        raise LabError(f"cannot enter a network namespace ({os.strerror(ctypes.get_errno())}): run as root")
