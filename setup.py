"""Extension modules. Everything else is declared in pyproject.toml.

Compiled are all `.pyx` files, and the plain `.py` modules of the rooms in `COMPILED_ROOMS`
(they also run uncompiled, for debugging). `FZ_BUILD_ONLY=packet,crypto` limits a developer's
build to those rooms; `FZ_BUILD_ONLY=none` compiles nothing.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

COMPILED_ROOMS = ("ice", "turn")
COMPILING = {"bdist_wheel", "build", "build_ext", "editable_wheel", "install"}
ROOT = Path("fz_core")


def sources() -> list[Path]:
    """Every file to compile, limited by FZ_BUILD_ONLY."""
    found = sorted(ROOT.rglob("*.pyx"))
    for room in COMPILED_ROOMS:
        found += sorted(p for p in (ROOT / room).glob("*.py") if p.name != "__init__.py")
    only = os.environ.get("FZ_BUILD_ONLY")
    return [p for p in found if not only or p.parts[1] in only.split(",")]


def extension(path: Path) -> Extension:
    """One extension per module, linked with libsodium."""
    return Extension(
        ".".join(path.with_suffix("").parts),
        [str(path)],
        libraries=["sodium"],
        # Cython's comparison with None reads an int only behind a check of its type; gcc 12 misses that.
        extra_compile_args=["-O3", "-Wall", "-Wno-array-bounds", "-fno-strict-aliasing"],
    )


def require_libsodium() -> None:
    """Stop with one line where the header is missing, instead of a page of compiler output."""
    places = ("/usr/include", "/usr/local/include", *os.environ.get("CPATH", "").split(":"))
    if not any((Path(p) / "sodium.h").exists() for p in places if p):
        sys.exit("sodium.h not found: libsodium's headers are missing; run 'apt-get install libsodium-dev'")


def extensions() -> list[Extension]:
    """Cythonized modules; the commands that only describe or pack the sources need none."""
    if not sources() or not COMPILING.intersection(sys.argv):
        return []
    require_libsodium()
    from Cython.Build import cythonize

    return cythonize(
        [extension(p) for p in sources()],
        build_dir="build/cython",
        nthreads=os.cpu_count() or 1,
        quiet="--quiet" in sys.argv,
        compiler_directives={"language_level": 3, "embedsignature": True, "binding": True},
    )


if __name__ == "__main__":
    setup(ext_modules=extensions(), options={"build_ext": {"parallel": os.cpu_count() or 1}})
