"""Flow records on their way to the disk: a bounded queue and one thread (`spec/binaries.md` §10.3).

    spool = FlowSpool(Path("/var/lib/firezone/flow_logs"))
    spool.configure(init.flow_logs)
    spool.put(record)                   # never blocks
    spool.close()

Not here: the layout on the disk (`files`), and sending (`upload`).
"""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import structlog

from fz_core.driver.flow_logs import files
from fz_core.linux.whole_file import sync_folder
from fz_core.portal.types import FlowLogs
from fz_core.tunnel.flow_record import FlowRecord

QUEUE = 10_000
BATCH = 256
DRAIN_TIME = 5.0
WARN_EVERY = 1000
MAX_KNOWN_TOKENS = 4096
log = structlog.get_logger("flow_spool")


class FlowSpool:
    """Keeps records that the portal wants, on the disk until they are sent. The thread starts when needed."""

    def __init__(self, root: Path, *, queue_size: int = QUEUE) -> None:
        self._root = root
        self._queue: queue.Queue[FlowRecord | None] = queue.Queue(queue_size)
        self._thread: threading.Thread | None = None
        self._settings: FlowLogs | None = None
        self._is_closing = False
        self._known_tokens: dict[Path, str] = {}
        self.overflows = 0
        self.failures = 0

    def put(self, record: FlowRecord) -> None:
        """Store a record, if the portal wants this authorization's records at all."""
        if not record.token.uploads_enabled or self._is_closing:
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.overflows += 1
            if self.overflows % WARN_EVERY == 1:
                log.warning("Flow-log queue is full, records are lost", lost=self.overflows)
            return
        self._start()

    def configure(self, settings: FlowLogs) -> None:
        """What the portal says about uploads; written in turn by the thread."""
        self._settings = settings
        self._wake()
        self._start()

    def close(self, timeout: float = DRAIN_TIME) -> bool:
        """Take nothing more and write out what is queued, for a limited time. Whether all was written."""
        self._is_closing = True
        if self._thread is None:
            return True
        self._wake()
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.warning("Flow logs were not written in time", left=self._queue.qsize())
        return not self._thread.is_alive()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="flow-spool", daemon=True)
            self._thread.start()

    def _wake(self) -> None:
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            pass  # then the thread is awake

    # in the thread

    def _run(self) -> None:
        while not (self._is_closing and self._queue.empty() and self._settings is None):
            batch = [self._queue.get()]
            while len(batch) < BATCH and not self._queue.empty():
                batch.append(self._queue.get())
            settings, self._settings = self._settings, None
            if settings is not None:
                self._write_settings(settings)
            self._write([record for record in batch if record is not None])

    def _write_settings(self, settings: FlowLogs) -> None:
        try:
            files.write_settings(self._root, settings)
        except OSError as error:
            self._fail(str(error))

    def _write(self, records: list[FlowRecord]) -> None:
        touched: set[Path] = set()
        for record in records:
            directory = files.directory_of(self._root, record.token)
            if directory is None:
                self._fail("the token's policy authorization id is not a UUID")
                continue
            try:
                self._store(directory, record)
                touched.add(directory)
            except (OSError, ValueError) as error:
                self._fail(str(error))
        for directory in touched:
            try:
                sync_folder(directory)
            except OSError as error:
                self._fail(str(error))

    def _store(self, directory: Path, record: FlowRecord) -> None:
        for _ in range(2):  # the directory may be pruned in between
            files.make_directories(self._root, directory.parent, directory)
            try:
                self._store_token(directory, record.token.text)
                files.write_report(directory, record)
                return
            except FileNotFoundError as error:
                gone = error
        raise gone

    def _store_token(self, directory: Path, text: str) -> None:
        path = directory / "token"
        if self._known_tokens.get(directory) == text and path.exists():
            return
        files.write_atomically(path, text.encode())
        if len(self._known_tokens) >= MAX_KNOWN_TOKENS:
            self._known_tokens.clear()
        self._known_tokens[directory] = text

    def _fail(self, reason: str) -> None:
        self.failures += 1
        if self.failures % WARN_EVERY == 1:
            log.warning("Flow logs cannot be stored", reason=reason, failures=self.failures)
