"""Whole systems of our own programs in network namespaces."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from functools import partial

import dns.message as dns_message
import pytest

from fz_core.lab import Host, Lab, LabError
from fz_core.lab.certificates import Authority
from fz_core.lab.names import dig, start_names
from fz_core.lab.servers import start_doh
from fz_core.lab.system import Programs, System
from tests.netns.name_scenarios import NAME_SCENARIOS, expect, load, must_fail, named_system, ping
from tests.netns.name_scenarios import eventually as eventually_that
from tests.netns.scenarios import SCENARIOS, eventually
from tests.netns.traffic_scenarios import TRAFFIC_SCENARIOS

pytestmark = [pytest.mark.root, pytest.mark.peer("nft", "curl", "ip")]


@pytest.mark.shows("tunnel", 96)
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str) -> None:
    SCENARIOS[name](Programs())


@pytest.mark.peer("unbound", "dig", "ping")
@pytest.mark.parametrize("name", TRAFFIC_SCENARIOS)
def test_traffic(name: str) -> None:
    TRAFFIC_SCENARIOS[name](Programs())


@pytest.mark.peer("unbound", "dig", "iperf3", "ping")
@pytest.mark.parametrize("name", NAME_SCENARIOS)
def test_name_scenario(name: str) -> None:
    NAME_SCENARIOS[name](Programs())


@pytest.mark.shows("tunnel", 90)
@pytest.mark.peer("unbound", "dig")
def test_one_download_is_one_flow_at_both_ends() -> None:
    """docs/flow-logs.md: the client names the proxy address, the gateway the real one."""

    def completed(output: str) -> list[str]:
        return [line for line in output.splitlines() if "TCP flow completed" in line and "rx_bytes=0" not in line]

    flows = {"FIREZONE_FLOW_LOGS": "true"}
    with named_system(Programs(), env=flows, gateway_env=flows) as system:
        load(system, "wiki", megabytes=1.0, timeout=20.0)
        client, gateway = system.clients[0].process, system.gateways[0].process
        for process in (client, gateway):
            process.wait_for_line("TCP flow completed", 10.0)
        for process, address in ((client, "100.96.0."), (gateway, "10.20.0.80")):
            found = completed(process.output)
            assert len(found) == 1, found
            assert f" inner_dst_ip={address}" in found[0]
            assert " domain=wiki.corp.example " in found[0]
            assert int(re.search(r" rx_bytes=(\d+)", found[0])[1]) >= 1_000_000  # type: ignore[index]


def five_over_one_connection(host: Host) -> None:
    """Names of resources and others, all asked before the first answer; two with equal ids."""
    server = re.search(r"nameserver (\S+)", host.read_etc("resolv.conf"))
    assert server is not None
    asked = [
        "www.public.example",
        "wiki.corp.example",
        "absent.public.example",
        "www.public.example",
        "other.corp.example",
    ]
    queries = [dns_message.make_query(name, "A", id=1 + number // 2) for number, name in enumerate(asked)]
    with host.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(8)
        sock.connect((server[1], 53))
        sock.sendall(b"".join(len(wire).to_bytes(2, "big") + wire for wire in (q.to_wire() for q in queries)))
        replies = sock.makefile("rb")
        received = [dns_message.from_wire(replies.read(int.from_bytes(replies.read(2), "big"))) for _ in queries]
    if sorted(str((m.id, m.question)) for m in received) != sorted(str((m.id, m.question)) for m in queries):
        raise LabError(f"asked {queries}, was answered {received}")


@pytest.mark.shows("tunnel", 51)
@pytest.mark.peer("unbound", "dig")
def test_five_queries_on_one_connection_all_complete() -> None:
    with named_system(Programs(), clients=False) as system:
        upstream = start_names(system.lab.public_host("names", 53), {"public.example": ["www 60 A 192.0.2.80"]})
        system.add_client("client", 30, dns_control="etc-resolv-conf", nameservers=upstream.addresses[:1])
        five_over_one_connection(system.clients[0].host)


@pytest.mark.peer("unbound", "dig")
def test_short_names_are_found_in_the_search_domain() -> None:
    def prepare(system: System) -> None:
        system.search_domain = "corp.example"

    with named_system(Programs(), prepare=prepare) as system:
        assert "search corp.example\n" in system.clients[0].host.read_etc("resolv.conf")
        eventually_that("a page by its short name", lambda: system.fetch(0.01, name="wiki", timeout=5.0))


@pytest.mark.peer("unbound", "dig", "openssl")
def test_other_names_are_asked_over_https_when_the_portal_says_so() -> None:
    with Lab() as lab:
        authority = Authority(lab.folder)
        upstream = start_names(lab.public_host("dns", 53), {"public.example": ["www 60 A 192.0.2.80"]})
        start_doh(upstream.host, authority)
        system = System(lab)
        system.doh_servers = [f"https://{upstream.host.ipv4}/dns-query"]
        system.start_portal()
        system.start_relay(0)
        client = system.add_client("client", 30, dns_control="etc-resolv-conf", env=authority.trust)
        for tcp in (False, True):
            eventually_that(
                "an answer over HTTPS", partial(expect, client.host, "www.public.example", "A", "192.0.2.80", tcp)
            )
        assert client.process.stop() == 0


@pytest.mark.peer("unbound", "dig")
def test_one_family_is_reached_through_the_other_unless_that_is_switched_off() -> None:
    """docs/deviations.md: translation between the families, and its variable."""
    with named_system(Programs()) as system:
        eventually_that("the page", lambda: load(system, "four"))
        for name, family in (("four", 6), ("six", 4)):
            load(system, name, family=family, megabytes=1.0)
            ping(system, f"{name}.corp.example", family=family)
        gateway = system.gateways[0]
        gateway.env = {**gateway.env, "FZFF_ICMP_UNREACHABLE_INSTEAD_OF_NAT64": "true"}
        system.restart(gateway)
        eventually_that("the page again", lambda: load(system, "four"))
        for name, family in (("four", 6), ("six", 4)):
            must_fail(f"{name} over IPv{family}", partial(load, system, name, family=family))
            must_fail(f"ping {name} over IPv{family}", partial(ping, system, f"{name}.corp.example", family=family))


@pytest.mark.peer("unbound", "dig")
def test_names_resolve_by_the_systems_functions_too() -> None:
    """FZFF_GATEWAY_USERSPACE_DNS_A_AAAA_RECORDS=false."""
    with named_system(Programs(), env=None) as system:
        gateway = system.gateways[0]
        gateway.env = {**gateway.env, "FZFF_GATEWAY_USERSPACE_DNS_A_AAAA_RECORDS": "false"}
        system.restart(gateway)
        for name, family in (("wiki", 4), ("wiki", 6), ("alias", 4), ("six", 6)):
            eventually_that(name, partial(load, system, name, family=family))
        must_fail("a name that does not exist", lambda: load(system, "absent"))


@pytest.mark.shows("tunnel", 50, 53)
@pytest.mark.peer("unbound", "dig")
def test_an_icmp_error_for_a_tunnelled_query_fails_that_query_at_once() -> None:
    """Nobody serves DNS at 10.20.0.81: the server's "port unreachable" comes back through the tunnel."""

    def prepare(system: System) -> None:
        system.resources["net"] = "10.20.0.0/24"
        system.allowed.add("net")
        system.dns_servers = ["10.20.0.81", "10.20.0.80"]

    with named_system(Programs(), prepare=prepare) as system:
        gateway = system.gateways[0]
        assert gateway.server is not None
        assert gateway.names is not None
        gateway.names.process.stop()
        gateway.server.add_address("10.20.0.81")
        host = system.clients[0].host
        for tcp in (False, True):
            assert dig(host, "www.public.example", server="100.100.111.1", tcp=tcp, timeout=4).status == "SERVFAIL"
        ping(system, "10.20.0.80")


