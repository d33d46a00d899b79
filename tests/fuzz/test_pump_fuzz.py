"""The pump against mutated input: as it is built, and built to find its own errors.

The second has copies of the compiled modules that the pump is made of, under AddressSanitizer and
UndefinedBehaviorSanitizer. In its buffers whatever lies behind a packet's last byte is out of bounds (`fz_fence`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.fuzz.checked_build import build, run_checked
from tests.fuzz.pump_fuzzer import Fuzzer

SECONDS = 20
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so")
# Python never frees what it keeps for its lifetime.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


@pytest.mark.parametrize("seed", range(4))
def test_mutated_input_does_no_harm(seed: int) -> None:
    turns = iter(range(1500))
    done = Fuzzer(seed).run(lambda: next(turns, None) is None)
    assert done["carried_out"] > 300
    assert done["carried_in"] > 100


@pytest.mark.timeout(600)
def test_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    """Mutated input with one thread, then three threads with whole packets while everything changes."""
    build(tmp_path, "-fsanitize=address,undefined -fno-sanitize-recover=all")
    seed = os.environ.get("FZ_FUZZ_SEED", "1")
    done = checked(tmp_path, "tests.fuzz.pump_fuzzer", seed)
    assert done["device"] > 1000, done
    assert done["network"] > 1000, done
    assert done["carried_out"] > 1000, done
    assert done["carried_in"] > 200, done
    raced = checked(tmp_path, "tests.fuzz.pump_racer", seed)
    assert raced["carried_out"] > 1000, raced
    assert raced["carried_in"] > 1000, raced


def checked(place: Path, module: str, seed: str) -> dict[str, int]:
    result = run_checked(place, LIBRARIES, module, seed, str(SECONDS), **OPTIONS)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-8000:]
    found: dict[str, int] = json.loads(result.stdout)
    return found
