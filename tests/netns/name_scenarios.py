"""What a whole system must do with names, filters, devices and the internet resource.

As in `scenarios.py`, each is for any mix of programs, builds its own lab, returns a note for people and
raises on failure.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from fz_core.lab import Host, Lab, LabError
from fz_core.lab.names import dig, start_names
from fz_core.lab.policy import INTERNET, ResourceSpec, dns, dynamic_pool, static_pool
from fz_core.lab.servers import start_echo, start_iperf, start_web
from fz_core.lab.system import Fetch, Programs, Shape, System
from tests.netns.scenarios import Scenario, complain, find_path, ours_took

ZONE = [
    "wiki 60 A 10.20.0.80", "wiki 60 AAAA fd20::80", "wiki 60 TXT hello",
    "four 60 A 10.20.0.80", "six 60 AAAA fd20::80", "alias 60 CNAME wiki", "moving 1 A 10.20.0.80",
    "_sip._tcp 60 SRV 1 2 5060 wiki", "other 60 A 10.20.0.80", "other 60 AAAA fd20::80",
]  # fmt: skip
CORP = "corp.example"
PROBED = {"firezone.dev": ["@ 60 A 192.0.2.1"]}  # official gateways use no server that does not know it
MEGABYTES = 5


@contextmanager
def named_system(
    programs: Programs,
    resources: dict[str, ResourceSpec | str] | None = None,
    *,
    shape: Shape | None = None,
    clients: bool = True,
    prepare: Callable[[System], None] = lambda system: None,
    gateway_env: Mapping[str, str] | None = None,
    **client: object,
) -> Iterator[System]:
    """A started system whose resources are names, and a client whose host asks the tunnel."""
    with Lab() as lab:
        system = System(lab, programs, shape)
        system.resources = {"corp": dns("**.corp.example"), **(resources or {})}
        system.allowed = set(system.resources)
        prepare(system)
        system.start_portal()
        for number in range(system.shape.relays):
            system.start_relay(number)
        system.add_gateway("gateway", 31, zones={CORP: ZONE, **PROBED}, env=gateway_env)
        if clients:
            system.add_client("client", 30, dns_control="etc-resolv-conf", **client)  # type: ignore[arg-type]
        yield system


def eventually(what: str, attempt: Callable[[], object], seconds: float = 20.0) -> float:
    """Repeat until it does not raise; how long that took."""
    started_at = time.monotonic()
    while True:
        try:
            attempt()
            return time.monotonic() - started_at
        except LabError as error:
            if time.monotonic() - started_at > seconds:
                raise LabError(f"{what}: not within {seconds:.0f} s: {error}") from None
            time.sleep(0.1)


def must_fail(what: str, attempt: Callable[[], object]) -> None:
    """LabError if it works."""
    try:
        attempt()
    except LabError:
        return
    raise LabError(f"{what} worked")


def load(system: System, name: str, *, family: int = 4, megabytes: float = 0.01, timeout: float = 5.0) -> Fetch:
    """Fetch by name."""
    return system.fetch(megabytes, name=f"{name}.{CORP}", family=family, timeout=timeout)


def ping(system: System, target: str, *, family: int = 4, client: int = 0, seconds: int = 2) -> None:
    """One echo; LabError if no answer comes."""
    result = system.clients[client].host.run(
        "ping", f"-{family}", "-c", "1", "-W", str(seconds), target, check=False, timeout=seconds + 8
    )
    if result.returncode != 0:
        raise LabError(f"ping {target}: {result.stdout.strip()} {result.stderr.strip()}")


def curl(system: System, url: str, *, client: int = 0, seconds: int = 3) -> float:
    """Fetch a URL; how long it took, LabError with curl's words if it failed."""
    started_at = time.monotonic()
    result = system.clients[client].host.run(
        "curl", "-sS", "--max-time", str(seconds), "-o", "/dev/null", url, check=False, timeout=seconds + 5
    )
    if result.returncode != 0:
        raise LabError(f"curl {url}: {result.stderr.strip()}")
    return time.monotonic() - started_at


def connects(system: System, target: str, port: int, *, client: int = 0, seconds: int = 3) -> None:
    """A TCP connection to any port."""
    command = f"exec 3<>/dev/tcp/{target}/{port}"
    result = system.clients[client].host.run("timeout", str(seconds), "bash", "-c", command, check=False)
    if result.returncode != 0:
        raise LabError(f"no connection to {target} port {port}: {result.stderr.strip()}")


