"""Requests to the kernel about links, addresses, routes and rules (rtnetlink(7), linux/rtnetlink.h).

    with RouteSocket() as kernel:
        kernel.change(NEWROUTE, body, CREATE | EXCLUSIVE)       # NetlinkError if refused
        for body in kernel.dump(GETROUTE, header): ...

A message body is a fixed header followed by attributes. Only what `netlink.py` needs is here: a general
library takes longer to import than everything else about a start.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Self

NEWLINK, GETLINK = 16, 18
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
NEWRULE = 32
REQUEST, ACK, DUMP, EXCLUSIVE, CREATE = 0x1, 0x4, 0x300, 0x200, 0x400
DUMP_INTERRUPTED = 0x10
NOOP, ERROR, DONE = 1, 2, 3
UNICAST, PROTO_STATIC = 1, 4
RTA_DST, RTA_OIF, RTA_TABLE = 1, 4, 15
SOL_NETLINK, EXT_ACK_CAP, GET_STRICT_CHK = 270, 10, 12
MESSAGE = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
LINK = struct.Struct("=BxHiII")  # family, type, index, flags, which flags change
ADDRESS = struct.Struct("=BBBBi")  # family, prefix length, flags, scope, index
ROUTE = struct.Struct("=BBBBBBBBI")  # family, lengths of dst and src, tos, table, protocol, scope, type, flags
ATTRIBUTE = struct.Struct("=HH")  # length, type
RESULT = struct.Struct("=i")
TYPE_MASK = 0x3FFF
RECEIVE_BYTES = 1 << 17
DUMP_ATTEMPTS = 5


class NetlinkError(OSError):
    """The kernel refused a request."""

    def __init__(self, number: int) -> None:
        super().__init__(number, os.strerror(number))


class RouteSocket:
    """One request at a time; every method blocks until the kernel has answered."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._sequence = 0
        try:
            self._sock.bind((0, 0))
        except BaseException:
            self._sock.close()
            raise
        for option in (EXT_ACK_CAP, GET_STRICT_CHK):  # short errors; dumps of one table only: since Linux 4.20
            with suppress(OSError):
                self._sock.setsockopt(SOL_NETLINK, option, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def change(self, kind: int, body: bytes, flags: int = 0) -> None:
        """Ask for a change. NetlinkError if it is refused."""
        self._send(kind, REQUEST | ACK | flags, body)
        for answer, _, payload in self._receive():
            if answer == ERROR:
                _raise_if_refused(payload)
                return

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """The bodies of everything of a kind. NetlinkError if that is refused."""
        for _ in range(DUMP_ATTEMPTS):
            found, is_whole = self._dump_once(kind, body)
            if is_whole:
                break
        return found

    def _dump_once(self, kind: int, body: bytes) -> tuple[list[bytes], bool]:
        """Not whole if something changed meanwhile."""
        self._send(kind, REQUEST | DUMP, body)
        found, is_whole = [], True
        for answer, flags, payload in self._receive():
            is_whole = is_whole and not flags & DUMP_INTERRUPTED
            if answer in (ERROR, DONE):
                _raise_if_refused(payload)
                break
            if answer != NOOP:
                found.append(payload)
        return found, is_whole

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        self._sock.sendto(MESSAGE.pack(MESSAGE.size + len(body), kind, flags, self._sequence, 0) + body, (0, 0))

    def _receive(self) -> Iterator[tuple[int, int, bytes]]:
        """Type, flags and body of the answers to the latest request, for ever."""
        while True:
            data, at = self._sock.recv(RECEIVE_BYTES), 0
            while at + MESSAGE.size <= len(data):
                length, kind, flags, sequence, _ = MESSAGE.unpack_from(data, at)
                if sequence == self._sequence:
                    yield kind, flags, data[at + MESSAGE.size : at + length]
                at += max(_aligned(length), MESSAGE.size)


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    length = ATTRIBUTE.size + len(value)
    return (ATTRIBUTE.pack(length, kind) + value).ljust(_aligned(length), b"\0")


def number(kind: int, value: int) -> bytes:
    """An attribute of 32 bits."""
    return attribute(kind, struct.pack("=I", value))


def attributes(body: bytes, at: int) -> dict[int, bytes]:
    """The attributes behind a fixed header of `at` bytes."""
    found = {}
    while at + ATTRIBUTE.size <= len(body):
        length, kind = ATTRIBUTE.unpack_from(body, at)
        found[kind & TYPE_MASK] = body[at + ATTRIBUTE.size : at + length]
        at += max(_aligned(length), ATTRIBUTE.size)
    return found


def _aligned(length: int) -> int:
    return length + 3 & ~3


def _raise_if_refused(payload: bytes) -> None:
    """The payload of an acknowledgement, or of the end of a dump, begins with a negative error number."""
    if len(payload) >= RESULT.size and (code := RESULT.unpack_from(payload)[0]) < 0:
        raise NetlinkError(-code)
