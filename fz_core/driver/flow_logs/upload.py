"""Sends what the flow-log spool holds to the portal (`spec/binaries.md` §10.4).

    uploader = FlowUploader(root, resolve=names.resolve_portal)
    nursery.start_soon(uploader.run)

A pass sends one batch for each authorization, oldest reports first. Sending twice is safe: the portal
recognizes reports by what they say. Not here: the layout on the disk (`files`).
"""

from __future__ import annotations

import json
import math
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from enum import Enum, auto
from functools import partial
from pathlib import Path

import structlog
import trio

from fz_core.driver.flow_logs import files
from fz_core.driver.flow_logs.files import Report
from fz_core.driver.flow_logs.https import HTTPS_PORT, BadUrl, HttpsClient, Reply, Resolve
from fz_core.portal.types import FlowLogs
from fz_core.tunnel.flow_record import IngestToken

BACKLOG_INTERVAL, OFF_INTERVAL = 1.0, 30.0
FIRST_BACKOFF, MAX_BACKOFF = 1.0, 60.0
BATCH_BUDGET = 300.0
DEFAULT_RETRY_AFTER, MAX_RETRY_AFTER = 1.0, 3600.0
log = structlog.get_logger("flow_upload")


class Outcome(Enum):
    """What became of a batch."""

    SENT = auto()
    KEPT = auto()  # refused: it would be again
    TOO_LARGE = auto()
    GAVE_UP = auto()  # the portal has troubles of its own
    UNREACHABLE = auto()


