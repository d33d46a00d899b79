"""A portal's upload door on this machine: HTTPS with a certificate of our own, and answers by script."""

from __future__ import annotations

import json
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import h11
import trio

HOST = "portal.test"
Answer = tuple[int, dict[str, str]]


def make_certificates(directory: Path) -> tuple[Path, Path, Path]:
    """A test CA, and a key and certificate it issued for HOST."""
    ca, ca_key = directory / "ca.pem", directory / "ca.key"
    key, request, certificate = directory / "server.key", directory / "server.csr", directory / "server.pem"
    names = directory / "names"
    names.write_text(f"subjectAltName=DNS:{HOST},DNS:other.test\n")
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *new_key, "-keyout", ca_key, "-out", ca, "-days", "2", "-subj", "/CN=Test CA")
    openssl("req", *new_key, "-keyout", key, "-out", request, "-subj", f"/CN={HOST}")
    openssl(
        "x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial",
        "-out", certificate, "-days", "2", "-extfile", names,
    )  # fmt: skip
    return ca, key, certificate


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@dataclass
class Request:
    """One upload as the portal saw it."""

    host: str
    path: str
    authorization: str
    reports: list[dict[str, Any]]


@dataclass
class FlowPortal:
    """Answers in turn from `answers`, then with `judge`."""

    port: int = 0
    answers: list[Answer] = field(default_factory=list)
    judge: Callable[[Request], Answer] = field(default=lambda request: (200, {}))
    requests: list[Request] = field(default_factory=list)

    def url(self, host: str = HOST) -> str:
        return f"https://{host}:{self.port}"

    async def _serve(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        connection = h11.Connection(h11.SERVER)
        head: h11.Request | None = None
        body = b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                try:
                    connection.receive_data(bytes(await stream.receive_some(65536)))
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return
            elif isinstance(event, h11.Request):
                head, body = event, b""
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                await self._answer(stream, connection, head, body)
                connection.start_next_cycle()
            else:
                return

    async def _answer(
        self, stream: trio.SSLStream[trio.SocketStream], connection: h11.Connection, head: h11.Request, body: bytes
    ) -> None:
        headers = {name.decode(): value.decode() for name, value in head.headers}
        reports = json.loads(body)["flow_logs"]
        request = Request(headers["host"], head.target.decode(), headers["authorization"], reports)
        assert (head.method, headers["content-type"]) == (b"POST", "application/json")
        self.requests.append(request)
        status, extra = self.answers.pop(0) if self.answers else self.judge(request)
        reply = b'{"data":{"status":"ok"}}'
        fields = [("Content-Length", str(len(reply))), *extra.items()]
        for event in (h11.Response(status_code=status, headers=fields), h11.Data(data=reply), h11.EndOfMessage()):
            await stream.send_all(connection.send(event) or b"")


@asynccontextmanager
async def open_portal(key: Path, certificate: Path) -> AsyncIterator[FlowPortal]:
    """A portal that listens while the context lasts."""
    portal = FlowPortal()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_ssl_over_tcp, portal._serve, 0, tls, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        portal.port = listener.transport_listener.socket.getsockname()[1]
        yield portal
        nursery.cancel_scope.cancel()
