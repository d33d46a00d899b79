"""The fault lab: what goes wrong under a tunnel, and how many seconds it is out (docs/fault-lab.md).

    python -m fz_core.lab.faults [--only TEXT] [--seeds N] [--peers FOLDER] [--iceless] [--json]

Every scenario runs in a lab of its own, once per seed: the seed says when, within three seconds, the fault comes.
FOLDER holds the official programs; then all mixes are tried. Prints a table with median and worst figure beside
what the official programs were measured to do and our goal.
Exit status: 0, 1 if our own pair fails or its worst figure is above a goal, 2 usage error.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fz_core.lab.faults_bench import Outcome, Run, Settings
from fz_core.lab.faults_links import LINKS
from fz_core.lab.faults_paths import PATHS
from fz_core.lab.faults_programs import PROGRAMS
from fz_core.lab.processes import LabError
from fz_core.lab.system import Programs

RUNS: dict[str, Run] = {**PATHS, **PROGRAMS, **LINKS}
NOTHING = 0.1  # what counts as no outage: the pace of probes and a busy machine
DEFAULTS = Settings()


@dataclass(frozen=True, slots=True)
class Goal:
    """Seconds: what the official programs were measured to do, ours at most, and with one official end at most.

    The arithmetic of the mixed bounds, with ICE and without, is in docs/fault-lab.md.
    """

    official: str = ""
    ours: float | None = None
    mixed: float = 60.0
    mixed_iceless: float = 8.0

    def bound(self, programs: Programs, *, iceless: bool) -> float:
        """The most these programs may take; whatever the lab waits for with two official ones."""
        officials = (programs.gateway != Programs().gateway) + (programs.client != Programs().client)
        if officials == 2:
            return float("inf")
        if officials == 0:
            return 60.0 if self.ours is None else self.ours
        return self.mixed_iceless if iceless else self.mixed


GOALS: dict[str, Goal] = {
    "roam": Goal("2.1-4.2", 2.5),
    "download through a roam": Goal(),
    "SIGHUP": Goal("0-2", 0.3),
    "public address changes": Goal("37", 8.0),
    "direct path filtered": Goal("35", 8.0),
    "filtered towards the client": Goal("", 8.0),
    "filtered from the client": Goal("", 8.0),
    "router reboots": Goal("", 8.0),
    "local address changes": Goal("", 8.0),
    "switch to IPv6 only": Goal("", 8.0),
    "blackout 30 s": Goal("", 8.0),
    "relay dies under a direct connection": Goal("0", NOTHING),
    "relay dies under a relayed connection": Goal("1.05", 1.0),
    "gateway SIGTERM": Goal("1.2-2.2", 1.2),
    "gateway SIGKILL": Goal("19.5", 6.0),
    "client SIGTERM": Goal("0.13", 0.6),
    "client SIGKILL": Goal("0.33", 0.6),
    "idle 90 s": Goal("0.006", 0.02),
    "connecting with 20 % loss": Goal("11-16", 4.0),
    "portal's answer 1 s late": Goal("11", 3.0, 14.0, 14.0),
    "5 MB, 40 ms, 2 % loss": Goal("0.7", 0.8),
    "portal away 60 s": Goal("", NOTHING),
    "every packet twice": Goal("", NOTHING),
}


def goal_of(name: str) -> Goal:
    """Scenarios without figures must end within the bound for any mix."""
    return GOALS.get(name, Goal())


def as_scenario(name: str, settings: Settings = DEFAULTS) -> Callable[[Programs], str]:
    """For matrices of mixes: a note with the figure, LabError if it does not recover or not within the bound."""

    def scenario(programs: Programs) -> str:
        outcome = RUNS[name](programs, settings)
        bound = goal_of(name).bound(programs, iceless=programs.iceless or settings.iceless)
        if outcome.seconds > bound:
            raise LabError(f"{outcome.seconds:.2f} s are more than {bound:.1f} s")
        return "; ".join(filter(None, (f"{_seconds(outcome.seconds)} s", outcome.note)))

    return scenario


FAULTS: dict[str, Callable[[Programs], str]] = {name: as_scenario(name) for name in RUNS}


@dataclass(frozen=True, slots=True)
class Measured:
    """One scenario with one mix: outcomes and failures of its seeds."""

    name: str
    mix: str
    outcomes: tuple[Outcome, ...]
    failures: tuple[str, ...]

    @property
    def median(self) -> float | None:
        return statistics.median(o.seconds for o in self.outcomes) if self.outcomes else None

    @property
    def worst(self) -> float | None:
        """None if a seed failed: then there is no worst figure."""
        return None if self.failures or not self.outcomes else max(o.seconds for o in self.outcomes)

    @property
    def verdict(self) -> str:
        """Against the goal, which binds our own pair."""
        goal = goal_of(self.name).ours
        if self.worst is None:
            return "FAIL"
        return "ok" if goal is None or self.worst <= goal else "late"


def measure(name: str, mix: str, programs: Programs, settings: Settings, seeds: int) -> Measured:
    """Run a scenario once per seed; tells each figure on stderr as it comes."""
    outcomes, failures = [], []
    for seed in range(seeds):
        own = replace(settings, seed=seed)
        if settings.logs is not None:
            own = replace(own, logs=settings.logs / f"{name}.{mix}.{seed}".replace("/", "-").replace(" ", "_"))
        title = f"{mix} | {name} | seed {seed} (+{own.offset:.2f} s)"
        try:
            outcome = RUNS[name](programs, own)
        except LabError as error:
            failures.append(str(error).splitlines()[0])
        except Exception as error:  # a bug of the lab; the other scenarios still run
            traceback.print_exc()
            failures.append(f"{type(error).__name__}: {error}")
        else:
            outcomes.append(outcome)
            print(f"{title}: {outcome.seconds:.3f} s {outcome.note}".rstrip(), file=sys.stderr, flush=True)
            continue
        print(f"{title}: FAIL {failures[-1]}", file=sys.stderr, flush=True)
    return Measured(name, mix, tuple(outcomes), tuple(failures))


def mixes(folder: Path | None) -> dict[str, Programs]:
    """Our own pair, and with official programs every mix. LabError if the folder has none."""
    own = {"ours": Programs()}
    if folder is None:
        return own
    names = ("firezone-gateway", "firezone-headless-client")
    versions = sorted((p for p in folder.iterdir() if p.is_dir()), reverse=True) if folder.is_dir() else []
    for place in (folder, *versions):
        gateway, client = (place / name for name in names)
        if os.access(gateway, os.X_OK) and os.access(client, os.X_OK):
            theirs = Programs(gateway=(str(gateway),), client=(str(client),))
            return own | {
                "our client, their gateway": Programs(gateway=theirs.gateway),
                "their client, our gateway": Programs(client=theirs.client),
                "their client and gateway": theirs,
            }
    raise LabError(f"{folder} has no executable {' and '.join(names)}: give the folder of one version")


def table(results: list[Measured]) -> str:
    """For people: one line per scenario and mix."""
    rows = [("scenario", "mix", "median", "worst", "official", "goal", "verdict", "note")]
    for r in results:
        goal = goal_of(r.name)
        notes = [*dict.fromkeys(r.failures), *dict.fromkeys(o.note for o in r.outcomes if o.note)]
        failed = f"{len(r.failures)} of {len(r.failures) + len(r.outcomes)} failed" if r.failures else ""
        rows.append(
            (
                r.name, r.mix, _seconds(r.median), _seconds(r.worst), goal.official or "-", _seconds(goal.ours),
                r.verdict, "; ".join(filter(None, (failed, *notes)))[:120],
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(" | ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def as_json(results: list[Measured], seeds: int) -> str:
    """For programs: the same with every single figure."""
    return json.dumps(
        [
            {
                "scenario": r.name, "mix": r.mix, "seeds": list(range(seeds)), "median_s": r.median,
                "worst_s": r.worst, "goal_s": goal_of(r.name).ours, "verdict": r.verdict,
                "seconds": [o.seconds for o in r.outcomes], "notes": [o.note for o in r.outcomes],
                "failures": r.failures,
            }
            for r in results
        ],
        indent=2,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="faults", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="only mixes and scenarios whose 'mix/scenario' contains this")
    parser.add_argument("--seeds", type=int, default=3, help="how often each scenario runs (3)")
    parser.add_argument("--peers", type=Path, help="folder with the official programs: try every mix")
    parser.add_argument("--iceless", action="store_true", help="the portal allows ICE-less connections")
    parser.add_argument("--hurry", type=float, default=1.0, help="divide long waits by this")
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of a table")
    parser.add_argument("--logs", type=Path, help="keep every program's output in this folder")
    parser.add_argument("--log-filter", default="info", help="log filter of gateways and clients (info)")
    options = parser.parse_args()
    settings = Settings(
        iceless=options.iceless, hurry=options.hurry, logs=options.logs, log_filter=options.log_filter
    )  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the lab is taken down
    try:
        found = mixes(options.peers)
    except LabError as error:
        print(f"faults: {error}", file=sys.stderr)
        return 2
    wanted = partial(_is_wanted, options.only)
    began_at = time.monotonic()
    results = [
        measure(name, mix, programs, settings, options.seeds)
        for name in RUNS
        for mix, programs in found.items()
        if wanted(f"{mix}/{name}")
    ]
    print(as_json(results, options.seeds) if options.json else table(results))
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    seeds = ", ".join(f"{s} (+{Settings(s).offset:.2f} s)" for s in range(options.seeds))
    print(f"seeds {seeds}; load {load}; {time.monotonic() - began_at:.0f} s", file=sys.stderr)
    return 1 if any(r.mix == "ours" and r.verdict != "ok" for r in results) else 0


def _is_wanted(only: list[str] | None, title: str) -> bool:
    return only is None or any(text in title for text in only)


if __name__ == "__main__":
    sys.exit(main())
