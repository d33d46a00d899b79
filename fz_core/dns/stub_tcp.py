"""DNS over TCP behind the sentinels, on raw IP packets (`spec/tunnel.md` §10, RFC 7766).

A SYN leaves nothing behind: its answer carries a keyed hash of the addresses, and the connection begins with the
segment that confirms it (RFC 4987 §3.6). While all of a sentinel's connections are taken that segment stays
unanswered, and the peer's kernel repeats it: who comes eleventh waits. One query per connection is under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from hashlib import blake2s
from typing import NamedTuple

from fz_core.dns.tcp_connection import ACK, MAX_WINDOW, MODULUS, RST, SYN, Connection, Segment
from fz_core.dns.wire import HEADER_BYTES
from fz_core.packet import Packet, build_tcp

PORT = 53
TCP = 6
MTU = 1280
MAX_CONNECTIONS = 10
MAX_MESSAGE = 65_535
RECEIVE_CAPACITY = 2 + MAX_MESSAGE
UNSENT_BEFORE_NEXT = 16_384  # more than this of replies on their way, and the next query waits
IDLE_TIMEOUT = 30.0
BUSY_TIMEOUT = 60.0
CLOSE_TIMEOUT = 10.0
IDLE_BEFORE_EVICTION = 1.0


class _Endpoints(NamedTuple):
    sentinel: bytes
    ip: bytes
    port: int


class TcpToken(NamedTuple):
    """One query on one connection."""

    sentinel: bytes
    ip: bytes
    port: int
    serial: int


class _Client:
    """A connection with the query under way on it."""

    __slots__ = ("connection", "serial")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.serial: int | None = None

    @property
    def deadline(self) -> float:
        connection = self.connection
        if connection.is_closing:
            return connection.progress_at + CLOSE_TIMEOUT
        is_busy = self.serial is not None or connection.unsent
        return connection.progress_at + (BUSY_TIMEOUT if is_busy else IDLE_TIMEOUT)


class StubTcpServer:
    """Server of up to 10 connections per sentinel. No packet raises, nothing is kept of who has no connection."""

    def __init__(self, random_bytes: Callable[[int], bytes]) -> None:
        self._secret = random_bytes(32)
        self._addresses: frozenset[bytes] = frozenset()
        self._clients: dict[_Endpoints, _Client] = {}
        self._next_serial = 0
        self._queries: deque[tuple[TcpToken, bytes]] = deque()
        self._packets: deque[Packet] = deque()

    def set_addresses(self, ips: Iterable[bytes]) -> None:
        """Listen on port 53 of these. Others than before: every connection is reset."""
        addresses = frozenset(ips)
        if addresses == self._addresses:
            return
        self._addresses = addresses
        for endpoints, client in list(self._clients.items()):
            client.connection.reset()
            self._flush(endpoints, client)

    def handle_packet(self, packet: Packet, now: float) -> None:
        """Take a TCP packet to a sentinel; anything else is ignored."""
        endpoints = _Endpoints(packet.dst, packet.src, packet.src_port)
        segment = _read_segment_untrusted(packet)
        if segment is None or endpoints.sentinel not in self._addresses:
            return
        if packet.dst_port != PORT:
            self._refuse(endpoints, segment, packet.dst_port)
            return
        client = self._clients.get(endpoints)
        if segment.flags & SYN and not segment.flags & (RST | ACK):
            self._clients.pop(endpoints, None)
            self._greet(endpoints, segment)
            return
        if client is None:
            client = self._accept(endpoints, segment, now)
        if client is not None:
            client.connection.handle_segment(segment, now)
            self._serve(endpoints, client, now)

    def poll_packet(self) -> Packet | None:
        """A packet for the TUN device."""
        return self._packets.popleft() if self._packets else None

    def poll_query(self) -> tuple[TcpToken, bytes] | None:
        """A message of a connection that still waits for its reply; it may be anything of 13 bytes and more."""
        while self._queries:
            token, message = self._queries.popleft()
            if self._client_of(token) is not None:
                return token, message
        return None

    def send_reply(self, token: TcpToken, reply: bytes, now: float) -> None:
        """Answer a query; nothing happens where its connection is gone or it was answered before.

        A reply that no TCP message can hold ends the connection.
        """
        if len(reply) > MAX_MESSAGE:
            self.abort(token, now)
            return
        client = self._client_of(token)
        if client is not None:
            client.serial = None
            client.connection.write(len(reply).to_bytes(2, "big") + reply, now)
            self._serve(_endpoints(token), client, now)

    def abort(self, token: TcpToken, now: float) -> None:
        """Reset the connection of a query that is none."""
        client = self._client_of(token)
        if client is not None:
            client.connection.reset()
            self._serve(_endpoints(token), client, now)

    def handle_timeout(self, now: float) -> None:
        """Repeat what was lost, and end connections on which nothing happens."""
        for endpoints, client in list(self._clients.items()):
            connection = client.connection
            connection.handle_timeout(now)
            if client.deadline <= now:
                if client.serial is not None or connection.unsent or connection.is_closing:
                    connection.reset()
                else:
                    connection.close(now)
            self._serve(endpoints, client, now)

    def poll_timeout(self) -> float | None:
        """When `handle_timeout` is next due."""
        due = [client.deadline for client in self._clients.values()]
        due += [at for client in self._clients.values() if (at := client.connection.poll_timeout()) is not None]
        return min(due, default=None)

    # connections

    def _greet(self, endpoints: _Endpoints, syn: Segment) -> None:
        # The peer's own MSS does not matter: no segment of ours exceeds the device's MTU, so it takes all of them.
        options = b"\2\4" + _mss(endpoints).to_bytes(2, "big")
        cookie = self._cookie(endpoints, syn.seq)
        self._send(endpoints, Segment(cookie, (syn.seq + 1) % MODULUS, SYN | ACK, MAX_WINDOW), options)

    def _accept(self, endpoints: _Endpoints, segment: Segment, now: float) -> _Client | None:
        """The connection that begins with this segment, if it confirms our greeting and there is room."""
        if segment.flags & RST:
            return None
        expected = (self._cookie(endpoints, (segment.seq - 1) % MODULUS) + 1) % MODULUS
        is_greeted = segment.flags & (ACK | SYN) == ACK and segment.ack == expected
        if not self._has_room(endpoints.sentinel, now, may_evict=is_greeted):
            return None  # perhaps of one who waits, and sends more than the segment we want
        if not is_greeted:
            self._refuse(endpoints, segment, PORT)
            return None
        client = self._clients[endpoints] = _Client(Connection(segment, _mss(endpoints), RECEIVE_CAPACITY, now))
        return client

    def _has_room(self, sentinel: bytes, now: float, *, may_evict: bool) -> bool:
        """Whether the sentinel has a connection to spare; the one idle for longest is reset for that."""
        peers = [(endpoints, client) for endpoints, client in self._clients.items() if endpoints.sentinel == sentinel]
        if len(peers) < MAX_CONNECTIONS:
            return True
        idle = [
            (client.connection.progress_at, endpoints)
            for endpoints, client in peers
            if client.serial is None and not client.connection.unsent
        ]
        if not may_evict or not idle or min(idle)[0] > now - IDLE_BEFORE_EVICTION:
            return False
        endpoints = min(idle)[1]
        self._clients[endpoints].connection.reset()
        self._flush(endpoints, self._clients[endpoints])
        return True

    def _serve(self, endpoints: _Endpoints, client: _Client, now: float) -> None:
        """Read the next query, close after the last one, and send what there is to send."""
        connection = client.connection
        if client.serial is None and connection.unsent <= UNSENT_BEFORE_NEXT and not connection.is_over:
            message = self._next_message(connection, now)
            if message is not None:
                client.serial = self._next_serial
                self._next_serial += 1
                self._queries.append((TcpToken(*endpoints, client.serial), message))
            elif connection.peer_closed:
                connection.close(now)
        self._flush(endpoints, client)

    def _next_message(self, connection: Connection, now: float) -> bytes | None:
        received = connection.received
        if len(received) < 2 or connection.is_closing:
            return None
        size = received[0] << 8 | received[1]
        if size <= HEADER_BYTES:
            connection.reset()
            return None
        return connection.consume(2 + size, now)[2:] if len(received) >= 2 + size else None

    def _flush(self, endpoints: _Endpoints, client: _Client) -> None:
        for segment in client.connection.outgoing:
            self._send(endpoints, segment)
        client.connection.outgoing.clear()
        if client.connection.is_over:
            self._clients.pop(endpoints, None)

    def _client_of(self, token: TcpToken) -> _Client | None:
        client = self._clients.get(_endpoints(token))
        return client if client is not None and client.serial == token.serial else None

    def _cookie(self, endpoints: _Endpoints, peer_seq: int) -> int:
        """Our first sequence number: only who received it can confirm it."""
        about = b"".join(endpoints[:2]) + endpoints.port.to_bytes(2, "big") + peer_seq.to_bytes(4, "big")
        return int.from_bytes(blake2s(about, key=self._secret, digest_size=4).digest(), "big")

    def _refuse(self, endpoints: _Endpoints, segment: Segment, port: int) -> None:
        """Reset what belongs to nothing (RFC 9293 §3.10.7.1)."""
        if segment.flags & RST:
            return
        if segment.flags & ACK:
            answer = Segment(segment.ack, 0, RST, 0)
        else:
            answer = Segment(0, (segment.seq + segment.sequence_length) % MODULUS, RST | ACK, 0)
        self._send(endpoints, answer, port=port)

    def _send(self, endpoints: _Endpoints, segment: Segment, options: bytes = b"", port: int = PORT) -> None:
        sentinel, ip, peer_port = endpoints
        seq, ack, flags, window, payload = segment
        packet = build_tcp(
            sentinel, ip, port, peer_port, flags, seq, ack, payload, window=window, options=options
        )  # fmt: skip
        self._packets.append(packet)


def _endpoints(token: TcpToken) -> _Endpoints:
    return _Endpoints(token.sentinel, token.ip, token.port)


def _mss(endpoints: _Endpoints) -> int:
    return MTU - 40 if len(endpoints.sentinel) == 4 else MTU - 60


def _read_segment_untrusted(packet: Packet) -> Segment | None:
    """The TCP segment of a packet; None where it is none or its header is cut off."""
    if packet.protocol != TCP:
        return None
    header = packet.data[packet.l4_offset :]
    if len(header) < 20 or not 20 <= (header_size := (header[12] >> 4) * 4) <= len(header):
        return None
    seq, ack = int.from_bytes(header[4:8], "big"), int.from_bytes(header[8:12], "big")
    return Segment(seq, ack, header[13], header[14] << 8 | header[15], header[header_size:])
