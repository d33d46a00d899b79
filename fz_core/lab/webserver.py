"""A web server with one large resource, for demo and tests: `python -m fz_core.lab.webserver --port 80`.

`GET /bytes?num=N` answers N bytes that are the same on every run (`document_digest`); `GET /` a short text.
Bytes go out through `sendfile`, so the server is never the slow part.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import socket
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

BLOCK_BYTES = 4 * 1024 * 1024
MAX_BYTES = 1 << 40
WELCOME = b"This page is private: you reached it through the tunnel.\n"


@cache
def block() -> bytes:
    """The bytes that repeat: pseudo-random, so that nothing on the way can compress them."""
    return hashlib.shake_128(b"fz_core.lab.webserver").digest(BLOCK_BYTES)


def document_digest(count: int) -> str:
    """The lower-case hex SHA-256 of `/bytes?num=count`."""
    digest = hashlib.sha256()
    whole, rest = divmod(count, BLOCK_BYTES)
    for _ in range(whole):
        digest.update(block())
    digest.update(block()[:rest])
    return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request after the other on a connection; HTTP/1.1."""

    protocol_version = "HTTP/1.1"
    server: WebServer

    def do_GET(self) -> None:
        """Answer a request."""
        url = urlsplit(self.path)
        if url.path == "/":
            self._head(200, len(WELCOME), "text/plain; charset=utf-8")
            self.wfile.write(WELCOME)
            return
        number = parse_qs(url.query).get("num", [""])[0]
        if url.path != "/bytes" or not (number.isascii() and number.isdigit() and int(number) <= MAX_BYTES):
            self._head(404 if url.path != "/bytes" else 400, 0, "text/plain")
            return
        self._head(200, int(number), "application/octet-stream")
        self._send_bytes(int(number))

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing per request."""

    def _head(self, status: int, length: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send_bytes(self, count: int) -> None:
        self.wfile.flush()
        sent = 0
        while sent < count:
            offset = sent % BLOCK_BYTES
            wanted = min(BLOCK_BYTES - offset, count - sent)
            sent += os.sendfile(self.connection.fileno(), self.server.memory, offset, wanted)


class WebServer(ThreadingHTTPServer):
    """Listens on the wildcard address of both families, or of IPv4 where IPv6 is off."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int) -> None:
        self.memory = os.memfd_create("block")
        with os.fdopen(os.dup(self.memory), "wb") as file:
            file.write(block())
        super().__init__(("", port), Handler)

    def server_bind(self) -> None:
        """One socket for both families."""
        self.socket.close()
        if socket.has_dualstack_ipv6():
            self.socket = socket.create_server(
                ("", self.server_address[1]), family=socket.AF_INET6, dualstack_ipv6=True
            )
        else:
            self.socket = socket.create_server(("", self.server_address[1]))
        self.server_address = self.socket.getsockname()[:2]
        self.server_name, self.server_port = "web", self.server_address[1]

    def server_close(self) -> None:
        """Free the port."""
        super().server_close()
        os.close(self.memory)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left early is not worth a traceback."""


def main() -> None:
    """Serve until killed; says 'serving on port N' when ready."""
    parser = argparse.ArgumentParser(description="web server of the lab")
    parser.add_argument("--port", type=int, default=80)
    server = WebServer(parser.parse_args().port)
    print(f"serving on port {server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
