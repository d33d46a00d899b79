"""Where unsent flow reports lie: names, modes, checksums (`spec/binaries.md` §10.3).

    <root>/upload.json                                       where and how often to send
    <root>/<role>/<policy authorization id>/token            on whose behalf
    <root>/<role>/<policy authorization id>/<start, 10-digit seconds>-<16 hex>.start.json, .end.json

Directories are 0700 and files 0600, for the token is a bearer credential. Files appear whole or not at all.
All functions block; call them from a thread. OSError where the file system does not play along.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fz_core.linux.whole_file import sync_folder, write_whole
from fz_core.portal.types import FlowLogs
from fz_core.tunnel.flow_record import FlowRecord, IngestToken, to_json

ROLES = ("initiator", "responder")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
REPORT = re.compile(r"(\d{10,}-[0-9a-f]{16})\.(start|end)\.json")
DEFAULT_BATCH, MAX_BATCH = 1000, 10_000
ABANDONED_AFTER = 60.0


@dataclass(frozen=True, slots=True)
class Report:
    """One report to send; `superseded` is the start of a flow whose end this is."""

    stem: str
    path: Path
    superseded: Path | None
    payload: dict[str, Any] = field(repr=False)

    def delete(self) -> None:
        """It was sent. A start deletes no end: that may have been written since."""
        self.path.unlink(missing_ok=True)
        if self.superseded is not None:
            self.superseded.unlink(missing_ok=True)


# writing


def directory_of(root: Path, token: IngestToken) -> Path | None:
    """Where reports under a token belong; None if its claims are no safe names."""
    authorization = token.claims["policy_authorization_id"]
    if token.role not in ROLES or UUID.fullmatch(authorization) is None:
        return None
    return root / token.role / authorization.lower()


def write_report(directory: Path, record: FlowRecord) -> None:
    """Store a record; the same flow has the same stem at start and end. The caller syncs the directory."""
    payload = to_json(record)
    content = {"checksum": checksum(payload), "payload": payload}
    path = directory / f"{stem_of(record)}.{record.kind.value}.json"
    write_atomically(path, json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode())


def stem_of(record: FlowRecord) -> str:
    """A flow's name: sorts by start, and is the same in both of its reports."""
    identity = (record.flow_start, record.protocol, *record.inner_src, *record.inner_dst)
    tail = hashlib.blake2b(repr(identity).encode(), digest_size=8).hexdigest()
    return f"{record.flow_start // 1_000_000:010d}-{tail}"


def checksum(payload: dict[str, Any]) -> int:
    """CRC-32 of the payload as compact JSON with sorted keys."""
    return zlib.crc32(json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def make_directories(root: Path, *below: Path) -> None:
    """Make the root, then directories below it, outermost first; private even if they were there already."""
    root.parent.mkdir(parents=True, exist_ok=True)
    for path in (root, *below):
        try:
            path.mkdir(mode=0o700)
            sync_folder(path.parent)
        except FileExistsError:
            if path.stat().st_mode & 0o077:
                path.chmod(0o700)


def write_atomically(path: Path, content: bytes) -> None:
    """Write all or nothing, and on the disk; only the name is for the caller to sync."""
    write_whole(path, content, unfinished=path.with_name(f".{path.name}.{os.getpid()}"), mode=0o600)


def write_settings(root: Path, settings: FlowLogs) -> None:
    """Say where reports go, or that they go nowhere."""
    path = root / "upload.json"
    if settings.upload_interval_secs == 0:
        path.unlink(missing_ok=True)
        return
    make_directories(root)
    content = {
        "api_url": settings.api_url,
        "interval": settings.upload_interval_secs,
        "batch_size": settings.upload_batch_size,
    }
    write_atomically(path, json.dumps(content).encode())
    sync_folder(root)


# reading


def read_settings(root: Path) -> FlowLogs | None:
    """Where reports go, with a usable batch size; None if nowhere."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads((root / "upload.json").read_bytes())
        url, interval, batch = content["api_url"], int(content["interval"]), int(content["batch_size"])
        if isinstance(url, str) and interval > 0 and batch >= 0:
            return FlowLogs(url, interval, min(batch or DEFAULT_BATCH, MAX_BATCH))
    return None


def read_token(directory: Path) -> IngestToken | None:
    """On whose behalf the reports of a directory are; None if unknown."""
    with suppress(OSError, ValueError):
        return IngestToken.parse((directory / "token").read_text("ascii"))
    return None


def directories(root: Path) -> Iterator[Path]:
    """All directories of reports."""
    for role in ROLES:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(root / role) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if UUID.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    yield root / role / entry.name


def prune(root: Path, unix_now: float) -> None:
    """Delete what can no longer be sent: its token has expired, or is missing for longer than writing one takes."""
    for directory in directories(root):
        with suppress(OSError):
            token = read_token(directory)
            if token is None:
                is_over = directory.stat().st_mtime < unix_now - ABANDONED_AFTER
            else:
                is_over = token.expires_at <= unix_now
            if is_over:
                shutil.rmtree(directory)
            else:
                _delete_unfinished(directory, unix_now)


def take_reports(directory: Path, limit: int, kept: Collection[str] = ()) -> tuple[list[Report], bool]:
    """The oldest reports, at most `limit`, and whether there are more. Corrupt ones are deleted.

    Those whose stem is in `kept` were refused before, and come only when there are no others.
    """
    kinds: dict[str, set[str]] = {}
    with suppress(FileNotFoundError):
        for name in os.listdir(directory):
            if match := REPORT.fullmatch(name):
                kinds.setdefault(match[1], set()).add(match[2])
    fresh = sorted(stem for stem in kinds if stem not in kept)
    wanted = (fresh or sorted(kinds))[:limit]
    found = (read_report(directory, stem, kinds[stem]) for stem in wanted)
    return [report for report in found if report is not None], len(fresh) > limit


def read_report(directory: Path, stem: str, kinds: Collection[str]) -> Report | None:
    """The last word about a flow; None if it is gone or, then deleted, corrupt."""
    for kind in ("end", "start"):
        path = directory / f"{stem}.{kind}.json"
        if kind not in kinds:
            continue
        try:
            content = json.loads(path.read_bytes())
            payload = content["payload"]
            if isinstance(payload, dict) and content["checksum"] == checksum(payload):
                superseded = directory / f"{stem}.start.json" if kind == "end" and "start" in kinds else None
                return Report(stem, path, superseded, payload)
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        path.unlink(missing_ok=True)
    return None


def _delete_unfinished(directory: Path, unix_now: float) -> None:
    """What a crash left behind."""
    for path in directory.glob(".*"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < unix_now - ABANDONED_AFTER:
                path.unlink()
