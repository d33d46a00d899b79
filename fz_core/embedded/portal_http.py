"""The HTTP before the WebSocket: one request head read by h11, and answers without a WebSocket."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qsl, urlsplit

import h11
import trio

from fz_core.embedded.portal_session import Knock, Refusal

MAX_HEAD = 16 * 1024
MAX_PARAMS = 64
PATHS = {
    "/client/v2/websocket": ("client", False),
    "/client/websocket": ("client", True),
    "/gateway/v2/websocket": ("gateway", False),
    "/gateway/websocket": ("gateway", True),
    "/relay/websocket": ("relay", False),
}


@dataclass(frozen=True, slots=True)
class Head:
    """A request head. `raw` are the bytes read, to be read again by the WebSocket library."""

    method: str
    path: str
    query: str = field(repr=False)
    headers: dict[str, str] = field(repr=False)
    raw: bytes = field(repr=False)

    @property
    def is_upgrade(self) -> bool:
        """Whether the WebSocket library will accept it."""
        tokens = [t.strip().lower() for t in self.headers.get("connection", "").split(",")]
        return (
            self.method == "GET"
            and "upgrade" in tokens
            and self.headers.get("upgrade", "").lower() == "websocket"
            and self.headers.get("sec-websocket-version") == "13"
            and bool(self.headers.get("sec-websocket-key"))
        )


class PrefixedStream(trio.abc.HalfCloseableStream):
    """A stream whose first bytes have been read already."""

    def __init__(self, stream: trio.abc.HalfCloseableStream, prefix: bytes) -> None:
        self._stream, self._prefix = stream, prefix

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """The prefix first."""
        if not self._prefix:
            return await self._stream.receive_some(max_bytes)
        await trio.lowlevel.checkpoint()
        size = len(self._prefix) if max_bytes is None else max_bytes
        data, self._prefix = self._prefix[:size], self._prefix[size:]
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As the stream below."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """As the stream below."""
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """As the stream below."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """As the stream below."""
        await self._stream.aclose()


async def read_head(stream: trio.abc.ReceiveStream) -> Head | Refusal | None:
    """A request head; None if the peer hung up, a Refusal if it is none."""
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    raw = b""
    try:
        while (event := parser.next_event()) is h11.NEED_DATA:
            data = bytes(await stream.receive_some(4096))
            if not data:
                return None
            raw += data
            parser.receive_data(data)
    except h11.RemoteProtocolError as error:
        return Refusal(400, "bad_request", str(error))
    if not isinstance(event, h11.Request):
        return Refusal(400, "bad_request", "No request.")
    target = event.target.decode("latin-1")
    path, _, query = target.partition("?") if target.startswith("/") else _absolute(target)
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in event.headers}
    return Head(event.method.decode("latin-1"), path, query, headers, raw)


def _absolute(target: str) -> tuple[str, str, str]:
    try:
        parts = urlsplit(target)
    except ValueError:
        return "", "", ""
    return parts.path, "?", parts.query


def knock_of(head: Head, remote: str) -> Knock | Refusal:
    """What a head asks for; the token comes from the header, else from the query."""
    endpoint = PATHS.get(head.path)
    if endpoint is None:
        return Refusal(404, "not_found", f"There is nothing at {head.path[:100]}.")
    if not head.is_upgrade:
        return Refusal(426, "upgrade_required", "This is a WebSocket, version 13.")
    try:
        params = dict(parse_qsl(head.query, keep_blank_values=True, max_num_fields=MAX_PARAMS))
    except ValueError:
        return Refusal(400, "invalid_connect_params", "Too many query parameters.")
    scheme, _, token = head.headers.get("x-authorization", "").partition(" ")
    header_token = token if scheme.lower() == "bearer" and token.strip() else None
    query_token = params.pop("token", None)
    role, is_legacy = endpoint
    agent = head.headers.get("user-agent", "")
    return Knock(role, is_legacy, params, header_token or query_token, agent, remote)


def problem(refusal: Refusal) -> bytes:
    """A whole HTTP answer, problem+json."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(refusal.status).phrase,
        "status": refusal.status,
        "detail": refusal.detail,
        "code": refusal.code,
    }
    extra = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
    return answer(refusal.status, json.dumps(body).encode(), "application/problem+json; charset=utf-8", extra)


def answer(
    status: int, body: bytes = b"", kind: str = "text/plain; charset=utf-8", extra: dict[str, str] | None = None
) -> bytes:
    """A whole HTTP answer, after which the connection ends."""
    headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close", **(extra or {})}
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
