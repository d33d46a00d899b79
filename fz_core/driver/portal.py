"""The connection to the portal: names, sockets, TLS and WebSocket around `portal.Channel`.

    link = PortalLink(login, client_channel(secrets.token_bytes), public_key=lambda: key_b64)
    nursery.start_soon(link.run)
    async for event in link.events: ...      # Connected, MessageReceived, MessageDropped, Hiccup, Fatal
    link.send(message)

`run` reconnects by itself and returns after `Fatal`. Not here: what to do about any of these events.
Source: `spec/portal-protocol.md` §1, §3.
"""

from __future__ import annotations

import logging
import secrets
import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit

import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection, wrap_client_stream

from fz_core.driver import clock
from fz_core.portal import Channel, ChannelEvent, Connect, Connected, Fatal, Hiccup, Login, relay_channel

Resolve = Callable[[str], Awaitable[Sequence[str]]]
SO_MARK = 0xFD002021
CONNECT_BUDGET = 5.0
HANDSHAKE_BUDGET = 15.0
CLOSE_BUDGET = 1.0
LOST_CLOSE_BUDGET = 0.05
QUEUE = 128
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
MAX_HANDSHAKE_BYTES = 64 * 1024
log = logging.getLogger("firezone.portal")


class PortalLink:
    """One role's link. `public_key` gives the current key, in Base64, at every attempt; None for relays.

    `mark` keeps the connection out of the tunnel and needs CAP_NET_ADMIN; None leaves sockets unmarked.
    Certificates are checked against the system's roots (or SSL_CERT_FILE) unless `tls` is given.
    """

    def __init__(
        self,
        login: Login,
        channel: Channel,
        *,
        public_key: Callable[[], str | None] = lambda: None,
        mark: int | None = SO_MARK,
        resolve: Resolve | None = None,
        tls: ssl.SSLContext | None = None,
        now: Callable[[], float] = clock.now,
    ) -> None:
        self._login, self._channel, self._public_key = login, channel, public_key
        self._mark, self._resolve, self._tls, self._now = mark, resolve or resolve_host, tls, now
        self._wake, self._rearm = trio.Event(), trio.Event()
        self._watched_until: float | None = None
        self._attempt = trio.CancelScope()
        self._sender: trio.MemorySendChannel[ChannelEvent]
        self.events: trio.MemoryReceiveChannel[ChannelEvent]
        self._sender, self.events = trio.open_memory_channel[ChannelEvent](QUEUE)

    def send(self, message: object) -> bool:
        """Queue a message; False if the link is down, then it is dropped."""
        queued = self._channel.send(message, self._now())
        self._wake.set()
        return queued

    def probe(self) -> None:
        """Something suggests that the link may be dead: find out within 2 s, and if so start over at once."""
        self._channel.probe(self._now())
        self._wake.set()
        self._rearm.set()

    def reconnect(self) -> None:
        """Start over at once, whatever is under way: the network, or our key, has changed."""
        self._channel.reconnect(self._now())
        self._attempt.cancel()

    async def run(self) -> None:
        """Keep the link up until cancelled or `Fatal`."""
        async with self._sender:
            while (delay := await self._hand_up()) is not None:
                self._attempt = trio.CancelScope()
                with self._attempt:
                    await trio.sleep(delay)
                    await self._connect_once()

    async def _hand_up(self) -> float | None:
        """Pass events on; the delay of the next attempt, None after a fatal one."""
        delay: float | None = None
        while (event := self._channel.poll_event()) is not None:
            if isinstance(event, Connect):
                delay = event.delay
                continue
            await self._sender.send(event)
            if isinstance(event, Fatal):
                return None
        return delay

    async def _connect_once(self) -> None:
        """One WebSocket from dialling to its end. How it ended is told to the channel."""
        try:
            async with trio.open_nursery() as nursery:
                with trio.fail_after(HANDSHAKE_BUDGET):
                    stream, websocket = await self._open(nursery)
                stream.is_strict = False
                try:
                    await self._talk(websocket)
                finally:
                    # A farewell is still sent when the next connection is urgent, but no answer is waited for.
                    is_urgent = self._channel.reconnects_in == 0.0
                    with trio.move_on_after(LOST_CLOSE_BUDGET if is_urgent else CLOSE_BUDGET, shield=True):
                        await websocket.aclose()
                nursery.cancel_scope.cancel()
        except* ConnectionRejected as rejected:
            self._refused(rejected)
        except* trio.TooSlowError:
            self._ended(f"no answer within {HANDSHAKE_BUDGET:.0f} s")
        except* (OSError, ssl.SSLError, trio.BrokenResourceError, ConnectionClosed, ConnectionLost) as errors:
            self._ended(describe(errors))

    async def _open(self, nursery: trio.Nursery) -> tuple[StrictStream, WebSocketConnection]:
        host, port, is_tls = self._login.endpoint()
        context = self._tls
        async with trio.open_nursery() as meanwhile:
            if is_tls and context is None:
                roots: list[ssl.SSLContext] = []
                meanwhile.start_soon(load_roots, roots)
            plain = await self._dial(host, port)
            nursery.start_soon(close_at_end, plain)
        stream: trio.abc.Stream = plain
        if is_tls:
            context = context or roots[0]
            encrypted = trio.SSLStream(plain, context, server_hostname=host, https_compatible=True)
            await encrypted.do_handshake()
            stream = encrypted
        strict = StrictStream(stream)
        url = urlsplit(self._login.url(self._public_key()))
        websocket = await wrap_client_stream(
            nursery,
            strict,  # type: ignore[arg-type]  # any stream will do
            f"[{host}]" if ":" in host else host,
            f"{url.path}?{url.query}",
            extra_headers=[(name.encode(), value.encode()) for name, value in self._login.headers()],
            max_message_size=MAX_MESSAGE_BYTES,
        )
        return strict, websocket

    async def _dial(self, host: str, port: int) -> trio.SocketStream:
        addresses = list(dict.fromkeys(await self._resolve(host)))
        if not addresses:
            raise ConnectionLost(f"no addresses for {host}")
        return await dial(addresses, port, self._mark)

    async def _talk(self, websocket: WebSocketConnection) -> None:
        """Exchange texts until either end is done."""
        self._channel.handle_connected(self._now())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, websocket)
            nursery.start_soon(self._watch, nursery.cancel_scope)
            while self._channel.is_open:
                message = await websocket.get_message()
                if isinstance(message, str):
                    self._channel.handle_text(message, self._now())
                self._wake.set()
                if self._channel.poll_timeout() != self._watched_until:
                    self._rearm.set()
                await self._hand_up_messages()
            nursery.cancel_scope.cancel()

    async def _hand_up_messages(self) -> None:
        """Pass events on while the WebSocket lasts; those about its end are left to `_hand_up`."""
        while self._channel.is_open and (event := self._channel.poll_event()) is not None:
            await self._sender.send(event)

    async def _write(self, websocket: WebSocketConnection) -> None:
        while True:
            self._wake = trio.Event()
            while (text := self._channel.poll_transmit()) is not None:
                await websocket.send_message(text)
            await self._wake.wait()

    async def _watch(self, scope: trio.CancelScope) -> None:
        """Timers, apart from writing, which a dead peer may block."""
        while (deadline := self._channel.poll_timeout()) is not None:
            self._watched_until, self._rearm = deadline, trio.Event()
            with trio.move_on_after(max(0.0, deadline - self._now())):
                await self._rearm.wait()
            self._channel.handle_timeout(self._now())
            self._wake.set()
        scope.cancel()

    def _refused(self, rejected: BaseExceptionGroup[ConnectionRejected]) -> None:
        refusal = first(rejected)
        assert isinstance(refusal, ConnectionRejected)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in refusal.headers}
        body = bytes(refusal.body or b"").decode("utf-8", "replace")
        self._channel.handle_refused(refusal.status_code, headers, body, time.time(), self._now())

    def _ended(self, error: str) -> None:
        """Report an end, unless the channel brought it about itself."""
        if self._channel.reconnects_in is None and not self._channel.is_dead:
            self._channel.handle_closed(error, self._now())