def names(shape: Shape, path: str, *, block: bool = False) -> Scenario:
    """Names with both families, with one, an alias, over TCP; and what does not exist."""

    def scenario(programs: Programs) -> str:
        with named_system(programs, shape=shape) as system:
            if block:
                system.block_direct()
            first = eventually("the first page", lambda: load(system, "wiki"))
            for name, family in (("wiki", 4), ("wiki", 6), ("four", 4), ("six", 6), ("alias", 4), ("alias", 6)):
                load(system, name, family=family)
            find_path(system, path)
            result = load(system, "wiki", megabytes=MEGABYTES, timeout=60.0)
            ours_took(system, path)
            started_at = time.monotonic()
            must_fail("a name that does not exist", lambda: load(system, "absent"))
            if (took := time.monotonic() - started_at) > 4:
                raise LabError(f"an absent name failed only after {took:.1f} s")
            complain(system)
            return f"first page {first * 1000:.0f} ms, {result.mbit_s:.0f} Mbit/s"

    return scenario


def datagrams(programs: Programs) -> str:
    """ICMP and UDP by name, over both families."""
    with named_system(programs) as system:
        server = system.gateways[0].server
        assert server is not None
        start_iperf(server)
        eventually("ping", lambda: ping(system, f"wiki.{CORP}"))
        ping(system, f"wiki.{CORP}", family=6)
        losses = []
        for family in (4, 6):
            result = system.clients[0].host.run(
                "iperf3", f"-{family}", "-c", f"wiki.{CORP}", "-u", "-b", "20M", "-l", "1000", "-t", "1", "-J",
                check=False, timeout=30,
            )  # fmt: skip
            if result.returncode != 0:
                raise LabError(f"iperf3 over IPv{family}: {result.stdout[-300:]}")
            losses.append(json.loads(result.stdout)["end"]["sum"]["lost_percent"])
        if max(losses) > 5:
            raise LabError(f"{losses} % of the datagrams were lost")
        complain(system)
        return f"lost {losses[0]:.1f} % and {losses[1]:.1f} %"


def moving_name(programs: Programs) -> str:
    """A name gets another address: who asks again gets there, without a restart of anything."""
    with named_system(programs) as system:
        gateway = system.gateways[0]
        assert gateway.server is not None
        assert gateway.names is not None
        eventually("the name", lambda: load(system, "moving"))
        gateway.names.set_zone(CORP, [r for r in ZONE if "moving" not in r] + ["moving 1 A 10.20.0.81"])
        gateway.server.add_address("10.20.0.81")
        gateway.server.nft(
            "table ip old {\nchain in { type filter hook input priority 0;\n"
            "ip daddr 10.20.0.80 tcp dport 80 reject with tcp reset\n}\n}"
        )
        return f"there after {eventually('the new address', lambda: load(system, 'moving')):.1f} s"


def one_source_port(programs: Programs) -> str:
    """Three downloads at once from one port to three names of one server: the gateway must tell them apart."""
    with named_system(programs) as system:
        host = system.clients[0].host
        eventually("the page", lambda: load(system, "wiki"))
        proxies = {name: dig(host, f"{name}.{CORP}").records[0] for name in ("wiki", "four", "other")}
        host.sysctl("net.ipv4.ip_local_port_range=5555 5555")
        downloads = [
            host.spawn(
                f"download-{name}",
                [
                    "curl",
                    "-sS",
                    "--max-time",
                    "20",
                    "-o",
                    "/dev/null",
                    "-w",
                    "%{size_download} %{local_port}",
                    "--resolve",
                    f"{name}.{CORP}:80:{ip}",
                    f"http://{name}.{CORP}/bytes?num=3000000",
                ],
            )
            for name, ip in proxies.items()
        ]
        results = []
        for download in downloads:
            if download.wait(25) != 0:
                raise LabError(f"a download failed: {download.tail()}")
            results.append(download.output.strip())
        if set(results) != {"3000000 5555"}:
            raise LabError(f"unexpected: {results}")
        return ""


