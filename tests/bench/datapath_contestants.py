"""Who takes part in `bench_datapath`, each laid out on the same machines.

    client - router (NAT) - internet - router (NAT) - gateway - server

A contestant is a context manager that yields `Ends`, ready to carry traffic from the client to the server and back.
Plain packets have no tunnel through the gateway's router, so it routes them to the gateway instead; the client's
router translates them as it does the datagrams of a tunnel. Tunnels without a portal have one forwarded port on the
gateway's router. Programs leave the limits of socket buffers as they are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fz_core.lab import Host, Lab, LabError
from fz_core.lab.processes import Process
from fz_core.lab.system import Programs, Shape, System, ours
from fz_core.lab.topology import Router
from tests.bench.coturn_dialect import coturn

SERVER = {4: "10.20.0.80", 6: "fd20::80"}
RESOURCE_NETS = ("10.20.0.0/24", "fd20::/64")
TUNNEL_NETS = {
    "client": ("100.64.0.2/24", "fd00:2021:1111::2/112"),
    "gateway": ("100.64.0.1/24", "fd00:2021:1111::1/112"),
}
TUNNEL_PORT = 51820
TUNNEL_MTU = "1280"
FIRST_ANSWER = 30.0  # seconds
SETTLE = 3.0  # a first path may be through the relay, a better one is found meanwhile
NO_LIMITS_RAISED = {"FIREZONE_NO_INC_BUF": "true"}


@dataclass
class Ends:
    """Where traffic starts and ends, and the programs that carry it."""

    client: Host
    server: Host
    router: Router
    programs: dict[str, Process]
    families: tuple[int, ...] = (4, 6)
    relayed_bytes: Callable[[], int] = lambda: 0  # sent by relays so far


Contestant = Callable[[], AbstractContextManager[Ends]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says about other programs."""

    peers: Path | None = None
    wireguard_go: str = "wireguard-go"
    pump_source: Path | None = None
    mixes: bool = False


def contestants(settings: Settings) -> tuple[dict[str, Contestant], dict[str, str]]:
    """By name, in the order of the table; and why others are left out."""
    found: dict[str, Contestant] = {"plain": plain}
    left_out: dict[str, str] = {}
    if shutil.which(settings.wireguard_go) and shutil.which("wg"):
        found["wireguard-go"] = partial(wireguard_go, settings.wireguard_go)
    else:
        left_out["wireguard-go"] = f"needs {settings.wireguard_go} and wg"
    if settings.pump_source is not None:
        for cipher in ("sodium", "openssl"):
            for threads in (1, 2):
                found[f"pump, {cipher}, {threads}"] = partial(pump, settings.pump_source, cipher, threads)
    else:
        left_out["pump"] = "no --pump-source"
    found["ours, direct"] = partial(firezone, Programs())
    found["ours, direct, two threads"] = partial(firezone, Programs(), env={"FZ_FASTPATH_THREADS": "2"})
    found["ours, direct, no fast path"] = partial(firezone, Programs(), env={"FZ_FASTPATH": "off"})
    found["ours, relayed"] = partial(firezone, Programs(), relayed=True)
    if shutil.which("turnserver"):
        found["ours, through coturn"] = through_coturn
    else:
        left_out["coturn"] = "needs turnserver"
    if settings.peers is None:
        left_out["official"] = "no --peers"
        return found, left_out
    official = official_programs(settings.peers)
    missing = [
        command[0] for command in (official.client, official.gateway, official.relay) if not shutil.which(command[0])
    ]
    if missing:
        left_out["official"] = f"no {', '.join(missing)}"
        return found, left_out
    found["official, direct"] = partial(firezone, official)
    found["official, relayed"] = partial(firezone, official, relayed=True)
    if settings.mixes:
        for title, programs in (
            ("our client, official gateway", Programs(gateway=official.gateway)),
            ("official client, our gateway", Programs(client=official.client)),
        ):
            found[title] = partial(firezone, programs)
    return found, left_out


def official_programs(folder: Path) -> Programs:
    """The official programs of a folder, in the parts they can play."""
    gateway, client, relay = ((str(folder / f"firezone-{name}"),) for name in ("gateway", "headless-client", "relay"))
    return Programs(gateway=gateway, client=client, relay=relay)


