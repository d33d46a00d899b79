"""Readable when one of some files changes, is replaced, appears or goes (inotify(7)).

A file is watched itself, for mounts into containers, and by its folder, for programs that replace it; both
also where a symbolic link leads. Python has no inotify.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

IN_CLOSE_WRITE, IN_ATTRIB = 0x8, 0x4
IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x40, 0x80, 0x100, 0x200
FILE_EVENTS = IN_CLOSE_WRITE | IN_ATTRIB
FOLDER_EVENTS = IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE
EVENT = struct.Struct("iIII")
READ_BYTES = 65_536

_libc = ctypes.CDLL(None, use_errno=True)


class FileWatch:
    """`drain` when `fileno` is readable. OSError where the kernel has no instance left for this user."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = tuple(paths)
        self._names: dict[int, set[str]] = {}
        self._fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._watch_all()

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._fd

    def drain(self) -> bool:
        """Forget what has come; whether it was about one of the files."""
        concerns_us = False
        while True:
            try:
                data = os.read(self._fd, READ_BYTES)
            except BlockingIOError:
                break
            while data:
                descriptor, _, _, length = EVENT.unpack_from(data)
                name = os.fsdecode(data[EVENT.size : EVENT.size + length].rstrip(b"\0"))
                concerns_us |= descriptor < 0 or name in self._names.get(descriptor, ())
                data = data[EVENT.size + length :]
        if concerns_us:  # what was replaced is another file now
            self._watch_all()
        return concerns_us

    def close(self) -> None:
        """Stop watching, once."""
        os.close(self._fd)

    def _watch_all(self) -> None:
        for path in self._paths:
            for place in dict.fromkeys((path, Path(os.path.realpath(path)))):
                self._watch(place, FILE_EVENTS, "")
                self._watch(place.parent, FOLDER_EVENTS, place.name)

    def _watch(self, place: Path, events: int, name: str) -> None:
        """Places that do not exist are left out."""
        descriptor = _libc.inotify_add_watch(self._fd, os.fsencode(place), events)
        if descriptor >= 0:
            self._names.setdefault(descriptor, set()).add(name)
