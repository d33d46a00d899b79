"""The lab is what it claims: NAT flavours seen from real sockets, delay, loss, and nothing left behind."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import dns.message
import pytest

from fz_core.lab import Host, Lab, LabError, Process
from fz_core.lab.certificates import Authority
from fz_core.lab.names import Answer, dig, start_names
from fz_core.lab.policy import dns as dns_resource
from fz_core.lab.servers import start_doh, start_echo, start_iperf
from fz_core.lab.system import System
from fz_core.lab.webserver import document_digest
from tests.netns.scenarios import eventually

pytestmark = pytest.mark.root

FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab
    assert lab.leftovers() == []


@FAMILIES
def test_cone_keeps_one_mapping_and_lets_only_known_peers_answer(lab: Lab, family: int) -> None:
    first, second = lab.public_host("first", 10), lab.public_host("second", 11)
    laptop = lab.host("laptop", lab.router("home", 30))
    inside = bound(laptop, family, 40000)
    ours, other = bound(first, family, 5000), bound(second, family, 5001)
    seen = [exchange(inside, ours, first), exchange(inside, other, second)]
    assert seen[0] == seen[1] == ("203.0.113.30" if family == socket.AF_INET else "203:0:113::30", 40000)
    stranger = bound(second, family, 5002)
    stranger.sendto(b"unasked", seen[0])
    ours.sendto(b"asked", seen[0])
    assert receive(inside) == b"asked"


@FAMILIES
def test_symmetric_maps_every_destination_anew(lab: Lab, family: int) -> None:
    hosts = [lab.public_host(f"server{n}", 10 + n) for n in range(3)]
    laptop = lab.host("laptop", lab.router("home", 30, nat="symmetric"))
    inside = bound(laptop, family, 40000)
    ports = {exchange(inside, bound(host, family, 5000), host)[1] for host in hosts}
    assert len(ports) == 3
    assert 40000 not in ports


@FAMILIES
def test_two_cones_can_be_punched_even_if_the_first_datagram_is_lost(lab: Lab, family: int) -> None:
    """The unasked datagram must not take the outside port from the host inside."""
    a = lab.host("a", lab.router("ra", 30))
    b = lab.host("b", lab.router("rb", 31))
    outside = ["203.0.113.30", "203.0.113.31"] if family == socket.AF_INET else ["203:0:113::30", "203:0:113::31"]
    left, right = bound(a, family, 40000), bound(b, family, 41000)
    left.sendto(b"lost", (outside[1], 41000))
    eventually_silent(right)
    right.sendto(b"punched", (outside[0], 40000))
    data, source = left.recvfrom(100)
    assert (data, source[:2]) == (b"punched", (outside[1], 41000))


def test_blocked_udp_passes_to_the_relay_only(lab: Lab) -> None:
    relay, peer = lab.public_host("relay", 101), lab.public_host("peer", 11)
    router = lab.router("office", 30)
    laptop = lab.host("laptop", router)
    router.block_udp("203.0.113.101", "203:0:113::101")
    for family in (socket.AF_INET, socket.AF_INET6):
        inside, at_relay, at_peer = (bound(h, family, 0) for h in (laptop, relay, peer))
        inside.sendto(b"blocked", where(peer, at_peer))
        exchange(inside, at_relay, relay)
        eventually_silent(at_peer)
        assert tcp_works(laptop, peer, family)
    router.unblock_udp()
    exchange(bound(laptop, socket.AF_INET, 0), bound(peer, socket.AF_INET, 0), peer)


@FAMILIES
def test_without_nat_everybody_reaches_the_host_itself(lab: Lab, family: int) -> None:
    early = lab.public_host("early", 10)
    server = lab.host("server", lab.router("open", 40, nat="none"))
    late = lab.public_host("late", 11)
    behind = lab.host("behind", lab.router("home", 30))
    listening = bound(server, family, 5000)
    for host in (early, late, behind):
        exchange(bound(host, family, 0), listening, server)


@FAMILIES
def test_forwarded_ports_reach_the_host(lab: Lab, family: int) -> None:
    router = lab.router("home", 30)
    server = lab.host("server", router)
    outside = lab.public_host("outside", 10)
    router.forward_port("udp", 3478, server)
    listening = bound(server, family, 3478)
    asking = bound(outside, family, 0)
    public = router.public_ipv4 if family == socket.AF_INET else router.public_ipv6
    asking.sendto(b"hello", (public, 3478))
    data, source = listening.recvfrom(100)
    assert data == b"hello"
    listening.sendto(b"answer", source)
    assert asking.recvfrom(100)[1][:2] == (public, 3478)


@pytest.mark.parametrize(("families", "present"), [((4,), "inet"), ((6,), "inet6")])
def test_hosts_have_the_wanted_families_and_no_default_route(lab: Lab, families: tuple[int, ...], present: str) -> None:
    laptop = lab.host("laptop", lab.router("home", 30, families=families))
    public = lab.public_host("public", 10, families=families)
    for host in (laptop, public):
        (device,) = json.loads(host.run("ip", "-j", "addr", "show", "dev", "eth0").stdout)
        assert {a["family"] for a in device["addr_info"] if a["scope"] == "global"} == {present}
        for family in ("-4", "-6"):
            assert "default" not in host.run("ip", family, "route").stdout
    laptop.run("ping", "-c1", "-W5", public.ipv4 or public.ipv6 or "")


def test_delay_and_loss(lab: Lab) -> None:
    server = lab.public_host("server", 10)
    router = lab.router("home", 30)
    laptop = lab.host("laptop", router)
    for device in ("internet", "lan1"):
        router.delay(device, 30)

    def fastest(*options: str) -> float:
        ping = laptop.run("ping", "-c3", "-i0.2", *options, str(server.ipv4)).stdout
        return min(float(line.split("time=")[1].split()[0]) for line in ping.splitlines() if "time=" in line)

    assert fastest() >= 60
    router.delay("internet", loss=100)
    assert laptop.run("ping", "-c2", "-i0.2", "-W1", "203.0.113.10", check=False).returncode == 1
    for device in ("internet", "lan1"):
        router.delay(device)
    assert fastest("-W5") < 60


def test_a_delayed_path_carries_large_transfers_unharmed(lab: Lab) -> None:
    web = lab.public_host("web", 10)
    router = lab.router("home", 30)
    laptop = lab.host("laptop", router)
    for device in ("internet", "lan1"):
        router.delay(device, 5)
    web.spawn("web", [sys.executable, "-m", "fz_core.lab.webserver"]).wait_for_line("serving")
    path = lab.folder / "document"
    laptop.run("curl", "-sSf", "-o", str(path), "http://203.0.113.10/bytes?num=9000001")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == document_digest(9000001)


def test_private_network_serves_the_known_document(lab: Lab) -> None:
    gateway = lab.host("gateway", lab.router("site", 31))
    web = lab.private_network(gateway, "web", 20)
    web.spawn("web", [sys.executable, "-m", "fz_core.lab.webserver"]).wait_for_line("serving")
    for target in ("10.20.0.80", "[fd20::80]"):
        path = lab.folder / "document"
        gateway.run("curl", "-sSf", "-o", str(path), f"http://{target}/bytes?num=9000001")
        assert hashlib.sha256(path.read_bytes()).hexdigest() == document_digest(9000001)
    web.add_address("10.20.0.81")
    web.add_address("fd20::81")
    for target in ("10.20.0.81", "[fd20::81]"):
        gateway.run("curl", "-sSf", "-o", "/dev/null", f"http://{target}/bytes?num=1")
    status = gateway.run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://10.20.0.80/bytes?num=-1")
    assert status.stdout == "400"


def test_programs_see_their_own_etc(lab: Lab) -> None:
    before = Path("/etc/hosts").read_text()
    host = lab.public_host("host", 10)
    host.write_etc("hosts", "203.0.113.99 portal\n")
    assert host.run("getent", "ahostsv4", "portal").stdout.split()[0] == "203.0.113.99"
    assert Path("/etc/hosts").read_text() == before


def test_programs_of_a_machine_share_an_etc_they_may_change(lab: Lab) -> None:
    before, listed = Path("/etc/resolv.conf").read_text(), sorted(Path("/etc").iterdir())
    first, second = lab.public_host("first", 10), lab.public_host("second", 11)
    for host in (first, second):
        host.write_etc("resolv.conf", "nameserver 192.0.2.1\n")
    watcher = first.spawn("watcher", ["sh", "-c", "echo ready; read x < $0; cat /etc/resolv.conf", lab_fifo(lab)])
    watcher.wait_for_line("ready")
    first.run("sh", "-c", "echo nameserver 192.0.2.2 > /etc/resolv.conf")  # in place
    assert first.read_etc("resolv.conf") == "nameserver 192.0.2.2\n"
    # as an atomic replacement does it, with the old file kept beside the new
    first.run(
        "sh", "-c", "cp /etc/resolv.conf /etc/resolv.conf.old; echo new > /etc/next; mv /etc/next /etc/resolv.conf"
    )
    Path(lab_fifo(lab)).write_text("go\n")
    assert watcher.wait_for_line("new") == "new"
    assert first.run("cat", "/etc/resolv.conf", "/etc/resolv.conf.old").stdout == "new\nnameserver 192.0.2.2\n"
    assert second.run("cat", "/etc/resolv.conf").stdout == "nameserver 192.0.2.1\n"
    first.write_etc("resolv.conf", "nameserver 192.0.2.3\n")
    assert first.run("cat", "/etc/resolv.conf").stdout == "nameserver 192.0.2.3\n"
    assert first.run("touch", "/etc/ssl/lab-was-here", check=False).returncode != 0
    assert (Path("/etc/resolv.conf").read_text(), sorted(Path("/etc").iterdir())) == (before, listed)


@pytest.mark.peer("unbound", "unbound-control", "dig")
def test_names_are_resolved_and_change_at_run_time(lab: Lab) -> None:
    server, laptop = lab.public_host("server", 10), lab.public_host("laptop", 11)
    laptop.write_etc("resolv.conf", "nameserver 203.0.113.10\n")
    records = ["app 60 A 10.20.0.80", "app 60 A 10.20.0.81", "app 60 AAAA fd20::80", "www 30 CNAME app.example.com."]
    big = "big 60 TXT " + " ".join(f'"{n:0200d}"' for n in range(20))
    names = start_names(
        server, {"example.com": [*records, big], "20.10.in-addr.arpa": ["80.0 60 PTR app.example.com."]}
    )
    assert names.addresses == ("203.0.113.10", "203:0:113::10")
    assert sorted(dig(laptop, "app.example.com").records) == ["10.20.0.80", "10.20.0.81"]
    assert dig(laptop, "app.example.com", "AAAA", server=names.addresses[1], tcp=True).records == ("fd20::80",)
    alias = dig(laptop, "www.example.com")
    assert (alias.status, alias.ttl, alias.records[0]) == ("NOERROR", 30, "app.example.com.")
    assert dig(laptop, "80.0.20.10.in-addr.arpa", "PTR").records == ("app.example.com.",)
    assert len(dig(laptop, "big.example.com", "TXT").records[0]) > 4000  # too much for a datagram
    for name in ("nothing.example.com", "unknown.test"):
        assert dig(laptop, name) == Answer("NXDOMAIN", ())
    assert dig(laptop, "app.example.com", "MX") == Answer("NOERROR", ())
    names.set_zone("example.com", ["app 60 A 10.20.0.99"])
    assert dig(laptop, "app.example.com") == Answer("NOERROR", ("10.20.0.99",), 60)
    assert dig(laptop, "www.example.com").status == "NXDOMAIN"
    assert names.queries()[0] == ("app.example.com", "A")
    assert ("app.example.com", "MX") in names.queries()
    names.process.stop()
    with pytest.raises(LabError, match=r"dig app\.example\.com"):
        dig(laptop, "app.example.com", timeout=1)


@pytest.mark.peer("unbound", "unbound-control", "dig", "openssl", "curl")
def test_names_come_over_https_to_those_who_trust_the_authority(lab: Lab) -> None:
    server, laptop = lab.public_host("server", 10), lab.public_host("laptop", 11)
    start_names(server, {"example.com": ["app 60 A 10.20.0.80"]})
    authority = Authority(lab.folder)
    doh = start_doh(server, authority, "doh.test", "203.0.113.10")
    laptop.write_etc("hosts", "203.0.113.10 doh.test\n")
    wanted = dns.message.make_query("app.example.com", "A", id=0)
    (lab.folder / "query").write_bytes(wanted.to_wire())
    encoded = base64.urlsafe_b64encode(wanted.to_wire()).decode().rstrip("=")
    post = ["--data-binary", f"@{lab.folder / 'query'}", "-H", "Content-Type: application/dns-message"]
    trust = ["--cacert", str(authority.certificate), "-sS", "-f", "-o", str(lab.folder / "reply")]
    for method, arguments in (("POST", [*post, URL]), ("GET", [f"{URL}?dns={encoded}"])):
        laptop.run("curl", *trust, *arguments)
        reply = dns.message.from_wire((lab.folder / "reply").read_bytes())
        assert [rrset.to_text().split()[-1] for rrset in reply.answer] == ["10.20.0.80"]
        assert doh.wait_for_line(f"answered {method}")
    laptop.run("curl", *trust, *post, URL.replace("doh.test", "203.0.113.10"))
    for arguments in ([URL], [f"{URL}?dns=!"], ["--data", "x", URL], [*post, URL + "/other"]):
        assert laptop.run("curl", *trust, *arguments, check=False).returncode == 22
    stranger = laptop.run("curl", "-sS", "-f", *post, URL, check=False)
    assert stranger.returncode == 60
    assert doh.is_running


@FAMILIES
def test_echo_servers_say_who_came(lab: Lab, family: int) -> None:
    server = lab.public_host("server", 10)
    laptop = lab.host("laptop", lab.router("home", 30))
    echo = start_echo(server)
    target = server.ipv4 if family == socket.AF_INET else server.ipv6
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with laptop.socket(family, kind) as sock:
            sock.settimeout(10)
            sock.connect((target, 7))
            sock.send(b"there")
            assert receive(sock) == b"there"
    outside = "203.0.113.30" if family == socket.AF_INET else "203:0:113::30"
    assert {f"udp peer {outside}", f"tcp peer {outside}"} <= set(echo.output.splitlines())


@pytest.mark.peer("iperf3")
def test_iperf_serves_more_than_once(lab: Lab) -> None:
    server, laptop = lab.public_host("server", 10), lab.public_host("laptop", 11)
    start_iperf(server)
    for _ in range(2):
        assert "receiver" in laptop.run("iperf3", "-c", "203.0.113.10", "-n", "1M").stdout


@pytest.mark.peer("unbound", "unbound-control", "dig", "curl")
def test_a_system_has_accounts_and_a_gateway_that_resolves_behind_itself(lab: Lab) -> None:
    system = System(lab)
    system.resources["app"] = dns_resource("*.example.com", "tcp/80")
    system.allowed, system.allowed_to = {"net6"}, {"bob": {"net", "app"}}
    system.add_account("bob")
    system.dns_servers, system.search_domain = ["203.0.113.53"], "example.com"
    system.start_portal()
    system.start_relay(0)
    gateway = system.add_gateway("gateway", 31, zones={"example.com": ["app 60 A 10.20.0.80"]})
    assert gateway.host.read_etc("resolv.conf") == "nameserver 10.20.0.80\n"
    assert dig(gateway.host, "app.example.com").records == ("10.20.0.80",)
    assert dig(gateway.host, "portal").records == (system.portal_host.ipv4,)
    assert gateway.names is not None
    gateway.names.set_zone("example.com", ["app 60 A 10.20.0.81"])
    assert dig(gateway.host, "app.example.com").records == ("10.20.0.81",)
    bob = system.add_client("bobs", 30, account="bob", nameservers=["203.0.113.53"])
    assert bob.host.read_etc("resolv.conf") == "nameserver 203.0.113.53\n"
    system.add_client("carols", 32, account="carol")  # unknown until now
    for client in (0, 1):
        eventually(system, 20.0, family=6, client=client)
    eventually(system, 20.0, client=0)
    bob.host.write_etc("hosts", "10.20.0.80 app.example.com\n")
    assert system.fetch(0.001, client=0, name="app.example.com").status == 200
    with pytest.raises(LabError):
        system.fetch(0.001, client=1, timeout=2.0)
    system.resources["app"] = dns_resource("no name")
    with pytest.raises(LabError, match="is no name"):
        system.reload_policy()


def test_lines_and_ends_of_programs(lab: Lab) -> None:
    host = lab.public_host("host", 10)
    process = host.spawn("talker", ["sh", "-c", "echo ready $WORD; exec sleep 1000"], {"WORD": "now"})
    assert process.wait_for_line("^ready") == "ready now"
    assert process.is_running
    assert process.stop() == -signal.SIGTERM
    ended = host.spawn("ender", ["sh", "-c", "echo last words; exit 3"])
    with pytest.raises(LabError, match=r"(?s)ended with 3.*last words"):
        ended.wait_for_line("never")
    with pytest.raises(LabError, match="failed with 1"):
        host.run("false")


def test_everything_goes_after_a_failure() -> None:
    lab = Lab()
    with pytest.raises(ZeroDivisionError):
        fail_in(lab)
    (process,) = STARTED
    assert lab.leftovers() == []
    assert not process.is_running
    assert not lab.folder.exists()


def test_two_labs_live_side_by_side(lab: Lab) -> None:
    lab.public_host("same", 10)
    with Lab() as second:
        second.public_host("same", 10)
    lab.public_host("another", 11).run("ping", "-c1", "-W5", "203.0.113.10")


def test_the_next_lab_removes_what_a_killed_one_left() -> None:
    script = """
        import os, signal
        from fz_core.lab import Lab
        lab = Lab().__enter__()
        process = lab.public_host("lost", 10).spawn("sleep", ["sleep", "1000"])
        print(lab.prefix, process.pid, lab.folder, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    prefix, pid, folder = killed.stdout.split()
    assert killed.returncode == -signal.SIGKILL
    assert list(Path("/run/netns").glob(prefix + "*"))
    with Lab():
        assert not list(Path("/run/netns").glob(prefix + "*"))
    assert not is_alive(int(pid))
    for path in Path(folder).iterdir():
        path.unlink()
    Path(folder).rmdir()


# helpers

URL = "https://doh.test/dns-query"
STARTED: list[Process] = []


def lab_fifo(lab: Lab) -> str:
    """A pipe to let a program go on."""
    path = lab.folder / "go"
    if not path.exists():
        os.mkfifo(path)
    return str(path)


def fail_in(lab: Lab) -> None:
    """Leave a program that ignores SIGTERM, and a child of it in a session of its own."""
    with lab:
        host = lab.host("laptop", lab.router("home", 30))
        host.write_etc("hosts", "")
        stubborn = "trap '' TERM; (exec setsid sleep 1000) & echo ready; while true; do sleep 1; done"
        STARTED.append(host.spawn("stubborn", ["sh", "-c", stubborn]))
        STARTED[0].wait_for_line("ready")
        assert len(lab.leftovers()) > 4
        raise ZeroDivisionError


def bound(host: Host, family: int, port: int) -> socket.socket:
    """A UDP socket on a wildcard address in the host's namespace."""
    sock = host.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(10)
    sock.bind(("", port))
    return sock


def where(host: Host, sock: socket.socket) -> tuple[str, int]:
    address = host.ipv4 if sock.family == socket.AF_INET else host.ipv6
    assert address is not None
    return address, sock.getsockname()[1]


def exchange(inside: socket.socket, outside: socket.socket, host: Host) -> tuple[str, int]:
    """Both ways; how `host` sees the inside socket."""
    inside.sendto(b"there", where(host, outside))
    data, source = outside.recvfrom(100)
    assert data == b"there"
    outside.sendto(b"back", source)
    assert receive(inside) == b"back"
    return source[0], source[1]


def receive(sock: socket.socket) -> bytes:
    return sock.recv(100)


def eventually_silent(sock: socket.socket) -> None:
    """Nothing is queued once a datagram of the host's own has gone through the same socket."""
    loopback = "127.0.0.1" if sock.family == socket.AF_INET else "::1"
    sock.sendto(b"own", (loopback, sock.getsockname()[1]))
    assert receive(sock) == b"own"


def tcp_works(client: Host, server: Host, family: int) -> bool:
    listening = server.socket(family, socket.SOCK_STREAM)
    dialling = client.socket(family, socket.SOCK_STREAM)
    with listening, dialling:
        listening.bind(("", 0))
        listening.listen()
        dialling.settimeout(10)
        dialling.connect(where(server, listening))
        return True


def is_alive(pid: int) -> bool:
    """Running, and not merely waiting to be collected by a parent that never does."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
