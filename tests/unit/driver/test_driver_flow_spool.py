"""The flow-log spool on the disk (spec/binaries.md §10.3)."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog.testing

from fz_core.driver.flow_logs import files
from fz_core.driver.flow_logs.spool import FlowSpool
from fz_core.packet import Address
from fz_core.portal.types import FlowLogs
from fz_core.tunnel.flow_record import FlowRecord, IngestToken, Outer, OuterPath, RecordKind, to_json
from tests.unit.tunnel.flow_samples import AUTHORIZATION, assert_conforms, token_text

START, END = RecordKind.START, RecordKind.END


def a_record(number: int = 0, kind: RecordKind = END, **claims: Any) -> FlowRecord:
    token = IngestToken.parse(token_text(**claims))
    assert token is not None
    start = 1_800_000_000_000_000 + number
    src, dst = Address.parse("100.64.0.1:5000"), Address.parse("[2001:db8::1]:80")
    outers = (Outer(OuterPath(src, dst), start),)
    return FlowRecord(kind, token, "udp", src, dst, outers, start, "bücher.example", start, start, 1, 2, 3, 4)


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("open_umask")
def test_layout_modes_and_checksum(tmp_path: Path) -> None:
    root = tmp_path / "firezone" / "flow_logs"
    spool = FlowSpool(root)
    spool.configure(FlowLogs("https://api.example", 60, 0))
    spool.put(a_record(kind=START))
    spool.put(a_record(kind=END))
    assert spool.close()
    directory = root / "initiator" / AUTHORIZATION
    names = sorted(p.name for p in directory.iterdir())
    stem = names[0].split(".")[0]
    assert names == [f"{stem}.end.json", f"{stem}.start.json", "token"]
    seconds, identity = stem.split("-")
    assert seconds == "1800000000"
    assert len(identity) == 16
    assert all(c in "0123456789abcdef" for c in identity)
    assert (directory / "token").read_text() == a_record().token.text
    for kind in (START, END):
        content = json.loads((directory / f"{stem}.{kind.value}.json").read_text())
        canonical = json.dumps(content["payload"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert content == {"checksum": zlib.crc32(canonical.encode()), "payload": to_json(a_record(kind=kind))}
        assert_conforms(content["payload"], kind.value)
    assert json.loads((root / "upload.json").read_text()) == {
        "api_url": "https://api.example",
        "interval": 60,
        "batch_size": 0,
    }
    for path in (root, *root.rglob("*")):
        assert mode(path) == (0o700 if path.is_dir() else 0o600), path


def test_directories_that_were_open_are_closed(tmp_path: Path) -> None:
    directory = tmp_path / "flow_logs" / "initiator" / AUTHORIZATION
    directory.mkdir(parents=True)
    for path in (directory, directory.parent, directory.parent.parent):
        path.chmod(0o755)
    before = mode(tmp_path)
    write(tmp_path / "flow_logs", a_record())
    assert [mode(p) for p in (directory, directory.parent, directory.parent.parent)] == [0o700] * 3
    assert mode(tmp_path) == before


def test_only_what_the_portal_wants_is_stored(tmp_path: Path) -> None:
    write(tmp_path / "x", a_record(uploads_enabled=False))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("authorization", ["../../etc", "7b0c8f0e11114222833394444444444a", "", f"{AUTHORIZATION}/x"])
def test_only_a_uuid_becomes_a_path(tmp_path: Path, authorization: str) -> None:
    spool = write(tmp_path / "x", a_record(policy_authorization_id=authorization))
    assert spool.failures == 1
    assert not (tmp_path / "x").exists()


def test_roles_are_kept_apart(tmp_path: Path) -> None:
    write(tmp_path, a_record(), a_record(role="responder"))
    assert [d.relative_to(tmp_path).parts[0] for d in files.directories(tmp_path)] == ["initiator", "responder"]


def test_a_new_token_replaces_the_old_one(tmp_path: Path) -> None:
    write(tmp_path, a_record(1), a_record(2, exp=1_950_000_000))
    (directory,) = files.directories(tmp_path)
    token = files.read_token(directory)
    assert token is not None
    assert token.expires_at == 1_950_000_000
    assert len(list(directory.glob("*.json"))) == 2


def test_an_interval_of_zero_turns_uploads_off(tmp_path: Path) -> None:
    spool = FlowSpool(tmp_path / "x")
    for interval in (0, 60, 0):
        spool.configure(FlowLogs("https://api.example", interval, 7))
    spool.close()
    assert files.read_settings(tmp_path / "x") is None
    spool = FlowSpool(tmp_path / "x")
    spool.configure(FlowLogs("https://api.example", 60, 70_000))
    spool.close()
    assert files.read_settings(tmp_path / "x") == FlowLogs("https://api.example", 60, 10_000)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"api_url":1,"interval":1,"batch_size":1}', b"[]"])
def test_settings_that_cannot_be_read_mean_off(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "upload.json").write_bytes(content)
    assert files.read_settings(tmp_path) is None


def test_a_full_queue_loses_records_with_a_warning_per_thousand(tmp_path: Path) -> None:
    spool = FlowSpool(tmp_path / "x", queue_size=2)
    spool._start = lambda: None  # type: ignore[method-assign]  # a thread that gets no time
    with structlog.testing.capture_logs() as lines:
        for number in range(2003):
            spool.put(a_record(number))
    assert spool.overflows == 2001
    assert [line["lost"] for line in lines] == [1, 1001, 2001]


def test_a_disk_that_refuses_is_a_warning_and_the_thread_goes_on(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no directory")
    with structlog.testing.capture_logs() as lines:
        spool = write(tmp_path / "x", a_record(1), a_record(2))
    assert spool.failures == 2
    assert [(line["log_level"], line["event"]) for line in lines] == [("warning", "Flow logs cannot be stored")]
    assert a_record().token.text not in repr(lines)


def test_a_directory_that_was_pruned_is_made_again(tmp_path: Path) -> None:
    spool = FlowSpool(tmp_path)
    spool._write([a_record(1)])
    (directory,) = files.directories(tmp_path)
    files.prune(tmp_path, 2_000_000_000)
    assert not directory.exists()
    spool._write([a_record(2)])
    assert files.read_token(directory) is not None


def test_nothing_is_stored_after_the_end(tmp_path: Path) -> None:
    spool = FlowSpool(tmp_path / "x")
    assert spool.close()
    spool.put(a_record())
    assert spool.close()
    assert not (tmp_path / "x").exists()


def test_a_crash_leaves_whole_reports_only(tmp_path: Path) -> None:
    """Killed in the middle of writing: what has its name is whole, and what was announced is there."""
    root = tmp_path / "flow_logs"
    writer = subprocess.Popen(
        [sys.executable, "-c", CRASHING, str(root)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[3],
        text=True,
    )
    try:
        assert writer.stdout is not None
        announced = [writer.stdout.readline().strip() for _ in range(40)]
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    (directory,) = files.directories(root)
    assert files.read_token(directory) is not None
    (directory / ".1800000000-0000000000000000.end.json.1").write_text("half a rep")
    reports, _ = files.take_reports(directory, 10_000)
    assert {r.path.name for r in reports} == {p.name for p in directory.glob("[!.]*.json")}
    assert set(announced) <= {r.stem for r in reports}
    for report in reports:
        assert_conforms(report.payload, "end")
    files.prune(root, directory.stat().st_mtime + 61)
    assert not list(directory.glob(".*"))
    assert len(list(directory.glob("*.json"))) == len(reports)


CRASHING = """
import itertools, sys
from pathlib import Path
from typing import Any
from fz_core.driver.flow_logs import files
from fz_core.driver.flow_logs.spool import FlowSpool
from tests.unit.driver.test_driver_flow_spool import a_record
spool = FlowSpool(Path(sys.argv[1]))
for number in itertools.count():
    spool._write([a_record(number)])
    print(files.stem_of(a_record(number)), flush=True)
"""


def write(root: Path, *records: FlowRecord) -> FlowSpool:
    spool = FlowSpool(root)
    for record in records:
        spool.put(record)
    assert spool.close()
    return spool
