"""The report of `bench_datapath` as Markdown tables, one line per contestant.

    python -m tests.bench.datapath_table REPORT.json FILE.md     # writes between the markers of that file

Nothing is copied by hand. An empty cell was not measured, a dash is a load that failed; the report says why.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- datapath -->", "<!-- end datapath -->"
FAILED = "–"
Column = tuple[str, Callable[[Mapping[str, Any]], str]]


def main() -> int:
    if len(sys.argv) != 3:
        print(f"usage: python -m {__spec__.name} REPORT.json FILE.md", file=sys.stderr)
        return 2
    write_tables(Path(sys.argv[2]), json.loads(Path(sys.argv[1]).read_text()))
    return 0


def write_tables(path: Path, report: Mapping[str, Any]) -> None:
    """Replace what is between the markers."""
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path} has no {BEGIN} and {END} to write between")
    path.write_text(f"{before}{BEGIN}\n{tables(report)}{END}{after}")


def tables(report: Mapping[str, Any]) -> str:
    """All of them, and what the figures depend on."""
    found = (table(title, columns, report) for title, columns in TABLES.items())
    return "\n".join([introduction(report), *(text for text in found if text)])


def introduction(report: Mapping[str, Any]) -> str:
    """One paragraph."""
    machine = report["machine"]
    loads = [c["load_average"][0] for c in report["contestants"].values()] or [0.0]
    lines = [
        f"{machine['date']}: {machine['cores']} cores, Linux {machine['kernel']}, Python {machine['python']}, "
        f"iperf3 {machine['iperf3']}, socket buffers up to {machine['rmem_max'] >> 10} KiB in and "
        f"{machine['wmem_max'] >> 10} KiB out; {report['seconds']:g} s per figure. "
        f"Load average when a contestant began: {min(loads):.1f} to {max(loads):.1f}.",
        "Both tunnel ends, two NAT routers, the relay and iperf3, which makes and takes the traffic, share the cores.",
        *(f"Left out: {name} ({reason})." for name, reason in report.get("left_out", {}).items()),
        *(f"{name} failed: {c['error']}." for name, c in report["contestants"].items() if "error" in c),
    ]
    return "\n".join(lines) + "\n"


def table(title: str, columns: list[Column], report: Mapping[str, Any]) -> str:
    """Without the rows and columns nobody has anything in."""
    rows = {name: [show(c) for _, show in columns] for name, c in report["contestants"].items()}
    kept = [n for n in range(len(columns)) if any(row[n] for row in rows.values())]
    if not kept:
        return ""
    lines = ["|".join(["", *(f" {cell} " for cell in ("", *(columns[n][0] for n in kept))), ""])]
    lines.append("|---" * (len(kept) + 1) + "|")
    for name, row in rows.items():
        if any(row):
            lines.append("|".join(["", *(f" {cell} " for cell in (name, *(row[n] for n in kept))), ""]))
    return f"{title}\n\n" + "\n".join(lines) + "\n"


def value(path: str, spell: Callable[[Any], str] = str) -> Callable[[Mapping[str, Any]], str]:
    """A cell: what stands at this place of a contestant's results."""

    def show(contestant: Mapping[str, Any]) -> str:
        here: Any = contestant
        for key in path.split("/"):
            if not isinstance(here, Mapping) or key not in here:
                return FAILED if isinstance(here, Mapping) and "error" in here and here is not contestant else ""
            here = here[key]
        return spell(here)

    return show


def joined(*cells: Callable[[Mapping[str, Any]], str], by: str = " / ") -> Callable[[Mapping[str, Any]], str]:
    """Several in one cell; those that are empty are left out."""
    return lambda contestant: by.join(text for cell in cells if (text := cell(contestant)))


def both(path: str, spell: Callable[[Any], str] = str) -> Callable[[Mapping[str, Any]], str]:
    """Up and down; `{way}` stands for them."""
    return joined(*(value(path.format(way=way), spell) for way in ("up", "down")))


def whole(number: float) -> str:
    """Rounded, with thousands apart."""
    return f"{number:,.0f}"


def mib(kib: int) -> str:
    return f"{kib / 1024:.0f}"


def percent(number: float) -> str:
    return f"{number:.2g} %" if number else "0"


def datagrams(way: str, size: int) -> Callable[[Mapping[str, Any]], str]:
    """How many came, and what was lost when half of that was offered."""
    place = f"udp/{way}/{size}"
    lost = value(f"{place}/half/lost_percent", percent)
    return joined(value(f"{place}/received_per_s", whole), lost, by=", ")


def gigabit(way: str) -> Callable[[Mapping[str, Any]], str]:
    return value(f"udp/{way}/1200 at 1 Gbit/mbit_s", whole)


def kept_by(who: str) -> Callable[[Mapping[str, Any]], str]:
    """Memory at the three times."""
    return joined(*(value(f"memory/{when}/{who}", mib) for when in ("idle", "bulk", "after_flows")), by=" → ")


def latency(when: str) -> Callable[[Mapping[str, Any]], str]:
    return joined(value(f"ping/{when}/p50"), value(f"ping/{when}/p99"))


CPU = "tcp/IPv4/1/{way}/cpu_s_per_gb/"
TABLES: dict[str, list[Column]] = {
    "TCP, Mbit/s, up / down; *far* is a round trip of 20 ms with 0.1 % lost each way, one stream:": [
        *(
            (f"IPv{family}, {streams}", both(f"tcp/IPv{family}/{streams}/{{way}}/mbit_s", whole))
            for family in (4, 6)
            for streams in (1, 8)
        ),
        ("far, 1", both("far/{way}/mbit_s", whole)),
        ("path", value("tcp/IPv4/1/up/path")),
    ],
    "Processor seconds per GB of each program, and retransmits, one TCP stream over IPv4, up / down:": [
        ("client", both(CPU + "client")),
        ("gateway", both(CPU + "gateway")),
        ("relay", both(CPU + "relay")),
        ("retransmits", both("tcp/IPv4/1/{way}/retransmits")),
    ],
    "UDP: the most datagrams per second that came, whatever was offered, and loss at half of that rate; "
    "Mbit/s that came of 1 Gbit/s offered in datagrams of 1200 bytes:": [
        *((f"{size} B {way}", datagrams(way, size)) for way in ("up", "down") for size in (64, 512, 1200)),
        ("1 Gbit/s up", gigabit("up")),
        ("1 Gbit/s down", gigabit("down")),
    ],
    "Ping in ms, p50 / p99, at rest and beside one TCP stream; memory in MiB at rest → after bulk → "
    "after 10,000 UDP flows; new UDP flows answered per second:": [
        ("at rest", latency("idle")),
        ("beside up", latency("up")),
        ("beside down", latency("down")),
        ("client MiB", kept_by("client")),
        ("gateway MiB", kept_by("gateway")),
        ("relay MiB", kept_by("relay")),
        (
            "bytes per flow, client / gateway",
            joined(*(value(f"memory/bytes_per_flow/{w}") for w in ("client", "gateway"))),
        ),
        ("flows/s", value("memory/flows/per_s", whole)),
    ],
}

if __name__ == "__main__":
    sys.exit(main())
