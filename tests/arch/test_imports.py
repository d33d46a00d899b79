"""What a start does not import: a module takes 0.5 ms to 0.1 s, and a client is to work 0.6 s after its start."""

from __future__ import annotations

import subprocess
import sys

import pytest

HTTPS = "for DNS over HTTPS and flow-log uploads, imported in a thread when there is a server to talk to"
SPOOL = "imported in a thread when there is a spool of flow logs"
NETLINK = "imported in a thread while the portal is called"
UNNEEDED = {
    "httpcore": HTTPS,
    "httpx": HTTPS,
    "h2": HTTPS,
    "hpack": HTTPS,
    "anyio": HTTPS,
    "fz_core.driver.names.doh_server": HTTPS,
    "fz_core.driver.marked_http": HTTPS,
    "fz_core.driver.flow_logs.upload": SPOOL,
    "fz_core.driver.flow_logs.https": SPOOL,
    "pyroute2": NETLINK,
    "fz_core.linux.netlink": NETLINK,
    "fz_core.linux.link_scope": NETLINK,
    "statistics": "brings fractions and decimal along, for one median",
    "unittest": "comes with pyroute2",
    "multiprocessing": "comes with pyroute2",
    "urllib.request": "nothing here needs it",
    "fz_core.embedded": "the portal and the relay are other programs",
    "fz_core.commands": "the portal and the relay are other programs",
    "fz_core.lab": "for tests and benchmarks",
    "prometheus_client": "for the relay",
    "fz_core.turn.server": "for the relay",
    "pytest": "for tests",
}
GATEWAY_ONLY = (
    "fz_core.driver.gateway_side",
    "fz_core.driver.names.gateway_names",
    "fz_core.driver.names.resolver",
    "fz_core.driver.names.dns_server",
    "fz_core.driver.health",
    "fz_core.tunnel.gateway",
    "fz_core.tunnel.client_access",
    "fz_core.portal.gateway",
)
CLIENT_ONLY = (
    "fz_core.driver.client_side",
    "fz_core.driver.names.client_names",
    "fz_core.driver.names.doh",
    "fz_core.tunnel.client",
    "fz_core.tunnel.client_peers",
    "fz_core.tunnel.client_dns",
    "fz_core.tunnel.resources",
)
BOTH = (*GATEWAY_ONLY, *CLIENT_ONLY)
CONFIG = "'wss://localhost', 'id', 'name', '1.0', 'secret'"
TUNNEL = "from fz_core import Role, Tunnel, TunnelConfig; Tunnel(TunnelConfig(Role.{role}, " + CONFIG + "))"
STARTS = {
    "client's options": ("import fz_headless.__main__ as m; m.parser()", BOTH),
    "gateway's options": ("import fz_gateway.__main__ as m; m.parser()", [m for m in BOTH if "health" not in m]),
    "client": ("import fz_headless.__main__; " + TUNNEL.format(role="CLIENT"), GATEWAY_ONLY),
    "gateway": ("import fz_gateway.__main__; " + TUNNEL.format(role="GATEWAY"), CLIENT_ONLY),
}


@pytest.mark.parametrize("start", STARTS)
def test_a_start_imports_nothing_it_does_not_need(start: str) -> None:
    code, of_the_other = STARTS[start]
    modules = imported_by(code)
    assert "trio" in modules
    assert {module: why for module, why in UNNEEDED.items() if module in modules} == {}
    assert modules & set(of_the_other) == set()


def test_what_is_said_to_be_of_one_role_is_imported_by_it() -> None:
    """Otherwise the lists above would prove nothing."""
    assert set(CLIENT_ONLY) <= imported_by(STARTS["client"][0])
    assert set(GATEWAY_ONLY) <= imported_by(STARTS["gateway"][0])


def imported_by(code: str) -> set[str]:
    """Every module in the interpreter after this code."""
    run = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sorted(sys.modules))"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return set(run.stdout.split())


def test_pyroute2_is_whole_for_others() -> None:
    """We import a part of it; a program beside us gets all, of the same classes."""
    code = (
        "import sys; from fz_core.linux.iproute import IPRoute; assert 'sqlite3' not in sys.modules;"
        "import pyroute2; assert pyroute2.NDB; assert pyroute2.IPRoute is IPRoute"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
