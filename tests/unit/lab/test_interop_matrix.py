"""The page of `make interop` keeps what was not run."""

from __future__ import annotations

from pathlib import Path

from tests.interop.matrix import NOTES, Section, merge, parse

NAMES, MIXES = ["direct", "relayed, twice"], ["ours", "theirs"]
ORDER = {"First": (NAMES, MIXES), "Second": (NAMES, MIXES)}


def section(title: str, *results: tuple[str, str, str, str | None]) -> Section:
    made = Section(title)
    for result in results:
        made.record(*result)
    return made


def test_parts_are_merged_cell_by_cell(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Old head\n\n{NOTES}\n## Notes\n\n- kept\n")
    merge(page, [section("Second", ("ours", "direct", "yes", None))], ORDER)
    merge(page, [section("First", ("ours", "direct", "no", "nothing came"))], ORDER)
    merge(page, [section("First", ("theirs", "relayed, twice", "2.1 s", None))], ORDER)
    text = page.read_text()
    assert text.endswith(f"{NOTES}\n## Notes\n\n- kept\n")
    assert "Old head" not in text
    first, second = text.index("## First"), text.index("## Second")
    assert text[first:second].splitlines() == [
        "## First",
        "",
        "| Scenario | ours | theirs |",
        "|---|---|---|",
        "| direct | no | - |",
        "| relayed, twice | - | 2.1 s |",
        "",
        "- ours, direct: nothing came",
        "",
    ]
    merge(page, [section("First", ("ours", "direct", "yes", None))], ORDER)
    assert "nothing came" not in page.read_text()
    assert parse(page.read_text())["First"].cells == {("ours", "direct"): "yes", ("theirs", "relayed, twice"): "2.1 s"}


def test_what_is_not_tried_any_more_goes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    merge(page, [section("First", ("ours", "direct", "yes", None))], ORDER)
    merge(page, [section("Second", ("ours", "direct", "yes", None))], {"Second": (["direct"], ["ours"])})
    assert "First" not in page.read_text()
    assert "relayed" not in page.read_text()
