"""What the kernel knows of path MTUs, brought to the state machine: what it refused, and what it is asked."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

from fz_core.linux import UdpSocket
from fz_core.tunnel import TunnelRole


def take_refusals(state: TunnelRole, sockets: Sequence[UdpSocket], now: float) -> list[Exception]:
    """The errors of the sockets: those datagrams are lost, the sockets go on. Too large ones raise a question."""
    errors = [error for udp in sockets for error in udp.take_errors()]
    for remote in {e.remote for e in errors if e.errno == errno.EMSGSIZE}:
        if remote is not None:
            state.path_mtus.doubt(remote, now)
    if state.path_mtus.asks_at <= now:
        answer_questions(state, sockets, now)
    return [OSError(error.errno, str(error)) for error in errors]


def answer_questions(state: TunnelRole, sockets: Iterable[UdpSocket], now: float) -> None:
    """Tell the state the MTU of each path it asks about; where there is no route, nothing."""
    by_family = {udp.is_ipv4: udp for udp in sockets}
    for hop in state.path_mtus.take_questions(now):
        udp = by_family.get(hop.remote.is_ipv4)
        mtu = None if udp is None else udp.path_mtu(hop.remote, hop.local)
        if mtu is not None:
            state.handle_path_mtu(hop.remote, mtu, now)
