"""Many small DNS questions over UDP: shared sockets, no task per question.

A socket is connected to one server, so only its datagrams arrive; it has a random port and random ids, and
is replaced after 64 questions or 2 seconds, so that a guesser has little time. Replies count only with id
and question. Not here: retries, TCP, and what replies mean (`resolver`).
"""

from __future__ import annotations

import secrets
import socket
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import trio

from fz_core.dns import Query, is_reply_to
from fz_core.driver import clock
from fz_core.driver.names.dns_client import QuerySocket
from fz_core.linux import SocketFactory
from fz_core.packet import Address

TRY_TIMEOUT = 2.0
MAX_PER_SOCKET = 64
MAX_SOCKET_AGE = 2.0
RECV_BATCH = 64
MAX_DATAGRAM = 4096
RD_QUESTION_AND_EDNS = b"\x01\x00\x00\x01\x00\x00\x00\x00\x00\x01"
EDNS = b"\x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x00"  # replies of up to 1232 bytes, please (RFC 6891)
CLASS_IN = 1

OnDone = Callable[[bytes | None], None]  # gets the reply; None if there is none


class DnsBatch:
    """`ask` calls back once, within TRY_TIMEOUT. `run` must run beside it; its end drops what is under way."""

    def __init__(
        self, *, marked: bool, now: Callable[[], float] = clock.now, sockets: SocketFactory | None = None
    ) -> None:
        self._marked, self._now, self._sockets = marked, now, sockets
        self._current: dict[Address, _SharedSocket] = {}
        self._deadlines: deque[tuple[float, _SharedSocket, int]] = deque()
        self._nursery: trio.Nursery | None = None
        self._asked = trio.Event()

    async def run(self) -> None:
        """Read replies and watch deadlines until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                while True:
                    self._expire()
                    if self._deadlines:
                        await trio.sleep(max(0.02, self._deadlines[0][0] - self._now()))
                    else:
                        self._asked = trio.Event()
                        await self._asked.wait()
        finally:
            self._nursery = None

    def ask(self, server: Address, question: bytes, on_done: OnDone) -> None:
        """Send a question in wire form. OSError where the server cannot be asked; then nothing is called back."""
        now = self._now()
        shared = self._current.get(server)
        if shared is None or shared.asked >= MAX_PER_SOCKET or now >= shared.ends_at:
            shared = self._replace(server, now)
        message_id = shared.send(question, on_done)
        if not self._deadlines:
            self._asked.set()
        self._deadlines.append((now + TRY_TIMEOUT, shared, message_id))

    def _replace(self, server: Address, now: float) -> _SharedSocket:
        if self._nursery is None:
            raise OSError("the resolver is not running")
        old = self._current.pop(server, None)
        if old is not None:
            old.retire()
        opened = QuerySocket(server, socket.SOCK_DGRAM, marked=self._marked, sockets=self._sockets)
        shared = _SharedSocket(opened, now + MAX_SOCKET_AGE)
        self._current[server] = shared
        self._nursery.start_soon(shared.run)
        return shared

    def _expire(self) -> None:
        now = self._now()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, shared, message_id = self._deadlines.popleft()
            shared.expire(message_id)
        for server in [s for s, shared in self._current.items() if now >= shared.ends_at]:
            self._current.pop(server).retire()


class _Asked(NamedTuple):
    query: Query
    on_done: OnDone


class _SharedSocket:
    """One socket and the questions that went out by it."""

    def __init__(self, opened: QuerySocket, ends_at: float) -> None:
        self._opened, self.ends_at = opened, ends_at
        self._pending: dict[int, _Asked] = {}
        self._scope = trio.CancelScope()
        self._is_retired = False
        self.asked = 0

    def send(self, question: bytes, on_done: OnDone) -> int:
        """The id under which the question went out."""
        message_id = secrets.randbits(16)
        while message_id in self._pending:
            message_id = secrets.randbits(16)
        data = message_id.to_bytes(2, "big") + RD_QUESTION_AND_EDNS + question + EDNS
        try:
            self._opened.sock.send(data)
        except ConnectionRefusedError:  # the news of an earlier question; this one was not sent
            self._opened.sock.send(data)
        except BlockingIOError:
            pass  # a full buffer: as if lost on the way
        rdtype = int.from_bytes(question[-4:-2], "big")
        self._pending[message_id] = _Asked(Query(message_id, "", rdtype, CLASS_IN, data, question, False), on_done)
        self.asked += 1
        return message_id

    def expire(self, message_id: int) -> None:
        """Time is up for a question, if it is still open."""
        asked = self._pending.pop(message_id, None)
        if asked is not None:
            asked.on_done(None)
            self._close_if_done()

    def retire(self) -> None:
        """No more questions come; close with the last reply."""
        self._is_retired = True
        self._close_if_done()

    async def run(self) -> None:
        """Hand out replies until retired and done."""
        sock = self._opened.sock
        with self._opened, self._scope:
            while True:
                await trio.lowlevel.wait_readable(sock)
                self._receive(sock)

    def _receive(self, sock: socket.socket) -> None:
        for _ in range(RECV_BATCH):
            try:
                reply = sock.recv(MAX_DATAGRAM)
            except BlockingIOError:
                return
            except OSError:  # nobody listens there: true for every open question
                self._fail_all()
                return
            asked = self._pending.get(int.from_bytes(reply[:2], "big"))
            if asked is not None and is_reply_to(asked.query, reply):
                del self._pending[asked.query.id]
                asked.on_done(reply)
                self._close_if_done()

    def _fail_all(self) -> None:
        pending, self._pending = self._pending, {}
        self.asked = MAX_PER_SOCKET  # the next question gets a fresh socket
        for asked in pending.values():
            asked.on_done(None)
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._is_retired and not self._pending:
            self._scope.cancel()
