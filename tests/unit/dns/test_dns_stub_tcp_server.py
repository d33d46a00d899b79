"""DNS over TCP behind the sentinels, packet by packet and in virtual time; the kernel is asked in tests/netns."""

from __future__ import annotations

import random
from ipaddress import ip_address

import pytest

from fz_core.dns import StubTcpServer, TcpToken
from fz_core.packet import Packet, build_tcp, build_udp, verify_checksums

FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
SENTINEL = ip_address("100.100.111.1").packed
SENTINEL_V6 = ip_address("fd00:2021:1111:8000:100:100:111:0").packed
OWN, OWN_V6 = ip_address("100.64.0.1").packed, ip_address("fd00:2021:1111::1").packed
QUERY = bytes(range(40))


@pytest.mark.parametrize(("sentinel", "own", "mss"), [(SENTINEL, OWN, 1240), (SENTINEL_V6, OWN_V6, 1220)])
def test_a_query_and_its_reply(sentinel: bytes, own: bytes, mss: int) -> None:
    server = make_server()
    peer = Peer(server, sentinel, own)
    (greeting,) = peer.send(SYN)
    assert tcp_options(greeting) == b"\2\4" + mss.to_bytes(2, "big")
    peer.take(greeting)
    peer.send(ACK)
    peer.send(ACK | PSH, frame(QUERY))
    token, message = poll(server)
    assert message == QUERY
    assert token.sentinel == sentinel
    server.send_reply(token, bytes(60_000), 0.0)
    segments = drain(server)
    assert max(len(segment) for segment in segments) == 1280
    for segment in segments:
        assert verify_checksums(segment) == ()
        peer.take(segment)
    assert peer.received == frame(bytes(60_000))


def test_a_syn_leaves_nothing_behind() -> None:
    server = make_server()
    for port in range(1, 3000):
        assert len(Peer(server, port=port).send(SYN)) == 1
    assert server.poll_timeout() is None
    Peer(server).connect()
    assert server.poll_timeout() is not None


@pytest.mark.shows("tunnel", 51)
def test_queries_one_after_another() -> None:
    server = make_server()
    peer = Peer(server).connect()
    peer.send(ACK, b"".join(frame(bytes([n]) * 20) for n in range(5)))
    for n in range(5):
        token, message = poll(server)
        assert message == bytes([n]) * 20
        assert server.poll_query() is None
        server.send_reply(token, bytes([n + 100]) * 30, 0.0)
    peer.take(*drain(server))
    assert peer.received == b"".join(frame(bytes([n + 100]) * 30) for n in range(5))


def test_a_query_waits_while_much_is_unsent() -> None:
    server = make_server()
    peer = Peer(server).connect()
    peer.send(ACK, frame(QUERY) + frame(QUERY))
    token, _ = poll(server)
    server.send_reply(token, bytes(50_000), 0.0)
    assert server.poll_query() is None
    peer.take(*drain(server))
    peer.send(ACK)
    assert poll(server)[0].serial != token.serial


def test_lost_segments_are_repeated() -> None:
    server = make_server()
    peer = Peer(server).connect()
    peer.send(ACK, frame(QUERY))
    server.send_reply(poll(server)[0], bytes(5000), 0.0)
    first, _lost, *rest = drain(server)
    peer.take(first, *rest)
    assert len(peer.received) == 1240
    peer.send(ACK)
    due = server.poll_timeout()
    assert due is not None
    assert due == pytest.approx(0.3)
    server.handle_timeout(due)
    peer.take(*drain(server))
    while len(peer.received) < 5002:
        peer.take(*peer.send(ACK))
    assert peer.received == frame(bytes(5000))


def test_a_vanished_peer_is_given_up() -> None:
    server = make_server()
    peer = Peer(server).connect()
    peer.send(ACK, frame(QUERY))
    server.send_reply(poll(server)[0], bytes(3000), 0.0)
    sent, now = drain(server), 0.0
    while (due := server.poll_timeout()) is not None:
        assert due > now
        now = due
        server.handle_timeout(now)
        server.handle_timeout(now)
        sent += drain(server)
    assert 30 < now < 60
    assert len(sent) == 3 + 6 + 1  # segments, repetitions, reset
    assert sent[-1].tcp_flags & RST


