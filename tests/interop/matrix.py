"""The matrix of what works, as sections of a page: what was not run this time stays as it was."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

NOTES = "<!-- notes -->"
HEAD = """# Compatibility

What was tried with which official programs, on our embedded portal, by `make interop PEERS=<folder>`.
`-`: this has no point in this mix, or the release does not know it, or it was not run. Scenarios are described in
`tests/netns/scenarios.py`, `traffic_scenarios.py`, `name_scenarios.py` and `path_mtu_scenarios.py`; faults, and
what bounds their seconds in which mix, in [fault-lab.md](fault-lab.md).
"""
Cell = tuple[str, str]


@dataclass
class Section:
    """One table: scenarios down, mixes across, and below it what failed, one line each."""

    title: str
    cells: dict[Cell, str] = field(default_factory=dict)
    failures: dict[Cell, str] = field(default_factory=dict)

    def record(self, mix: str, name: str, text: str, failure: str | None) -> None:
        """What came out: a cell, and a line if it failed."""
        self.cells[mix, name] = text
        self.failures.pop((mix, name), None)
        if failure is not None:
            self.failures[mix, name] = failure

    def update(self, newer: Section) -> None:
        """Take over what was run again."""
        for cell, text in newer.cells.items():
            self.record(*cell, text, newer.failures.get(cell))

    def text(self, names: Iterable[str], mixes: Iterable[str]) -> str:
        """In this order; mixes without anything are left out."""
        rows, columns = list(names), [mix for mix in mixes if any(m == mix for m, _ in self.cells)]
        lines = [f"## {self.title}", "", _row(["Scenario", *columns]), "|---" * (len(columns) + 1) + "|"]
        lines += [_row([n, *(self.cells.get((mix, n), "-") for mix in columns)]) for n in rows]
        failed = [(mix, n) for n in rows for mix in columns if (mix, n) in self.failures]
        lines += ["", *(f"- {mix}, {n}: {self.failures[mix, n]}" for mix, n in failed)]
        return "\n".join(lines).rstrip() + "\n"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def parse(page: str) -> dict[str, Section]:
    """The sections of a page by title, above the notes."""
    found = {}
    for block in page.partition(NOTES)[0].split("\n## ")[1:]:
        section = Section(block.splitlines()[0].strip())
        rows = [
            [cell.strip() for cell in line.strip("| ").split(" | ")] for line in block.splitlines() if line[:1] == "|"
        ]
        for row in rows[2:]:
            section.cells.update({(mix, row[0]): text for mix, text in zip(rows[0][1:], row[1:], strict=True)})
        for mix, name in section.cells:
            line = re.search(rf"^- {re.escape(mix)}, {re.escape(name)}: (.*)$", block, re.MULTILINE)
            if line is not None:
                section.failures[mix, name] = line[1]
        section.cells = {cell: text for cell, text in section.cells.items() if text != "-"}
        found[section.title] = section
    return found


def merge(path: Path, sections: Iterable[Section], order: Mapping[str, tuple[Iterable[str], Iterable[str]]]) -> None:
    """Bring a page up to date. Several processes may do so, each with its part.

    `order` has every title the page may have, with names and mixes in order; other sections are dropped.
    """
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        page = file.read()
        known = parse(page)
        for section in sections:
            known.setdefault(section.title, Section(section.title)).update(section)
        texts = [known[title].text(*axes) for title, axes in order.items() if title in known and known[title].cells]
        _, mark, notes = page.partition(NOTES)
        file.truncate(0)
        file.write("\n".join([HEAD, *texts]) + (f"\n{mark}{notes}" if mark else ""))
