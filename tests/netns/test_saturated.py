"""A machine whose every core is busy with tunnel traffic keeps its control plane's deadlines.

Bulk traffic runs in both directions at once, directly or through a relay; nothing that anybody asks about a path, of a
relay or for a new session may stay without an answer because of it, or get it late, and the portal must not miss us.
FZ_SATURATED_SECONDS asks for a longer run: after 300 s channels and allocations are refreshed too.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from math import inf
from pathlib import Path

import pytest

from fz_core.lab import Lab
from fz_core.lab.processes import Process
from fz_core.lab.servers import start_iperf
from fz_core.lab.system import Member, Programs, Shape, System
from tests.netns.scenarios import complain, eventually

pytestmark = [pytest.mark.root, pytest.mark.peer("nft", "curl", "ip", "iperf3", "tcpdump")]

SECONDS = float(os.environ.get("FZ_SATURATED_SECONDS", "60"))
# RFC 8489: the first retransmission of a request that nobody answered comes after half a second.
ANSWER_WITHIN = 0.5
REKEY_AFTER = 120.0  # WireGuard paper, section 6.1
SERVER = "10.20.0.80"

COOKIE = b"\x21\x12\xa4\x42"
CLASS, REQUEST, INDICATION = 0x0110, 0x0000, 0x0010
INITIATION, RESPONSE = b"\x01\0\0\0", b"\x02\0\0\0"
INITIATION_SIZE, RESPONSE_SIZE = 148, 92
ETHERNET, UDP_HEADER = 14, 8
IP_HEADERS = {b"\x08\0": 20, b"\x86\xdd": 40}
# Datagrams that are sent at once (UDP_SEGMENT) pass from kernel to kernel, and to tcpdump, as one: an answer may be the
# last of several. From its cookie to the end there are 60 bytes if it tells an IPv4 address, 72 with one of IPv6.
# Shorter distances go first, because a frame that is too short for one is refused whatever follows.
INTERESTING = " or ".join(
    (
        "udp[12:4] = 0x2112a442",
        "udp[16:4] = 0x2112a442",  # in a channel
        "(ip6[6] = 17 and (ip6[52:4] = 0x2112a442 or ip6[56:4] = 0x2112a442))",
        "ether[len - 60:4] = 0x2112a442",
        "ether[len - 72:4] = 0x2112a442",
        f"ether[len - {RESPONSE_SIZE}:4] = 0x02000000",
        f"ether[len - {INITIATION_SIZE}:4] = 0x01000000",
    )
)


@pytest.mark.timeout(180 + SECONDS)
def test_no_deadline_is_missed_under_full_load() -> None:
    with Lab() as lab:
        system = System(lab, Programs(), Shape())
        system.start()
        eventually(system, 20.0)
        seen = saturated(system, SECONDS)
        assert len(seen.checks) > 20, f"only {len(seen.checks)} STUN requests in {SECONDS} s"


@pytest.mark.timeout(240 + SECONDS)
def test_no_deadline_is_missed_through_a_relay_while_keys_change() -> None:
    with Lab() as lab:
        system = System(lab, Programs(), Shape())
        system.start()
        system.block_direct()
        eventually(system, 20.0)
        connected_at = time.monotonic()
        assert system.path_of() == "relayed"
        while time.monotonic() < connected_at + REKEY_AFTER - SECONDS / 2:
            system.fetch(0.001, timeout=5.0)
            time.sleep(1.0)
        seen = saturated(system, SECONDS)
        assert system.path_of() == "relayed"
        assert len(seen.checks) > 20, f"only {len(seen.checks)} STUN requests in {SECONDS} s"
        assert seen.handshakes, "no handshake was seen"


@dataclass(frozen=True)
class Seen:
    """Seconds until the answer, inf for none: of STUN requests, and of handshakes."""

    checks: list[float]
    handshakes: list[float]


def saturated(system: System, seconds: float) -> Seen:
    """Load the system, and look at its control plane meanwhile."""
    member, gateway = system.clients[0], system.gateways[0]
    assert gateway.server is not None
    start_iperf(gateway.server)
    before = len(system.warnings())
    captures = [(one, *watch(one)) for one in (member, gateway)]
    load = member.host.spawn("load", ["iperf3", "-c", SERVER, "-t", str(seconds), "--bidir", "--forceflush"])
    deadline = time.monotonic() + seconds + 30
    while load.is_running and time.monotonic() < deadline:
        system.fetch(0.001, timeout=5.0)  # somebody else's requests, meanwhile
        time.sleep(1.0)
    assert "receiver" in load.output, load.output[-500:]
    both = Seen([], [])
    for one, watching, capture in captures:
        watching.send_signal(signal.SIGINT)
        watching.wait()
        assert "\n0 packets dropped by kernel" in watching.output, watching.tail(3)
        seen = answers_in(capture)
        late = [took for took in (*seen.checks, *seen.handshakes) if took > ANSWER_WITHIN]
        assert late == [], f"{one.name}: of {len(seen.checks)} requests and {len(seen.handshakes)} handshakes: {late} s"
        both.checks.extend(seen.checks)
        both.handshakes.extend(seen.handshakes)
        assert "Portal connection hiccup" not in one.process.output
    assert len(system.warnings()) == before
    complain(system)
    return both


def test_an_answer_is_seen_behind_other_datagrams() -> None:
    ethernet_and_udp = bytes(12) + b"\x08\0" + bytes(12) + b"client__" + b"\x12\x34\x0d\x96" + bytes(4)
    request, answer = (
        b"\0\x01\0\x08" + COOKIE + bytes(12) + b"software",
        b"\x01\x01\0\0" + COOKIE + b"a transaction"[:12],
    )
    data = b"\x04\0\0\0" + bytes(60)
    in_channel = b"\x40\x01\0\x1c" + request
    way = b"client__\x12\x34\x0d\x96"
    assert messages(ethernet_and_udp + data + answer) == [(False, b"a transactio", way)]
    assert messages(ethernet_and_udp + request + answer) == [(True, bytes(12), way), (False, b"a transactio", way)]
    assert messages(ethernet_and_udp + in_channel) == [(True, bytes(12), way + b"\x40\x01")]
    initiation = INITIATION + b"from" + bytes(140)
    assert messages(ethernet_and_udp + data + initiation) == [(True, b"from", b"handshake")]
    assert messages(ethernet_and_udp + RESPONSE + b"to__from" + bytes(80)) == [(False, b"from", b"")]


def watch(member: Member) -> tuple[Process, Path]:
    """Capture the control plane at a member's router, on the inner side."""
    capture = member.host.lab.folder / f"{member.name}.pcap"
    command = ["tcpdump", "-i", "lan", "-U", "-B", "16384", "-s", "0", "-w", str(capture), INTERESTING]
    process = member.router.spawn(f"{member.name}-watch", command)
    process.wait_for_line("listening on")
    return process, capture


