"""The firewall mark that keeps the program's own traffic out of the tunnel. Source: spec/io.md 3.2.

Every socket towards the network carries it: the policy rules of `netlink.py` skip marked packets.
"""

from __future__ import annotations

import socket
import sys

from fz_core.linux.errors import HostError

MARK = 0xFD002021


class MarkError(HostError):
    """A socket could not be excluded from the tunnel; going on would loop traffic into it."""


def set_mark(sock: socket.socket, mark: int = MARK) -> None:
    """Exclude a socket from the tunnel; MarkError where that is not permitted.

    The mark goes as bytes: `setsockopt` takes no number above 2^31 - 1.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark.to_bytes(4, sys.byteorder))
    except OSError as error:
        raise MarkError(
            f"cannot set mark {mark:#x} on a socket ({error.strerror}): run as root or with CAP_NET_ADMIN"
        ) from error
