"""An embedded portal as a trio service: listeners, WebSockets and time around `PortalState`.

    server = PortalServer(state)
    await nursery.start(server.serve, listeners)
    server.set_policy(policy)

One task per connection reads, one writes from a bounded queue; a peer that does not keep up is closed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_server_stream

from fz_core.embedded.policy import Policy
from fz_core.embedded.portal_http import Head, PrefixedStream, answer, knock_of, problem, read_head
from fz_core.embedded.portal_session import Knock, Refusal
from fz_core.embedded.portal_state import Close, Evict, Look, PortalState, Send
from fz_core.embedded.relay_check import is_dead

HEAD_TIMEOUT = 10.0
CLOSE_TIMEOUT = 2.0
SEND_TIMEOUT = 30.0
ALIVE_TIMEOUT = 1.0
MAX_LOOKS = 64
MAX_CONNECTIONS = 4096
MAX_MESSAGE_BYTES = 256 * 1024
QUEUE = 256
log = logging.getLogger("firezone_portal")


@dataclass(slots=True)
class Connection:
    """The I/O of one session."""

    outbox: trio.MemorySendChannel[str]
    inbox: trio.MemoryReceiveChannel[str]
    websocket: WebSocketConnection | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class PortalServer:
    """Serves one `PortalState`. Its time is trio's."""

    def __init__(self, state: PortalState, *, max_connections: int = MAX_CONNECTIONS) -> None:
        self._state = state
        self._slots = trio.Semaphore(max_connections)
        self._connections: dict[int, Connection] = {}
        self._wake = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._looks = 0

    async def serve(
        self,
        listeners: Sequence[trio.abc.Listener[Any]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._keep_time)
            await nursery.start(trio.serve_listeners, self._handle, list(listeners))
            task_status.started()

    def set_policy(self, policy: Policy) -> None:
        """Put a new policy in force."""
        self._state.set_policy(policy, trio.current_time())
        self._flush()

    async def _keep_time(self) -> None:
        while True:
            self._wake = trio.Event()
            deadline = self._state.poll_timeout()
            with trio.move_on_at(float("inf") if deadline is None else deadline):
                await self._wake.wait()
            self._state.handle_timeout(trio.current_time())
            self._flush()

    def _flush(self) -> None:
        """Hand all output to the connections' queues."""
        while (output := self._state.poll_output()) is not None:
            if isinstance(output, Look):
                self._start_look(output)
                continue
            connection = self._connections.get(output.session_id)
            if connection is None:
                continue
            match output:
                case Send(_, text):
                    try:
                        connection.outbox.send_nowait(text)
                    except trio.WouldBlock:
                        log.warning("Closing a peer that does not read session=%d", output.session_id)
                        self._drop(output.session_id)
                    except trio.BrokenResourceError:
                        pass
                case Evict(session_id, reason, text):
                    log.debug("Closing session=%d: %s", session_id, reason)
                    del self._connections[session_id]
                    if self._nursery is not None:
                        self._nursery.start_soon(self._evict, connection, text)
                case Close(session_id, reason):
                    log.debug("Closing session=%d: %s", session_id, reason)
                    del self._connections[session_id]
                    connection.outbox.close()
        self._wake.set()

    def _drop(self, session_id: int) -> None:
        connection = self._connections.pop(session_id, None)
        if connection is not None:
            connection.scope.cancel()
            self._state.handle_closed(session_id, trio.current_time())

    async def _evict(self, connection: Connection, text: str) -> None:
        """A process that is replaced hears why, if it still lives: else it would come back and replace the other."""
        with connection.outbox:
            if await _is_alive(connection):
                try:
                    connection.outbox.send_nowait(text)
                except (trio.WouldBlock, trio.BrokenResourceError):
                    pass

    def _start_look(self, look: Look) -> None:
        if self._nursery is not None and self._looks < MAX_LOOKS:
            self._looks += 1
            self._nursery.start_soon(self._look, look)

    async def _look(self, look: Look) -> None:
        try:
            dead = await is_dead(look.addresses)
        finally:
            self._looks -= 1
        if dead:
            self._state.handle_relay_dead(look.relay_id, trio.current_time())
            self._wake.set()

    async def _admit(self, knock: Knock) -> int | Refusal:
        """Let in, unless another gateway of this identity is there and answers; a dead connection hinders nobody."""
        if knock.role == "gateway":
            rival = self._state.rival_of(knock, trio.current_time())
            connection = None if rival is None else self._connections.get(rival)
            if connection is not None and await _is_alive(connection):
                return Refusal(409, "gateway_already_connected", "A gateway with this id is connected already.")
        return self._state.open(knock, trio.current_time())

    # one connection

    async def _handle(self, stream: trio.abc.HalfCloseableStream) -> None:
        """Whatever a peer does ends its own connection only."""
        try:
            self._slots.acquire_nowait()
        except trio.WouldBlock:
            await trio.aclose_forcefully(stream)
            return
        try:
            await self._serve(stream)
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError, ConnectionClosed) as errors:
            log.debug("Connection lost: %r", errors.exceptions[0])
        except* Exception:
            log.exception("A connection failed on a bug of ours")
        finally:
            self._slots.release()
            with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
                await trio.aclose_forcefully(stream)

    async def _serve(self, stream: trio.abc.HalfCloseableStream) -> None:
        head: Head | Refusal | None = None
        with trio.move_on_after(HEAD_TIMEOUT):
            head = await read_head(stream)
        if head is None:
            return
        if isinstance(head, Head) and head.path in ("/healthz", "/readyz"):
            await _say(stream, answer(200, b"ok\n"))
            return
        knock = head if isinstance(head, Refusal) else knock_of(head, _remote(stream))
        admitted = knock if isinstance(knock, Refusal) else await self._admit(knock)
        if isinstance(admitted, Refusal):
            log.info("Refused connection remote=%s status=%d code=%s", _remote(stream), admitted.status, admitted.code)
            await _say(stream, problem(admitted))
            return
        assert isinstance(head, Head)
        outbox, inbox = trio.open_memory_channel[str](QUEUE)
        connection = self._connections[admitted] = Connection(outbox, inbox)
        try:
            with connection.scope:
                self._flush()
                await self._talk(admitted, connection, PrefixedStream(stream, head.raw))
        finally:
            if self._connections.get(admitted) is connection:
                del self._connections[admitted]
            self._state.handle_closed(admitted, trio.current_time())
            self._flush()

    async def _talk(self, session_id: int, connection: Connection, stream: PrefixedStream) -> None:
        async with trio.open_nursery() as nursery:
            with trio.fail_after(HEAD_TIMEOUT):
                request = await wrap_server_stream(nursery, stream, max_message_size=MAX_MESSAGE_BYTES)
                websocket = connection.websocket = await request.accept()
            nursery.start_soon(self._write, websocket, connection, nursery.cancel_scope)
            try:
                while True:
                    message = await websocket.get_message()
                    if isinstance(message, str):
                        self._state.handle_text(session_id, message, trio.current_time())
                        self._flush()
            except ConnectionClosed:
                nursery.cancel_scope.cancel()

    async def _write(self, websocket: WebSocketConnection, connection: Connection, scope: trio.CancelScope) -> None:
        async for text in connection.inbox:
            with trio.fail_after(SEND_TIMEOUT):
                await websocket.send_message(text)
        with trio.move_on_after(CLOSE_TIMEOUT):
            await websocket.aclose()
        scope.cancel()


async def _is_alive(connection: Connection) -> bool:
    """Whether a peer answers a ping within 1 s."""
    if connection.websocket is None:
        return False
    with trio.move_on_after(ALIVE_TIMEOUT):
        try:
            await connection.websocket.ping()
        except (ConnectionClosed, OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return True
    return False


async def _say(stream: trio.abc.HalfCloseableStream, data: bytes) -> None:
    """Answer, and wait for the peer to have read it: closing at once could destroy it on the way."""
    with trio.move_on_after(CLOSE_TIMEOUT):
        await stream.send_all(data)
        if isinstance(stream, trio.SocketStream):
            await stream.send_eof()
            while await stream.receive_some(4096):
                pass


def _remote(stream: trio.abc.Stream) -> str:
    inner: Any = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    try:
        return str(inner.socket.getpeername()[0])
    except (AttributeError, OSError):
        return "?"
