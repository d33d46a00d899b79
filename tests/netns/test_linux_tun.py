"""The TUN device against the kernel (spec/io.md 14, items 31 to 33, 38 to 41)."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fz_core.fastpath import split_super_packet
from fz_core.linux import TunDevice, TunError
from fz_core.packet import DropReason, Packet, build_tcp, verify_checksums
from tests.readiness import readable, writable

pytestmark = pytest.mark.root

NAME = f"fzt{os.getpid() % 10_000_000}"
HEADER = bytes(10)
UDP_SEGMENT = 103
OURS = {4: "198.18.77.1", 6: "fd77::1"}
THEIRS = {4: "198.18.77.2", 6: "fd77::2"}
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
SYN, PSH, ACK = 0x02, 0x08, 0x10


def test_device_has_the_wanted_shape() -> None:
    with TunDevice.open(NAME) as tun:
        assert tun.offloads
        assert fcntl.fcntl(tun.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert not os.get_blocking(tun.fileno())
        link = ip("-d", "link", "show", NAME)
        assert "qlen 10000" in link
        assert "tun type tun pi off vnet_hdr on" in link
        assert tun.read_batch(10) == []
    assert not Path(f"/sys/class/net/{NAME}").exists()


def test_second_opener_fails_and_the_name_is_free_after_close() -> None:
    for _ in range(5):
        with TunDevice.open(NAME), pytest.raises(TunError, match="another instance"):
            TunDevice.open(NAME)


@pytest.mark.shows("io", 31)
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_another_process_is_refused_and_the_name_is_free_after_it(end: signal.Signals) -> None:
    for _ in range(50):
        with held_by_another_process(end):
            with pytest.raises(TunError, match="another instance"):
                TunDevice.open(NAME)
            with pytest.raises(OSError, match=r"busy|Invalid argument"):
                open_multi_queue()
        assert not Path(f"/sys/class/net/{NAME}").exists()


@contextmanager
def held_by_another_process(end: signal.Signals) -> Iterator[None]:
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        TunDevice.open(NAME)
        os.write(tell, b"x")
        signal.pause()
        os._exit(1)
    try:
        assert os.read(ready, 1) == b"x"
        yield
    finally:
        os.kill(pid, end)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(tell)


def open_multi_queue() -> None:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", NAME.encode(), 0x0001 | 0x1000 | 0x4000 | 0x0100))
    finally:
        os.close(fd)


@pytest.mark.shows("io", 32, 33)
@pytest.mark.parametrize("version", [4, 6])
def test_datagrams_are_the_same_with_and_without_offloads(version: int) -> None:
    data = os.urandom(3507)
    arrived = []
    for offloads in (True, False):
        with TunDevice.open(NAME, offloads=offloads) as tun:
            bring_up_both()
            with socket.socket(FAMILIES[version], socket.SOCK_DGRAM) as sock:
                sock.bind((OURS[version], 0))
                sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
                sock.sendto(data, (THEIRS[version], 443))
                packets, headers = read_from(tun, sock.getsockname()[1], 3507)
        assert headers == ([5] if offloads else [0] * 4)
        arrived.append([comparable(packet) for packet in packets])
        assert [packet.payload for packet in packets] == [data[at : at + 1000] for at in range(0, 3507, 1000)]
        assert all(verify_checksums(packet) == () for packet in packets)
    assert arrived[0] == arrived[1]


@pytest.mark.shows("io", 32, 33)
@pytest.mark.parametrize("version", [4, 6])
def test_a_stream_is_the_same_with_and_without_offloads(version: int) -> None:
    data = os.urandom(9507)
    arrived = []
    for offloads in (True, False):
        with TunDevice.open(NAME, offloads=offloads) as tun:
            bring_up_both()
            with socket.socket(FAMILIES[version], socket.SOCK_STREAM) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # gone when closed
                sock.bind((OURS[version], 0))
                start = connect(tun, sock, version)
                sock.send(data)
                packets, headers = read_from(tun, sock.getsockname()[1], 9507)
        assert set(headers) == ({1 if version == 4 else 4} if offloads else {0})
        assert offloads == (len(headers) < len(packets))
        arrived.append([(sequence(p) - start & 0xFFFFFFFF, p.tcp_flags, p.payload) for p in packets])
        assert all(verify_checksums(packet) == () for packet in packets)
    assert arrived[0] == arrived[1]
    assert [at for at, _, _ in arrived[0]] == list(range(0, 9507, 1000))
    assert b"".join(payload for _, _, payload in arrived[0]) == data


def connect(tun: TunDevice, sock: socket.socket, version: int) -> int:
    """Answer the kernel's SYN by hand; the first sequence number of its data."""
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        sock.connect((THEIRS[version], 443))
    port = sock.getsockname()[1]
    ((syn, *_), _) = read_from(tun, port, 0)
    start = (sequence(syn) + 1) & 0xFFFFFFFF
    segment_size = b"\x02\x04" + struct.pack("!H", 1000)
    answer = build_tcp(syn.dst, syn.src, 443, port, SYN | ACK, 7, start, options=segment_size)
    assert tun.write(HEADER + answer.data)
    assert writable(sock)
    return start


def sequence(packet: Packet) -> int:
    return int.from_bytes(packet.data[packet.l4_offset + 4 : packet.l4_offset + 8], "big")


def read_from(tun: TunDevice, port: int, wanted: int) -> tuple[list[Packet], list[int]]:
    """Packets sent from a port, until they carry `wanted` bytes, and the segmentation types they came under."""
    packets: list[Packet] = []
    kinds: list[int] = []
    while not packets or sum(len(packet.payload) for packet in packets) < wanted:
        for raw in read(tun, 100):
            found = split_super_packet(raw)
            assert not isinstance(found, DropReason)
            if found[0].src_port == port and (found[0].payload or not wanted):
                packets += found
                kinds.append(raw[1])
                assert raw[1] or (raw[0] & 1) or raw[:10] == HEADER
    return packets, kinds