def portal_and_names(programs: Programs) -> str:
    """Without the portal, names go on: known ones, new ones of the same resource, and with ECN on."""
    with named_system(programs) as system:
        host = system.clients[0].host
        host.sysctl("net.ipv4.tcp_ecn=1")
        eventually("the page", lambda: load(system, "wiki"))
        system.portal.kill()
        for name, family in (("wiki", 4), ("wiki", 6), ("other", 4), ("four", 4), ("six", 6)):
            eventually(f"{name} without the portal", partial(load, system, name, family=family), 10.0)
        system.restart_portal()
        time.sleep(2.0)
        load(system, "alias")
        return ""


def filters(programs: Programs) -> str:
    """What filters allow passes, other things are refused at once; a changed filter counts at once."""
    web_only = {"corp": dns("**.corp.example", "tcp/80"), "net": ResourceSpec("cidr", "10.20.0.0/24", ("icmp",))}
    with named_system(programs, web_only) as system:
        server = system.gateways[0].server
        assert server is not None
        start_echo(server)
        eventually("the page", lambda: load(system, "wiki"))
        must_fail("ping by name", lambda: ping(system, f"wiki.{CORP}"))
        must_fail("another port", lambda: connects(system, f"wiki.{CORP}", 7))
        eventually("ping by address", lambda: ping(system, "10.20.0.80"))
        must_fail("a page by address", lambda: curl(system, "http://10.20.0.80/bytes?num=1"))
        system.resources["corp"] = dns("**.corp.example", "tcp/80", "icmp", "tcp/7")
        system.reload_policy()
        eventually("ping after the change", lambda: ping(system, f"wiki.{CORP}"))
        eventually("the other port after the change", lambda: connects(system, f"wiki.{CORP}", 7))
        load(system, "wiki")
        return ""


def overlapping(programs: Programs) -> str:
    """Two resources of one name and two networks of one address: what either allows passes."""
    resources: dict[str, ResourceSpec | str] = {
        "corp": dns("**.corp.example", "icmp"),
        "wiki": dns("wiki.corp.example", "tcp/80"),
        "wide": ResourceSpec("cidr", "10.20.0.0/16", ("icmp",)),
        "narrow": ResourceSpec("cidr", "10.20.0.80/32", ("tcp/80",)),
    }
    with named_system(programs, resources) as system:
        eventually("the page by name", lambda: load(system, "wiki"))
        eventually("ping by name", lambda: ping(system, f"wiki.{CORP}"))
        eventually("the page by address", lambda: curl(system, "http://10.20.0.80/bytes?num=1"))
        eventually("ping by address", lambda: ping(system, "10.20.0.80"))
        must_fail("another port", lambda: connects(system, "10.20.0.80", 7))
        return ""


def questions(programs: Programs) -> str:
    """SRV and TXT are answered in the site; A, AAAA and PTR by the client; over UDP and TCP."""
    with named_system(programs) as system:
        host = system.clients[0].host
        for tcp in (False, True):
            for name, kind, expected in (
                (f"_sip._tcp.{CORP}", "SRV", f"1 2 5060 wiki.{CORP}."),
                (f"wiki.{CORP}", "TXT", '"hello"'),
            ):
                eventually(f"{kind}, tcp={tcp}", partial(expect, host, name, kind, expected, tcp))
            answer = dig(host, f"wiki.{CORP}", "A", tcp=tcp)
            if len(answer.records) != 4 or any(not r.startswith("100.96.") for r in answer.records):
                raise LabError(f"unexpected addresses {answer}")
            if len(dig(host, f"wiki.{CORP}", "AAAA", tcp=tcp).records) != 4:
                raise LabError("not four IPv6 addresses")
            if dig(host, f"wiki.{CORP}", "HTTPS", tcp=tcp).records:
                raise LabError("an HTTPS record was answered")
            reverse = ".".join(reversed(answer.records[0].split("."))) + ".in-addr.arpa"
            expect(host, reverse, "PTR", f"wiki.{CORP}.", tcp)
        if dig(host, "use-application-dns.net").status != "NXDOMAIN":
            raise LabError("the canary is not denied")
        complain(system)
        return ""


def expect(host: Host, name: str, kind: str, record: str, tcp: bool) -> None:
    """LabError unless this record is answered."""
    answer = dig(host, name, kind, tcp=tcp)
    if record not in answer.records:
        raise LabError(f"{name} {kind} was answered {answer}")


