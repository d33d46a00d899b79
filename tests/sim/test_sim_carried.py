"""When a flow is carried by the pump: from its third packet on, so that one of a single packet costs no verdict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.sim.pumped import Pumped
from tests.sim.system import RESOURCE, Scenario


@pytest.fixture
def net() -> Iterator[Pumped]:
    net = Pumped(RESOURCE, zone={}, scenario=Scenario(), seed=5)
    assert net.talk("10.0.0.80", port=7, src_port=6999)
    yield net
    net.close()


def carried_by(net: Pumped) -> tuple[int, int, int, int]:
    """Packets that needed nobody: at the client out and in, at the gateway in and out."""
    ends: list[Any] = [net.client, net.gateway]
    counters = [end.carrier.counters() for end in ends]
    client, gateway = ((c["out_packets"], c["in_packets"]) for c in counters)
    return client[0], client[1], gateway[1], gateway[0]


def test_a_flow_is_carried_from_its_third_packet_on(net: Pumped) -> None:
    carried = []
    before = carried_by(net)
    for number in range(5):
        net.ask(bytes([number]), port=7001)
        net.world.run_for(0.2)
        after = carried_by(net)
        carried.append(tuple(b - a for a, b in zip(before, after, strict=True)))
        before = after
    assert carried == [(0,) * 4, (0,) * 4, (1,) * 4, (1,) * 4, (1,) * 4]
