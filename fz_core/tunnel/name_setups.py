"""Which proxy addresses a gateway knows, seen from the client (`spec/tunnel.md` §11).

Before traffic to a name flows, its gateway must have been told the name's proxy addresses and have
confirmed that it translates them. Packets wait meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from ipaddress import ip_address
from typing import NamedTuple

from fz_core.dns import NameEntry
from fz_core.packet import Packet
from fz_core.tunnel.buffers import PacketBuffer
from fz_core.tunnel.control import AssignedIps
from fz_core.tunnel.verdict import Verdict

BUFFERED_PACKETS = 32
MAX_BUFFERS = 1024
MAX_SETUPS = 65_536
RESEND_INTERVAL = 2.0
REFRESH_INTERVAL = 1.0  # the TTL of our answers: who asks more often has not waited for it
USED_FOR = 7440.0


class SetupState(Enum):
    """Life of a set-up."""

    PENDING = auto()
    CONFIRMED = auto()
    FAILED = auto()


class SetupKey(NamedTuple):
    """One gateway serves one name for one resource; resources that share a name are set up each."""

    gateway_id: str
    name: str
    resource_id: str


class _Setup:
    __slots__ = ("buffer", "is_stale", "sent_at", "state", "used_at")

    def __init__(self, now: float) -> None:
        self.state = SetupState.PENDING
        self.buffer: PacketBuffer | None = None
        self.is_stale = False
        self.sent_at = self.used_at = now

    def note(self, _packets: int, _payload_bytes: int, last_at: float) -> None:
        self.used_at = max(self.used_at, last_at)


class NameSetups:
    """All set-ups by key. What must be sent comes back as `AssignedIps`; there is no timer.

    `unsettled` gets the gateway's id where packets may no longer simply go: verdicts about them are void.
    """

    def __init__(self, unsettled: Callable[[str], None] = lambda gateway_id: None) -> None:
        self._unsettled = unsettled
        self._setups: dict[SetupKey, _Setup] = {}
        self._by_name: dict[str, set[SetupKey]] = {}
        self._buffers = 0

    def __len__(self) -> int:
        return len(self._setups)

    def handle_queried(self, name: str, now: float) -> None:
        """Somebody asked for the name again: what was agreed with gateways is due for renewal."""
        for key in self._by_name.get(name, ()):
            setup = self._setups[key]
            is_fresh = setup.state is SetupState.CONFIRMED and now - setup.sent_at < REFRESH_INTERVAL
            setup.is_stale = setup.state is not SetupState.PENDING and not is_fresh

    def update(self, key: SetupKey, entry: NameEntry, now: float) -> AssignedIps | None:
        """Make sure that the gateway knows the name; what to tell it, if anything."""
        setup = self._setups.get(key)
        if setup is None:
            self._make_room()
            setup = self._setups[key] = _Setup(now)
            self._by_name.setdefault(key.name, set()).add(key)
            self._hold(setup)
        elif setup.is_stale:
            setup.is_stale = False
            if setup.state is SetupState.FAILED:
                self._hold(setup)
            setup.state = SetupState.PENDING
            self._unsettled(key.gateway_id)
        elif setup.state is not SetupState.PENDING or now - setup.sent_at < RESEND_INTERVAL:
            return None
        setup.sent_at = now
        return _announcement(key, entry)

    def handle_packet(
        self, key: SetupKey, entry: NameEntry, packet: Packet, now: float
    ) -> tuple[bool, AssignedIps | None]:
        """A packet for the name: whether it may go now, and what to tell the gateway first."""
        setup = self._setups.get(key)
        announcement = None
        if setup is None or setup.state is SetupState.PENDING:
            announcement = self.update(key, entry, now)
            setup = self._setups[key]
        setup.used_at = now
        if setup.buffer is None:
            return True, announcement
        setup.buffer.push(packet)
        return False, announcement

    def handle_status(self, key: SetupKey, is_active: bool) -> list[Packet]:
        """The gateway has answered: the packets that may go now. What waited for a failure is lost."""
        setup = self._setups.get(key)
        if setup is None:
            return []
        if setup.state is SetupState.CONFIRMED and not is_active:
            self._unsettled(key.gateway_id)
        setup.state = SetupState.CONFIRMED if is_active else SetupState.FAILED
        packets = self._release(setup)
        return packets if is_active else []

    def support(self, verdict: Verdict, key: SetupKey) -> bool:
        """Let a verdict about a packet that went stand on a set-up; False unless the gateway has confirmed it."""
        setup = self._setups.get(key)
        if setup is None or setup.state is not SetupState.CONFIRMED:
            return False
        verdict.stand_on(USED_FOR, setup.note)
        return True

    def is_set_up(self, gateway_id: str, name: str) -> bool:
        """Whether this gateway may send us packets in the name's place."""
        return any(key.gateway_id == gateway_id for key in self._by_name.get(name, ()))

    def is_in_use(self, name: str, now: float) -> bool:
        """Whether an established flow may still depend on the name's addresses."""
        return any(now - self._setups[key].used_at < USED_FOR for key in self._by_name.get(name, ()))

    def forget_gateway(self, gateway_id: str) -> None:
        """The gateway is gone, and what it knew."""
        self._forget(key for key in list(self._setups) if key.gateway_id == gateway_id)

    def forget_resource(self, resource_id: str) -> None:
        """The resource is gone."""
        self._forget(key for key in list(self._setups) if key.resource_id == resource_id)

    def _forget(self, keys: object) -> None:
        for key in keys:  # type: ignore[attr-defined]
            self._unsettled(key.gateway_id)
            self._release(self._setups.pop(key))
            same_name = self._by_name[key.name]
            same_name.discard(key)
            if not same_name:
                del self._by_name[key.name]

    def _make_room(self) -> None:
        if len(self._setups) >= MAX_SETUPS:
            self._forget([min(list(self._setups)[:64], key=lambda k: self._setups[k].used_at)])

    def _hold(self, setup: _Setup) -> None:
        if setup.buffer is None:
            # Beyond the bound a packet is stored nowhere, yet must not reach a gateway that would refuse it.
            setup.buffer = PacketBuffer(BUFFERED_PACKETS if self._buffers < MAX_BUFFERS else 1)
            self._buffers += 1

    def _release(self, setup: _Setup) -> list[Packet]:
        if setup.buffer is None:
            return []
        packets, setup.buffer = setup.buffer.drain(), None
        self._buffers -= 1
        return packets


def _announcement(key: SetupKey, entry: NameEntry) -> AssignedIps:
    """Four or eight addresses: those of the families the resource has (§3)."""
    match = next((m for m in entry.matches if m.resource_id == key.resource_id), None)
    v4 = entry.v4 if match is None or match.has_v4 else ()
    v6 = entry.v6 if match is None or match.has_v6 else ()
    return AssignedIps(key.resource_id, key.name, tuple(ip_address(ip) for ip in (*v4, *v6)))
