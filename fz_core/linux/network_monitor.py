"""A word from the kernel that the network has changed (rtnetlink(7)); not what has changed."""

from __future__ import annotations

import errno
import socket

DEBOUNCE = 0.5  # seconds to wait after the last change
# routes, links and addresses of both families
GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400


class NetworkMonitor:
    """Readable when routes, links or addresses change: then `drain`, wait `DEBOUNCE`, and copy anew."""

    def __init__(self) -> None:
        flags = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | flags, socket.NETLINK_ROUTE)
        try:
            self._sock.bind((0, GROUPS))
        except BaseException:
            self._sock.close()
            raise

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._sock.fileno()

    def drain(self) -> bool:
        """Forget what has come; whether there was anything."""
        changed = False
        while True:
            try:
                changed = bool(self._sock.recv(65_536)) or changed
            except BlockingIOError:
                return changed
            except OSError as error:  # ENOBUFS: more came than fits, so something changed
                if error.errno != errno.ENOBUFS:
                    raise
                changed = True

    def close(self) -> None:
        """Stop listening; harmless when repeated."""
        self._sock.close()