class FlowUploader:
    """Uploads while `run` runs. Without `marked` its sockets are ordinary ones; `port` is for tests.

    `resolve` gives the addresses of a host past the tunnel. Certificates are checked against the system's
    roots unless `tls` is given.
    """

    def __init__(
        self,
        root: Path,
        resolve: Resolve,
        *,
        marked: bool = True,
        tls: ssl.SSLContext | None = None,
        port: int = HTTPS_PORT,
        sleep: Callable[[float], Awaitable[None]] = trio.sleep,
        now: Callable[[], float] = trio.current_time,
        unix_now: Callable[[], float] = time.time,
    ) -> None:
        self._root = root
        self._open = partial(HttpsClient, resolve, marked=marked, tls=tls, port=port)
        self._sleep, self._now, self._unix_now = sleep, now, unix_now
        self._kept: dict[Path, set[str]] = {}
        self._settings: FlowLogs | None = None
        self._next_at = -math.inf

    async def run(self) -> None:
        """Upload for ever, as the portal's settings say."""
        while True:
            try:
                await self._sleep(await self._turn())
            except OSError as error:
                log.warning("The flow-log spool cannot be read", error=str(error))
                await self._sleep(OFF_INTERVAL)

    async def _turn(self) -> float:
        """One pass, if uploads are on; seconds until the next turn."""
        settings = await trio.to_thread.run_sync(files.read_settings, self._root)
        if settings != self._settings:
            self._settings, self._next_at = settings, -math.inf
        if settings is None:
            await trio.to_thread.run_sync(files.prune, self._root, self._unix_now())
            return OFF_INTERVAL
        if self._now() >= self._next_at:
            started_at = self._now()
            if await self.upload(settings):
                return BACKLOG_INTERVAL
            self._next_at = started_at + settings.upload_interval_secs
        return max(BACKLOG_INTERVAL, min(self._next_at - self._now(), OFF_INTERVAL))

    async def upload(self, settings: FlowLogs) -> bool:
        """One pass; whether there is a backlog."""
        directories = await trio.to_thread.run_sync(self._survey)
        has_backlog = False
        async with self._open() as client:
            for directory in directories:
                outcome, has_more = await self._upload_directory(client, settings, directory)
                has_backlog |= has_more and outcome in (Outcome.SENT, Outcome.KEPT)
                if outcome is Outcome.UNREACHABLE:
                    break  # for the others it would be the same
        return has_backlog

    def _survey(self) -> list[Path]:
        files.prune(self._root, self._unix_now())
        directories = list(files.directories(self._root))
        self._kept = {d: self._kept[d] for d in directories if d in self._kept}
        return directories

    async def _upload_directory(self, client: HttpsClient, settings: FlowLogs, directory: Path) -> tuple[Outcome, bool]:
        token = await trio.to_thread.run_sync(files.read_token, directory)
        if token is None or not token.uploads_enabled:
            return Outcome.SENT, False
        take = partial(files.take_reports, directory, settings.upload_batch_size, self._kept.get(directory, ()))
        reports, has_more = await trio.to_thread.run_sync(take)
        if not reports:
            return Outcome.SENT, has_more
        return await self._upload_reports(client, settings, token, reports), has_more

    async def _upload_reports(
        self, client: HttpsClient, settings: FlowLogs, token: IngestToken, reports: Sequence[Report]
    ) -> Outcome:
        """Send reports of one authorization, in halves if they are too large together."""
        outcome = await self._deliver(client, settings, token, reports)
        if outcome is Outcome.TOO_LARGE and len(reports) > 1:
            middle = len(reports) // 2
            for half in (reports[:middle], reports[middle:]):
                outcome = await self._upload_reports(client, settings, token, half)
                if outcome in (Outcome.GAVE_UP, Outcome.UNREACHABLE):
                    break
            return outcome
        if outcome is Outcome.SENT:
            await trio.to_thread.run_sync(_delete, reports)
        elif outcome in (Outcome.KEPT, Outcome.TOO_LARGE):
            self._kept.setdefault(reports[0].path.parent, set()).update(r.stem for r in reports)
            return Outcome.KEPT
        return outcome

    async def _deliver(
        self, client: HttpsClient, settings: FlowLogs, token: IngestToken, reports: Sequence[Report]
    ) -> Outcome:
        """Send one body until there is an answer to act on, or the time for it is up."""
        body = json.dumps({"flow_logs": [r.payload for r in reports]}, separators=(",", ":")).encode()
        url = settings.api_url.rstrip("/") + "/ingestion/flow_logs"
        give_up_at, backoff = self._now() + BATCH_BUDGET, FIRST_BACKOFF
        while True:
            try:
                reply = await client.post(url, token.text, body)
                outcome, trouble = _judge(reply), f"status {reply.status}"
            except BadUrl as error:
                reply, outcome, trouble = None, Outcome.KEPT, str(error)
            except (OSError, trio.TooSlowError) as error:
                reply, outcome, trouble = None, Outcome.UNREACHABLE, _one_line(error)
            if outcome is not Outcome.SENT:
                log.debug("Flow logs were not taken", reports=len(reports), reason=trouble)
            if reply is not None and reply.status == 429:
                await self._sleep(self._retry_after(reply))
                continue
            if outcome not in (Outcome.GAVE_UP, Outcome.UNREACHABLE):
                return outcome
            if self._now() + backoff > give_up_at:
                log.warning("Flow logs cannot be uploaded for now", reports=len(reports), reason=trouble)
                return outcome
            await self._sleep(backoff)
            backoff = min(backoff * 2, MAX_BACKOFF)

    def _retry_after(self, reply: Reply) -> float:
        """Seconds, from either form of the header."""
        text = reply.retry_after
        try:
            seconds = float(text) if text.isdigit() else _seconds_until(text, self._unix_now())
        except (ValueError, TypeError, OverflowError):
            return DEFAULT_RETRY_AFTER
        return min(max(seconds, DEFAULT_RETRY_AFTER), MAX_RETRY_AFTER)


def _judge(reply: Reply) -> Outcome:
    if 200 <= reply.status < 300:
        return Outcome.SENT
    if reply.status == 413:
        return Outcome.TOO_LARGE
    return Outcome.GAVE_UP if reply.status in (408, 429) or reply.status >= 500 else Outcome.KEPT


def _seconds_until(date: str, unix_now: float) -> float:
    from email.utils import parsedate_to_datetime  # takes long to import, and is rarely needed

    at = parsedate_to_datetime(date)
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - datetime.fromtimestamp(unix_now, UTC).timestamp()


def _delete(reports: Sequence[Report]) -> None:
    for report in reports:
        try:
            report.delete()
        except OSError as error:
            log.warning("A sent flow log cannot be deleted", error=error.strerror)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