def test_a_closed_window_is_probed() -> None:
    server = make_server()
    peer = Peer(server, window=0).connect()
    peer.send(ACK, frame(QUERY))
    server.send_reply(poll(server)[0], bytes(3000), 0.0)
    assert all(len(payload(segment)) == 0 for segment in drain(server))
    due = server.poll_timeout()
    assert due is not None
    server.handle_timeout(due)
    (probe,) = drain(server)
    assert len(payload(probe)) == 1
    peer.window = 65_535
    peer.take(probe, *peer.send(ACK))
    while len(peer.received) < 3002:
        peer.take(*peer.send(ACK))


def test_idle_connections_end() -> None:
    server = make_server()
    peer = Peer(server).connect()
    assert server.poll_timeout() == 30.0
    server.handle_timeout(30.0)
    (fin,) = drain(server)
    assert fin.tcp_flags & FIN
    peer.take(fin)
    (last,) = peer.send(FIN | ACK)
    assert last.tcp_flags == ACK
    assert server.poll_timeout() is None


def test_a_peer_that_never_closes() -> None:
    server = make_server()
    peer = Peer(server).connect()
    server.handle_timeout(30.0)
    peer.take(*drain(server))
    peer.send(ACK, now=30.0)
    server.handle_timeout(40.0)
    (reset,) = drain(server)
    assert reset.tcp_flags & RST
    assert server.poll_timeout() is None


def test_a_query_nobody_answers() -> None:
    server = make_server()
    peer = Peer(server).connect()
    peer.send(ACK, frame(QUERY))
    token, _ = poll(server)
    server.handle_timeout(59.9)
    assert drain(server) == []
    server.handle_timeout(60.0)
    assert [segment.tcp_flags & RST for segment in drain(server)] == [RST]
    server.send_reply(token, QUERY, 61.0)
    server.abort(token, 61.0)
    assert drain(server) == []


def test_half_close() -> None:
    server = make_server()
    peer = Peer(server).connect()
    peer.send(ACK | FIN, frame(QUERY))
    server.send_reply(poll(server)[0], QUERY, 0.0)
    segments = drain(server)
    assert segments[-1].tcp_flags & FIN
    peer.take(*segments)
    assert peer.received == frame(QUERY)
    peer.send(ACK)
    assert server.poll_timeout() is None


def test_ten_connections_and_the_eleventh_waits() -> None:
    server = make_server()
    peers = [Peer(server, port=n).connect() for n in range(1, 11)]
    for peer in peers:
        peer.send(ACK, frame(QUERY))
    late = Peer(server, port=11).connect()
    assert late.send(ACK, frame(QUERY)) == []
    assert len(poll_all(server)) == 10
    peers[0].send(RST)
    late.rewind()
    assert len(late.send(ACK, frame(QUERY))) == 1
    assert poll(server)[0].port == 11
    other = Peer(server, SENTINEL_V6, OWN_V6).connect()
    other.send(ACK, frame(QUERY))
    assert poll(server)[0].sentinel == SENTINEL_V6


def test_the_longest_idle_connection_makes_room() -> None:
    server = make_server()
    peers = [Peer(server, port=n).connect() for n in range(1, 11)]
    for n, peer in enumerate(peers):
        if n != 4:
            peer.send(ACK, frame(QUERY), now=float(n) + 2)
    late = Peer(server, port=11)
    late.take(*late.send(SYN, now=2.5))
    assert [(p.tcp_flags & RST, p.dst_port) for p in late.send(ACK, now=2.5)] == [(RST, peers[4].port)]
    assert [p.tcp_flags for p in late.send(ACK, frame(QUERY), now=2.5)] == [ACK]
    assert poll_all(server)[-1].port == 11


@pytest.mark.parametrize("garbage", [b"\0\0", b"\0\x0c" + bytes(12)])
def test_no_message_is_so_short(garbage: bytes) -> None:
    server = make_server()
    peer = Peer(server).connect()
    assert peer.send(ACK, garbage)[-1].tcp_flags & RST
    assert server.poll_timeout() is None


