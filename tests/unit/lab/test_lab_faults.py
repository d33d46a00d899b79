"""The fault lab's arithmetic: gaps, shares, medians, verdicts, and what a bad cable does to packets."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest

from fz_core.lab.delay_line import LATE, Trouble
from fz_core.lab.faults import FAULTS, GOALS, RUNS, Measured, as_json, mixes, table
from fz_core.lab.faults_bench import MOMENTS, Outcome, Settings
from fz_core.lab.outage import Record
from fz_core.lab.outage_proxy import is_held, read_frame
from fz_core.lab.processes import LabError


def record(answered: list[float], pace: float = 0.5) -> Record:
    """Questions every half second from 0 to 10; those asked at these instants are answered at once."""
    record = Record(pace)
    for number in range(20):
        at = number * pace
        record.asked.append(at)
        if at in answered:
            record.answers.append((at, number))
    return record


STEADY = [n * 0.5 for n in range(20)]


def test_steady_answers_are_no_outage() -> None:
    assert record(STEADY).outage(2.0, 8.0) == 0.0
    assert record(STEADY).share(2.0, 8.0) == 1.0


def test_an_outage_is_the_longest_gap_less_the_pace() -> None:
    seen = record([at for at in STEADY if not 3.0 <= at < 5.0 and at != 7.0])
    assert seen.outage(2.9, 9.0) == pytest.approx(2.0)
    assert seen.gaps(2.9, 9.0, least=0.1) == pytest.approx([2.0, 0.5])
    assert seen.share(3.0, 7.0) == 0.5


def test_the_gap_begins_with_the_last_answer_before_the_fault() -> None:
    assert record([0.0, 1.0, 6.0]).outage(3.0, 6.0) == pytest.approx(4.5)


def test_silence_to_the_end_counts() -> None:
    assert record([0.0, 1.0]).outage(1.0, 9.0) == pytest.approx(7.5)
    assert record([]).outage(1.0, 9.0) == pytest.approx(7.5)


def test_an_answer_counts_for_the_time_of_its_question() -> None:
    seen = record([])
    seen.answers = [(4.0, 1), (5.0, 9)]  # asked at 0.5 and at 4.5
    assert seen.answered_at(0.0) == 4.0
    assert seen.answered_at(3.0) == 5.0
    assert seen.answered_at(5.0) is None


def test_the_same_seed_strikes_at_the_same_moment() -> None:
    offsets = [Settings(seed).offset for seed in range(20)]
    assert offsets == [Settings(seed).offset for seed in range(20)]
    assert len(set(offsets)) == 20
    assert all(0 <= offset < MOMENTS for offset in offsets)


def test_every_goal_is_a_scenarios() -> None:
    assert GOALS.keys() <= RUNS.keys()
    assert FAULTS.keys() == RUNS.keys()


@pytest.mark.parametrize(
    ("seconds", "failures", "verdict", "worst"),
    [
        ((2.4, 2.5), (), "ok", 2.5),
        ((0.1, 2.6), (), "late", 2.6),
        ((0.1,), ("x",), "FAIL", None),
        ((), (), "FAIL", None),
    ],
)
def test_the_worst_seed_decides(
    seconds: tuple[float, ...], failures: tuple[str, ...], verdict: str, worst: float | None
) -> None:
    measured = Measured("roam", "ours", tuple(map(Outcome, seconds)), failures)
    assert (measured.verdict, measured.worst) == (verdict, worst)


def test_the_table_has_a_line_per_scenario_and_its_notes() -> None:
    results = [
        Measured("roam", "ours", (Outcome(2.0), Outcome(1.0, "twice"), Outcome(2.5)), ()),
        Measured("idle 90 s", "ours", (), ("nothing came",)),
    ]
    _, roam, idle = table(results).splitlines()
    assert [cell.strip() for cell in roam.split("|")] == [
        "roam", "ours", "2.00", "2.50", "2.1-4.2", "2.50", "ok", "twice",
    ]  # fmt: skip
    assert [cell.strip() for cell in idle.split("|")][2:] == [
        "-", "-", "0.006", "0.020", "FAIL", "1 of 1 failed; nothing came",
    ]  # fmt: skip
    assert json.loads(as_json(results, 3))[0]["seconds"] == [2.0, 1.0, 2.5]


def test_mixes_need_both_programs(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="has no executable"):
        mixes(tmp_path)
    folder = tmp_path / "1.0.0"
    folder.mkdir()
    for name in ("firezone-gateway", "firezone-headless-client"):
        (folder / name).touch(0o755)
    assert list(mixes(None)) == ["ours"]
    found = mixes(tmp_path)
    assert len(found) == 4
    assert found["our client, their gateway"].gateway == (str(folder / "firezone-gateway"),)
    assert found["our client, their gateway"].client == mixes(None)["ours"].client


def test_shares_of_packets_are_lost_overtaken_and_doubled() -> None:
    trouble = Trouble(0.1, loss=0.2, reorder=0.1, duplicate=0.5)
    rng = random.Random(1)
    fates = [trouble.delays(rng) for _ in range(10_000)]
    came = [fate for fate in fates if fate]
    assert 0.78 < len(came) / len(fates) < 0.82
    assert 0.47 < sum(len(fate) == 2 for fate in came) / len(came) < 0.53
    assert 0.08 < sum(fate[0] > 0.1 + LATE / 2 for fate in came) / len(came) < 0.12
    assert trouble.is_per_packet
    assert not Trouble(0.1).is_per_packet


def test_the_fate_of_packets_is_the_seeds() -> None:
    trouble = Trouble(loss=0.3, duplicate=0.3)
    first, again, other = (
        [trouble.delays(rng) for _ in range(100)] for rng in (random.Random(7), random.Random(7), random.Random(8))
    )
    assert first == again != other


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536])
def test_the_late_portal_reads_frames_whole(size: int) -> None:
    extra = b"" if size < 126 else size.to_bytes(2 if size < 65536 else 8, "big")
    length = size if size < 126 else 126 if size < 65536 else 127
    frame = bytes([0x81, length]) + extra + b"x" * size
    reader = io.BytesIO(frame + b"\x8a\x00")
    assert read_frame(reader) == frame
    assert read_frame(reader) == b"\x8a\x00"
    assert read_frame(reader) == b""


def test_only_the_answer_is_late() -> None:
    assert is_held(b'\x81\x7d{"event":"authorization_created","payload":{}}')
    assert not is_held(b'\x81\x7d{"event":"ice_candidates","payload":{}}')