@contextmanager
def plain() -> Iterator[Ends]:
    """No tunnel: the resource is reached by routing."""
    with Lab() as lab:
        sites = _Sites(lab)
        routes = ((sites.client, "172.30.0.254", "172:30::254"), (sites.router, "203.0.113.31", "203:0:113::31"),
                  (sites.gateway_router, "172.31.0.100", "172:31::100"))  # fmt: skip
        for namespace, *via in routes:
            for network, hop in zip(RESOURCE_NETS, via, strict=True):
                namespace.ip("route", "replace", network, "via", hop)
        sites.server.ip("route", "replace", "203.0.113.0/24", "via", "10.20.0.1")
        sites.server.ip("route", "replace", "203:0:113::/64", "via", "fd20::1")
        for family, network in zip(("ip", "ip6"), RESOURCE_NETS, strict=True):
            sites.gateway_router.nft(f"insert rule inet nat forward {family} daddr {network} accept")
        yield sites.ends({})


@contextmanager
def wireguard_go(program: str) -> Iterator[Ends]:
    """wireguard-go at both ends, static peers."""
    with Lab() as lab, tempfile.TemporaryDirectory() as folder:
        sites = _Sites(lab)
        keys = {name: _wg("genkey") for name in ("client", "gateway")}
        processes = {}
        for name, other in (("gateway", "client"), ("client", "gateway")):
            host, device = sites.hosts[name], f"wg{os.getpid() % 100_000}{name[0]}"
            path = Path(folder) / name
            path.touch(mode=0o600)
            path.write_text(keys[name])
            processes[name] = host.spawn(f"wireguard-go-{name}", [program, "-f", device], {"LOG_LEVEL": "error"})
            _wait_for_device(host, device, processes[name])
            reach = [net.replace("/24", "/32").replace("/112", "/128") for net in TUNNEL_NETS[other]]
            if name == "client":
                endpoint = [
                    "endpoint",
                    f"{sites.gateway_router.public_ipv4}:{TUNNEL_PORT}",
                    "persistent-keepalive",
                    "25",
                ]
                reach += RESOURCE_NETS
            else:
                endpoint = []
            host.run(
                "wg", "set", device, "private-key", str(path), "listen-port", str(TUNNEL_PORT),
                "peer", _wg("pubkey", keys[other]), "allowed-ips", ",".join(reach), *endpoint,
            )  # fmt: skip
            sites.configure(name, device)
        yield sites.ends(processes)


@contextmanager
def pump(source: Path, cipher: str, threads: int) -> Iterator[Ends]:
    """A bare packet pump with static keys, compiled here; it knows IPv4 only."""
    with Lab() as lab, tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "pump"
        libraries = ("-lsodium", "-lcrypto", "-lpthread")
        command = ["gcc", "-w", "-O3", "-march=native", "-o", str(program), str(source), *libraries]
        subprocess.run(command, check=True, timeout=120)
        sites = _Sites(lab)
        assert sites.gateway_router.public_ipv4 is not None
        remote = {"client": sites.gateway_router.public_ipv4, "gateway": sites.router.public_ipv4}
        processes = {}
        for name, host in sites.hosts.items():
            host.sysctl("net.ipv6.conf.default.disable_ipv6=1")
            arguments = ["pump0", host.ipv4, str(TUNNEL_PORT), remote[name], str(TUNNEL_PORT), cipher, str(threads)]
            processes[name] = host.spawn(f"pump-{name}", [str(program), *map(str, arguments)])
            _wait_for_device(host, "pump0", processes[name])
        for name in sites.hosts:
            sites.configure(name, "pump0", families=(4,))
        yield sites.ends(processes, families=(4,))


@contextmanager
def firezone(programs: Programs, *, relayed: bool = False, env: Mapping[str, str] | None = None) -> Iterator[Ends]:
    """Client, gateway, relay and portal."""
    with Lab() as lab:
        system = System(lab, programs, Shape())
        system.start_portal()
        system.start_relay(0)
        yield _paired(system, relay=system.relays[0] if relayed else None, env=env)


