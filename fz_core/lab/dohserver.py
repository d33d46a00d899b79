"""DNS over HTTPS (RFC 8484) in front of a name server: GET and POST, HTTP/1.1.

    python -m fz_core.lab.dohserver --cert doh.pem --key doh.key --upstream 127.0.0.1

Every query goes to the upstream over TCP, and its reply back unchanged; each is logged as `answered POST`.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import socket
import ssl
import struct
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

PATH = "/dns-query"
KIND = "application/dns-message"
MAX_QUERY = 65535
TIMEOUT = 5.0


class Handler(BaseHTTPRequestHandler):
    """One request after the other on a connection."""

    protocol_version = "HTTP/1.1"
    server: DohServer

    def do_GET(self) -> None:
        """The query is in the URL."""
        text = parse_qs(urlsplit(self.path).query).get("dns", [""])[0]
        try:
            query = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except binascii.Error:
            query = b""
        self._answer(query)

    def do_POST(self) -> None:
        """The query is the body."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_QUERY:
            self.close_connection = True
            self._say(413 if length.isdecimal() else 411)
            return
        query = self.rfile.read(int(length))
        if self.headers.get("Content-Type") != KIND:
            self._say(415)
        else:
            self._answer(query)

    def _answer(self, query: bytes) -> None:
        if urlsplit(self.path).path != PATH:
            self._say(404)
        elif not query:
            self._say(400)
        else:
            try:
                reply = ask(self.server.upstream, query)
            except OSError:
                self._say(502)
                return
            print(f"answered {self.command}", flush=True)
            self._say(200, reply)

    def _say(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Type", KIND)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing per request."""


class DohServer(ThreadingHTTPServer):
    """Listens on the wildcard address of both families."""

    daemon_threads = True
    request_queue_size = 128
    address_family = socket.AF_INET6

    def __init__(self, port: int, context: ssl.SSLContext, upstream: str) -> None:
        self.context, self.upstream = context, upstream
        super().__init__(("::", port), Handler)

    def server_bind(self) -> None:
        """One socket for both families, and no look-up of our own name."""
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "doh", self.socket.getsockname()[1]

    def get_request(self) -> tuple[Any, Any]:
        """The handshake is left to the connection's own thread."""
        sock, address = super().get_request()
        return self.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False), address

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left early, or does not trust us, is not worth a traceback."""
        print("connection failed", flush=True)


def ask(upstream: str, query: bytes) -> bytes:
    """One exchange with a name server over TCP."""
    with socket.create_connection((upstream, 53), TIMEOUT) as stream, stream.makefile("rb") as answers:
        stream.sendall(struct.pack("!H", len(query)) + query)
        (length,) = struct.unpack("!H", answers.read(2).ljust(2, b"\0"))
        reply = answers.read(length)
    if not length or len(reply) < length:
        raise ConnectionError("the name server ended the stream")
    return reply


def main() -> None:
    """Serve until killed; says 'serving on port N' when ready."""
    parser = argparse.ArgumentParser(description="DNS over HTTPS server of the lab")
    parser.add_argument("--port", type=int, default=443)
    parser.add_argument("--cert", type=Path, required=True)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--upstream", default="127.0.0.1", metavar="IP")
    options = parser.parse_args()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(options.cert, options.key)
    context.set_alpn_protocols(["http/1.1"])
    server = DohServer(options.port, context, options.upstream)
    print(f"serving on port {server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
