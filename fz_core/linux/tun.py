"""The TUN device: one queue, virtio header, segmentation offloads where the kernel has them all.

Not here: addresses and routes (`netlink.py`), splitting and merging (`fastpath/`). Source: spec/io.md 6.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
from types import TracebackType
from typing import TYPE_CHECKING, Self

from fz_core.linux import switches
from fz_core.linux.compiled import TunQueue
from fz_core.linux.errors import HostError

if TYPE_CHECKING:
    from typing_extensions import Buffer

TUN_NODE = "/dev/net/tun"
TUN_DEVICE_NUMBER = os.makedev(10, 200)
TX_QUEUE_LENGTH = 10_000

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
SIOCSIFTXQLEN = 0x8943
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
OFFLOADS = 0x01 | 0x02 | 0x04 | 0x20 | 0x40  # CSUM, TSO4, TSO6, USO4, USO6: all or nothing


class TunError(HostError):
    """The TUN device cannot be opened or read; the message names the remedy."""


class TunDevice:
    """`TunDevice.open()`, then `read_batch`, `write` and `close`. The device vanishes when closed."""

    def __init__(self, fd: int, name: str, offloads: bool) -> None:
        self._fd = fd
        self._queue = TunQueue(fd)
        self._offloads = offloads
        self.name = name

    @classmethod
    def open(cls, name: str = "tun-firezone", *, offloads: bool = True, node: str = TUN_NODE) -> Self:
        """Create the device, down and without addresses. Fails while another process has it."""
        fd = _open_node(node)
        try:
            _create(fd, name)
            offloads = offloads and switches.is_on(switches.TUN_OFFLOADS) and _enable_offloads(fd)
            _set_tx_queue_length(name)
            return cls(fd, name, offloads)
        except BaseException:
            os.close(fd)
            raise

    def fileno(self) -> int:
        """The non-blocking descriptor, -1 once closed."""
        return self._fd

    @property
    def offloads(self) -> bool:
        """Whether merged packets may be written: offloads were granted, and none was refused since."""
        return self._offloads and not self._queue.refused_merged

    def read_batch(self, limit: int) -> list[bytes]:
        """Up to `limit` packets, each with its 10-byte header; TunError where the device is gone."""
        try:
            return self._queue.read_batch(limit)
        except OSError as error:
            raise TunError(
                f"cannot read {self.name} ({error.strerror}): was the device deleted? Restart the service"
            ) from error

    def write(self, packet: Buffer) -> bool:
        """Write a packet with its header. False: wait until writable. A refused packet is counted, not raised."""
        return self._queue.write(packet)

    def counters(self) -> dict[str, int]:
        """Packets and bytes both ways, and refused writes."""
        queue = self._queue
        return {
            "read_packets": queue.read_packets,
            "read_bytes": queue.read_bytes,
            "written_packets": queue.written_packets,
            "written_bytes": queue.written_bytes,
            "write_errors": queue.write_errors,
        }

    @property
    def last_write_errno(self) -> int:
        """The errno of the last refused write, 0 if there was none."""
        return self._queue.last_write_errno

    def close(self) -> None:
        """Remove the device; harmless when repeated."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._queue = TunQueue(-1)
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_node(node: str) -> int:
    """Open the TUN node, made when absent (containers)."""
    try:
        if not os.path.exists(node):
            os.makedirs(os.path.dirname(node), exist_ok=True)
            os.chmod(os.path.dirname(node), 0o751)
            os.mknod(node, 0o600 | stat.S_IFCHR, TUN_DEVICE_NUMBER)
        return os.open(node, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            remedy = "run as root or with CAP_NET_ADMIN, in a container also pass --device /dev/net/tun"
        else:
            remedy = "load the kernel module with 'modprobe tun'"
        raise TunError(f"cannot open {node} ({error.strerror}): {remedy}") from error


def _create(fd: int, name: str) -> None:
    encoded = name.encode()
    if not 0 < len(encoded) < 16:
        raise ValueError(f"interface name {name!r} must have 1 to 15 bytes")
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", encoded, IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
    except OSError as error:
        if error.errno == errno.EPERM:
            remedy = "run as root or with CAP_NET_ADMIN"
        elif error.errno in (errno.EBUSY, errno.EINVAL):
            remedy = "another instance or interface has this name, stop it first"
        else:
            remedy = "check that the kernel supports TUN devices"
        raise TunError(f"cannot create TUN device {name} ({error.strerror}): {remedy}") from error


def _enable_offloads(fd: int) -> bool:
    """Kernels before 6.2 lack USO and refuse; then no offload is used."""
    try:
        fcntl.ioctl(fd, TUNSETOFFLOAD, OFFLOADS)
    except OSError:
        return False
    return True


def _set_tx_queue_length(name: str) -> None:
    """The kernel's 500 drops bursts; failure only costs speed."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
            fcntl.ioctl(control, SIOCSIFTXQLEN, struct.pack("16si20x", name.encode(), TX_QUEUE_LENGTH))
    except OSError:
        pass
