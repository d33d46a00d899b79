"""Sockets on loopback that stand for addresses of a simulated network, and a network of one's own to have them in.

Datagrams of one size from one place are sent as one message with UDP_SEGMENT: the kernel brings them on as one
buffer to a socket that takes such (UDP_GRO), as a network card would.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from fz_core.packet import Address

IP_PKTINFO, IP_RECVTOS, SOL_UDP, UDP_SEGMENT, UDP_GRO = 8, 13, 17, 103, 104
IPV6_RECVPKTINFO, IPV6_RECVTCLASS, IPV6_TCLASS = 49, 66, 67
LEVEL = {4: socket.IPPROTO_IP, 16: socket.IPPROTO_IPV6}
TOS = {4: socket.IP_TOS, 16: IPV6_TCLASS}
TAKES_TOS = {4: IP_RECVTOS, 16: IPV6_RECVTCLASS}
TAKES_ADDRESS = {4: IP_PKTINFO, 16: IPV6_RECVPKTINFO}
FAMILY = {4: socket.AF_INET, 16: socket.AF_INET6}
BUFFER = 4 << 20
MOST_SEGMENTS, MOST_BYTES = 64, 65_000
CLONE_NEWNET = 0x40000000


def socket_at(address: Address) -> socket.socket:
    """A bound socket that tells the ECN marks of what arrives."""
    family = len(address.ip)
    found = socket.socket(FAMILY[family], socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    found.setsockopt(LEVEL[family], TAKES_TOS[family], 1)
    found.bind((address.host, address.port))
    return found


def data_socket(address: Address) -> socket.socket:
    """As the driver has them: it also tells where datagrams arrive, and takes several as one."""
    found = socket_at(address)
    found.setsockopt(LEVEL[len(address.ip)], TAKES_ADDRESS[len(address.ip)], 1)
    found.setsockopt(SOL_UDP, UDP_GRO, 1)
    return found


class Ends:
    """Stand for everybody a peer has to do with."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._by_address: dict[Address, socket.socket] = {}
        self._by_number: dict[int, tuple[Address, socket.socket]] = {}

    def send(self, source: Address, to: Address, datagrams: list[bytes], ecn: int) -> None:
        """As one message; but the last, all have one size."""
        family = len(source.ip)
        control = [(LEVEL[family], TOS[family], struct.pack("=i", ecn))]
        if len(datagrams) > 1:
            control.append((SOL_UDP, UDP_SEGMENT, struct.pack("=H", len(datagrams[0]))))
        self._at(source).sendmsg(datagrams, control, 0, (to.host, to.port))

    def take(self) -> list[tuple[bytes, Address, bytes, int]]:
        """What came: from which IP address, for whom, and its ECN mark."""
        found = []
        for number, _ in self._poll.poll(0):
            address, end = self._by_number[number]
            while True:
                try:
                    data, control, _, name = end.recvmsg(2000, 64)
                except BlockingIOError:
                    break
                source = socket.inet_pton(end.family, name[0])
                found.append((source, address, data, control[0][2][0] & 3 if control else 0))
        return found

    def close(self) -> None:
        for end in self._by_address.values():
            end.close()
        self._poll.close()

    def _at(self, address: Address) -> socket.socket:
        found = self._by_address.get(address)
        if found is None:
            found = self._by_address[address] = socket_at(address)
            self._by_number[found.fileno()] = address, found
            self._poll.register(found, select.EPOLLIN)
        return found


def messages(batch: list[tuple[Address, Address, bytes, int]]) -> Iterator[tuple[Address, Address, list[bytes], int]]:
    """`(to, source, datagrams, ecn)`: what comes together in one buffer, from what comes at one time."""
    run: list[bytes] = []
    key: tuple[Address, Address, int] | None = None
    for to, source, data, ecn in batch:
        fits = key == (to, source, ecn) and 0 < len(data) <= len(run[0]) == len(run[-1])
        if not fits or len(run) == MOST_SEGMENTS or sum(map(len, run)) + len(data) > MOST_BYTES:
            if key is not None:
                yield key[0], key[1], run, key[2]
            run, key = [], (to, source, ecn)
        run.append(data)
    if key is not None:
        yield key[0], key[1], run, key[2]


@contextmanager
def own_network() -> Iterator[None]:
    """This thread in a network namespace of its own, where every address is local; needs root."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())}: run as root")

    with open("/proc/thread-self/ns/net") as before:
        check(libc.unshare(CLONE_NEWNET))
        try:
            for command in ("link set lo up", "-6 route add local ::/0 dev lo"):
                subprocess.run(["ip", *command.split()], check=True)
            with open("/proc/sys/net/ipv6/ip_nonlocal_bind", "w") as switch:
                switch.write("1")
            yield
        finally:
            check(libc.setns(before.fileno(), CLONE_NEWNET))
