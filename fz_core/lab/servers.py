"""Servers to start on a machine of a lab, each ready when the function returns and ended with the lab."""

from __future__ import annotations

import sys

from fz_core.lab.certificates import Authority
from fz_core.lab.processes import Process
from fz_core.lab.topology import Host

ECHO_PORT = 7
IPERF_PORT = 5201


def start_web(host: Host, port: int = 80) -> Process:
    """The known document over HTTP, `fz_core.lab.webserver`."""
    return _start(host, "web", "webserver", "--port", str(port))


def start_echo(host: Host, port: int = ECHO_PORT) -> Process:
    """Echo over UDP and TCP; logs each new peer's address."""
    return _start(host, "echo", "echo", "--port", str(port))


def start_iperf(host: Host, port: int = IPERF_PORT) -> Process:
    """An iperf3 server for many tests, one after the other."""
    process = host.spawn(f"{host.name}-iperf3", ["iperf3", "-s", "-p", str(port), "--forceflush"])
    process.wait_for_line("Server listening")
    return process


def start_doh(host: Host, authority: Authority, *names: str, upstream: str = "127.0.0.1", port: int = 443) -> Process:
    """DNS over HTTPS at `https://NAME/dns-query`, in front of the name server at `upstream`.

    Without `names` the certificate is for the addresses of the machine.
    """
    known = names or tuple(ip for ip in (host.ipv4, host.ipv6) if ip is not None)
    certificate, key = authority.issue(*known)
    files = ("--cert", str(certificate), "--key", str(key))
    return _start(host, "doh", "dohserver", *files, "--upstream", upstream, "--port", str(port))


def _start(host: Host, what: str, module: str, *arguments: str) -> Process:
    command = [sys.executable, "-m", f"fz_core.lab.{module}", *arguments]
    process = host.spawn(f"{host.name}-{what}{len(host.lab.processes)}", command)
    process.wait_for_line("^serving")
    return process
