"""`import fz_core` as a Python program uses it: the Tunnel API in a process of its own, without our command lines."""

from __future__ import annotations

import sys

import pytest

from fz_core.lab import Lab
from fz_core.lab.system import System, ours
from tests.netns.scenarios import eventually

pytestmark = [pytest.mark.root, pytest.mark.peer("nft", "curl", "ip")]

PROGRAM = """
import os, sys, trio, fz_core

async def main():
    tunnel = fz_core.Tunnel(fz_core.TunnelConfig(
        role=fz_core.Role.CLIENT, api_url=os.environ["FIREZONE_API_URL"], token=os.environ["FIREZONE_TOKEN"],
        device_id="a python program", name="a python program", version="1.5.12"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tunnel.run)
        async for event in tunnel.events:
            print(type(event).__name__, flush=True)
            if type(event).__name__ == "ResourcesChanged":
                print("statuses", *(f"{view.name}={view.status}" for view in event.resources), flush=True)
            try:
                event.changed = True
            except Exception as error:
                assert "frozen" in type(error).__name__.lower() or isinstance(error, (AttributeError, TypeError)), error
            else:
                raise AssertionError(f"{event} can be changed")
            if type(event).__name__ == "ConnectionDown":
                print("drops", sorted(tunnel.drops), tunnel.is_ready, flush=True)
                tunnel.stop()

trio.run(main)
print("ended", flush=True)
"""


def test_a_python_program_is_a_client() -> None:
    with Lab() as lab:
        system = System(lab)
        system.start_portal()
        system.start_relay(0)
        gateway = system.add_gateway("gateway", 31)
        system.programs = type(system.programs)(client=(sys.executable, "-c", PROGRAM))
        client = system.add_client("client", 30)
        eventually(system, 20.0)
        client.host.run("ping", "-c", "1", "-W", "1", "100.64.0.77", check=False)  # nobody there: dropped
        assert gateway.process.stop() == 0
        client.process.wait_for_line("^ended", 10.0)
        assert client.process.wait(5) == 0
        seen = client.process.output.split()
        assert "net=Online" in seen
        assert "PacketsDropped" in seen
        assert seen.index("TunConfigChanged") < seen.index("ConnectionUp") < seen.index("ConnectionDown")
        assert system.clients[0].host.run("ip", "link", "show", "tun-firezone", check=False).returncode != 0


def test_importing_is_cheap_and_names_are_there() -> None:
    import subprocess

    code = (
        "import sys, fz_core; assert not any(m in sys.modules for m in ('trio', 'pyroute2'));"
        "names = [getattr(fz_core, n) for n in fz_core.__all__]; print(len(names))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) >= 10
    assert ours("x")[1:] == ("-m", "x")