@pytest.mark.shows("tunnel", 94)
def test_a_deleted_device_ends_the_program_once_with_one_line() -> None:
    with Lab() as lab:
        system = System(lab)
        system.start()
        for member in (*system.clients, *system.gateways):
            member.host.run("ip", "link", "del", "tun-firezone")
            assert member.process.wait(10) == 1
            assert member.process.output.count("was the device deleted?") == 1
            assert "Traceback" not in member.process.output


def test_two_gateways_of_one_site_share_the_work_and_stand_in_for_each_other() -> None:
    with Lab() as lab:
        system = System(lab)
        system.start()
        eventually(system, 20.0)
        system.add_gateway("gateway2", 33)
        system.gateways[0].process.stop()
        eventually(system, 30.0)
        assert "ConnectionUp" in system.gateways[1].process.output


def test_a_wrong_token_ends_the_client_with_one_line() -> None:
    with Lab() as lab:
        system = System(lab)
        system.start_portal()
        router = lab.router("r", 30)
        host = lab.host("h", router)
        url = system.api_url((4,))
        command = (sys.executable, "-m", "fz_headless", "--firezone-id", "x", "--api-url", url)
        env = {"FIREZONE_TOKEN": "a-wrong-token-of-some-length", "RUST_LOG": "error"}
        process = host.spawn("client", command, env)
        assert process.wait(20) == 1
        assert len(process.output.strip().splitlines()) == 1
        assert "401" in process.output
        assert "a-wrong-token" not in process.output