def test_abort() -> None:
    server = make_server()
    peer = Peer(server).connect()
    peer.send(ACK, frame(QUERY))
    server.abort(poll(server)[0], 0.0)
    assert [segment.tcp_flags & RST for segment in drain(server)] == [RST]
    assert server.poll_timeout() is None


def test_a_reply_of_absurd_length_ends_the_connection() -> None:
    server = make_server()
    peer = Peer(server).connect()
    peer.send(ACK, frame(QUERY))
    server.send_reply(poll(server)[0], bytes(65_536), 0.0)
    assert [segment.tcp_flags & RST for segment in drain(server)] == [RST]


@pytest.mark.shows("tunnel", 54)
def test_other_addresses_reset_everything_and_the_same_nothing() -> None:
    server = make_server()
    peer = Peer(server).connect()
    peer.send(ACK, frame(QUERY))
    server.set_addresses([SENTINEL_V6, SENTINEL])
    assert drain(server) == []
    token, _ = poll(server)
    server.set_addresses([SENTINEL_V6])
    assert [segment.tcp_flags & RST for segment in drain(server)] == [RST]
    server.send_reply(token, QUERY, 0.0)
    assert drain(server) == []
    assert peer.send(ACK, frame(QUERY)) == []
    assert Peer(server).send(SYN) == []


def test_what_belongs_to_nothing_is_reset() -> None:
    server = make_server()
    (reset,) = Peer(server).send(ACK, b"hello")
    assert reset.tcp_flags == RST
    (reset,) = Peer(server, port_of_server=80).send(SYN)
    assert reset.tcp_flags == RST | ACK
    assert Peer(server).send(RST) == []
    assert Peer(server).send(SYN | ACK)[0].tcp_flags == RST
    server.handle_packet(build_udp(OWN, SENTINEL, 1, 53, bytes(20)), 0.0)
    assert drain(server) == []


def test_sequence_numbers_wrap_around() -> None:
    server = make_server()
    peer = Peer(server)
    peer.seq = 2**32 - 10
    peer.connect()
    for _ in range(3):
        peer.send(ACK, frame(QUERY))
        server.send_reply(poll(server)[0], QUERY, 0.0)
        peer.take(*drain(server))
    assert peer.received == frame(QUERY) * 3


def test_repeated_overlapping_and_early_segments() -> None:
    server = make_server()
    peer = Peer(server).connect()
    data = frame(QUERY)
    peer.send(ACK, data[:10])
    peer.seq -= 5
    peer.send(ACK, data[5:20])
    peer.seq += 5
    assert peer.send(ACK, data[25:])[0].tcp_flags == ACK
    assert server.poll_query() is None
    peer.seq -= 5 + len(data[25:])
    peer.send(ACK, data[20:])
    assert poll(server)[1] == QUERY


def test_an_acknowledgement_of_what_was_not_sent() -> None:
    server = make_server()
    peer = Peer(server).connect()
    peer.ack += 1
    (answer,) = peer.send(ACK, frame(QUERY))
    assert answer.tcp_flags == ACK
    assert server.poll_query() is None


def test_received_bytes_are_bounded() -> None:
    server = make_server()
    peer = Peer(server).connect()
    peer.send(ACK, frame(QUERY))
    for _ in range(100):
        answers = peer.send(ACK, bytes(1200))
    assert window(answers[-1]) == 0
    assert poll(server)[1] == QUERY