def tunnelled_upstream(programs: Programs) -> str:
    """The portal's name server stands behind the gateway: other names are asked there, over UDP and TCP."""

    def prepare(system: System) -> None:
        system.dns_servers = ["10.20.0.80"]

    resources: dict[str, ResourceSpec | str] = {"corp": dns("wiki.corp.example"), "net": "10.20.0.0/24"}
    with named_system(programs, resources, prepare=prepare) as system:
        host = system.clients[0].host
        for tcp in (False, True):
            eventually("other names", partial(expect, host, f"other.{CORP}", "A", "10.20.0.80", tcp))
        if dig(host, f"absent.{CORP}").status != "NXDOMAIN":
            raise LabError("an absent name is not denied")
        eventually("the page", lambda: load(system, "wiki"))
        asked = system.gateways[0].names
        assert asked is not None
        if (f"other.{CORP}", "A") not in asked.queries():
            raise LabError("the server behind the gateway was not asked")
        complain(system)
        return ""


def local_upstream(programs: Programs) -> str:
    """Without servers from the portal, other names are asked at the host's own server, outside the tunnel."""
    with named_system(programs, clients=False) as system:
        public = system.lab.public_host("names", 53)
        start_names(public, {"public.example": ["www 60 A 192.0.2.80", "big 60 TXT " + " ".join(["x" * 250] * 8)]})
        assert public.ipv4 is not None
        system.add_client("client", 30, dns_control="etc-resolv-conf", nameservers=[public.ipv4])
        host = system.clients[0].host
        for tcp in (False, True):
            expect(host, "www.public.example", "A", "192.0.2.80", tcp)
        for tcp in (False, True):  # over UDP it is cut off, and dig asks again over TCP
            if len(dig(host, "big.public.example", "TXT", tcp=tcp).records) != 1:
                raise LabError("a long answer did not come")
        eventually("the page", lambda: load(system, "wiki"))
        complain(system)
        return ""


def internet(programs: Programs) -> str:
    """Everything else through the gateway, but neither its own network nor other clients."""
    with named_system(programs, {"everything": INTERNET}, clients=False) as system:
        public = system.lab.public_host("site", 80)
        start_web(public)
        gateway = system.gateways[0]
        for family in ("ip", "ip6"):
            gateway.host.nft(
                f"table {family} out {{\nchain post {{ type nat hook postrouting priority 100;\n"
                f'oifname != "tun-firezone" masquerade\n}}\n}}'
            )
        system.add_client("client", 30, dns_control="etc-resolv-conf", internet=True)
        system.add_client("other", 32)
        eventually("a public page", lambda: curl(system, f"http://{public.ipv4}/bytes?num=1"))
        eventually("a public page over IPv6", lambda: curl(system, f"http://[{public.ipv6}]/bytes?num=1"))
        eventually("ping", lambda: ping(system, str(public.ipv4)))
        must_fail("the gateway's network", lambda: curl(system, "http://10.20.0.80/bytes?num=1"))
        other = re.search(r"inet (\S+)/32", system.clients[1].host.run("ip", "addr", "show", "tun-firezone").stdout)
        assert other is not None
        must_fail("another client", lambda: ping(system, other[1]))
        eventually("a page by name", lambda: load(system, "wiki"))
        return ""


def device_pools(programs: Programs) -> str:
    """One client reaches another through a static pool, by address and by a dynamic pool's name; not the other way."""
    resources: dict[str, ResourceSpec | str] = {
        "devices": static_pool("server", filters=("icmp", "tcp/80")),
        "names": dynamic_pool("*.devices.example"),
    }

    def prepare(system: System) -> None:
        system.add_account("server")
        system.allowed = {"corp"}
        system.allowed_to = {"tester": {"devices", "names"}}

    with named_system(programs, resources, prepare=prepare) as system:
        system.add_client("server", 34, account="server", program=programs.peer)
        start_web(system.clients[1].host)
        start_echo(system.clients[1].host)
        ips = [address_of(system, 1, family) for family in (4, 6)]
        eventually("ping", lambda: ping(system, ips[0]))
        eventually("ping over IPv6", lambda: ping(system, ips[1], family=6))
        eventually("a page", lambda: curl(system, f"http://{ips[0]}/bytes?num=1000000"))
        must_fail("a port that is not allowed", lambda: connects(system, ips[0], 7))
        must_fail("the other way", lambda: ping(system, address_of(system, 0, 4), client=1))
        eventually("the name", lambda: ping(system, "server.devices.example"))
        if dig(system.clients[0].host, "nobody.devices.example").status != "NXDOMAIN":
            raise LabError("an unknown device is not denied")
        system.resources["devices"] = static_pool("server", filters=("icmp",))
        system.reload_policy()
        eventually("the filter", lambda: must_fail("the page", lambda: curl(system, f"http://{ips[0]}/bytes?num=1")))
        ping(system, ips[0])
        system.allowed_to = {"tester": {"names"}}
        system.reload_policy()
        eventually("revocation", lambda: must_fail("ping", lambda: ping(system, ips[0], seconds=1)))
        return ""


