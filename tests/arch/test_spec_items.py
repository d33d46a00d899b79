"""The specifications end in lists of what a test must show: every item has a test that says so with a `shows` mark.

`@pytest.mark.shows("tunnel", 1, 2)` names items of spec/tunnel.md §23, "connectivity" those of spec/connectivity.md §11
and "io" those of spec/io.md §14.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
LAST_ITEM = {"tunnel": 96, "connectivity": 54, "io": 51}


@pytest.mark.parametrize("sheet", LAST_ITEM)
def test_every_item_of_a_list_is_shown(sheet: str) -> None:
    missing = set(range(1, LAST_ITEM[sheet] + 1)) - _shown(sheet)
    assert not missing, "no test shows these"


def test_no_mark_names_an_item_that_does_not_exist() -> None:
    wrong = [(sheet, item, where) for sheet, item, where in _marks() if not 1 <= item <= LAST_ITEM.get(sheet, 0)]
    assert not wrong


def _shown(sheet: str) -> set[int]:
    return {item for name, item, _ in _marks() if name == sheet}


def _marks() -> Iterator[tuple[str, int, str]]:
    """Sheet, item and file of every mark; a mark that is not written as literals fails here."""
    for path in sorted(TESTS.rglob("test_*.py")):
        source = path.read_text()
        if "mark.shows(" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "shows":
                sheet, *items = (ast.literal_eval(argument) for argument in node.args)
                for item in items:
                    yield sheet, item, path.name
