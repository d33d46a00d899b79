"""What this process may do, and what others may see of it."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from pathlib import Path

CAP_NET_ADMIN = 12
PR_SET_DUMPABLE = 4
SOCKET_BUFFERS = {"rmem_max": 16_777_216, "wmem_max": 2_097_152}


def has_net_admin() -> bool:
    """Whether we are root or hold the capability CAP_NET_ADMIN."""
    if os.geteuid() == 0:
        return True
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> CAP_NET_ADMIN & 1)
    return False


def forbid_core_dumps() -> None:
    """Keys and tokens must not reach a core file, nor another process of the same user."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def raise_socket_buffers(proc: Path = Path("/proc/sys/net/core")) -> dict[str, str]:
    """Let sockets have large buffers. Never lowers a limit; what happened, by name of the limit."""
    results = {}
    for name, wanted in SOCKET_BUFFERS.items():
        try:
            if int((proc / name).read_text()) >= wanted:
                results[name] = "is large enough"
            else:
                (proc / name).write_text(str(wanted))
                results[name] = f"raised to {wanted}"
        except OSError as error:
            results[name] = f"cannot be raised: {error.strerror}"
    return results


def os_version() -> tuple[str, str, str, str]:
    """Name and version of the distribution, architecture, kernel."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    name, version = release.get("NAME", "Linux"), release.get("VERSION_ID", "0")
    return name, version, platform.machine(), platform.release()
