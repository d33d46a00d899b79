"""Latency and loss where the kernel has no netem: holds what leaves a device, in this process.

    python -m fz_core.lab.delay_line DEVICE MILLISECONDS LOSS_PERCENT

Traffic control redirects the device's output to a TAP device; what is read there is sent by a packet socket
when its time has come. Super packets stay whole, so that this costs little. Order is kept. It ends when it
is killed, and the redirection with it.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque

TAP_PREFIX = "slow-"
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
OFFLOADS = 0x67
SOL_PACKET, PACKET_VNET_HDR, PACKET_QDISC_BYPASS = 263, 15, 20
LONGEST_FRAME = 10 + 14 + 65536
LIMIT = 100_000


def main() -> None:
    """Redirect, say 'holding', and forward for ever."""
    device, delay_ms, loss_percent = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    tap = open_tap(device)
    out = open_output(device)
    tc("qdisc", "add", "dev", device, "clsact")
    everything = f"filter add dev {device} egress protocol all u32 match u32 0 0"
    tc(*everything.split(), *["action", "mirred", "egress", "redirect", "dev"], TAP_PREFIX + device)
    print("holding", flush=True)
    forward(tap, out, delay_ms / 1000, loss_percent / 100)


def forward(tap: int, out: socket.socket, delay: float, loss: float) -> None:
    """Move frames, each `delay` seconds after it came."""
    held: deque[tuple[float, bytes]] = deque()
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else None
        if select.select([tap], [], [], wait)[0]:
            now = time.monotonic()
            while len(frame := read(tap)):
                if random.random() >= loss and len(held) < LIMIT:
                    held.append((now + delay, frame))
        now = time.monotonic()
        while held and held[0][0] <= now:
            try:
                out.send(held.popleft()[1])
            except OSError:  # a full or vanished device loses frames, as cables do
                pass


def read(tap: int) -> bytes:
    """The next frame with its header; nothing when none waits."""
    try:
        return os.read(tap, LONGEST_FRAME)
    except BlockingIOError:
        return b""


def open_tap(device: str) -> int:
    """The device that gets what leaves `device`."""
    name = TAP_PREFIX + device
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(tap, TUNSETOFFLOAD, OFFLOADS)
    quiet = "addrgenmode none multicast off txqueuelen 100000 up"  # nothing of its own may get in
    subprocess.run(["ip", "link", "set", name, *quiet.split()], check=True)
    return tap


def open_output(device: str) -> socket.socket:
    """Sends on `device` past its redirection, receives nothing."""
    out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    out.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    out.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
    out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 20)
    out.bind((device, 0))
    return out


def tc(*arguments: str) -> None:
    """Change the device's traffic control."""
    subprocess.run(["tc", *arguments], check=True)


if __name__ == "__main__":
    main()