@pytest.mark.parametrize("seed", range(20))
def test_any_segments_leave_the_server_sound(seed: int) -> None:
    """Random segments of a few connections, replies, time-outs: nothing raises, all ends, bytes are never invented."""
    rng = random.Random(seed)
    server = make_server()
    peers = [Peer(server, port=n) for n in range(1, 14)]
    now = 0.0
    for _ in range(1500):
        peer = rng.choice(peers)
        action = rng.random()
        if action < 0.1:
            peer.connect(now=now)
        elif action < 0.5:
            peer.send(rng.choice([ACK, ACK, ACK | FIN, RST, SYN, SYN | FIN, 0]), frame(QUERY)[: rng.randrange(50)], now)
        elif action < 0.6:
            peer.seq += rng.randrange(-50, 50)
            peer.ack += rng.choice([0, 0, 1, -1, 2**31])
        elif action < 0.8 and (received := server.poll_query()) is not None:
            server.send_reply(received[0], bytes(rng.choice([0, 20, 5000, 65_535])), now)
        else:
            due = server.poll_timeout()
            now = now + 0.01 if due is None or rng.random() < 0.8 else max(now, due)
            server.handle_timeout(now)
            after = server.poll_timeout()
            assert after is None or after > now
        for segment in drain(server):
            assert segment.src == SENTINEL
            assert segment.src_port == 53
            for receiver in peers:
                receiver.take(segment)
    while (due := server.poll_timeout()) is not None:
        server.handle_timeout(due)
        drain(server)
    assert server.poll_query() is None


class Peer:
    """A client's end: keeps count of sequence numbers, and of bytes received in order."""

    def __init__(
        self,
        server: StubTcpServer,
        sentinel: bytes = SENTINEL,
        own: bytes = OWN,
        port: int = 40_000,
        port_of_server: int = 53,
        window: int = 65_535,
    ) -> None:
        self.server, self.sentinel, self.own = server, sentinel, own
        self.port, self.port_of_server, self.window = port, port_of_server, window
        self.seq = 1_000_000
        self.ack = 0
        self.received = b""

    def connect(self, now: float = 0.0) -> Peer:
        self.take(*(p for p in self.send(SYN, now=now) if p.dst_port == self.port))
        for packet in self.send(ACK, now=now):
            assert packet.tcp_flags & RST
        return self

    def send(self, flags: int, data: bytes = b"", now: float = 0.0) -> list[Packet]:
        """Send one segment; what comes back at once."""
        packet = build_tcp(
            self.own, self.sentinel, self.port, self.port_of_server,
            flags, self.seq % 2**32, self.ack % 2**32, data, window=self.window,
        )  # fmt: skip
        self.seq += len(data) + bool(flags & SYN) + bool(flags & FIN)
        self._last = len(data)
        self.server.handle_packet(packet, now)
        return drain(self.server)

    def rewind(self) -> None:
        """Forget that the last data was sent."""
        self.seq -= self._last

    def take(self, *packets: Packet) -> None:
        """Receive segments, those out of order in vain."""
        for packet in packets:
            if packet.dst_port != self.port or packet.src != self.sentinel:
                continue
            seq = int.from_bytes(packet.data[packet.l4_offset + 4 : packet.l4_offset + 8], "big")
            if packet.tcp_flags & SYN:
                self.ack = seq + 1
            elif seq == self.ack % 2**32:
                self.received += payload(packet)
                self.ack += len(payload(packet)) + bool(packet.tcp_flags & FIN)


def make_server() -> StubTcpServer:
    server = StubTcpServer(random.Random(1).randbytes)
    server.set_addresses([SENTINEL, SENTINEL_V6])
    return server


def poll(server: StubTcpServer) -> tuple[TcpToken, bytes]:
    received = server.poll_query()
    assert received is not None
    return received


def poll_all(server: StubTcpServer) -> list[TcpToken]:
    tokens = []
    while (received := server.poll_query()) is not None:
        tokens.append(received[0])
    return tokens


def drain(server: StubTcpServer) -> list[Packet]:
    packets = []
    while (packet := server.poll_packet()) is not None:
        packets.append(packet)
    return packets


def frame(message: bytes) -> bytes:
    return len(message).to_bytes(2, "big") + message


def tcp_options(packet: Packet) -> bytes:
    header = packet.data[packet.l4_offset :]
    return header[20 : (header[12] >> 4) * 4]


def payload(packet: Packet) -> bytes:
    header = packet.data[packet.l4_offset :]
    return header[(header[12] >> 4) * 4 :]


def window(packet: Packet) -> int:
    return int.from_bytes(packet.data[packet.l4_offset + 14 : packet.l4_offset + 16], "big")
