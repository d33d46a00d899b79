"""The pump against mutated input: as it is built, and built to find its own errors.

The second has copies of the compiled modules that the pump is made of, under AddressSanitizer and
UndefinedBehaviorSanitizer. In its buffers whatever lies behind a packet's last byte is out of bounds (`fz_fence`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.pump_fuzzer import Fuzzer

ROOT = Path(__file__).parents[2]
SECONDS = 20
ROOMS = ("fastpath", "packet", "crypto", "wireguard")
# They carry no packets of the pump.
OTHERS = ("coalesce", "gso", "relay_")
FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fno-strict-aliasing", "-fsanitize=address,undefined")
BUILD = """
import sys
from pathlib import Path
from Cython.Build import cythonize
from setuptools import Extension, setup
flags, files = sys.argv[1].split(), [Path(name) for name in sys.argv[2:]]
sys.argv = ["setup", "-q", "build_ext", "--inplace"]
modules = [
    Extension(".".join(file.with_suffix("").parts), [str(file)], libraries=["sodium"],
              extra_compile_args=[*flags, "-fno-sanitize-recover=all", "-w"], extra_link_args=flags)
    for file in files
]
modules = cythonize(modules, build_dir="build", quiet=True, nthreads=2, compiler_directives={"language_level": 3})
setup(name="checked", ext_modules=modules, options={"build_ext": {"parallel": 2}}, packages=[])
"""


@pytest.mark.parametrize("seed", range(4))
def test_mutated_input_does_no_harm(seed: int) -> None:
    turns = iter(range(1500))
    done = Fuzzer(seed).run(lambda: next(turns, None) is None)
    assert done["carried_out"] > 300
    assert done["carried_in"] > 100


@pytest.mark.timeout(600)
def test_mutated_input_under_sanitizers(tmp_path: Path) -> None:
    build(tmp_path)
    output = fuzz(tmp_path, seed=int(os.environ.get("FZ_FUZZ_SEED", "1")), seconds=SECONDS)
    done = json.loads(output)
    assert done["device"] > 1000, done
    assert done["network"] > 1000, done
    assert done["carried_out"] > 1000, done
    assert done["carried_in"] > 200, done


def build(place: Path) -> None:
    """The package with checked modules in `place`."""
    kept = shutil.ignore_patterns("*.c", "__pycache__")
    shutil.copytree(ROOT / "fz_core", place / "fz_core", ignore=kept)
    shutil.copytree(ROOT / "tests", place / "tests", ignore=kept)
    sources = [
        path.relative_to(ROOT)
        for room in ROOMS
        for path in sorted((ROOT / "fz_core" / room).glob("*.pyx"))
        if not path.name.startswith(OTHERS)
    ]
    for source in sources:
        for old in (place / source.parent).glob(f"{source.stem}.*.so"):
            old.unlink()
    run([sys.executable, "-c", BUILD, " ".join(FLAGS), *map(str, sources)], place, {})


def fuzz(place: Path, seed: int, seconds: float) -> str:
    libraries = [compiler_file("libasan.so"), compiler_file("libubsan.so"), compiler_file("libstdc++.so")]
    return run(
        [sys.executable, "-m", "tests.fuzz.pump_fuzzer", str(seed), str(seconds)],
        place,
        {
            "LD_PRELOAD": " ".join(libraries),
            # Python never frees what it keeps for its lifetime.
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONMALLOC": "malloc",
            "PYTHONPATH": str(place),
        },
    )


def compiler_file(name: str) -> str:
    return subprocess.run(
        ["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()


def run(command: list[str], place: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=place, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    return done.stdout
