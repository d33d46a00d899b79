"""spec/tunnel.md §23 is a test list: every item has at least one test that says so with a `shows` mark."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
MARK = re.compile(r"@pytest\.mark\.shows\(([\d,\s]+)\)")
ITEMS = range(1, 97)


def shown() -> dict[int, set[str]]:
    """Items and the files that show them."""
    found: dict[int, set[str]] = {}
    for path in TESTS.rglob("test_*.py"):
        for numbers in MARK.findall(path.read_text()):
            for number in re.findall(r"\d+", numbers):
                found.setdefault(int(number), set()).add(path.name)
    return found


def test_every_item_of_the_tunnels_list_is_shown() -> None:
    missing = sorted(set(ITEMS) - set(shown()))
    assert not missing, f"no test shows items {missing}"


def test_no_mark_names_an_item_that_does_not_exist() -> None:
    assert set(shown()) <= set(ITEMS)