@contextmanager
def through_coturn() -> Iterator[Ends]:
    """Our pair, over IPv4, relayed by coturn; our relay only tells the portal that there is one."""
    dialect = ours("tests.bench.coturn_dialect")
    aside = ("--bind-ip4-addr", "127.0.0.1")
    programs = Programs(
        gateway=(*dialect, "fz_gateway"),
        client=(*dialect, "fz_headless"),
        relay=(*dialect, "fz_core.commands.relay", *aside),
        portal=(*dialect, "fz_core.commands.portal"),
    )
    with Lab() as lab:
        system = System(lab, programs, Shape(relay_families=(4,)))
        system.start_portal()
        system.start_relay(0)
        host = system.relay_hosts[0]
        assert host.ipv4 is not None
        # coturn ends an allocation whose data has no route, and private candidates have none here.
        host.ip("link", "add", "void", "type", "bridge")
        host.ip("link", "set", "void", "arp", "off", "up")
        host.ip("route", "add", "default", "dev", "void")
        yield _paired(system, relay=host.spawn("coturn", coturn(host.ipv4)))


def _paired(system: System, *, relay: Process | None, env: Mapping[str, str] | None = None) -> Ends:
    """A gateway and a client that have found each other, through the relay if there is one."""
    variables = NO_LIMITS_RAISED | dict(env or {})
    gateway = system.add_gateway("gateway", 31, env=variables)
    client = system.add_client("client", 30, env=variables)
    carriers = {"client": client.process, "gateway": gateway.process}
    if relay is not None:
        system.block_direct()
        carriers["relay"] = relay
    assert gateway.server is not None
    ends = Ends(client.host, gateway.server, client.router, carriers)
    ends.relayed_bytes = lambda: sum(system.relay_bytes())
    _until_reached(ends)
    time.sleep(SETTLE)
    return ends


class _Sites:
    """The machines of a contestant without a portal, as a `System` has them."""

    def __init__(self, lab: Lab) -> None:
        self.gateway_router = lab.router("gateway-router", 31)
        self.gateway = lab.host("gateway", self.gateway_router)
        self.server = lab.private_network(self.gateway, "gateway-web", 20)
        self.router = lab.router("client-router", 30)
        self.client = lab.host("client", self.router)
        self.hosts = {"gateway": self.gateway, "client": self.client}
        self.gateway_router.forward_port("udp", TUNNEL_PORT, self.gateway)

    def configure(self, name: str, device: str, families: tuple[int, ...] = (4, 6)) -> None:
        """Addresses, and the client's routes to what is behind the gateway."""
        host = self.hosts[name]
        host.ip("link", "set", device, "mtu", TUNNEL_MTU, "up")
        for family, address, network in zip((4, 6), TUNNEL_NETS[name], RESOURCE_NETS, strict=True):
            if family in families:
                host.ip("addr", "add", address, "dev", device, *(["nodad"] if family == 6 else []))
                if name == "client":
                    host.ip("route", "replace", network, "dev", device)

    def ends(self, processes: dict[str, Process], families: tuple[int, ...] = (4, 6)) -> Ends:
        """Once packets come through."""
        ends = Ends(self.client, self.server, self.router, processes, families)
        _until_reached(ends)
        return ends


def _until_reached(ends: Ends) -> None:
    """One answer in each family."""
    deadline = time.monotonic() + FIRST_ANSWER
    for family in ends.families:
        while ends.client.run("ping", "-c1", "-W1", SERVER[family], check=False).returncode != 0:
            dead = next((p for p in ends.programs.values() if not p.is_running), None)
            if dead is not None or time.monotonic() > deadline:
                logs = "\n".join(f"{p.name}: {p.tail(5)}" for p in ([dead] if dead else ends.programs.values()))
                raise LabError(f"no answer from {SERVER[family]}:\n{logs}")


def _wait_for_device(host: Host, device: str, process: Process) -> None:
    deadline = time.monotonic() + 10.0
    while host.run("ip", "link", "show", device, check=False).returncode != 0:
        if not process.is_running or time.monotonic() > deadline:
            raise LabError(f"{process.name} made no device {device}:\n{process.tail(5)}")
        time.sleep(0.02)


def _wg(*arguments: str) -> str:
    """`wg genkey`, or `wg pubkey` of a key."""
    command, *given = arguments
    result = subprocess.run(
        ["wg", command], input="".join(given), capture_output=True, text=True, check=True, timeout=10
    )
    return result.stdout.strip()
