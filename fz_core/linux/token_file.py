"""The token file of the client: root's, and nobody else's to read (`spec/binaries.md` §3.3)."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fz_core.linux.errors import HostError

VARIABLE = "FIREZONE_TOKEN"


def read_token_file(path: str | Path) -> str:
    """The trimmed token. HostError names what is wrong with the file."""
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise HostError(
            f"can't find the token: set {VARIABLE}, or put the token into {path} ({error.strerror})"
        ) from None
    with os.fdopen(descriptor, "rb") as file:
        # the opened file is checked, so that it cannot be exchanged in between
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise HostError(f"token file {path} is not a regular file")
        if (info.st_uid, info.st_gid) != (0, 0):
            raise HostError(f"token file {path} belongs to {info.st_uid}:{info.st_gid}: chown root:root {path}")
        if info.st_mode & 0o177:
            raise HostError(
                f"token file {path} has mode {stat.S_IMODE(info.st_mode):04o}, others may reach it: chmod 600 {path}"
            )
        content = file.read(65_536)
    try:
        return content.decode().strip()
    except UnicodeDecodeError:
        raise HostError(f"token file {path} is not UTF-8 text") from None
