"""The benchmark of whole systems, run shortly: its report says what spec/io.md §14 items 50 and 51 ask for."""

from __future__ import annotations

import pytest

from fz_core.lab.system import Programs
from tests.bench.bench_system import tunnel

pytestmark = [pytest.mark.root, pytest.mark.peer("nft", "curl", "ip", "iperf3")]

TRAFFIC = ("upload", "download", "udp_200", "udp_200_download")
# spec/io.md §1.3: the most that queues of datagrams and packets may hold, KiB
QUEUES = (20 + 128 + 32) * 1024


@pytest.mark.shows("io", 50, 51)
@pytest.mark.parametrize(("relayed", "delay_ms"), [(False, 0.0), (True, 20.0)])
def test_a_short_run_reports_everything(relayed: bool, delay_ms: float) -> None:
    """Numbers are reported, not judged; that memory does not grow with the traffic is."""
    report = tunnel(Programs(), 2.0, relayed=relayed, delay_ms=delay_ms)
    ends = {"client", "gateway", "relay"} if relayed else {"client", "gateway"}
    assert report["path"] == ("relayed" if relayed else "direct")
    for kind in TRAFFIC:
        assert report[kind]["mbit_s"] > 0
        assert report[kind]["lost_percent" if kind.startswith("udp") else "retransmits"] >= 0
        assert set(report[kind]["load"]) == ends
        for name, load in report[kind]["load"].items():
            assert load["wakeups_per_s"] > 0
            assert load["cpu_s_by_thread"]
            calls = load["full_packets_per_call"]
            assert calls["udp_send"] > 0
            assert calls["udp_receive"] > 0
            if name != "relay":
                assert calls["tun_read"] + calls["tun_write"] > 0
    for name in ends:
        assert set(report["drops"][name]) == {"udp", "tun"}
        assert report["at_rest"][name]["state"] == "S"
        memory = report["rss_kib"][name]
        assert len(memory) == 1 + len(TRAFFIC)
        assert max(memory) - memory[0] < QUEUES
        assert memory[-1] - memory[1] < 16 * 1024, memory  # three more runs need no more than the first did
    assert report["warnings"] == 0
