"""`/healthz` and `/readyz` over HTTP: the first says the process runs, the second that it can serve."""

from __future__ import annotations

import socket
from collections.abc import Callable

import h11
import structlog
import trio

REQUEST_TIMEOUT = 5.0
MAX_CONNECTIONS = 32
MAX_REQUEST_BYTES = 16_384

log = structlog.get_logger("health")


class HealthServer:
    """Serves one address until cancelled. A taken port is logged as an error and nothing else."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._slots = trio.Semaphore(MAX_CONNECTIONS)

    async def run(
        self,
        is_ready: Callable[[], bool],
        *,
        task_status: trio.TaskStatus[int | None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Answer probes; `is_ready` decides `/readyz`. Started with the port, or None if it is taken."""
        host, port = self._address
        try:
            listeners = await trio.open_tcp_listeners(port, host=host)
        except OSError as error:
            log.error(
                "cannot serve health checks, choose another --health-check-addr",
                address=f"{host}:{port}", error=error.strerror or str(error),
            )  # fmt: skip
            task_status.started(None)
            return
        task_status.started(listeners[0].socket.getsockname()[1])

        async def serve(stream: trio.SocketStream) -> None:
            await self._serve(stream, is_ready)

        await trio.serve_listeners(serve, listeners)

    async def _serve(self, stream: trio.SocketStream, is_ready: Callable[[], bool]) -> None:
        try:
            self._slots.acquire_nowait()
        except trio.WouldBlock:
            await stream.aclose()
            return
        try:
            with trio.move_on_after(REQUEST_TIMEOUT):
                await _answer(stream, is_ready)
        except (OSError, trio.BrokenResourceError, h11.RemoteProtocolError):
            pass
        finally:
            self._slots.release()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()


async def _answer(stream: trio.SocketStream, is_ready: Callable[[], bool]) -> None:
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST_BYTES)
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(4096))
        elif isinstance(event, h11.Request):
            break
        else:
            return
    response = h11.Response(
        status_code=_status(event.target.decode("ascii", "replace").partition("?")[0], is_ready),
        headers=[("content-length", "0"), ("connection", "close")],
    )
    for part in (response, h11.EndOfMessage()):
        await stream.send_all(connection.send(part) or b"")


def _status(path: str, is_ready: Callable[[], bool]) -> int:
    if path == "/healthz":
        return 200
    if path == "/readyz":
        return 200 if is_ready() else 503
    return 404
