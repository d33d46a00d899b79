"""The UDP data socket over loopback (spec/io.md 14, items 12, 15 to 18, 20, 21, 26)."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator

import pytest

from fz_core.linux import MarkError, UdpSocket, set_mark
from fz_core.packet import Address
from tests.readiness import readable

V4, V6 = socket.AF_INET, socket.AF_INET6
LOOPBACK = {V4: Address(bytes([127, 0, 0, 1]), 0), V6: Address(bytes(15) + b"\1", 0)}
SO_NO_CHECK = 11


@pytest.fixture(params=[V4, V6], ids=["v4", "v6"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[UdpSocket, UdpSocket]]:
    with UdpSocket.bind(request.param, 0, None) as a, UdpSocket.bind(request.param, 0, None) as b:
        yield a, b


@pytest.mark.shows("io", 21)
def test_tells_addresses_ecn_and_payload(pair: tuple[UdpSocket, UdpSocket]) -> None:
    a, b = pair
    for ecn in range(4):
        assert a.send_batch(b"hello", 5, at(b), None, ecn) is None
        assert receive(b, 1) == [(at(b), at(a), ecn, b"hello", 5)]


def test_address_objects_are_reused(pair: tuple[UdpSocket, UdpSocket]) -> None:
    a, b = pair
    for _ in range(2):
        a.send_batch(b"x", 1, at(b))
    first, second = receive(b, 2)
    assert first[0] is second[0]
    assert first[1] is second[1]


@pytest.mark.shows("io", 15)
def test_segments_leave_in_one_call(pair: tuple[UdpSocket, UdpSocket]) -> None:
    a, b = pair
    assert a.send_batch(b"aaaaaabbbbbbccccccddd", 6, at(b)) is None
    assert a.counters()["tx_calls"] == 1
    assert datagrams(receive(b, 21)) == [b"aaaaaa", b"bbbbbb", b"cccccc", b"ddd"]


@pytest.mark.shows("io", 16)
@pytest.mark.parametrize(("count", "size", "calls"), [(50, 1316, 2), (65, 100, 2), (49, 1316, 1), (64, 100, 1)])
def test_batches_are_cut_to_what_a_packet_holds(count: int, size: int, calls: int) -> None:
    with UdpSocket.bind(V4, 0, None) as a, UdpSocket.bind(V4, 0, None) as b:
        wanted = [bytes([i]) * size for i in range(count)]
        assert a.send_batch(b"".join(wanted), size, at(b)) is None
        assert a.counters()["tx_calls"] == calls
        assert datagrams(receive(b, count * size)) == wanted


def test_without_gso_the_same_datagrams_arrive(pair: tuple[UdpSocket, UdpSocket]) -> None:
    _, b = pair
    family = V4 if b.is_ipv4 else V6
    with UdpSocket.bind(family, 0, None, gso=False) as single:
        assert single.is_single(at(b))
        assert single.send_batch(b"aaaabbbbcc", 4, at(b)) is None
        assert single.counters()["tx_calls"] == 3
        assert datagrams(receive(b, 10)) == [b"aaaa", b"bbbb", b"cc"]


@pytest.mark.shows("io", 17)
def test_refused_segmentation_falls_back_for_that_destination_only() -> None:
    with contextlib.ExitStack() as stack:
        a, b, c = (stack.enter_context(UdpSocket.bind(V4, 0, None)) for _ in range(3))
        set_option(a, SO_NO_CHECK, 1)  # the kernel answers EINVAL to segmentation without checksums
        assert a.send_batch(b"aaaabbbbcc", 4, at(b)) is None
        assert datagrams(receive(b, 10)) == [b"aaaa", b"bbbb", b"cc"]
        assert a.take_errors() == []
        assert a.is_single(at(b))
        assert not a.is_single(at(c))
        set_option(a, SO_NO_CHECK, 0)
        before = a.counters()["tx_calls"]
        a.send_batch(b"aaaabbbbcc", 4, at(c))
        assert a.counters()["tx_calls"] == before + 1
        a.send_batch(b"aaaabbbbcc", 4, at(b))
        assert a.counters()["tx_calls"] == before + 4
        assert datagrams(receive(c, 10)) == datagrams(receive(b, 10)) == [b"aaaa", b"bbbb", b"cc"]
        after_reset = stack.enter_context(UdpSocket.bind(V4, 0, None))
        after_reset.send_batch(b"aaaabbbbcc", 4, at(b))
        assert after_reset.counters()["tx_calls"] == 1


@pytest.mark.shows("io", 18)
def test_foreign_source_fails_only_its_own_datagrams(pair: tuple[UdpSocket, UdpSocket]) -> None:
    a, b = pair
    stale = Address(bytes([192, 0, 2, 1]) if a.is_ipv4 else bytes.fromhex("20010db8") + bytes(12), 0)
    assert a.send_batch(b"aaaabbbb", 4, at(b), stale) is None
    (error,) = a.take_errors()
    assert error.remote == at(b)
    assert error.local == stale
    assert error.dropped_bytes == 8
    assert error.errno in (errno.ENETUNREACH, errno.EINVAL)
    assert a.take_errors() == []
    assert not a.is_single(at(b))
    a.send_batch(b"aaaabbbb", 4, at(b), LOOPBACK[V4 if a.is_ipv4 else V6])
    assert datagrams(receive(b, 8)) == [b"aaaa", b"bbbb"]


def test_errors_are_bounded() -> None:
    with UdpSocket.bind(V4, 0, None) as a:
        for _ in range(100):
            a.send_batch(b"x", 1, Address(bytes([127, 0, 0, 1]), 9), Address(bytes([192, 0, 2, 1]), 0))
        assert len(a.take_errors()) == 64
        assert a.counters()["tx_errors"] == 100


@pytest.mark.shows("io", 19)
def test_too_large_datagram_is_an_error_and_never_fragmented() -> None:
    with UdpSocket.bind(V4, 0, None) as a:
        a.send_batch(bytes(65536), 65536, Address(bytes([127, 0, 0, 1]), 9))
        (error,) = a.take_errors()
        assert error.errno == errno.EMSGSIZE


@pytest.mark.shows("io", 20)
def test_junk_is_skipped_without_harming_its_neighbours(pair: tuple[UdpSocket, UdpSocket]) -> None:
    a, b = pair
    a.send_batch(b"before", 6, at(b))
    a.send_batch(bytes(1400), 1400, at(b))
    plain(a, b"", at(b))
    a.send_batch(b"after", 5, at(b))
    assert datagrams(receive(b, 11)) == [b"before", b"after"]
    assert b.counters()["rx_oversized"] == 1


def test_receive_limit_leaves_the_rest_queued() -> None:
    with UdpSocket.bind(V4, 0, None) as a, UdpSocket.bind(V4, 0, None, gro=False) as b:
        for i in range(5):
            a.send_batch(bytes([i]), 1, at(b))
        assert readable(b)
        assert [m[3] for m in b.recv_batch(2)] == [b"\0", b"\1"]
        assert [m[3] for m in b.recv_batch()] == [b"\2", b"\3", b"\4"]
        assert b.recv_batch() == []


@pytest.mark.shows("io", 12)
def test_second_instance_gets_another_port() -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(UdpSocket.bind(V4, 0, None))
        second = stack.enter_context(UdpSocket.bind(V4, first.port, None))
        v6 = stack.enter_context(UdpSocket.bind(V6, first.port, None))
        assert second.port not in (0, first.port)
        assert v6.port == first.port


def test_wrong_family_is_the_callers_mistake(pair: tuple[UdpSocket, UdpSocket]) -> None:
    a, _ = pair
    other = LOOPBACK[V6 if a.is_ipv4 else V4]
    with pytest.raises(ValueError, match="does not fit"):
        a.send_batch(b"x", 1, Address(other.ip, 1))
    with pytest.raises(ValueError, match="differ in family"):
        a.send_batch(b"x", 1, at(a), other)


@pytest.mark.shows("io", 26)
def test_buffer_sizes_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIREZONE_UDP_SEND_BUFFER_SIZE", "100000")
    monkeypatch.setenv("FIREZONE_UDP_RECV_BUFFER_SIZE", "80000")
    with UdpSocket.bind(V4, 0, None) as a:
        assert a.buffer_sizes() == (100000, 80000)


@pytest.mark.shows("io", 26)
def test_buffer_sizes_are_capped_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIREZONE_UDP_RECV_BUFFER_SIZE", "rubbish")
    with open("/proc/sys/net/core/rmem_max") as file:
        most = int(file.read())
    with UdpSocket.bind(V4, 0, None) as a:
        assert a.buffer_sizes()[1] == min(most, 16 * 1024 * 1024)


def test_close_is_repeatable_and_frees_the_port() -> None:
    a = UdpSocket.bind(V4, 0, None)
    port = a.port
    a.close()
    a.close()
    with UdpSocket.bind(V4, port, None) as again:
        assert again.port == port


@pytest.mark.shows("io", 13)
@pytest.mark.root
def test_sockets_carry_the_mark() -> None:
    with UdpSocket.bind(V4, 0) as a, socket.socket(fileno=os.dup(a.fileno())) as copy:
        assert copy.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) & 0xFFFFFFFF == 0xFD002021


def test_a_socket_that_cannot_be_marked_is_an_error() -> None:
    sock = socket.socket()
    sock.close()
    with pytest.raises(MarkError, match="CAP_NET_ADMIN"):
        set_mark(sock)


def at(udp: UdpSocket) -> Address:
    """Where a wildcard socket is reached over loopback."""
    return LOOPBACK[V4 if udp.is_ipv4 else V6]._replace(port=udp.port)


def receive(udp: UdpSocket, size: int) -> list[tuple[Address, Address, int, bytes, int]]:
    """Batches until `size` bytes have come."""
    found: list[tuple[Address, Address, int, bytes, int]] = []
    while sum(len(m[3]) for m in found) < size:
        assert readable(udp), f"only {found} arrived"
        found += udp.recv_batch()
    return found


def datagrams(batch: list[tuple[Address, Address, int, bytes, int]]) -> list[bytes]:
    return [data[i : i + size] for _, _, _, data, size in batch for i in range(0, len(data), size)]


def set_option(udp: UdpSocket, option: int, value: int) -> None:
    with socket.socket(fileno=os.dup(udp.fileno())) as copy:
        copy.setsockopt(socket.SOL_SOCKET, option, value)


def plain(udp: UdpSocket, data: bytes, remote: Address) -> None:
    with socket.socket(fileno=os.dup(udp.fileno())) as copy:
        copy.sendto(data, (remote.host, remote.port))
