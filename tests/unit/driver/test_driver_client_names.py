"""A client's view of its host's name servers, and what a new network does to questions under way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from fz_core.crypto import PrivateKey
from fz_core.driver.names.client_names import ClientNames
from fz_core.linux import RouteCache, SocketFactory, make_dns_control
from fz_core.tunnel import ClientTunnel
from fz_core.tunnel.events import ForwardQuery

LOOPBACK = bytes([127, 0, 0, 1])
QUERY = bytes.fromhex("00010100000100000000000003777777076578616d706c650000010001")


class Scene:
    """Names of a client whose /etc is a folder of the test's; commands to the state are only noted."""

    def __init__(self, etc: Path) -> None:
        self.resolv_conf = etc / "resolv.conf"
        self.resolv_conf.write_text("nameserver 192.0.2.1\n")
        state = ClientTunnel(PrivateKey(bytes(32)), 0.0, 0.0, bytes)
        sockets = SocketFactory(None, RouteCache(lambda destination: LOOPBACK))
        self.commands: list[Callable[[float], None]] = []
        self.names = ClientNames(state, make_dns_control("disabled", etc), self.commands.append, sockets)

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(10):
            while not condition():
                await trio.sleep(0.01)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


async def test_another_resolv_conf_is_noticed(scene: Scene, nursery: trio.Nursery) -> None:
    await scene.names.repair()
    assert scene.names._resolvers == (bytes([192, 0, 2, 1]),)
    await nursery.start(scene.names.run)
    await trio.testing.wait_all_tasks_blocked()
    scene.resolv_conf.write_text("nameserver 192.0.2.2\n")
    await scene.until(lambda: scene.names._resolvers == (bytes([192, 0, 2, 2]),))
    new = scene.resolv_conf.with_name("new")
    new.write_text("nameserver 192.0.2.3\n")
    new.rename(scene.resolv_conf)
    await scene.until(lambda: scene.names._resolvers == (bytes([192, 0, 2, 3]),))
    assert len(scene.commands) == 3


@pytest.mark.shows("io", 24)
async def test_a_reset_fails_questions_under_way_at_once(
    scene: Scene, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    """The server is silent, and the clock stands, so time is never up."""
    silent = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
    await silent.bind(("127.0.0.1", 0))
    await nursery.start(scene.names.run)
    for token in range(20):
        scene.names.handle(ForwardQuery(token, LOOPBACK, silent.getsockname()[1], None, False, False, QUERY))
    for _ in range(20):
        await silent.recvfrom(100)
    assert scene.commands == []
    scene.names.reset()
    while len(scene.commands) < 20:
        await trio.testing.wait_all_tasks_blocked()
    silent.close()