def test_goodbyes_and_a_clean_machine_after_sigterm() -> None:
    with Lab() as lab:
        system = System(lab)
        system.start()
        eventually(system, 20.0)
        client, gateway = system.clients[0], system.gateways[0]
        assert client.process.stop() == 0
        gateway.process.wait_for_line("the client said goodbye", 5.0)
        assert client.host.run("ip", "link", "show", "tun-firezone", check=False).returncode != 0
        assert gateway.process.stop() == 0
        assert "Goodbye" in gateway.process.output


@pytest.mark.shows("io", 41)
def test_the_host_is_configured_as_documented() -> None:
    """spec/io.md §7: addresses /32 and /128, MTU 1280, three rules per family, the right tables."""
    with Lab() as lab:
        system = System(lab)
        system.start()
        host = system.clients[0].host
        shown = json.loads(host.run("ip", "-j", "addr", "show", "dev", "tun-firezone").stdout)[0]
        assert shown["mtu"] == 1280
        assert shown["txqlen"] == 10000
        assert sorted((a["family"], a["prefixlen"]) for a in shown["addr_info"]) == [("inet", 32), ("inet6", 128)]
        rules = host.run("ip", "rule").stdout
        for priority, table in ((100, 539098368), (200, 539098369), (300, 539098370)):
            assert re.search(rf"^{priority}:\s+not from all fwmark 0xfd002021 lookup {table}", rules, re.MULTILINE)
        routes = host.run("ip", "route", "show", "table", "539098368").stdout
        for network in ("100.64.0.0/11", "100.96.0.0/11", "100.100.111.0/24", "10.20.0.0/24"):
            assert f"{network} dev tun-firezone" in routes


def test_health_endpoints_tell_the_truth() -> None:
    with Lab() as lab:
        system = System(lab)
        system.start()
        host = system.gateways[0].host

        def status(path: str) -> str:
            url = f"http://127.0.0.1:8080{path}"
            return host.run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", url, check=False).stdout

        deadline = time.monotonic() + 10
        while status("/readyz") != "200" and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (status("/healthz"), status("/readyz"), status("/other")) == ("200", "200", "404")
        system.portal.kill()
        deadline = time.monotonic() + 10
        while status("/readyz") != "503" and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (status("/healthz"), status("/readyz")) == ("200", "503")


def test_no_secret_in_process_list_logs_or_core() -> None:
    with Lab() as lab:
        system = System(lab)
        system.start()
        eventually(system, 20.0)
        shown = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
        logs = "".join(member.process.output for member in (*system.gateways, *system.clients))
        logs += system.portal.output + system.relays[0].output
        for token in system._tokens.values():
            assert token not in shown
            assert token not in logs


def test_a_second_instance_is_refused_in_one_line() -> None:
    with Lab() as lab:
        system = System(lab)
        system.start()
        client = system.clients[0]
        second = client.host.spawn("second", client.command, {**client.env, "RUST_LOG": "error"})
        assert second.wait(20) == 1
        assert second.output.count("\n") == 1
        assert "tun-firezone" in second.output


def test_nothing_is_left_behind_even_after_a_failure() -> None:
    def namespaces() -> list[str]:
        shown = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        return [name for name in shown.splitlines() if name.startswith(f"fz{os.getpid()}.")]  # others may run labs too

    during: list[str] = []

    def fail_inside() -> None:
        with Lab() as lab:
            System(lab).start()
            during.extend(namespaces())
            raise LabError("on purpose")

    with pytest.raises(LabError, match="on purpose"):
        fail_inside()
    assert len(during) >= 5
    assert namespaces() == []