def address_of(system: System, client: int, family: int) -> str:
    """A client's address inside the tunnel."""
    shown = system.clients[client].host.run("ip", f"-{family}", "-o", "addr", "show", "tun-firezone", "scope", "global")
    found = re.search(r"inet6? (\S+)/", shown.stdout)
    if found is None:
        raise LabError(f"no IPv{family} address: {shown.stdout}")
    return found[1]


def expiry(programs: Programs) -> str:
    """Access to a name expires during use; a new grant brings it back by itself."""

    def prepare(system: System) -> None:
        system.expires_in = 5

    with named_system(programs, prepare=prepare) as system:
        eventually("the page", lambda: load(system, "wiki"))
        ended_at = time.monotonic() + 12
        failed = longest = 0.0
        while time.monotonic() < ended_at:
            started_at = time.monotonic()
            try:
                load(system, "wiki", timeout=2.0)
            except LabError:
                failed += time.monotonic() - started_at
                longest = max(longest, failed)
            else:
                failed = 0.0
            time.sleep(0.2)
        if longest > 5:
            raise LabError(f"away for {longest:.1f} s")
        return f"never away for more than {longest:.1f} s"


def named_revocation(programs: Programs) -> str:
    """Access to a name is taken away and given again."""
    with named_system(programs, {"net": "10.20.0.0/24"}) as system:
        eventually("the page", lambda: load(system, "wiki"))
        system.allowed = {"net"}
        system.reload_policy()
        eventually("revocation", lambda: must_fail("the page", lambda: load(system, "wiki", timeout=2.0)))
        eventually("the other resource", lambda: curl(system, "http://10.20.0.80/bytes?num=1"))
        system.allowed = {"corp", "net"}
        system.reload_policy()
        return f"again after {eventually('the new grant', lambda: load(system, 'wiki')) * 1000:.0f} ms"


def names_and_restarts(programs: Programs) -> str:
    """Gateway and client restart; names go on, and the client leaves its host's DNS as it found it."""
    with named_system(programs) as system:
        client, gateway = system.clients[0], system.gateways[0]
        eventually("the page", lambda: load(system, "wiki"))
        system.restart(gateway)
        took = eventually("after the gateway's restart", lambda: load(system, "wiki"), 30.0)
        before = "nameserver 127.0.0.53\n"
        client.process.stop()
        if client.host.read_etc("resolv.conf") != before:
            raise LabError(f"resolv.conf was left as:\n{client.host.read_etc('resolv.conf')}")
        system.restart(client)
        eventually("after the client's restart", lambda: load(system, "other"))
        system.restart(client, kill=True)
        eventually("after the client was killed", lambda: load(system, "wiki"))
        client.process.stop()
        if client.host.read_etc("resolv.conf") != before:
            raise LabError(f"resolv.conf was left as:\n{client.host.read_etc('resolv.conf')}")
        return f"back {took:.1f} s after the gateway's restart"


NAME_SCENARIOS: dict[str, Scenario] = {
    "names": names(Shape(), "direct"),
    "names, relayed": names(Shape(), "relayed", block=True),
    "names, UDP and ICMP": datagrams,
    "a name that moves": moving_name,
    "one source port for three names": one_source_port,
    "names without the portal": portal_and_names,
    "filters": filters,
    "overlapping resources": overlapping,
    "SRV, TXT, PTR, DNS over TCP": questions,
    "name server behind the gateway": tunnelled_upstream,
    "name server outside the tunnel": local_upstream,
    "internet resource": internet,
    "device pools": device_pools,
    "access to a name expires": expiry,
    "access to a name is revoked": named_revocation,
    "names and restarts": names_and_restarts,
}
