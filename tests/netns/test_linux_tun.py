"""The TUN device against the kernel (spec/io.md 14, items 31, 33, 38, 41)."""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
from pathlib import Path

import pytest

from fz_core.linux import TunDevice, TunError

pytestmark = pytest.mark.root

NAME = f"fzt{os.getpid() % 10_000_000}"
HEADER = bytes(10)


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
    assert select.select([tun], [], [], 10)[0]
    return tun.read_batch(limit)