def relay_link(
    login: Login, budget: float | None = 86_400.0
) -> Callable[[str, Callable[[bool], None]], Awaitable[None]]:
    """A relay's link as `embedded.run_relay` wants it. The relay's sockets are not marked."""

    async def run(stamp_secret: str, set_ready: Callable[[bool], None]) -> None:
        link = PortalLink(login, relay_channel(secrets.token_bytes, stamp_secret, budget), mark=None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            async for event in link.events:
                match event:
                    case Connected():
                        set_ready(True)
                        log.info("Connected to portal")
                    case Hiccup(delay, _, error):
                        set_ready(False)
                        log.info("Portal connection hiccup error=%s backoff=%.1fs", error, delay)
                    case Fatal(error):
                        set_ready(False)
                        raise PortalFailed(error)

    return run


class PortalFailed(Exception):
    """The portal will not have us."""


class ConnectionLost(Exception):
    """An attempt ended before the WebSocket was open."""


class StrictStream(trio.abc.Stream):
    """Until the WebSocket is open, an end or a flood of bytes is an error; the library would wait on."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream, self._received, self.is_strict = stream, 0, True

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Bytes from the portal."""
        try:
            data = await self._stream.receive_some(max_bytes)
        except trio.BrokenResourceError as error:
            if self.is_strict:
                raise ConnectionLost(f"connection broken during the handshake: {error.__cause__ or error}") from None
            raise
        self._received += len(data)
        if self.is_strict and (not data or self._received > MAX_HANDSHAKE_BYTES):
            raise ConnectionLost("connection closed during the handshake" if not data else "answer too long")
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Bytes to the portal."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """As the stream below."""
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """As the stream below."""
        await self._stream.aclose()


async def resolve_host(host: str) -> Sequence[str]:
    """IPs of both families, from the hosts file and the system's resolver; none if it fails."""
    try:
        found = await trio.socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        log.debug("Cannot resolve host=%s error=%s", host, error)
        return ()
    return [str(entry[4][0]) for entry in found]


async def load_roots(found: list[ssl.SSLContext]) -> None:
    """The system's certificates, which take 30 ms to read, in a thread."""
    found.append(await trio.to_thread.run_sync(ssl.create_default_context))


async def dial(addresses: Sequence[str], port: int, mark: int | None) -> trio.SocketStream:
    """Try all addresses at once; the first that answers wins. OSError if none does."""
    winners: list[trio.SocketStream] = []
    errors: list[str] = []

    async def attempt(host: str, scope: trio.CancelScope) -> None:
        try:
            with trio.fail_after(CONNECT_BUDGET):
                stream = await connect(host, port, mark)
        except (OSError, trio.TooSlowError) as error:
            errors.append(f"{host}: {'no answer' if isinstance(error, trio.TooSlowError) else error}")
            return
        winners.append(stream)
        scope.cancel()

    async with trio.open_nursery() as nursery:
        for host in addresses:
            nursery.start_soon(attempt, host, nursery.cancel_scope)
    if not winners:
        raise OSError(f"cannot connect to port {port}: {'; '.join(errors)}")
    for late in winners[1:]:
        await trio.aclose_forcefully(late)
    return winners[0]


async def connect(host: str, port: int, mark: int | None) -> trio.SocketStream:
    """One TCP connection, marked before it leaves."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        if mark is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", mark))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await sock.connect((host, port))
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


async def close_at_end(stream: trio.SocketStream) -> None:
    """Close the socket whichever way the attempt ends."""
    try:
        await trio.sleep_forever()
    finally:
        await trio.aclose_forcefully(stream)


def first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first exception of a group that is not itself one."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def describe(group: BaseExceptionGroup[BaseException]) -> str:
    """One line about the first error."""
    error = first(group)
    if isinstance(error, ConnectionClosed):
        reason = error.reason
        return f"the connection was closed ({reason.code if reason else 'no code'})"
    return str(error.__cause__ or error)
