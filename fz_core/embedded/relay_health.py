"""`/healthz` and `/readyz` of a relay, over HTTP/1.1 with h11."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import h11
import trio

REQUEST_TIMEOUT = 10.0
MAX_READ = 8192


async def serve_health(
    address: tuple[str, int],
    is_ready: Callable[[], bool],
    *,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer until cancelled; OSError if the port is taken."""
    handler = partial(answer_connection, is_ready=is_ready)
    await trio.serve_tcp(handler, address[1], host=address[0], task_status=task_status)


async def answer_connection(stream: trio.SocketStream, is_ready: Callable[[], bool]) -> None:
    """One request, then close. What is not HTTP is simply hung up on."""
    connection = h11.Connection(h11.SERVER)
    with trio.move_on_after(REQUEST_TIMEOUT):
        try:
            request = await next_request(stream, connection)
            if request is not None:
                status = status_of(request.method, request.target, is_ready())
                await send_status(stream, connection, status)
        except (h11.RemoteProtocolError, trio.BrokenResourceError):
            pass
    await trio.aclose_forcefully(stream)


async def next_request(stream: trio.SocketStream, connection: h11.Connection) -> h11.Request | None:
    """The request line and headers; a body is not waited for."""
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            return None
        connection.receive_data(await stream.receive_some(MAX_READ))


def status_of(method: bytes, target: bytes, is_ready: bool) -> int:
    """The answer to a request."""
    path = target.partition(b"?")[0]
    if path not in (b"/healthz", b"/readyz"):
        return 404
    if method not in (b"GET", b"HEAD"):
        return 405
    return 200 if path == b"/healthz" or is_ready else 503


async def send_status(stream: trio.SocketStream, connection: h11.Connection, status: int) -> None:
    """An answer without body."""
    headers = [("content-length", "0"), ("connection", "close")]
    data = connection.send(h11.Response(status_code=status, headers=headers)) or b""
    data += connection.send(h11.EndOfMessage()) or b""
    await stream.send_all(data)
