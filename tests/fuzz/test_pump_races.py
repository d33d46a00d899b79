"""The pump's two threads beside the driver's, under ThreadSanitizer: whatever they share has a lock, or is atomic.

Sockets and pipes synchronise nobody there (`io_sync=0`). Nothing needs suppressing: only our modules are looked at.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.fuzz.checked_build import build, rebuild, run_checked

FLAGS = "-fsanitize=thread"
SECONDS = 20
FOUND = 66
SEED = os.environ.get("FZ_FUZZ_SEED", "1")
Changes = list[tuple[str, str]]
UNGUARDED: list[tuple[str, Changes, str]] = [
    (
        "fz_core/fastpath/pump.pyx",
        [
            ("        lock(self, half)\n        index = flows_enter(", "        index = flows_enter("),
            ("        unlock(self, half)\n        return index, note", "        return index, note"),
        ],
        "pump.c",
    ),
    (
        "fz_core/fastpath/outbound.pyx",
        [("fz_time_set(&peer.unheard_since, now)", "peer.unheard_since = now")],
        "outbound.c",
    ),
]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package with modules that ThreadSanitizer sees."""
    place = tmp_path_factory.mktemp("races")
    build(place, FLAGS)
    yield place
    shutil.rmtree(place)


@pytest.mark.timeout(600)
def test_no_data_race(checked: Path) -> None:
    raced = race(checked, SECONDS)
    assert raced.returncode == 0, raced.stdout[-2000:] + raced.stderr[-8000:]
    assert "ThreadSanitizer" not in raced.stderr
    done = json.loads(raced.stdout)
    assert done["carried_out"] > 1000, done
    assert done["carried_in"] > 1000, done
    assert done["rekeys"] > 20, done
    assert done["sockets"] > 20, done
    assert done["records"] > 100, done


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("file", "changes", "where"), UNGUARDED)
def test_what_nobody_guards_is_found(checked: Path, tmp_path: Path, file: str, changes: Changes, where: str) -> None:
    place = shutil.copytree(checked, tmp_path / "unguarded")
    source = place / file
    text = source.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    source.write_text(text)
    rebuild(place, FLAGS, [Path(file)])
    raced = race(place, SECONDS / 4)
    assert raced.returncode == FOUND, raced.stderr[-2000:]
    assert "WARNING: ThreadSanitizer: data race" in raced.stderr, raced.stderr[-8000:]
    assert where in raced.stderr, raced.stderr[-8000:]


def race(place: Path, seconds: float) -> CompletedProcess[str]:
    options = f"io_sync=0 exitcode={FOUND} history_size=4"
    return run_checked(place, ["libtsan.so"], "tests.fuzz.pump_racer", SEED, str(seconds), TSAN_OPTIONS=options)
