"""Whole systems with the official programs at either end, in every mix.

    python -m tests.interop --peers FOLDER

FOLDER holds `firezone-gateway`, `firezone-headless-client` and `firezone-relay`, or folders with those, one per
version. A folder with the client alone is tried with our gateway, as clients before 1.4 are. Everything runs on
our embedded portal. Prints a matrix and writes it to docs/compatibility.md.
Exit status: 0 if every scenario passed or is a known limit, 1 otherwise, 2 usage error.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from fz_core.lab import LabError
from fz_core.lab.system import Programs
from tests.netns.name_scenarios import NAME_SCENARIOS
from tests.netns.path_mtu_scenarios import MTU_SCENARIOS
from tests.netns.scenarios import SCENARIOS as PATH_SCENARIOS

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = {**PATH_SCENARIOS, **MTU_SCENARIOS, **NAME_SCENARIOS}
STRICT_GATEWAY = (1, 6, 0)  # older ones let the internet resource into their own network
BEYOND_OLD_CLIENTS = {
    # they know one resource per name, ask the portal for every name, resolve SRV themselves, have no such option
    "overlapping resources", "names without the portal", "one source port for three names",
    "SRV, TXT, PTR, DNS over TCP", "internet resource", "device pools",
}  # fmt: skip
POOL_CLIENT = (1, 5, 9)  # older clients are not told of device pools (spec/portal-protocol.md §8.9)
NAMES = ("firezone-gateway", "firezone-headless-client", "firezone-relay")


@dataclass(frozen=True)
class Release:
    """One set of official programs; `gateway` is None where there is only a client."""

    folder: Path
    gateway: str | None
    client: str

    @classmethod
    def of(cls, folder: Path) -> Release:
        gateway = folder / NAMES[0]
        return cls(folder, version(gateway) if gateway.exists() else None, version(folder / NAMES[1]))

    def program(self, name: str) -> tuple[str, ...]:
        return (str(self.folder / name),)

    @property
    def title(self) -> str:
        return f"client {self.client}" if self.gateway is None else f"gateway {self.gateway}, client {self.client}"


def version(program: Path) -> str:
    result = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"^(?:Error: )?firezone-[a-z-]+ (\d+\.\d+\.\d+)", result.stdout + result.stderr, re.MULTILINE)
    if found is None:  # clients before 1.4 tell their version as an error
        raise LabError(f"{program} --version failed: {result.stderr.strip() or result.returncode}")
    return found[1]


def mixes(release: Release) -> dict[str, Programs]:
    gateway, client, relay = (release.program(name) for name in NAMES)
    if release.gateway is None:
        return {"their client, our gateway": Programs(client=client, old_clients=True)}
    return {
        "our client, their gateway": Programs(gateway=gateway),
        "their client, our gateway": Programs(client=client),
        "their client and gateway": Programs(gateway=gateway, client=client),
        "our client, their peer": Programs(peer=client),
        "their client, our peer": Programs(client=client, peer=Programs().client),
        "their relay": Programs(relay=relay),
        "our client, their gateway and relay": Programs(gateway=gateway, relay=relay),
        "their client and relay, our gateway": Programs(client=client, relay=relay),
        "all theirs but the portal": Programs(gateway=gateway, client=client, relay=relay),
    }


def releases(folder: Path) -> list[Release]:
    folders = [folder, *sorted((p for p in folder.iterdir() if p.is_dir()), reverse=True)]
    found = [[name for name in NAMES if os.access(f / name, os.X_OK)] for f in folders]
    whole = (list(NAMES), [NAMES[1]])
    return [Release.of(f) for f, names in zip(folders, found, strict=True) if names in whole]


def attempt(name: str, programs: Programs) -> tuple[bool, str]:
    started_at = time.monotonic()
    try:
        note = SCENARIOS[name](programs)
    except LabError as error:
        return False, str(error).splitlines()[0]
    except Exception as error:  # a bug of ours; the others still run
        traceback.print_exc()
        return False, f"{type(error).__name__}: {error}"
    return True, note or f"{time.monotonic() - started_at:.0f} s"


def applies(mix: str, name: str, release: Release | None) -> bool:
    """Some mixes have a point in some scenarios only, and old clients know no device pools.

    A peer is the other end of a device pool, and whose relay carries a name makes no difference beyond one scenario.
    Nothing large passes a narrow path between two official programs.
    """
    if name in MTU_SCENARIOS and (mix == "their client and gateway" or "relay" in mix or mix.startswith("all")):
        return False
    if "peer" in mix and name != "device pools":
        return False
    if ("relay" in mix or mix.startswith("all")) and name in NAME_SCENARIOS and name != "names, relayed":
        return False
    if release is None:
        return True
    if release.gateway is None:
        return name not in BEYOND_OLD_CLIENTS
    if name == "device pools" and numbers(release.client) < POOL_CLIENT:
        return "their client" not in mix
    if name == "internet resource" and numbers(release.gateway) < STRICT_GATEWAY:
        return "gateway" not in mix or "our gateway" in mix
    return True


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def run(
    title: str, table: dict[str, Programs], only: str | None, release: Release | None = None
) -> dict[tuple[str, str], tuple[bool, str]]:
    results = {}
    for mix, programs in table.items():
        for name in SCENARIOS:
            if not applies(mix, name, release) or (only is not None and only not in f"{mix}/{name}"):
                continue
            results[mix, name] = passed, note = attempt(name, programs)
            print(f"{'pass' if passed else 'FAIL'}  {title} | {mix} | {name}: {note}", flush=True)
    return results


def matrix(title: str, table: dict[str, Programs], results: dict[tuple[str, str], tuple[bool, str]]) -> str:
    columns = [mix for mix in table if any(m == mix for m, _ in results)]
    lines = [f"## {title}", "", "| Scenario | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    failures = []
    for name in SCENARIOS:
        cells = []
        for mix in columns:
            passed, note = results.get((mix, name), (True, "not run"))
            cells.append("yes" if passed and note != "not run" else "-" if passed else "no")
            if not passed:
                failures.append(f"- {mix}, {name}: {note}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *failures]).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="interop", description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="folder with the official programs, or with one folder per version")
    parser.add_argument("--only", help="run only mixes and scenarios whose 'mix/scenario' contains this text")
    options = parser.parse_args()
    if options.peers is None or not options.peers.is_dir() or not (found := releases(options.peers)):
        print(f"interop: needs PEERS=<folder> with executable {', '.join(NAMES)}", file=sys.stderr)
        return 2
    sections = []
    control = {"our programs": Programs()}
    everything = run("control", control, options.only)
    sections.append(matrix("Control: our programs only", control, everything))
    for release in found:
        table = mixes(release)
        results = run(release.title, table, options.only, release)
        sections.append(matrix(f"Official programs: {release.title}", table, results))
        everything |= {(f"{release.title}: {mix}", name): result for (mix, name), result in results.items()}
    if options.only is None:
        write(sections)
    failed = sum(not passed for passed, _ in everything.values())
    print(f"{len(everything) - failed} passed, {failed} failed")
    return 1 if failed else 0


def write(sections: list[str]) -> None:
    path = ROOT / "docs" / "compatibility.md"
    notes = path.read_text().partition("<!-- notes -->")[2] if path.exists() else ""
    head = (
        "# Compatibility\n\nWhat was tried with which official programs, on our embedded portal, by "
        "`make interop PEERS=<folder>`.\nEach scenario is described in `tests/netns/scenarios.py` or "
        "`tests/netns/name_scenarios.py`; `-` means that it has no point in this mix.\n"
    )
    path.write_text("\n".join([head, *sections]) + (f"\n<!-- notes -->{notes}" if notes else ""))


if __name__ == "__main__":
    sys.exit(main())
