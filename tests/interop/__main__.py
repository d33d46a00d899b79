"""Whole systems with the official programs at either end, in every mix, with ICE and without, and with faults.

    python -m tests.interop --peers FOLDER [--only TEXT] [--mode ice|iceless|both] [--no-faults] [--hurry X]

FOLDER holds `firezone-gateway`, `firezone-headless-client` and `firezone-relay`, or folders with those, one per
version. A folder with the client alone is tried with our gateway, as clients before 1.4 are. Everything runs on
our embedded portal. Prints a matrix and brings docs/compatibility.md up to date; what was not run stays there, so
that the work may be split between processes: `--no-faults` here, `--no-ordinary --only ...` there.
Exit status: 0 if every scenario passed or is a known limit, 1 otherwise, 2 usage error.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fz_core.lab import LabError
from fz_core.lab.faults import FAULTS, as_scenario
from fz_core.lab.faults_bench import Settings
from fz_core.lab.system import Programs
from tests.interop.matrix import Section, merge
from tests.interop.mixes import CONTROL, NAMES, ORDINARY, WITHOUT_ICE, Release, applies, decides, mixes, releases

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"


@dataclass(frozen=True)
class Part:
    """What becomes one section: a release or our own programs, ordinary scenarios or faults, with ICE or without."""

    release: Release | None
    has_faults: bool
    iceless: bool

    @property
    def title(self) -> str:
        whose = "Control: our programs only" if self.release is None else f"Official programs: {self.release.title}"
        return whose + ", faults" * self.has_faults + ", without ICE" * self.iceless

    @property
    def table(self) -> dict[str, Programs]:
        return CONTROL if self.release is None else mixes(self.release)

    @property
    def names(self) -> list[str]:
        if self.has_faults:
            return list(FAULTS)
        return [name for name in ORDINARY if not self.iceless or name in WITHOUT_ICE]

    def cells(self, only: list[str] | None) -> Iterator[tuple[str, str]]:
        for mix in self.table:
            for name in self.names:
                wanted = only is None or any(text in f"{self.title}/{mix}/{name}" for text in only)
                if wanted and applies(mix, name, self.release, self.iceless):
                    yield mix, name


def attempt(name: str, programs: Programs, settings: Settings) -> tuple[bool, str]:
    """Whether it passed, and a note."""
    started_at = time.monotonic()
    try:
        note = as_scenario(name, settings)(programs) if name in FAULTS else ORDINARY[name](programs)
    except LabError as error:
        return False, str(error).splitlines()[0]
    except Exception as error:  # a bug of ours; the others still run
        traceback.print_exc()
        return False, f"{type(error).__name__}: {error}"
    return True, note or f"{time.monotonic() - started_at:.0f} s"


def run(part: Part, only: list[str] | None, settings: Settings) -> tuple[Section, int]:
    """The section, and how many failures are ours."""
    section, failed = Section(part.title), 0
    for mix, name in part.cells(only):
        own = settings
        if settings.logs is not None:
            own = replace(settings, logs=settings.logs / f"{part.title}.{mix}.{name}".replace("/", "-"))
        passed, note = attempt(name, replace(part.table[mix], iceless=part.iceless), own)
        figure = note.partition(";")[0] if part.has_faults else "yes"
        section.record(mix, name, figure if passed else "no", None if passed else note)
        is_ours = not passed and decides(mix, name)
        failed += is_ours
        word = "pass" if passed else "FAIL" if is_ours else "no  "
        print(f"{word}  {part.title} | {mix} | {name}: {note}", flush=True)
    return section, failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="interop", description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="folder with the official programs, or with one folder per version")
    parser.add_argument("--only", action="append", help="only where 'section/mix/scenario' contains this; repeatable")
    parser.add_argument("--mode", choices=("ice", "iceless", "both"), default="both", help="with ICE, without, or both")
    parser.add_argument("--faults", action=argparse.BooleanOptionalAction, default=True, help="the fault scenarios")
    parser.add_argument("--ordinary", action=argparse.BooleanOptionalAction, default=True, help="all others")
    parser.add_argument("--hurry", type=float, default=1.0, help="divide the long waits of faults by this")
    parser.add_argument("--logs", type=Path, help="keep every program's output of faults in this folder")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to bring up to date (docs/compatibility.md)")
    options = parser.parse_args()
    if options.peers is None or not options.peers.is_dir() or not (found := releases(options.peers)):
        print(f"interop: needs PEERS=<folder> with executable {', '.join(NAMES)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the lab is taken down
    settings = Settings(hurry=options.hurry, logs=options.logs)
    parts = [Part(release, f, i) for release in (None, *found) for f in (False, True) for i in (False, True)]
    order = {part.title: (part.names, part.table) for part in parts}
    failed = count = 0
    for part in parts:
        if (part.iceless and options.mode == "ice") or (not part.iceless and options.mode == "iceless"):
            continue
        if not (options.faults if part.has_faults else options.ordinary):
            continue
        section, ours = run(part, options.only, settings)
        failed, count = failed + ours, count + len(section.cells)
        if section.cells:
            print(section.text(*order[part.title]), flush=True)
            merge(options.page, [section], order)
    print(f"{count - failed} passed or known, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