def comparable(packet: Packet) -> bytes:
    """Without what differs from send to send: source port, IPv4 identification, and checksums over them."""
    raw = bytearray(packet.data)
    at = packet.l4_offset
    raw[at : at + 2] = raw[at + 6 : at + 8] = b"\0\0"
    if packet.version == 4:
        raw[4:6] = raw[10:12] = b"\0\0"
    else:
        raw[1:4] = bytes(3)  # the flow label
    return bytes(raw)


@pytest.mark.shows("io", 40)
@pytest.mark.parametrize("version", [4, 6])
def test_large_packets_and_fragments_of_the_host_end_nothing(version: int) -> None:
    with TunDevice.open(NAME) as tun:
        bring_up_both()
        ip("link", "set", NAME, "mtu", "1500")
        with socket.socket(FAMILIES[version], socket.SOCK_DGRAM) as sock:
            sock.bind((OURS[version], 0))
            for size in (1400, 2000, 100):
                sock.sendto(bytes(size), (THEIRS[version], 443))
        found: list[list[Packet] | DropReason] = []
        while not found or isinstance(found[-1], DropReason):
            found += [split_super_packet(raw) for raw in read(tun, 100) if raw[10] >> 4 == version]
    assert found[0] is DropReason.TOO_BIG
    assert DropReason.FRAGMENTED in found
    assert not isinstance(found[-1], DropReason)
    assert [packet.payload for packet in found[-1]] == [bytes(100)]


def test_packets_come_and_go() -> None:
    with TunDevice.open(NAME) as tun:
        bring_up()
        echo = echo_request()
        assert tun.write(HEADER + echo)
        (reply,) = read(tun, 1)
        assert reply[10 + 12 : 10 + 20] == echo[16:20] + echo[12:16]
        assert reply[10 + 20] == 0  # echo reply
        counters = tun.counters()
        assert counters["read_packets"] == counters["written_packets"] == 1
        assert counters["read_bytes"] == len(reply)


def test_read_batch_respects_its_limit() -> None:
    with TunDevice.open(NAME) as tun:
        bring_up()
        for _ in range(3):
            tun.write(HEADER + echo_request())
        assert len(read(tun, 2)) == 2
        assert len(read(tun, 2)) == 1


@pytest.mark.shows("io", 38)
def test_refused_writes_are_counted_and_only_merged_ones_end_merging() -> None:
    with TunDevice.open(NAME) as tun:
        bring_up()
        assert tun.write(b"short")
        assert tun.counters()["write_errors"] == 1
        assert tun.offloads
        bad_header = bytes([1, 1]) + bytes(8)  # TCP segmentation of size 0
        assert tun.write(bad_header + echo_request())
        assert tun.counters()["write_errors"] == 2
        assert not tun.offloads
        assert tun.write(HEADER + echo_request())
        assert len(read(tun, 1)) == 1


@pytest.mark.shows("io", 33)
def test_offloads_can_be_switched_off() -> None:
    with TunDevice.open(NAME, offloads=False) as tun:
        bring_up()
        assert not tun.offloads
        tun.write(HEADER + echo_request())
        assert read(tun, 1)[0][:10] == HEADER


def test_a_deleted_device_ends_reading() -> None:
    with TunDevice.open(NAME) as tun:
        ip("link", "delete", NAME)
        with pytest.raises(TunError, match="was the device deleted"):
            tun.read_batch(1)


def test_a_missing_node_is_made(tmp_path: Path) -> None:
    node = tmp_path / "net" / "tun"
    with TunDevice.open(NAME, node=str(node)):
        assert node.is_char_device()
        assert node.parent.stat().st_mode & 0o777 == 0o751


def test_errors_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(TunError, match="modprobe tun"):
        TunDevice.open(NAME, node=str(tmp_path))
    (tmp_path / "plain").write_text("")
    with pytest.raises(TunError, match="kernel supports TUN"):
        TunDevice.open(NAME, node=str(tmp_path / "plain"))
    with pytest.raises(ValueError, match="1 to 15 bytes"):
        TunDevice.open("a" * 16)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def bring_up() -> None:
    """Up, with one address, and silent: no router solicitations, no multicast reports."""
    Path(f"/proc/sys/net/ipv6/conf/{NAME}/disable_ipv6").write_text("1")
    ip("link", "set", NAME, "multicast", "off", "up")
    ip("address", "add", "198.18.77.1/24", "dev", NAME)


def bring_up_both() -> None:
    """As above, with an address of either family, at the tunnel's MTU."""
    ip("link", "set", NAME, "addrgenmode", "none")
    ip("link", "set", NAME, "multicast", "off", "mtu", "1280", "up")
    ip("address", "add", "198.18.77.1/24", "dev", NAME)
    ip("address", "add", "fd77::1/64", "dev", NAME, "nodad")


def echo_request() -> bytes:
    """198.18.77.2 pings the device's address; valid checksums."""
    icmp = bytes([8, 0, 0, 0, 0, 1, 0, 1])
    header = bytes([0x45, 0, 0, 28, 0, 0, 0, 0, 64, 1, 0, 0, 198, 18, 77, 2, 198, 18, 77, 1])
    return with_checksum(header, 10) + with_checksum(icmp, 2)


def with_checksum(data: bytes, at: int) -> bytes:
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return data[:at] + (total ^ 0xFFFF).to_bytes(2, "big") + data[at + 2 :]


def read(tun: TunDevice, limit: int) -> list[bytes]:
    assert readable(tun)
    return tun.read_batch(limit)
