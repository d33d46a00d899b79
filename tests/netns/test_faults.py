"""The fault lab: its levers do what they say, and after each of some faults our programs work again.

How long they take is the lab's business (`make test-system`), not these tests'.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from fz_core.lab import Host, Lab, LabError, Router
from fz_core.lab.faults import RUNS
from fz_core.lab.faults_bench import Settings
from fz_core.lab.outage import Prober, first_byte
from fz_core.lab.servers import start_echo
from fz_core.lab.system import Programs

pytestmark = [pytest.mark.root, pytest.mark.peer("nft", "curl", "ip")]

WORKING = (
    "roam",
    "download through a roam",
    "SIGHUP",
    "public address changes",
    "direct path filtered",
    "router reboots",
    "relay dies under a direct connection",
    "relay dies under a relayed connection",
    "gateway SIGTERM",
    "gateway SIGKILL",
    "client SIGKILL",
    "portal's answer 1 s late",
    "connecting with 20 % loss",
    "every packet twice",
    "two clients, one id",
)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", WORKING)
def test_it_works_again(name: str) -> None:
    RUNS[name](Programs(), Settings(seed=0, hurry=4.0))


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture
def home(lab: Lab) -> tuple[Router, Host, Host]:
    """A router with a laptop behind it, and an echo server on the internet."""
    server = lab.public_host("server", 10)
    start_echo(server)
    router = lab.router("home", 30)
    return router, lab.host("laptop", router), server


def seen(lab: Lab) -> list[str]:
    """The addresses the echo server has met."""
    (log,) = lab.folder.glob("*echo*.log")
    return [line.split()[-1] for line in log.read_text().splitlines() if " peer " in line]


def mapping(host: Host, server: Host, reflector: socket.socket) -> tuple[str, int]:
    """As what the laptop's port 52625 is seen outside."""
    with host.socket() as sock:
        sock.bind(("", 52625))
        sock.sendto(b"?", (str(server.ipv4), reflector.getsockname()[1]))
        reflector.settimeout(5)
        source: tuple[str, int] = reflector.recvfrom(100)[1]
        return source


def test_a_new_public_address_is_used_at_once(lab: Lab, home: tuple[Router, Host, Host]) -> None:
    router, laptop, server = home
    for target in (server.ipv4, server.ipv6):
        first_byte(laptop, str(target), 5.0)
    router.change_public_address(33)
    for target in (server.ipv4, server.ipv6):
        first_byte(laptop, str(target), 5.0)
    assert seen(lab) == ["203.0.113.30", "203:0:113::30", "203.0.113.33", "203:0:113::33"]


def test_a_rebooted_router_uses_other_ports_the_same_towards_everybody(home: tuple[Router, Host, Host]) -> None:
    router, laptop, server = home
    with server.socket() as one, server.socket() as other:
        for reflector in (one, other):
            reflector.bind(("", 0))
        assert mapping(laptop, server, one) == ("203.0.113.30", 52625)
        router.remap_ports(20_000)
        ip, port = mapping(laptop, server, one)
        assert ip == "203.0.113.30"
        assert 20_000 <= port < 25_000
        assert mapping(laptop, server, other) == (ip, port)


def test_forgotten_connections_get_no_replies(home: tuple[Router, Host, Host]) -> None:
    router, laptop, server = home
    with laptop.socket() as sock, server.socket() as peer:
        peer.bind(("", 7000))
        peer.settimeout(5)
        sock.settimeout(0.5)
        sock.sendto(b"?", (str(server.ipv4), 7000))
        source = peer.recvfrom(100)[1]
        peer.sendto(b"!", source)
        assert sock.recv(100) == b"!"
        router.forget_connections()
        peer.sendto(b"!", source)
        with pytest.raises(TimeoutError):
            sock.recv(100)


@pytest.mark.parametrize(("way", "arrives"), [("in", True), ("out", False)])
def test_a_filter_of_one_direction_lets_the_other_pass(
    home: tuple[Router, Host, Host], way: str, arrives: bool
) -> None:
    router, laptop, server = home
    router.block_udp("203.0.113.99", way=way)
    with laptop.socket() as sock, server.socket() as peer:
        peer.bind(("", 7000))
        for waiting in (sock, peer):
            waiting.settimeout(0.5)
        sock.sendto(b"?", (str(server.ipv4), 7000))
        if arrives:
            peer.sendto(b"!", peer.recvfrom(100)[1])
        for waiting in (sock,) if arrives else (sock, peer):
            with pytest.raises(TimeoutError):
                waiting.recv(100)
    router.unblock_udp()
    with Prober(laptop, str(server.ipv4)) as prober:
        prober.wait_for_answer(5.0)


def test_a_prober_sees_a_cut_and_its_end(home: tuple[Router, Host, Host]) -> None:
    router, laptop, server = home
    with Prober(laptop, str(server.ipv4)) as prober:
        since = prober.wait_for_answer(5.0)
        router.cut()
        with pytest.raises(LabError, match="not back within"):
            prober.settle(since, watch=0.5, within=2.5)
        router.mend()
        assert prober.settle(since, watch=0.5, within=20.0) >= 1.5


def test_a_moved_machine_has_new_addresses_and_reaches_the_same(lab: Lab, home: tuple[Router, Host, Host]) -> None:
    _, laptop, server = home
    other = lab.router("other", 34)
    first_byte(laptop, str(server.ipv4), 5.0)
    laptop.unplug()
    with pytest.raises(LabError):
        first_byte(laptop, str(server.ipv4), 1.0)
    other.attach(laptop)
    first_byte(laptop, str(server.ipv4), 5.0)
    assert seen(lab) == ["203.0.113.30", "203.0.113.34"]
    other.give_address(laptop, 150)
    assert (laptop.ipv4, laptop.ipv6) == ("172.34.0.150", "172:34::150")
    first_byte(laptop, str(server.ipv6), 5.0)


def test_a_bad_cable_doubles_and_loses_each_datagram_by_itself(home: tuple[Router, Host, Host]) -> None:
    """Also those of a super packet, which the kernel would treat as one."""
    router, laptop, server = home
    datagram, count = 1000, 40
    with laptop.socket() as sock, server.socket() as peer:
        sock.setsockopt(socket.IPPROTO_UDP, 103, datagram)  # UDP_SEGMENT
        peer.bind(("", 7000))
        peer.settimeout(0.5)
        for trouble, least, most in (({"duplicate": 100.0}, 80, 80), ({"loss": 50.0, "seed": 1}, 8, 32)):
            router.delay("internet", **trouble)  # type: ignore[arg-type]
            sock.sendto(bytes(datagram * count), (str(server.ipv4), 7000))
            arrived = 0
            try:
                while len(peer.recv(65536)) == datagram:
                    arrived += 1
            except TimeoutError:
                pass
            assert least <= arrived <= most
