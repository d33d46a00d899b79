"""What the build files promise: programs that exist, stubs, versions, a plain word when nothing is built."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("fz_core", "fz_gateway", "fz_headless")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Compiled modules that only other compiled modules use.
WITHOUT_STUBS = {
    "fz_core/fastpath/relay_address.pyx",
    "fz_core/fastpath/relay_inbox.pyx",
    "fz_core/fastpath/relay_port.pyx",
    "fz_core/fastpath/relay_routes.pyx",
    "fz_core/packet/layout.pyx",
}
BUILD_FILES = ("pyproject.toml", "setup.py", "Makefile", "MANIFEST.in", "requirements.lock", "system-packages.txt")
REGISTRIES = re.compile(r"pypi\.org|pythonhosted|deb\.debian|crates\.io|npmjs|maven|proxy\.golang|(?:extra-)?index-url")


def package_files(*suffixes: str) -> list[Path]:
    return sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*") if p.suffix in suffixes)


def entry(target: str) -> Callable[..., object]:
    module, _, name = target.partition(":")
    found: Callable[..., object] = getattr(importlib.import_module(module), name)
    return found


@pytest.mark.parametrize("program", sorted(PROJECT["scripts"]))
def test_programs_resolve_to_callables(program: str) -> None:
    assert callable(entry(PROJECT["scripts"][program]))


def test_compiled_modules_have_stubs() -> None:
    missing = {str(p.relative_to(ROOT)) for p in package_files(".pyx") if not p.with_suffix(".pyi").exists()}
    assert missing == WITHOUT_STUBS


def test_stubs_describe_compiled_modules() -> None:
    assert [p for p in package_files(".pyi") if not p.with_suffix(".pyx").exists()] == []


def test_installed_version_is_the_declared_one() -> None:
    try:
        installed = version(PROJECT["name"])
    except PackageNotFoundError:
        pytest.skip("not installed: run 'make build'")
    assert installed == PROJECT["version"]


def test_every_dependency_is_locked() -> None:
    locked = set(re.findall(r"^([a-z0-9.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    names = {re.split(r"[<>=!~;\[ ]", requirement)[0] for requirement in wanted}
    assert names - locked == set()


def test_unbuilt_package_says_how_to_build(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "fz_core", tmp_path / "fz_core", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    run = [sys.executable, "-c", "import fz_core"]
    result = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "make build" in result.stderr.splitlines()[-1]


def test_no_registry_is_named() -> None:
    files = [*package_files(".py", ".pyi", ".pyx", ".pxd"), *(ROOT / name for name in BUILD_FILES)]
    named = {str(p.relative_to(ROOT)): m.group() for p in files if (m := REGISTRIES.search(p.read_text()))}
    assert named == {}
