"""A whole system in a lab: portal, relays, gateways with a web server behind them, clients.

    system = System(lab)
    system.resources["app"] = policy.dns("*.example.com", "tcp/80")
    system.allowed.add("app")
    system.start_portal()
    system.start_relay(0)
    system.add_gateway("gateway", 31, zones={"example.com": ["app 60 A 10.20.0.80"]})
    system.add_client("client", 30, dns_control="etc-resolv-conf")

Every program may be ours or another one with the same command line, so that mixes can be tried.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fz_core.lab.names import NameServer, Zones, start_names
from fz_core.lab.policy import ResourceSpec, Rules
from fz_core.lab.processes import LabError, Process
from fz_core.lab.servers import start_web
from fz_core.lab.topology import Host, Lab, Router
from fz_core.lab.webserver import document_digest

PORTAL_PORT = 8081
ROUTE_TABLE = str(0x2021FD00)
NOBODY = "127.0.0.53"  # a name server that is not there, unless the machine runs one
ACCOUNT = "tester"
CLIENT = "client of "
SENTINELS = "nameserver 100.100.111."
RESOURCE_NET, RESOURCE_NET6 = "10.20.0.0/24", "fd20::/64"
QUIET = {"FIREZONE_NO_TELEMETRY": "true", "RUST_LOG": "info", "PYTHONUNBUFFERED": "1"}


def ours(module: str) -> tuple[str, ...]:
    """The command line of one of our programs, of this very tree."""
    return (sys.executable, "-m", module)


@dataclass(frozen=True, slots=True)
class Programs:
    """Which programs play which part. The official ones take the same arguments and variables.

    `peer` is the client on whose device another client calls; without it that is `client` too. With `old_clients` the
    portal lets clients before 1.4 use any gateway, with `iceless` it lets pairs that can do without ICE do so.
    """

    gateway: tuple[str, ...] = ours("fz_gateway")
    client: tuple[str, ...] = ours("fz_headless")
    relay: tuple[str, ...] = ours("fz_core.commands.relay")
    portal: tuple[str, ...] = ours("fz_core.commands.portal")
    peer: tuple[str, ...] | None = None
    old_clients: bool = False
    iceless: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """Where the two ends stand. Families are 4 and 6.

    `iceless` is as in `Programs`. With `resolvers` each machine's own name
    server answers. With `named_portal` the client knows the portal by name, with addresses of both families, also
    while its own network has only one.
    """

    client_nat: str = "cone"
    gateway_nat: str = "cone"
    client_families: tuple[int, ...] = (4, 6)
    gateway_families: tuple[int, ...] = (4, 6)
    relay_families: tuple[int, ...] = (4, 6)
    relays: int = 1
    delay_ms: float = 0.0
    iceless: bool = False
    resolvers: bool = False
    named_portal: bool = False


@dataclass(frozen=True, slots=True)
class Fetch:
    """What `curl` saw."""

    status: int
    bytes: int
    first_byte_s: float
    total_s: float
    digest: str

    @property
    def mbit_s(self) -> float:
        """Mean throughput."""
        return self.bytes * 8 / self.total_s / 1e6 if self.total_s else 0.0


@dataclass
class Member:
    """A gateway or client: its machine and its program. Behind a gateway a `server`, perhaps with `names`."""

    name: str
    host: Host
    router: Router
    process: Process
    env: Mapping[str, str]
    command: tuple[str, ...]
    runs: int = 1
    logs: list[Path] = field(default_factory=list)
    server: Host | None = None
    names: NameServer | None = None


class System:
    """Builds everything inside a lab, one part at a time or all at once with `start`.

    What the portal allows are attributes, read by `start_portal` and `reload_policy`: `resources` by name (a text is a
    network), `allowed` to everybody, `allowed_to` one account each, lifetimes, DNS (IP addresses and https URLs), and
    whether connections may be `iceless`.
    """

    def __init__(self, lab: Lab, programs: Programs | None = None, shape: Shape | None = None) -> None:
        self.lab, self.programs, self.shape = lab, programs or Programs(), shape or Shape()
        self.gateways: list[Member] = []
        self.clients: list[Member] = []
        self.relays: list[Process] = []
        self.relay_hosts: list[Host] = []
        self._relay_runs = 1
        self.log_filter = QUIET["RUST_LOG"]
        self._tokens = {name: secrets.token_hex(20) for name in ("gateway", "relay", CLIENT + ACCOUNT)}
        self._policy = lab.folder / "policy.toml"
        self.resources: dict[str, str | ResourceSpec] = {"net": RESOURCE_NET, "net6": RESOURCE_NET6}
        self.allowed = {"net", "net6"}
        self.allowed_to: dict[str, set[str]] = {}
        self.expires_in: int | None = None
        self.dns_servers: list[str] = []
        self.doh_servers: list[str] = []
        self.search_domain: str | None = None
        self.old_clients = self.programs.old_clients
        self.iceless = self.shape.iceless or self.programs.iceless

    def start(self) -> None:
        """One gateway and one client, ready to talk."""
        self.start_portal()
        for number in range(self.shape.relays):
            self.start_relay(number)
        self.add_gateway("gateway", 31)
        self.add_client("client", 30)

    # parts

    def start_portal(self) -> None:
        """The portal on its own machine."""
        self.portal_host = self.lab.public_host("portal", 10)
        self.write_policy()
        self.portal = self._spawn_portal()
        self._wait_until_portal_serves()

    def _spawn_portal(self) -> Process:
        state = self.lab.folder / "portal.sqlite"
        listen = f"[::]:{PORTAL_PORT}"
        return self.portal_host.spawn(
            "portal",
            [*self.programs.portal, "--policy", str(self._policy), "--state", str(state), "--listen", listen],
            QUIET,
        )

    def restart_portal(self) -> None:
        """Kill the portal and start it again on the same state."""
        self.portal.kill()
        self.portal = self._spawn_portal()
        self._wait_until_portal_serves()

    def _wait_until_portal_serves(self) -> None:
        url = f"http://127.0.0.1:{PORTAL_PORT}/healthz"
        self._until(lambda: self.portal_host.run("curl", "-sf", url, check=False).returncode == 0, "the portal")

    def reload_policy(self) -> None:
        """Make the portal read the policy anew; LabError if it refuses."""
        self.write_policy()
        verdict = "The new policy is"
        before = self.portal.output.count(verdict)
        self.portal.send_signal(signal.SIGHUP)
        self._until(lambda: self.portal.output.count(verdict) > before, "the new policy", self.portal)
        if self.portal.output.rpartition(verdict)[2].startswith(" refused"):
            raise LabError(f"the portal refuses the policy:\n{self.portal.tail()}")

    def write_policy(self) -> None:
        """The policy file, from what this object allows."""
        accounts = {name.removeprefix(CLIENT): t for name, t in self._tokens.items() if name.startswith(CLIENT)}
        everybody = {"everyone": sorted(self.allowed)}
        rules = Rules(
            self._tokens["gateway"],
            self._tokens["relay"],
            accounts,
            self.resources,
            everybody | {account: sorted(names) for account, names in self.allowed_to.items()},
            self.expires_in,
            [*self.dns_servers, *self.doh_servers],
            self.search_domain,
            self.old_clients,
            self.iceless,
        )
        self._policy.touch(0o600)
        self._policy.write_text(rules.text())

    def add_account(self, name: str) -> None:
        """Another owner of clients; with the portal running, `reload_policy` makes it known."""
        self._tokens.setdefault(CLIENT + name, secrets.token_hex(20))

    def start_relay(self, number: int) -> None:
        """A relay on a machine of its own."""
        families = self.shape.relay_families
        host = self.lab.public_host(f"relay{number}", 101 + number, families=families)
        host.write_etc("hosts", self._hosts(families))
        self.relay_hosts.append(host)
        self.relays.append(self._spawn_relay(number, f"relay{number}"))
        self._wait_for_relay(number)

    def restart_relay(self, number: int) -> None:
        """Kill a relay, if it lives, and start it again: what it knew is gone."""
        self.relays[number].kill()
        self._relay_runs += 1
        self.relays[number] = self._spawn_relay(number, f"relay{number}-{self._relay_runs}")
        self._wait_for_relay(number)

    def _spawn_relay(self, number: int, name: str) -> Process:
        host = self.relay_hosts[number]
        families = self.shape.relay_families
        env = {**QUIET, "FIREZONE_TOKEN": self._tokens["relay"], "FIREZONE_API_URL": self.api_url(families)}
        if host.ipv4 is not None:
            env["PUBLIC_IP4_ADDR"] = host.ipv4
        if host.ipv6 is not None:
            env["PUBLIC_IP6_ADDR"] = host.ipv6
        return host.spawn(name, self.programs.relay, env)

    def _wait_for_relay(self, number: int) -> None:
        probe = ("curl", "-sf", "http://127.0.0.1:8080/readyz")
        host, relay = self.relay_hosts[number], self.relays[number]
        self._until(lambda: host.run(*probe, check=False).returncode == 0, f"relay {number}", relay)

    def add_gateway(
        self,
        name: str,
        number: int,
        *,
        zones: Zones | None = None,
        nameservers: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> Member:
        """A gateway behind a router of its own, with a web server only it can reach.

        `zones` are served on the web server's machine, where the gateway then asks first.
        """
        shape = self.shape
        router = self.lab.router(f"{name}-router", number, nat=shape.gateway_nat, families=shape.gateway_families)
        host = self.lab.host(name, router)
        server = self.lab.private_network(host, f"{name}-web", 20)
        start_web(server)
        names = None if zones is None else start_names(server, {**self._portal_zone(), **zones})
        asked = [*(names.addresses[:1] if names else ()), *nameservers]
        variables = self._environment(name, "gateway", shape.gateway_families) | dict(env or {})
        member = self._member(name, host, router, self.programs.gateway, shape.gateway_families, asked, variables)
        member.server, member.names = server, names
        self.gateways.append(member)
        return member

    def add_client(
        self,
        name: str,
        number: int,
        *,
        dns_control: str = "disabled",
        internet: bool = False,
        nameservers: Sequence[str] = (),
        account: str = ACCOUNT,
        env: Mapping[str, str] | None = None,
        program: tuple[str, ...] | None = None,
    ) -> Member:
        """A client behind a router of its own; `nameservers` are what its machine asks without us."""
        shape = self.shape
        router = self.lab.router(f"{name}-router", number, nat=shape.client_nat, families=shape.client_families)
        host = self.lab.host(name, router)
        options = ["--dns-control", dns_control, *(["--activate-internet-resource"] if internet else [])]
        if CLIENT + account not in self._tokens:
            self.add_account(account)
            self.reload_policy()
        command = (*(program or self.programs.client), *options, "standalone")
        families = () if shape.named_portal else shape.client_families
        variables = self._environment(name, CLIENT + account, families) | dict(env or {})
        member = self._member(name, host, router, command, families, nameservers, variables)
        self.clients.append(member)
        return member

    def _member(
        self, name: str, host: Host, router: Router, command: tuple[str, ...], families: tuple[int, ...],
        nameservers: Sequence[str], env: Mapping[str, str],
    ) -> Member:  # fmt: skip
        if self.shape.delay_ms:
            for device in ("internet", "lan"):
                router.delay(device, self.shape.delay_ms / 2)
        host.write_etc("resolv.conf", "".join(f"nameserver {ip}\n" for ip in nameservers or [NOBODY]))
        host.write_etc("hosts", self._hosts(families or (4, 6)))
        if not nameservers and (4 not in families or self.shape.resolvers):
            # The portal is known by name there, and official programs insist on asking a name server too.
            portal = [self.portal_host.ipv6, *([] if families == (6,) else [self.portal_host.ipv4])]
            known = [f"portal={ip}" for ip in portal]
            host.spawn(f"{name}-names", [*ours("fz_core.lab.resolver"), *known]).wait_for_line("serving")
        process = host.spawn(name, command, env)
        member = Member(name, host, router, process, env, command, logs=[process.log])
        self.wait_until_up(member)
        return member

    def _environment(self, name: str, token: str, families: tuple[int, ...]) -> dict[str, str]:
        return {
            **QUIET,
            "RUST_LOG": self.log_filter,
            "FIREZONE_TOKEN": self._tokens[token],
            "FIREZONE_API_URL": self.api_url(families),
            "FIREZONE_ID": f"{name}-id",
            "FIREZONE_NAME": name,
            "FZFF_ICMP_ERROR_UNREACHABLE_PROHIBITED_CREATE_NEW_FLOW": "true",
        }

    def _portal_zone(self) -> Zones:
        host = self.portal_host
        return {"portal": [f"@ 60 A {host.ipv4}", f"@ 60 AAAA {host.ipv6}"]}

    def _hosts(self, families: Sequence[int]) -> str:
        lines = ["127.0.0.1 localhost"]
        if 4 in families:
            lines.append(f"{self.portal_host.ipv4} portal")
        if 6 in families:
            lines.append(f"{self.portal_host.ipv6} portal")
        return "\n".join(lines) + "\n"

    def api_url(self, families: Sequence[int]) -> str:
        """Where the portal is for a machine of these families."""
        return f"ws://{self.portal_host.ipv4 if 4 in families else 'portal'}:{PORTAL_PORT}"

    def wait_until_up(self, member: Member) -> None:
        """Until its device has addresses and routes, and its host asks our servers if that was wanted."""

        def shows(*what: str) -> bool:
            shown = member.host.run("ip", "-j", *what, check=False)
            return shown.returncode == 0 and bool(shown.stdout.strip()) and any(json.loads(shown.stdout))

        def is_up() -> bool:
            has_address = shows("addr", "show", "dev", "tun-firezone", "scope", "global")
            has_routes = has_address and shows("route", "show", "table", ROUTE_TABLE, "dev", "tun-firezone")
            return has_routes and (not takes_dns or SENTINELS in member.host.read_etc("resolv.conf"))

        takes_dns = "etc-resolv-conf" in member.command

        self._until(is_up, f"the tunnel device of {member.name}", member.process)

    def restart(self, member: Member, *, kill: bool = False) -> None:
        """Stop a program, or kill it, and start it again."""
        if kill:
            member.process.kill()
        else:
            member.process.stop()
        self.relaunch(member)
        self.wait_until_up(member)

    def relaunch(self, member: Member) -> None:
        """Start a program that ended once more, without waiting for it."""
        member.runs += 1
        member.process = member.host.spawn(f"{member.name}-{member.runs}", member.command, member.env)
        member.logs.append(member.process.log)

    # use

    def fetch(
        self, megabytes: float, *, client: int = 0, family: int = 4, timeout: float = 60.0, name: str | None = None
    ) -> Fetch:
        """Fetch the document through the tunnel, by address or `name`, and check it. LabError if it does not come."""
        count = int(megabytes * 1_000_000)
        target = name or ("10.20.0.80" if family == 4 else "[fd20::80]")
        report = "%{http_code} %{size_download} %{time_starttransfer} %{time_total}"
        path = self.lab.folder / f"download-{client}"
        result = self.clients[client].host.run(
            "curl", f"-{family}", "-sS", "--max-time", str(timeout), "-o", str(path), "-w", report,
            f"http://{target}/bytes?num={count}", check=False, timeout=timeout + 5,
        )  # fmt: skip
        if result.returncode != 0:
            raise LabError(f"curl failed with {result.returncode}: {result.stderr.strip()}")
        status, size, first, total = result.stdout.split()
        fetched = Fetch(int(status), int(size), float(first), float(total), file_digest(path))
        if fetched.digest != document_digest(count):
            raise LabError(f"the checksum of {size} bytes is wrong")
        return fetched

    def path_of(self, client: int = 0) -> str:
        """`direct` or `relayed`, as our client logged its last choice; `unknown` for other programs."""
        for line in reversed(self.clients[client].process.output.splitlines()):
            if "PathInUse" in line:
                return "relayed" if "relayed=True" in line else "direct"
        return "unknown"

    def modes(self) -> set[bool]:
        """Which connections the portal ordered: without ICE or with it."""
        ordered = re.findall(r"Authorized .* iceless=(True|False)", self.portal.output)
        return {mode == "True" for mode in ordered}

    def relay_bytes(self) -> list[int]:
        """What each relay's machine has sent so far, the dead ones' too: tells which of them carries the data."""
        shown = [host.run("ip", "-s", "-j", "link", "show", "dev", host.device) for host in self.relay_hosts]
        return [int(json.loads(result.stdout)[0]["stats64"]["tx"]["bytes"]) for result in shown]

    def relay_addresses(self) -> list[str]:
        """Where relays are, or would be."""
        numbers = range(101, 101 + self.shape.relays)
        return [address for n in numbers for address in (f"203.0.113.{n}", f"203:0:113::{n}")]

    def block_direct(self) -> None:
        """Routers of both ends let UDP pass to relays only."""
        for member in (*self.gateways, *self.clients):
            member.router.block_udp(*self.relay_addresses())

    def warnings(self) -> list[str]:
        """Lines of gateways and clients that say WARN or ERROR."""
        return [
            f"{member.name}: {line}"
            for member in (*self.gateways, *self.clients)
            for log in member.logs
            for line in log.read_text(errors="replace").splitlines()
            if " WARN " in line or " ERROR " in line or "Traceback" in line
        ]

    def _until(
        self, condition: Callable[[], bool], what: str, process: Process | None = None, timeout: float = 15.0
    ) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            dead = process is not None and not process.is_running
            if dead or time.monotonic() > deadline:
                raise LabError(f"{what} did not come up:\n{process.tail() if process else self.portal.tail()}")
            time.sleep(0.02)


def file_digest(path: Path) -> str:
    """Lower-case hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
