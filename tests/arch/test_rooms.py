"""The rooms and their floors: a room imports only from lower floors, never from its own floor.

Covers Python imports and Cython cimports, read as text, so that unbuilt trees are checked too.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FLOORS = {
    0: ("packet", "crypto"),
    1: ("stun", "dns", "portal"),
    2: ("wireguard", "ice", "turn"),
    3: ("node",),
    4: ("tunnel",),
    5: ("fastpath", "linux"),
    6: ("driver", "embedded"),
    7: ("lab", "commands"),
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
# dns/ is a codec (floor 1); its forwarding parts are composed by tunnel/.
CLOCKS = re.compile(r"\b(?:import|from) (?:time|socket|select|threading|trio|asyncio|secrets|random)\b|os\.urandom")
IMPORT = re.compile(r"^\s*(?:from|import|cimport)\s+fz_core\.(\w+)", re.MULTILINE)


def files(room: str) -> list[Path]:
    return sorted(p for s in ("*.py", "*.pyx", "*.pxd") for p in (ROOT / "fz_core" / room).rglob(s))


def test_every_folder_has_a_floor() -> None:
    rooms = {p.name for p in (ROOT / "fz_core").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms <= set(FLOOR), f"rooms without a floor: {rooms - set(FLOOR)}"


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_imports_point_downwards(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {target}"
        for path in files(room)
        for target in IMPORT.findall(path.read_text())
        if target in FLOOR and target != room and FLOOR[target] >= FLOOR[room]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", sorted(r for r, floor in FLOOR.items() if floor <= 4))
def test_the_core_is_sans_io(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {match.group(0)}"
        for path in files(room)
        if (match := CLOCKS.search(path.read_text()))
    ]
    assert not wrong, "\n".join(wrong)


def test_front_ends_are_thin() -> None:
    for package in ("fz_gateway", "fz_headless"):
        lines = sum(len(p.read_text().splitlines()) for p in (ROOT / package).rglob("*.py"))
        assert lines < 1000, f"{package} has {lines} lines"


def test_modules_stay_under_600_lines() -> None:
    long = [
        f"{p.relative_to(ROOT)}: {n}"
        for p in (ROOT / "fz_core").rglob("*.py*")
        if p.suffix in (".py", ".pyx") and (n := len(p.read_text().splitlines())) > 600
    ]
    assert not long, "\n".join(long)
