"""What happens to twins of either role: packets of flows, the portal's messages, time; and the sum of many seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address
from random import Random
from typing import Any, NamedTuple

from verdict_twins import Twins

from fz_core.packet import Packet, build_echo, build_tcp, build_udp
from fz_core.portal import client as c
from fz_core.portal.types import NO_FLOW_LOGS, FlowLogs, IceCredentials
from fz_core.tunnel import TunnelRole
from fz_core.tunnel.flow_tracking import FlowTracking
from fz_core.tunnel.flows import FlowTracker
from fz_core.tunnel.verdict import FlowKey

START, EPOCH = 50.0, 1.7e9
STEPS = 500
ON = FlowLogs("https://api.example", 60, 0)
SYN, ACK, FIN, RST = 0x02, 0x10, 0x01, 0x04
MAX_TCP_PAYLOAD = 1200
CREDENTIALS = IceCredentials("abcd", "x" * 22), IceCredentials("efgh", "y" * 22)


def packed(text: str) -> bytes:
    return ip_address(text).packed


class VerdictRun:
    """One seed. A role's own run says what happens, and how often."""

    payloads: Sequence[int]  # bytes in packets of known flows

    def __init__(self, seed: int, new_role: Callable[[], TunnelRole]) -> None:
        self.random = Random(seed)
        self.twins = Twins(new_role, START)

    def run(self, steps: int) -> None:
        raise NotImplementedError

    def like(self, key: FlowKey) -> Packet:
        """A packet of a flow."""
        payload = bytes(self.random.choice(self.payloads))
        if key.protocol == 17:
            return build_udp(key.src, key.dst, key.src_port, key.dst_port, payload)
        if key.protocol == 6:
            return build_tcp(key.src, key.dst, key.src_port, key.dst_port, ACK, payload=payload[:MAX_TCP_PAYLOAD])
        return build_echo(key.src, key.dst, key.src_port, 1, payload, reply=self.random.random() < 0.5)

    def probe(self) -> None:
        self.twins.probe(self.like, self.random, 5)

    def tell(self, message: Any) -> None:
        """The portal says something."""
        self.twins.do(lambda role: role.handle_portal_message(message, self.twins.now))

    def tell_candidates(self) -> None:
        """What voids nothing."""
        generation = self.twins.fast.generation
        self.tell(c.RelaysPresence((), ()))
        assert self.twins.fast.generation == generation

    def expiry(self) -> int | None:
        """The end of a grant."""
        return self.random.choice([None, None, int(EPOCH + self.twins.now + self.random.choice([-1, 3, 30, 500]))])

    def logs(self) -> FlowLogs:
        return ON if self.random.random() < 0.9 else NO_FLOW_LOGS

    def age(self, peers: Iterable[str], fresh: Packet) -> None:
        """A packet of the device waits for a handshake, or the session is too old to send: nothing is offered."""
        self.twins.do(lambda role: role.node.aged.update(peers))
        self.twins.from_device(fresh)
        assert all(verdict.before != FlowKey.of(fresh) for verdict in self.twins.table.in_force(self.twins.now))
        self.twins.do(lambda role: role.node.aged.clear())


class Totals(NamedTuple):
    """What became of all seeds; `records` are those of flow logs."""

    carried: Counter[str]
    voided: Counter[str]
    records: int


def run_all(seeds: int, new_run: Callable[[int], VerdictRun]) -> Totals:
    """Run each seed; a failure names its seed."""
    carried, voided, records = Counter[str](), Counter[str](), 0
    for seed in range(seeds):
        run = new_run(seed)
        try:
            run.run(STEPS)
        except AssertionError as error:
            raise AssertionError(f"seed {seed} at {run.twins.now}") from error
        carried += run.twins.carried
        voided += run.twins.table.voided
        records += run.twins.records
    return Totals(carried, voided, records)


def tracking(role: str, most: int, *, is_on: bool) -> FlowTracking:
    """With so few tracked flows that some must make room."""
    flows = FlowTracking(role, EPOCH, has_spool=is_on)
    flows._new_tracker = lambda: FlowTracker(role, EPOCH, most, flows.revoked)  # type: ignore[method-assign]
    return flows
