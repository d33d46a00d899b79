"""The fast path changes nothing: two equal systems get the same input, and one has pumps in front of its states.

Everything a peer does is held against what the other one's twin does: every datagram with its time, destination and
ECN mark, every packet for the device, every event, error and drop, deadlines, and flow logs. Handshakes, STUN and
relayed data are equal to the byte; of an encrypted packet the header is, and what comes out at its end. By seed, input
comes one by one or in batches; `twins` says what order is worth then.

A failure names the seed and the step. `FZ_SEEDS=5000` plays so many, `FZ_FIRST_SEED=4711` begins with another one.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import nullcontext
from functools import cache

import pytest

from fz_core.tunnel import gateway as gateway_role
from tests.sim import system as sim
from tests.sim.fast_slow import play
from tests.sim.loopback import own_network
from tests.unit.tunnel.flow_samples import token_text

STEPS, SEEDS_PER_PART = 60, 24
FIRST = int(os.environ.get("FZ_FIRST_SEED", "0"))
# Of each, some in every hundred seeds.
KINDS = (
    "rekeys", "other ways", "data by a relay", "flow records", "client moves", "client starts anew",
    "client's NAT restarts", "gateway's NAT restarts", "portal away", "relay credentials", "resources changed",
    "access revoked", "access ends", "filters changed", "policy amid a carried burst", "network amid a carried burst",
    "wire 0", "wire 1", "wire 2", "wire 3", "wire 4",
)  # fmt: skip


def parts(default: int) -> list[range]:
    count = int(os.environ.get("FZ_SEEDS", default))
    return [range(FIRST + at, FIRST + min(at + SEEDS_PER_PART, count)) for at in range(0, count, SEEDS_PER_PART)]


PARTS_V4, PARTS_V6 = parts(96), parts(24)


@pytest.fixture(autouse=True)
def tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim, "INGEST_TOKEN", token_text())
    # A gateway looks for what has ended once a second, from whenever it began: here it does so in time.
    monkeypatch.setattr(gateway_role, "TICK", 0.001)


@cache
def played(seeds: range, has_v6: bool) -> Counter[str]:
    """What there was in these sequences, in which nothing differed."""
    with own_network() if has_v6 else nullcontext():
        return sum((play(seed, STEPS, has_v6=has_v6) for seed in seeds), Counter())


@pytest.mark.parametrize("seeds", PARTS_V4, ids=str)
def test_the_fast_path_changes_nothing(seeds: range) -> None:
    assert played(seeds, False)["out_packets"]


@pytest.mark.root
@pytest.mark.parametrize("seeds", PARTS_V6, ids=str)
def test_the_fast_path_changes_nothing_over_ipv6(seeds: range) -> None:
    assert played(seeds, True)["data to v6"]


@pytest.mark.timeout(600)
def test_the_sequences_had_everything_in_them() -> None:
    """Over as many seeds as there are by default; and most was carried, in both directions, and merged."""
    found = sum((played(seeds, False) for seeds in PARTS_V4[:4]), Counter())
    if sum(map(len, PARTS_V4)) >= 4 * SEEDS_PER_PART:
        assert not [kind for kind in KINDS if found[kind] < 10], found
        assert found["flow records"] > 500
        assert found["rekeys"] > 100
    assert found["out_packets"] > found["data"] / 2, found
    assert found["in_packets"] > found["data"] / 2, found
    assert found["out_datagrams"] > found["out_calls"], found
    assert found["in_packets"] > found["in_writes"], found
