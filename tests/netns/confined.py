"""Run a program as confined as the official gateway's systemd unit runs it, without systemd.

    python confined.py PROGRAM [ARGUMENT ...]

Only CAP_NET_ADMIN; sockets of IPv4, IPv6 and netlink only; only system calls of systemd's `@system-service`, any other
ends the process; no new namespaces; no memory that is writable and executable; no new privileges; 4096 descriptors and
512 processes. Root in name: the interpreter of a test may lie in root's home. Source: spec/io.md 12.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import socket
import struct
import subprocess
import sys
from pathlib import Path

NUMBERS = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
SETPRIV = ("setpriv", "--inh-caps=-all,+net_admin", "--ambient-caps=-all,+net_admin", "--bounding-set=-all,+net_admin",
           "--no-new-privs", "--")  # fmt: skip
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER_AT, ARCHITECTURE_AT, FIRST_ARGUMENT_AT = 0, 4, 16
X86_64 = 0xC000003E


def main() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    resource.setrlimit(resource.RLIMIT_NPROC, (512, 512))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) != 0:
        raise SystemExit("this kernel cannot refuse executable memory: use Linux 6.3 or newer")
    program = system_call_filter()
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0) != 0:
        raise SystemExit(f"the filter was refused: {os.strerror(ctypes.get_errno())}")
    os.execvp(sys.argv[1], sys.argv[1:])


def system_call_filter() -> bytes:
    """Instructions of 8 bytes: code, jump if equal, jump if not, value."""
    numbers = {name: int(number) for name, number in re.findall(r"__NR_(\w+) (\d+)", NUMBERS.read_text())}
    denied = {"unshare": errno.EPERM, "setns": errno.EPERM, "clone3": errno.ENOSYS}
    program = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (EQUAL, 1, 0, X86_64),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_AT),
    ]
    for name, error in denied.items():
        program += [(EQUAL, 0, 1, numbers[name]), (RETURN, 0, 0, ERRNO | error)]
    families = [(EQUAL, len(FAMILIES) - n, 0, family) for n, family in enumerate(FAMILIES)]
    only_families = [(LOAD, 0, 0, FIRST_ARGUMENT_AT), *families, (RETURN, 0, 0, ERRNO | errno.EAFNOSUPPORT)]
    only_families.append((RETURN, 0, 0, ALLOW))
    program += [(EQUAL, 0, len(only_families), numbers["socket"]), *only_families]
    for name in sorted(members_of("@system-service") & numbers.keys() - denied.keys() - {"socket"}):
        program += [(EQUAL, 0, 1, numbers[name]), (RETURN, 0, 0, ALLOW)]
    program.append((RETURN, 0, 0, KILL))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def members_of(group: str) -> set[str]:
    """System calls of one of systemd's groups, and of @default, which is always allowed."""
    shown = subprocess.run(
        ["systemd-analyze", "syscall-filter", "--no-pager"], capture_output=True, text=True, check=True
    )
    groups: dict[str, set[str]] = {}
    for line in shown.stdout.splitlines():
        word = line.strip()
        if line.startswith("@"):
            current = groups.setdefault(word, set())
        elif word and not word.startswith("#"):
            current.add(word)
    found: set[str] = set()
    unread = [group, "@default"]
    while unread:
        for word in groups[unread.pop()]:
            if word.startswith("@"):
                unread.append(word)
            else:
                found.add(word)
    return found


if __name__ == "__main__":
    main()
