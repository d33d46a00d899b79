"""Data packets, the ring of sessions, replay, padding and queues (spec section 11, item 48)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from wireguard_pair import End, Pair, ipv4, ipv6

from fz_core.packet import DropReason


def test_data_carries_a_counter_and_no_padding() -> None:
    pair = Pair().connect()
    sealed = [seal(pair.a, ipv4(bytes(n)), pair.now) for n in range(3)]
    assert [int.from_bytes(s[8:16], "little") for s in sealed] == [1, 2, 3]
    assert [len(s) for s in sealed] == [52, 53, 54]


@pytest.mark.parametrize("build", [ipv4, ipv6])
@pytest.mark.parametrize("padding", [0, 1, 12])
def test_padding_is_cut_off(build: object, padding: int) -> None:
    assert callable(build)
    pair = Pair().connect()
    pair.send(pair.a, build(b"payload", padding))
    assert pair.b.received == [build(b"payload")]


@pytest.mark.parametrize(
    "plaintext",
    [
        b"\0",
        b"\x45",
        ipv4()[:19],
        ipv6()[:39],
        ipv4(b"xx")[:-1],
        ipv6(b"xx")[:-1],
        b"\x55" + ipv4()[1:],
        ipv4()[:2] + b"\0\x13" + ipv4()[4:],
    ],
)
def test_what_is_no_ip_packet_is_dropped_but_counts_as_a_sign_of_life(plaintext: bytes) -> None:
    pair = Pair().connect()
    pair.now += 5
    sealed = seal(pair.a, plaintext, pair.now)
    assert pair.deliver(pair.b, sealed) is DropReason.MALFORMED_PACKET
    assert pair.b.tunnel.last_rx_at == pair.now


def test_size_limits() -> None:
    pair = Pair().connect()
    pair.send(pair.a, ipv4(bytes(1280)))
    assert pair.b.received == [ipv4(bytes(1280))]
    assert pair.a.tunnel.seal(bytes(1301), pair.now) is DropReason.TOO_BIG
    assert pair.a.tunnel.seal_into(bytes(1301), bytearray(2000), 0, pair.now) is DropReason.TOO_BIG
    sealed = seal(pair.a, ipv4(bytes(1280)), pair.now)
    assert pair.deliver(pair.b, sealed + b"\0") is DropReason.TOO_BIG
    assert pair.deliver(pair.b, sealed) == ipv4(bytes(1280))


def test_any_buffer_is_taken() -> None:
    pair = Pair().connect()
    for packet in (bytearray(ipv4(b"1")), memoryview(ipv4(b"1"))):
        sealed = pair.a.tunnel.seal(packet, pair.now)
        assert isinstance(sealed, bytes)
        assert pair.b.tunnel.handle_untrusted(memoryview(sealed), None, pair.now) == ipv4(b"1")


def test_sealing_into_a_buffer_is_the_same() -> None:
    pair = Pair().connect()
    out = bytearray(200)
    written = pair.a.tunnel.seal_into(ipv4(b"abc"), out, 7, pair.now)
    assert written == 20 + 3 + 32
    assert pair.deliver(pair.b, bytes(out[7 : 7 + written])) == ipv4(b"abc")
    assert out[:7] == bytes(7)
    assert out[7 + written :] == bytes(200 - 7 - written)
    with pytest.raises(ValueError, match="do not fit"):
        pair.a.tunnel.seal_into(ipv4(b"abc"), out, 200 - written + 1, pair.now)
    with pytest.raises(ValueError, match="do not fit"):
        pair.a.tunnel.seal_into(ipv4(b"abc"), out, -1, pair.now)
    with pytest.raises(BufferError):
        pair.a.tunnel.seal_into(ipv4(b"abc"), bytes(200), 0, pair.now)


def test_forgeries_do_not_move_the_window() -> None:
    pair = Pair().connect()
    sealed = seal(pair.a, ipv4(), pair.now)
    for at in range(8, len(sealed)):
        forged = bytearray(sealed)
        forged[at] ^= 0x80
        assert pair.deliver(pair.b, bytes(forged)) is DropReason.WG_BAD_PACKET
    ahead = sealed[:8] + (2**63).to_bytes(8, "little") + sealed[16:]
    assert pair.deliver(pair.b, ahead) is DropReason.WG_BAD_PACKET
    assert pair.deliver(pair.b, sealed) == ipv4()


def test_a_replay_is_dropped() -> None:
    pair = Pair().connect()
    sealed = seal(pair.a, ipv4(), pair.now)
    assert pair.deliver(pair.b, sealed) == ipv4()
    assert pair.deliver(pair.b, sealed) is DropReason.WG_REPLAYED_PACKET


@pytest.mark.shows("connectivity", 48)
def test_reordering_within_8192_is_accepted() -> None:
    pair = Pair().connect()
    sealed = [seal(pair.a, ipv4(), pair.now) for _ in range(8194)]
    assert pair.deliver(pair.b, sealed[-1]) == ipv4()
    assert pair.deliver(pair.b, sealed[2]) == ipv4()
    assert pair.deliver(pair.b, sealed[2]) is DropReason.WG_REPLAYED_PACKET
    assert pair.deliver(pair.b, sealed[1]) is DropReason.WG_REPLAYED_PACKET
    assert pair.deliver(pair.b, sealed[0]) is DropReason.WG_REPLAYED_PACKET
    for number in range(3, 8193, 97):
        assert pair.deliver(pair.b, sealed[number]) == ipv4()


def test_unknown_indices() -> None:
    pair = Pair().connect()
    sealed = seal(pair.a, ipv4(), pair.now)
    for index in (0, 0xBBBBBB00, 0xBBBBBB02, 0xBBBBBB09, 0xAAAAAA01, 0xFFFFFFFF):
        other = sealed[:4] + index.to_bytes(4, "little") + sealed[8:]
        assert pair.deliver(pair.b, other) is DropReason.WG_UNKNOWN_SESSION
    assert pair.deliver(pair.b, sealed) == ipv4()


@pytest.mark.shows("connectivity", 48)
def test_the_old_session_serves_until_the_new_one_is_used() -> None:
    pair = Pair().connect()
    pair.now += 1
    pair.lossy = lambda sender, datagram: datagram[0] == 4
    pair.a.tunnel.start_handshake(pair.now)
    pair.exchange()
    pair.lossy = lambda sender, datagram: False
    old = seal(pair.b, ipv4(b"old"), pair.now)
    assert int.from_bytes(old[4:8], "little") == 0xAAAAAA01
    assert pair.deliver(pair.a, old) == ipv4(b"old")
    pair.send(pair.a, ipv4(b"new"))
    new = seal(pair.b, ipv4(b"new"), pair.now)
    assert int.from_bytes(new[4:8], "little") == 0xAAAAAA02
    assert pair.deliver(pair.a, new) == ipv4(b"new")


def test_a_side_never_moves_back() -> None:
    pair = Pair().connect()
    early = [seal(pair.a, ipv4(b"early"), pair.now) for _ in range(2)]
    pair.now += 1
    pair.connect()
    pair.a.tunnel.start_handshake(pair.now)
    pair.exchange()
    assert pair.deliver(pair.b, early[0]) == ipv4(b"early")
    answer = seal(pair.b, ipv4(), pair.now)
    assert int.from_bytes(answer[4:8], "little") == 0xAAAAAA03


@pytest.mark.shows("connectivity", 48)
def test_twelve_quick_renewals_keep_connectivity() -> None:
    pair = Pair().connect()
    for number in range(12):
        pair.now += 0.1
        pair.a.tunnel.start_handshake(pair.now)
        pair.exchange()
        for end in (pair.a, pair.b):
            packet = ipv4(bytes([number]))
            assert pair.send(end, packet) is None
            assert pair.other(end).received[-1] == packet
    assert not pair.a.drops
    assert not pair.b.drops


def test_eight_sessions_are_kept() -> None:
    pair = Pair().connect()
    sealed = [seal(pair.a, ipv4(b"0"), pair.now)]
    for _ in range(8):
        pair.a.tunnel.start_handshake(pair.now)
        pair.exchange()
        sealed.append(seal(pair.a, ipv4(b"0"), pair.now))
    got = [pair.deliver(pair.b, s) for s in sealed]
    assert got == [DropReason.WG_UNKNOWN_SESSION] + [ipv4(b"0")] * 8


def test_by_default_data_neither_queues_nor_starts_a_handshake() -> None:
    pair = Pair()
    assert pair.a.tunnel.seal(ipv4(), pair.now) is DropReason.WG_NO_SESSION
    assert pair.a.tunnel.seal_into(ipv4(), bytearray(100), 0, pair.now) is DropReason.WG_NO_SESSION
    assert pair.a.tunnel.poll_datagram() is None
    assert pair.a.tunnel.poll_timeout() is None


def test_data_starts_a_handshake_and_waits_for_it() -> None:
    pair = Pair(queue_limit=2, handshake_on_data=True)
    for number in range(3):
        assert pair.a.tunnel.seal(ipv4(bytes([number])), pair.now) == b""
    assert pair.a.tunnel.seal(bytes(1301), pair.now) is DropReason.TOO_BIG
    pair.exchange()
    assert pair.a.sent_kinds() == [1, 4, 4]
    assert pair.b.received == [ipv4(b"\x01"), ipv4(b"\x02")]


def test_a_queue_without_starting_waits_for_a_handshake_in_progress_only() -> None:
    pair = Pair(queue_limit=2)
    assert pair.a.tunnel.seal(ipv4(), pair.now) is DropReason.WG_NO_SESSION
    pair.a.tunnel.start_handshake(pair.now)
    assert pair.a.tunnel.seal(ipv4(b"1"), pair.now) == b""
    pair.exchange()
    assert pair.b.received == [ipv4(b"1")]


def test_the_responders_queue_goes_out_on_confirmation() -> None:
    pair = Pair(queue_limit=2, handshake_on_data=True)
    pair.lossy = lambda sender, datagram: sender is pair.b and datagram[0] == 1
    assert pair.b.tunnel.seal(ipv4(b"b"), pair.now) == b""
    pair.exchange()
    pair.connect()
    assert pair.a.received == [ipv4(b"b")]


def test_a_lazy_tunnel_rests_when_idle_and_wakes_with_data() -> None:
    pair = Pair(queue_limit=1, handshake_on_data=True).connect()
    start = pair.now
    pair.run_until(start + 600)
    assert len(pair.a.sent_at(1)) == 1
    assert not pair.a.tunnel.has_session
    assert pair.a.tunnel.seal(ipv4(b"wake"), pair.now) == b""
    pair.exchange()
    assert pair.b.received == [ipv4(b"wake")]


def test_sessions_are_visible_to_a_pump() -> None:
    pair = Pair().connect()
    session = pair.a.tunnel.current_session()
    assert session is not None
    assert session.is_initiator
    assert session.is_confirmed
    assert session.established_at == pair.now
    assert session.send_until == pair.now + 170
    assert session.receive_until == pair.now + 180
    responder = pair.b.tunnel.current_session()
    assert responder is not None
    assert responder.send_until == pair.now + 180
    assert pair.a.tunnel.session(0xAAAAAA01) is session
    assert pair.a.tunnel.session(0xAAAAAA02) is None
    with pytest.raises(TypeError):
        type(session)()


def test_sessions_that_are_gone_leave_no_memory_behind() -> None:
    """Each that carried full packets had up to 1.1 KB of the cipher's library per direction."""
    before = 0
    for count in range(1500):
        pair = Pair().connect()
        pair.send(pair.a, ipv4(bytes(1200)))
        pair.send(pair.b, ipv4(bytes(1200)))
        assert len(pair.a.received) == len(pair.b.received) == 1
        if count == 300:
            before = resident_bytes()
    assert resident_bytes() - before < 2 << 20


def resident_bytes() -> int:
    """Of this process, by /proc/self/statm."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def seal(end: End, packet: bytes, now: float) -> bytes:
    sealed = end.tunnel.seal(packet, now)
    assert isinstance(sealed, bytes)
    return sealed