def answers_in(capture: Path) -> Seen:
    """What was asked, and how long the answers took.

    Only ways count on which something was ever answered: most pairs of candidates lead nowhere. The last moments do
    not count, for answers to them may be missing.
    """
    asked: dict[bytes, tuple[float, bytes]] = {}
    answered: dict[bytes, float] = {}
    last = 0.0
    for at, frame in packets(capture):
        last = at
        for is_request, transaction, way in messages(frame):
            if is_request:
                asked.setdefault(transaction, (at, way))
            else:
                answered.setdefault(transaction, at)
    alive = {way for transaction, (_, way) in asked.items() if transaction in answered}
    took = {
        transaction: answered.get(transaction, inf) - at
        for transaction, (at, way) in asked.items()
        if way in alive and at < last - ANSWER_WITHIN
    }
    return Seen([s for t, s in took.items() if len(t) == 12], [s for t, s in took.items() if len(t) == 4])


def messages(frame: bytes) -> list[tuple[bool, bytes, bytes]]:
    """Whether it asks, what identifies it, and the way: of each STUN message, and of a handshake message at the end."""
    start = ETHERNET + IP_HEADERS[frame[12:14]]
    # Both addresses, which are the last of an IP header, and both ports.
    way, payload = frame[start - (8 if start == ETHERNET + 20 else 32) : start + 4], frame[start + UDP_HEADER :]
    found = []
    at = payload.find(COOKIE)
    while at >= 0:
        kind = int.from_bytes(payload[at - 4 : at - 2], "big")
        before = payload[max(at - 8, 0) : at - 4]
        if kind & CLASS == INDICATION:
            break
        channel = before[:2] if len(before) == 4 and before[0] & 0xF0 == 0x40 else b""
        found.append((kind & CLASS == REQUEST, payload[at + 4 : at + 16], way + channel))
        at = payload.find(COOKIE, at + 1)
    if payload[-INITIATION_SIZE:][:4] == INITIATION and len(payload) >= INITIATION_SIZE:
        found.append((True, payload[-INITIATION_SIZE:][4:8], b"handshake"))
    if payload[-RESPONSE_SIZE:][:4] == RESPONSE and len(payload) >= RESPONSE_SIZE:
        found.append((False, payload[-RESPONSE_SIZE:][8:12], b""))
    return found


def packets(capture: Path) -> list[tuple[float, bytes]]:
    """Time and bytes of each packet of a pcap file (little-endian, microseconds), a cut-off last one left out."""
    data, at, found = capture.read_bytes(), 24, []
    while at + 16 <= len(data):
        seconds, micros, size, _ = (int.from_bytes(data[at + 4 * i : at + 4 * i + 4], "little") for i in range(4))
        at += 16
        if at + size <= len(data):
            found.append((seconds + micros / 1e6, data[at : at + size]))
        at += size
    return found
