"""The driver's side of the pump: its thread, what it could not decide, and the verdicts it works by (`design.md` §4).

    carrier = Carrier(state, tun, sockets, threads=1)
    carrier.start()
    ...when its descriptor is readable:      errors = carrier.read(now)
    ...at the end of each turn, after the flush:  carrier.settle(now, is_flushed)
    ...before the state's timers:            carrier.note(now)

The state is the truth: every verdict comes from it, and every change of it voids verdicts in the same turn.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections import deque
from collections.abc import Sequence

from fz_core.fastpath import Pump, split_super_packet
from fz_core.linux import HostError, TunDevice, TunError, UdpSocket, switches
from fz_core.node import Carried, Transport
from fz_core.packet import Address, DropReason
from fz_core.tunnel import PacketError, TunnelRole
from fz_core.tunnel.path_mtu import MAX_PACKET
from fz_core.tunnel.verdict import FlowKey, Verdict

THREADS_VARIABLE = "FZ_FASTPATH_THREADS"
CORES_FOR_TWO = 4
# How often a busy pump is asked what it carried: for connections, and for flows.
PEER_INTERVAL, FLOW_INTERVAL = 0.1, 1.0
SWEPT_PER_INTERVAL = 4096
BUDGET = 256
FROM_DEVICE, DATAGRAM, OPENED, FORGED, NO_PACKET = range(5)

Ending = tuple[bytes, int]
Record = tuple[int, int | None, Ending | None, Ending | None, int, bool, bytes]


def wanted_threads() -> int:
    """Threads of the pump: as many as `FZ_FASTPATH_THREADS` says, none with `FZ_FASTPATH=off`. HostError for others.

    Unless told, one for each direction where each finds a core of its own beside those of senders and receivers.
    """
    if not switches.is_on(switches.FASTPATH):
        return 0
    wanted = os.environ.get(THREADS_VARIABLE, "").strip()
    if wanted not in ("", "1", "2"):
        raise HostError(f"{THREADS_VARIABLE} is {wanted!r}: use 1 or 2, or unset it")
    return int(wanted) if wanted else 2 if len(os.sched_getaffinity(0)) >= CORES_FOR_TWO else 1


class Carrier:
    """Owns the pump. All methods belong to the loop's thread."""

    def __init__(self, state: TunnelRole, tun: TunDevice, sockets: Sequence[UdpSocket], *, threads: int = 1) -> None:
        self._state = state
        self._tun_name = tun.name
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._pump = Pump(
            tun.fileno(),
            self._wake,
            secrets.token_bytes(16),
            merges=tun.offloads,
            has_gso=all(udp.gso_segments > 1 for udp in sockets),
            threads=threads,
        )
        self._threads = [
            threading.Thread(target=self._pump.run, args=halves, name="pump", daemon=True)
            for halves in ([()] if threads == 1 else [(0,), (1,)])
        ]
        self._numbers: dict[str, int] = {}
        self._peers: dict[int, Transport] = {}
        self._installed: tuple[dict[int, Verdict], dict[int, Verdict]] = {}, {}
        self._new: dict[tuple[bool, str, FlowKey], Verdict] = {}
        self._generation = state.generation
        self._limits = state.path_mtus.limits
        self._lost = 0
        self._pending: deque[Record] = deque()
        self._is_unfinished = False
        self._peers_due_at: float | None = None
        self._flows_due_at = 0.0
        state.wants_verdicts = True
        self.set_sockets(sockets)

    def fileno(self) -> int:
        """Readable when the pump has something to say."""
        return self._wake

    def start(self) -> None:
        """Begin to carry."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Let the pump finish its batch, and end it; harmless when repeated."""
        if self._wake >= 0:
            self._pump.stop()
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join()
            self._state.wants_verdicts = False
            os.close(self._wake)
            self._wake = -1

    def set_sockets(self, sockets: Sequence[UdpSocket]) -> None:
        """Use these instead; the old ones may be closed then."""
        by_family = {udp.is_ipv4: (udp.fileno(), udp.port) for udp in sockets}
        self._pump.set_sockets(by_family.get(True), by_family.get(False))

    def counters(self) -> dict[str, int]:
        """What was carried, and what was lost."""
        return self._pump.counters()

    @property
    def refused_merged(self) -> bool:
        """Whether the device takes single packets only, as was found out since."""
        return self._pump.refused_merged

    # what the pump could not decide

    @property
    def is_behind(self) -> bool:
        """Whether a turn's budget left something to present."""
        return bool(self._pending)

    def read(self, errors: list[Exception], now: float) -> None:
        """Present what waits to the state, up to a budget: timers and the portal have their turn too."""
        if not self._pending:
            os.eventfd_read(self._wake)
            if self._pump.has_failed:
                raise TunError(f"cannot read {self._tun_name}: was the device deleted? Restart the service")
            self._is_unfinished = True
            self._pending.extend(self._pump.take())
            self._note_peers(now)  # a peer was heard before what it is told now
        for _ in range(min(len(self._pending), BUDGET)):
            kind, number, local, source, ecn, is_again, data = self._pending.popleft()
            self._state.flow_goes_on = is_again
            if kind == FROM_DEVICE:
                self._take_device_read(data, errors, now)
                continue
            assert local is not None
            assert source is not None
            error = self._take_datagram(kind, number, Address(*local), Address(*source), ecn, data, now)
            if error is not None:
                errors.append(error)
            self.heed()
        lost = self._pump.lost
        if lost != self._lost:
            self._state.drops[DropReason.BUFFER_FULL] += lost - self._lost
            self._lost = lost
        if self._peers_due_at is None:
            self._peers_due_at = now  # the first packets after a pause may wake a connection
            self._flows_due_at = max(self._flows_due_at, now)

    def _take_device_read(self, raw: bytes, errors: list[Exception], now: float) -> None:
        packets = split_super_packet(raw, self._state.drops)
        if isinstance(packets, DropReason):
            self._state.drops.add(packets)
            errors.append(PacketError(packets, "tun", None))
            return
        for packet in packets:
            error = self._state.handle_tun_input(packet, now)
            if error is not None:
                errors.append(error)
            self.heed()

    def _take_datagram(
        self, kind: int, number: int | None, local: Address, source: Address, ecn: int, data: bytes, now: float
    ) -> Exception | None:
        state = self._state
        if kind == DATAGRAM:
            return state.handle_network_input(local, source, data, ecn, now)
        if kind == OPENED:
            transport = None if number is None else self._peers.get(number)
            ends = None if transport is None else self._ends_of(transport, local, source)
            if transport is None or ends is None:
                state.drops.add(DropReason.UNKNOWN_CONNECTION)  # what it was opened for is gone
                return None
            return state.handle_opened(transport.peer_id, *ends, ecn, data, now)
        reason = DropReason.WG_BAD_PACKET if kind == FORGED else DropReason.MALFORMED_PACKET
        state.drops.add(reason)
        return PacketError(reason, source, local)

    def _ends_of(self, transport: Transport, local: Address, source: Address) -> tuple[Address, Address] | None:
        """Between whom a packet travelled; through a relay that is not who brought it."""
        receive = transport.receive
        if receive is None or receive.channel == 0:
            return local, source
        return self._state.node.ends_of(receive)

    def heed(self) -> None:
        """After each call of the state: what became void, then what it decided about the packet."""
        state = self._state
        if state.generation != self._generation:
            self._generation = state.generation
            self._new.clear()
            state.take_stale()
            state.take_revoked()
            self._pump.void_all()
        else:
            for peer_id in state.take_stale():
                self._void_peer(peer_id)
            for verdict in state.take_revoked():
                self._revoke(verdict)
        offered = state.take_verdict()
        if offered is not None:
            self._new[offered.is_inbound, offered.peer_id if offered.is_inbound else "", offered.before] = offered

    def _void_peer(self, peer_id: str) -> None:
        number = self._numbers.get(peer_id)
        if number is not None:
            self._pump.void_peer(number)
        self._new = {key: verdict for key, verdict in self._new.items() if verdict.peer_id != peer_id}

    def _revoke(self, verdict: Verdict) -> None:
        self._new.pop((verdict.is_inbound, verdict.peer_id if verdict.is_inbound else "", verdict.before), None)
        number = self._numbers.get(verdict.peer_id)
        if number is not None:
            removed = self._pump.remove(verdict.is_inbound, number, verdict.before)
            if removed is not None:
                self._forget(verdict.is_inbound, *removed)

    def _forget(self, is_inbound: bool, index: int, note: tuple[int, int, float] | None) -> None:
        known = self._installed[is_inbound].pop(index, None)
        if known is not None and note is not None:
            known.note(*note)

    # what the pump works by

    def settle(self, now: float, is_flushed: bool) -> None:
        """Bring the pump up to date, and let it go on with flows of which nothing is under way here any more."""
        self.heed()
        self._follow_peers(now)
        for verdict in self._new.values():
            self._install(verdict)
        self._new.clear()
        if self._is_unfinished and is_flushed and not self._pending:
            self._is_unfinished = False
            self._pump.finish()

    def _install(self, verdict: Verdict) -> None:
        number = self._numbers.get(verdict.peer_id)
        if number is None:
            return
        index, note = self._pump.install(
            verdict.is_inbound, number, verdict.before, verdict.after, verdict.ttl, verdict.until
        )
        self._forget(verdict.is_inbound, index, note)
        self._installed[verdict.is_inbound][index] = verdict

    def _follow_peers(self, now: float) -> None:
        changed = self._state.node.take_changed()
        if self._state.path_mtus.limits is not self._limits:
            changed = changed | set(self._limits) | set(self._state.path_mtus.limits)
            self._limits = self._state.path_mtus.limits
        for peer_id in changed:
            self._follow_peer(peer_id, now)

    def _follow_peer(self, peer_id: str, now: float) -> None:
        transport = self._state.node.transport(peer_id, now)
        number = self._numbers.get(peer_id)
        if number is not None and (transport is None or self._peers[number].tunnel is not transport.tunnel):
            self._pump.remove_peer(number)
            del self._numbers[peer_id], self._peers[number]
            number = None
        if transport is None:
            return
        if number is None:
            number = self._pump.add_peer(transport.index)
            if number is None:
                return
            self._numbers[peer_id] = number
        self._peers[number] = transport
        send, receive = transport.send, transport.receive
        self._pump.set_peer(
            number,
            transport.tunnel,
            None if send is None else (send.remote.ip, send.remote.port, send.local and send.local.ip, send.channel),
            transport.send_until,
            None if receive is None else (receive.remote.ip, receive.remote.port, receive.local, receive.channel),
            self._limits.get(peer_id, MAX_PACKET),
        )

    # what the pump tells

    def poll_timeout(self) -> float | None:
        """When `note` is due."""
        return self._peers_due_at

    def note(self, now: float) -> None:
        """Tell the state what was carried: to be called when due, and before the state runs its timers."""
        if self._peers_due_at is None:
            return
        is_busy = self._note_peers(now)
        if now >= self._flows_due_at or not is_busy:
            self.note_flows()
            self._flows_due_at = now + FLOW_INTERVAL
            for is_inbound, index, note in self._pump.sweep(SWEPT_PER_INTERVAL):
                self._forget(is_inbound, index, note)
        if is_busy:
            self._peers_due_at = now + PEER_INTERVAL
        else:
            self._peers_due_at = None
            self._pump.notice()

    def _note_peers(self, now: float) -> bool:
        """Whether any of them had traffic since the last time."""
        peers = self._pump.take_peers()
        for number, sent_at, heard_at, unheard_since in peers:
            transport = self._peers.get(number)
            if transport is not None:
                self._state.node.note_traffic(transport.peer_id, Carried(sent_at, heard_at, unheard_since), now)
        return bool(peers)

    def note_flows(self) -> None:
        """Tell what was carried of each flow since the last time."""
        notes = self._pump.take_flows()
        notes.sort(key=_last_at)
        for is_inbound, index, packets, size, last_at in notes:
            verdict = self._installed[is_inbound].get(index)
            if verdict is not None:
                verdict.note(packets, size, last_at)

    def take_refusals(self, errors: list[Exception], now: float) -> None:
        """Datagrams that the kernel did not take; those too large for their path raise a question."""
        for number, code, size in self._pump.take_refusals():
            transport = self._peers.get(number)
            if transport is None or transport.send is None:
                continue
            remote = transport.send.remote
            if code == errno.EMSGSIZE:
                self._state.path_mtus.doubt(remote, now)
            errors.append(OSError(code, f"sending {size} bytes to {remote}: {os.strerror(code)}"))


def _last_at(note: tuple[bool, int, int, int, float]) -> float:
    return note[4]
