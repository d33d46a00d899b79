"""What a bad cable does, where the kernel has no netem: holds what leaves a device, in this process.

    python -m fz_core.lab.delay_line DEVICE [--delay MS] [--loss %] [--reorder %] [--duplicate %] [--seed N]

Traffic control redirects the device's output to a TAP device; what is read there is sent by a packet socket
when its time has come. A line that only delays leaves super packets whole, so that it costs little, and keeps
the order. One that loses, reorders or duplicates does so to each packet by itself: the kernel splits super
packets before they come here, as it would before they leave a real machine. The same seed does the same
to the same packets. It ends when it is killed, and the redirection with it.
"""

from __future__ import annotations

import argparse
import fcntl
import heapq
import itertools
import os
import random
import select
import socket
import struct
import subprocess
import time
from dataclasses import dataclass

TAP_PREFIX = "slow-"
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
ALL_OFFLOADS = 0x67
SOL_PACKET, PACKET_VNET_HDR, PACKET_QDISC_BYPASS = 263, 15, 20
LONGEST_FRAME = 10 + 14 + 65536
LIMIT = 100_000
LATE = 0.02  # seconds by which an overtaken packet comes later than the others


@dataclass(frozen=True, slots=True)
class Trouble:
    """What happens to packets: seconds of delay, and shares (0 to 1) of those lost, overtaken, doubled."""

    delay: float = 0.0
    loss: float = 0.0
    reorder: float = 0.0
    duplicate: float = 0.0

    @property
    def is_per_packet(self) -> bool:
        """Whether each packet has a fate of its own."""
        return bool(self.loss or self.reorder or self.duplicate)

    def delays(self, rng: random.Random) -> list[float]:
        """When each copy of the next packet comes; empty if it is lost. Always draws the same number."""
        lost, late, twice = (rng.random() for _ in range(3))
        if lost < self.loss:
            return []
        first = self.delay + (LATE if late < self.reorder else 0.0)
        return [first, first] if twice < self.duplicate else [first]


def main() -> None:
    """Redirect, say 'holding', and forward for ever."""
    parser = argparse.ArgumentParser(description="bad cable of the lab")
    parser.add_argument("device")
    for what in ("delay", "loss", "reorder", "duplicate"):
        parser.add_argument(f"--{what}", type=float, default=0.0)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    trouble = Trouble(options.delay / 1000, options.loss / 100, options.reorder / 100, options.duplicate / 100)
    tap = open_tap(options.device, 0 if trouble.is_per_packet else ALL_OFFLOADS)
    out = open_output(options.device)
    tc("qdisc", "add", "dev", options.device, "clsact")
    everything = f"filter add dev {options.device} egress protocol all u32 match u32 0 0"
    tc(*everything.split(), *["action", "mirred", "egress", "redirect", "dev"], TAP_PREFIX + options.device)
    print("holding", flush=True)
    forward(tap, out, trouble, random.Random(options.seed))


def forward(tap: int, out: socket.socket, trouble: Trouble, rng: random.Random) -> None:
    """Move frames, each when its time has come."""
    held: list[tuple[float, int, bytes]] = []
    numbers = itertools.count()  # equal times keep their order
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else None
        if select.select([tap], [], [], wait)[0]:
            now = time.monotonic()
            while len(frame := read(tap)):
                for delay in trouble.delays(rng):
                    if len(held) < LIMIT:
                        heapq.heappush(held, (now + delay, next(numbers), frame))
        now = time.monotonic()
        while held and held[0][0] <= now:
            try:
                out.send(heapq.heappop(held)[2])
            except OSError:  # a full or vanished device loses frames, as cables do
                pass


def read(tap: int) -> bytes:
    """The next frame with its header; nothing when none waits."""
    try:
        return os.read(tap, LONGEST_FRAME)
    except BlockingIOError:
        return b""


def open_tap(device: str, offloads: int) -> int:
    """The device that gets what leaves `device`."""
    name = TAP_PREFIX + device
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(tap, TUNSETOFFLOAD, offloads)
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
