"""A machine whose every core is busy with tunnel traffic keeps its control plane's deadlines.

Bulk traffic runs in both directions at once; no answer about a path may be late because of it, and the portal must not
miss us.
"""

from __future__ import annotations

import time
from math import inf
from pathlib import Path

import pytest

from fz_core.lab import Lab
from fz_core.lab.servers import start_iperf
from fz_core.lab.system import Programs, Shape, System
from tests.netns.scenarios import complain, eventually

pytestmark = [pytest.mark.root, pytest.mark.peer("nft", "curl", "ip", "iperf3", "tcpdump")]

SECONDS = 60
# RFC 8489: the first retransmission of a request that nobody answered comes after half a second.
ANSWER_WITHIN = 0.5
STUN = "udp[12:4] = 0x2112a442"
COOKIE = b"\x21\x12\xa4\x42"
CLASS, REQUEST, INDICATION = 0x0110, 0x0000, 0x0010
HEADERS = 32  # IPv4 and UDP, and STUN's type and length
SERVER = "10.20.0.80"


@pytest.mark.timeout(240)
def test_no_deadline_is_missed_under_full_load() -> None:
    with Lab() as lab:
        system = System(lab, Programs(), Shape())
        system.start()
        eventually(system, 20.0)
        member, gateway = system.clients[0], system.gateways[0]
        assert gateway.server is not None
        start_iperf(gateway.server)
        before = len(system.warnings())
        capture = lab.folder / "checks.pcap"
        watching = member.router.spawn(
            "checks", ["tcpdump", "-i", "any", "-U", "-s", "128", "-w", str(capture), f"inbound and {STUN}"]
        )
        watching.wait_for_line("listening on")
        load = member.host.spawn("load", ["iperf3", "-c", SERVER, "-t", str(SECONDS), "--bidir", "--forceflush"])
        deadline = time.monotonic() + SECONDS + 30
        while load.is_running and time.monotonic() < deadline:
            system.fetch(0.001, timeout=5.0)  # somebody else's requests, meanwhile
            time.sleep(1.0)
        watching.kill()
        assert "receiver" in load.output, load.output[-500:]
        asked, late, lost = answers_in(capture)
        assert asked > 20, f"only {asked} STUN requests in {SECONDS} s"
        assert late == [], f"of {asked} STUN requests these were answered late: {late}"
        assert lost * 10 <= asked, f"{lost} of {asked} STUN requests were never answered"
        for process in (member.process, gateway.process):
            assert "Portal connection hiccup" not in process.output
        assert len(system.warnings()) == before
        complain(system)


def answers_in(capture: Path) -> tuple[int, list[float], int]:
    """How many requests there are in a capture, what those took whose answer came late, and how many got none.

    A request or an answer may be lost with the bulk that overflows a queue before anybody of ours sees it: that is
    what its sender's next one is for. Only ways count on which something was ever answered: most pairs of candidates
    lead nowhere.
    """
    requests: dict[bytes, tuple[float, bytes]] = {}
    answers: dict[bytes, float] = {}
    last = 0.0
    for at, frame in packets(capture):
        last = at
        where = frame.find(COOKIE)
        if where < HEADERS:
            continue
        kind, transaction = int.from_bytes(frame[where - 4 : where - 2], "big"), frame[where + 4 : where + 16]
        if kind & CLASS == REQUEST:
            # Addresses and ports: the last 8 bytes of the IPv4 header and the first 4 of UDP.
            requests.setdefault(transaction, (at, frame[where - 20 : where - 8]))
        elif kind & CLASS != INDICATION:
            answers.setdefault(transaction, at)
    alive = {way for transaction, (_, way) in requests.items() if transaction in answers}
    judged = {t: at for t, (at, way) in requests.items() if way in alive and at < last - ANSWER_WITHIN}
    took = [answers.get(t, inf) - at for t, at in judged.items()]
    return len(judged), [seconds for seconds in took if ANSWER_WITHIN < seconds < inf], took.count(inf)


def packets(capture: Path) -> list[tuple[float, bytes]]:
    """Time and bytes of each packet of a pcap file (little-endian, microseconds), the cut-off last one left out."""
    data, at, found = capture.read_bytes(), 24, []
    while at + 16 <= len(data):
        seconds, micros, size, _ = (int.from_bytes(data[at + 4 * i : at + 4 * i + 4], "little") for i in range(4))
        at += 16
        if at + size <= len(data):
            found.append((seconds + micros / 1e6, data[at : at + size]))
        at += size
    return found
