"""Name servers for tests: real sockets on loopback, behaviour by a function."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import NamedTuple

import dns.message
import dns.rcode
import dns.rrset
import trio

from fz_core.packet import Address

LOOPBACK = bytes([127, 0, 0, 1])


class Asked(NamedTuple):
    """One question that arrived."""

    transport: str
    name: str
    rdtype: str
    port: int
    message: dns.message.Message


Behaviour = Callable[[Asked], "list[bytes] | None"]


class Peer:
    """Serves UDP and TCP on one port. `answer` gives the datagrams, or frames, to send back; None: silence."""

    def __init__(self, answer: Behaviour, ip: str = "127.0.0.1", port: int = 0) -> None:
        self.answer, self.asked = answer, list[Asked]()
        self._udp, self._tcp = _bind_pair(ip, port)
        self.address = Address.parse(f"{ip}:{self._udp.getsockname()[1]}")
        self.tcp_connections = 0
        self.delay = 0.0

    @property
    def port(self) -> int:
        return self.address.port

    def transports(self) -> list[str]:
        """How the questions came, in order."""
        return [asked.transport for asked in self.asked]

    def close(self) -> None:
        """Instead of `run`: nobody listens on the port any more."""
        self._udp.close()
        self._tcp.close()

    async def run(self) -> None:
        with self._udp, self._tcp:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve_tcp, nursery)
                udp = trio.socket.from_stdlib_socket(self._udp)
                while True:
                    data, source = await udp.recvfrom(65535)
                    nursery.start_soon(self._answer, udp, data, source)

    async def _answer(self, udp: trio.socket.SocketType, data: bytes, source: tuple[str, int]) -> None:
        replies = self._replies("udp", data, source[1])
        await trio.sleep(self.delay)
        for reply in replies:
            await udp.sendto(reply, source)

    async def _serve_tcp(self, nursery: trio.Nursery) -> None:
        listener = trio.socket.from_stdlib_socket(self._tcp)
        while True:
            accepted, source = await listener.accept()
            self.tcp_connections += 1
            nursery.start_soon(self._serve_connection, trio.SocketStream(accepted), source[1])

    async def _serve_connection(self, stream: trio.SocketStream, port: int) -> None:
        buffer = b""
        async with stream:
            async for data in stream:
                buffer += data
                while len(buffer) >= 2 and len(buffer) >= 2 + int.from_bytes(buffer[:2], "big"):
                    end = 2 + int.from_bytes(buffer[:2], "big")
                    query, buffer = buffer[2:end], buffer[end:]
                    replies = self._replies("tcp", query, port)
                    await trio.sleep(self.delay)
                    for reply in replies:
                        # in two pieces, cut inside the length
                        framed = len(reply).to_bytes(2, "big") + reply
                        await stream.send_all(framed[:1])
                        await stream.send_all(framed[1:])

    def _replies(self, transport: str, data: bytes, port: int) -> list[bytes]:
        message = dns.message.from_wire(data)
        question = message.question[0]
        asked = Asked(
            transport,
            question.name.to_text(omit_final_dot=True).lower(),
            question.rdtype.name,
            port,
            message,
        )
        self.asked.append(asked)
        return self.answer(asked) or []


def _bind_pair(ip: str, port: int) -> tuple[socket.socket, socket.socket]:
    """UDP and TCP on the same port; which is free, another process may know first."""
    while True:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            udp.bind((ip, port))
            tcp.bind((ip, udp.getsockname()[1]))
            tcp.listen()
        except OSError:
            udp.close()
            tcp.close()
            if port:
                raise
            continue
        udp.setblocking(False)
        tcp.setblocking(False)
        return udp, tcp


def zone(records: dict[tuple[str, str], list[str]], ttl: int = 300) -> Behaviour:
    """Answers from a table; unknown names do not exist, names without the type have no answer."""

    def answer(asked: Asked) -> list[bytes]:
        return [reply(asked, *records.get((asked.name, asked.rdtype), []), ttl=ttl, exists=asked.name in names)]

    names = {name for name, _ in records}
    return answer


def reply(asked: Asked, *rdatas: str, ttl: int = 300, exists: bool = True, rcode: str = "NOERROR") -> bytes:
    """A reply with these records of the asked type."""
    return response(asked, *rdatas, ttl=ttl, exists=exists, rcode=rcode).to_wire(max_size=65_535)


def response(
    asked: Asked, *rdatas: str, ttl: int = 300, exists: bool = True, rcode: str = "NOERROR"
) -> dns.message.Message:
    message = dns.message.make_response(asked.message)
    message.set_rcode(dns.rcode.from_text(rcode if exists else "NXDOMAIN"))
    if rdatas:
        message.answer.append(dns.rrset.from_text(asked.message.question[0].name, ttl, "IN", asked.rdtype, *rdatas))
    return message
