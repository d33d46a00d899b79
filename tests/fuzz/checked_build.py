"""Copies of the compiled modules that the pump is made of, built to find their own errors, and how to run them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("fastpath", "packet", "crypto", "wireguard")
# They carry no packets of the pump.
OTHERS = ("coalesce", "gso", "relay_")
MAPPED_BITS = Path("/proc/sys/vm/mmap_rnd_bits")
MOST_BITS = 28  # with more, the shadow memory of gcc 12's libraries may be taken
FLAGS = "-O1 -g -fno-omit-frame-pointer -fno-strict-aliasing"
BUILD = """
import sys
from pathlib import Path
from Cython.Build import cythonize
from setuptools import Extension, setup
flags, files = sys.argv[1].split(), [Path(name) for name in sys.argv[2:]]
sys.argv = ["setup", "-q", "build_ext", "--inplace"]
modules = [
    Extension(".".join(file.with_suffix("").parts), [str(file)], libraries=["sodium"],
              extra_compile_args=[*flags, "-w"], extra_link_args=flags)
    for file in files
]
modules = cythonize(modules, build_dir="build", quiet=True, nthreads=2, compiler_directives={"language_level": 3})
setup(name="checked", ext_modules=modules, options={"build_ext": {"parallel": 2}}, packages=[])
"""


def build(place: Path, flags: str) -> None:
    """The package in `place`, with its modules compiled with these flags as well."""
    kept = shutil.ignore_patterns("*.c", "__pycache__")
    shutil.copytree(ROOT / "fz_core", place / "fz_core", ignore=kept)
    shutil.copytree(ROOT / "tests", place / "tests", ignore=kept)
    sources = [
        path.relative_to(ROOT)
        for room in ROOMS
        for path in sorted((ROOT / "fz_core" / room).glob("*.pyx"))
        if not path.name.startswith(OTHERS)
    ]
    rebuild(place, flags, sources)


def rebuild(place: Path, flags: str, sources: Sequence[Path]) -> None:
    """Some modules of the package in `place`."""
    for source in sources:
        for old in (place / source.parent).glob(f"{source.stem}.*.so"):
            old.unlink()
    done = run([sys.executable, "-c", BUILD, f"{FLAGS} {flags}", *map(str, sources)], place, {})
    assert done.returncode == 0, done.stderr[-8000:]


def compiler_file(name: str) -> str:
    """Where a library of the compiler is."""
    return subprocess.run(
        ["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()


def run_checked(
    place: Path, libraries: Sequence[str], module: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a module of the package in `place` beside the sanitizers' libraries."""
    variables = {
        "LD_PRELOAD": " ".join(compiler_file(library) for library in libraries),
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(place),
    }
    orderly = ["setarch", "-R"] if int(MAPPED_BITS.read_text()) > MOST_BITS else []
    return run([*orderly, sys.executable, "-m", module, *arguments], place, variables | environment)


def run(command: list[str], place: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=place, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
