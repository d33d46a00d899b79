"""Uploading flow logs, against a real HTTPS server (spec/binaries.md §10.4)."""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from fz_core.driver.flow_logs import files
from fz_core.driver.flow_logs.upload import FlowUploader
from fz_core.driver.flow_logs.uploading import upload_flow_logs
from fz_core.packet import Address
from fz_core.portal.types import FlowLogs
from fz_core.tunnel.flow_record import FlowRecord, IngestToken, Outer, OuterPath, RecordKind, to_json
from tests.unit.driver.flow_portal import HOST, FlowPortal, make_certificates, open_portal
from tests.unit.tunnel.flow_samples import token_text

pytestmark = pytest.mark.peer("openssl")
NOW = 1_800_000_000.0
OTHER = "9b0c8f0e-1111-4222-8333-944444444444"


def a_token(**claims: Any) -> IngestToken:
    token = IngestToken.parse(token_text(**claims))
    assert token is not None
    return token


def a_record(number: int, kind: RecordKind = RecordKind.END, token: IngestToken | None = None) -> FlowRecord:
    start = int(NOW * 1e6) + number * 1_000_000
    src, dst = Address.parse("100.64.0.1:5000"), Address.parse("10.0.0.1:80")
    outers = (Outer(OuterPath(None, dst), start),)
    return FlowRecord(kind, token or a_token(), "tcp", src, dst, outers, start, None, start, start, 1, 2, number, 4)


def store(root: Path, *records: FlowRecord) -> Path:
    directory = root
    for record in records:
        found = files.directory_of(root, record.token)
        assert found is not None
        directory = found
        files.make_directories(root, directory.parent, directory)
        files.write_atomically(directory / "token", record.token.text.encode())
        files.write_report(directory, record)
    return directory


class Upload:
    """An uploader whose waiting takes no time."""

    def __init__(self, root: Path, portal: FlowPortal, tls: ssl.SSLContext) -> None:
        self.root, self.portal = root, portal
        self.waits: list[float] = []
        self.resolved: list[str] = []
        self.time = 0.0
        self.uploader = FlowUploader(
            root,
            self._resolve,
            marked=False,
            tls=tls,
            port=portal.port,
            sleep=self._sleep,
            now=lambda: self.time,
            unix_now=lambda: NOW + self.time,
        )

    async def once(self, batch: int = 1000, url: str | None = None) -> bool:
        return await self.uploader.upload(FlowLogs(url or self.portal.url() + "/", 60, batch))

    def sent(self) -> list[list[int]]:
        """What each request carried, by number."""
        return [[report["rx_bytes"] for report in request.reports] for request in self.portal.requests]

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.time += seconds
        await trio.lowlevel.checkpoint()

    async def _resolve(self, host: str) -> Sequence[str]:
        self.resolved.append(host)
        return ["127.0.0.1"]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_certificates(tmp_path_factory.mktemp("ca"))


@pytest.fixture
async def upload(tmp_path: Path, certificates: tuple[Path, Path, Path]) -> AsyncIterator[Upload]:
    ca, key, certificate = certificates
    async with open_portal(key, certificate) as portal:
        yield Upload(tmp_path / "flow_logs", portal, ssl.create_default_context(cafile=str(ca)))


def left(directory: Path) -> list[str]:
    return sorted(p.name.split(".", 1)[1] for p in directory.glob("*.json"))


async def test_what_was_taken_is_deleted(upload: Upload) -> None:
    directory = store(upload.root, a_record(2), a_record(1), a_record(3, RecordKind.START))
    assert not await upload.once()
    (request,) = upload.portal.requests
    assert request.path == "/ingestion/flow_logs"
    assert request.host == f"{HOST}:{upload.portal.port}"
    assert request.authorization == f"Bearer {a_token().text}"
    assert request.reports == [to_json(a_record(n, k)) for n, k in ((1, END), (2, END), (3, START))]
    assert left(directory) == []
    assert upload.resolved == [HOST]
    assert not await upload.once()
    assert len(upload.portal.requests) == 1


async def test_an_end_stands_for_its_start(upload: Upload) -> None:
    directory = store(upload.root, a_record(1, START), a_record(1, END))
    await upload.once()
    assert [set(r) >= {"flow_end"} for r in upload.portal.requests[0].reports] == [True]
    assert left(directory) == []


async def test_an_end_that_comes_while_its_start_is_under_way_is_not_lost(upload: Upload) -> None:
    directory = store(upload.root, a_record(1, START))

    def judge(request: object) -> tuple[int, dict[str, str]]:
        store(upload.root, a_record(1, END))
        return 200, {}

    upload.portal.judge = judge
    await upload.once()
    assert left(directory) == ["end.json"]


async def test_one_batch_for_each_authorization_oldest_first(upload: Upload) -> None:
    other = a_token(policy_authorization_id=OTHER, role="responder")
    store(upload.root, *(a_record(n) for n in (5, 3, 1, 4, 2)), a_record(9, token=other))
    assert await upload.once(batch=2)
    assert await upload.once(batch=2)
    assert not await upload.once(batch=2)
    assert upload.sent() == [[1, 2], [9], [3, 4], [5]]
    assert upload.portal.requests[1].authorization == f"Bearer {other.text}"


@pytest.mark.parametrize("limit", [1, 2, 3])
async def test_what_is_too_large_is_halved(upload: Upload, limit: int) -> None:
    directory = store(upload.root, *(a_record(n) for n in range(7)))
    upload.portal.judge = lambda request: (413 if len(request.reports) > limit else 200, {})
    await upload.once()
    taken = [numbers for numbers in upload.sent() if len(numbers) <= limit]
    assert [n for numbers in taken for n in numbers] == list(range(7))
    assert upload.sent()[:2] == [list(range(7)), [0, 1, 2]]
    assert left(directory) == []


async def test_a_single_report_that_is_too_large_is_kept(upload: Upload) -> None:
    directory = store(upload.root, *(a_record(n) for n in range(4)))
    upload.portal.judge = lambda request: (413 if any(r["rx_bytes"] == 2 for r in request.reports) else 200, {})
    await upload.once()
    assert left(directory) == ["end.json"]
    assert upload.waits == []


@pytest.mark.parametrize(
    ("header", "waited"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({}, 1.0),
        ({"Retry-After": "soon"}, 1.0),
        ({"Retry-After": "Fri, 15 Jan 2027 08:00:20 GMT"}, 20.0),
        ({"Retry-After": "99999999"}, 3600.0),
    ],
)
async def test_too_many_requests(upload: Upload, header: dict[str, str], waited: float) -> None:
    directory = store(upload.root, a_record(1))
    upload.portal.answers = [(429, header)]
    await upload.once()
    assert upload.waits == [waited]
    assert left(directory) == []


@pytest.mark.parametrize("status", [408, 500, 503])
async def test_trouble_of_the_portal_is_waited_out(upload: Upload, status: int) -> None:
    directory = store(upload.root, a_record(1))
    upload.portal.answers = [(status, {})] * 3
    await upload.once()
    assert upload.waits == [1, 2, 4]
    assert left(directory) == []


async def test_trouble_for_more_than_five_minutes_is_left_to_the_next_pass(upload: Upload) -> None:
    other = a_token(policy_authorization_id=OTHER)
    directory = store(upload.root, a_record(1))
    store(upload.root, a_record(9, token=other))
    upload.portal.judge = lambda request: (200 if request.reports[0]["rx_bytes"] == 9 else 502, {})
    assert not await upload.once()
    assert upload.waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert left(directory) == ["end.json"]
    assert upload.sent()[-1] == [9]
    upload.portal.judge = lambda request: (200, {})
    await upload.once()
    assert left(directory) == []


async def test_an_unreachable_portal_ends_the_pass(upload: Upload) -> None:
    store(upload.root, a_record(1), a_record(9, token=a_token(policy_authorization_id=OTHER)))

    async def nowhere(host: str) -> Sequence[str]:
        upload.resolved.append(host)
        return []

    uploader = FlowUploader(
        upload.root, nowhere, marked=False, port=upload.portal.port, sleep=upload._sleep, now=lambda: upload.time,
        unix_now=lambda: NOW,
    )  # fmt: skip
    await uploader.upload(FlowLogs(upload.portal.url(), 60, 10))
    assert upload.waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


async def test_a_certificate_of_somebody_else_is_refused(upload: Upload) -> None:
    directory = store(upload.root, a_record(1))
    strangers = FlowUploader(
        upload.root, upload._resolve, marked=False, tls=ssl.create_default_context(), port=upload.portal.port,
        sleep=upload._sleep, now=lambda: upload.time, unix_now=lambda: NOW,
    )  # fmt: skip
    await strangers.upload(FlowLogs(upload.portal.url(), 60, 10))
    assert upload.portal.requests == []
    assert left(directory) == ["end.json"]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_redirects_are_followed(upload: Upload, status: int) -> None:
    directory = store(upload.root, a_record(1))
    upload.portal.answers = [(status, {"Location": f"{upload.portal.url('other.test')}/elsewhere"})]
    await upload.once()
    assert [r.path for r in upload.portal.requests] == ["/ingestion/flow_logs", "/elsewhere"]
    assert upload.resolved == [HOST, "other.test"]
    assert upload.sent() == [[1], [1]]
    assert left(directory) == []


@pytest.mark.parametrize(
    "location",
    ["http://portal.test/x", "https://portal.test:9/x", "https://user@portal.test:{port}/x", "ftp://x", "https://[x"],
)
async def test_redirects_to_where_no_token_may_go_are_not(upload: Upload, location: str) -> None:
    directory = store(upload.root, a_record(1))
    upload.portal.answers = [(307, {"Location": location.format(port=upload.portal.port)})]
    await upload.once()
    assert (len(upload.portal.requests), upload.waits) == (1, [])
    assert left(directory) == ["end.json"]


async def test_five_redirects_are_followed_and_not_six(upload: Upload) -> None:
    directory = store(upload.root, a_record(1))
    again = (307, {"Location": "/again"})
    upload.portal.answers = [again] * 6
    await upload.once()
    assert len(upload.portal.requests) == 6
    assert left(directory) == ["end.json"]
    upload.portal.answers = [again] * 5
    await upload.once()
    assert len(upload.portal.requests) == 12
    assert left(directory) == []


@pytest.mark.parametrize("url", ["http://portal.test", "https://portal.test:1", "https://a:b@portal.test", "x", ""])
async def test_only_https_on_the_one_port(upload: Upload, url: str) -> None:
    directory = store(upload.root, a_record(1))
    await upload.once(url=url or "https://")
    assert (upload.portal.requests, upload.resolved) == ([], [])
    assert left(directory) == ["end.json"]


@pytest.mark.parametrize("status", [303, 400, 401, 404, 422])
async def test_what_is_refused_is_kept_and_newer_reports_go_first(upload: Upload, status: int) -> None:
    directory = store(upload.root, a_record(1), a_record(2))
    upload.portal.answers = [(status, {"Location": "/x"})]
    await upload.once()
    assert upload.waits == []
    assert left(directory) == ["end.json", "end.json"]
    store(upload.root, a_record(3))
    await upload.once()
    await upload.once()
    assert upload.sent() == [[1, 2], [3], [1, 2]]
    assert left(directory) == []


# pruning


async def test_expired_tokens_go_with_their_reports(upload: Upload) -> None:
    expired = store(upload.root, a_record(1, token=a_token(exp=int(NOW))))
    alive = store(upload.root, a_record(2, token=a_token(exp=int(NOW) + 1, policy_authorization_id=OTHER)))
    await upload.once()
    assert not expired.exists()
    assert alive.exists()
    assert upload.sent() == [[2]]


async def test_reports_without_token_go_after_a_minute(upload: Upload) -> None:
    directory = store(upload.root, a_record(1))
    (directory / "token").write_text("not a token")
    os.utime(directory, (NOW - 60, NOW - 60))
    await upload.once()
    assert directory.exists()
    upload.time = 1.0
    await upload.once()
    assert not directory.exists()
    assert upload.portal.requests == []


async def test_corrupt_reports_are_deleted_and_never_sent(upload: Upload) -> None:
    directory = store(upload.root, *(a_record(n) for n in range(5)))
    one, two, three, four, _ = sorted(directory.glob("*.json"))
    one.write_text(one.read_text().replace('"rx_bytes":0', '"rx_bytes":7'))
    two.write_bytes(two.read_bytes()[:-5])
    three.write_bytes(b"\xff")
    four.write_text('{"checksum":1}')
    await upload.once()
    assert upload.sent() == [[4]]
    assert left(directory) == []


async def test_without_permission_to_upload_nothing_is_sent(upload: Upload) -> None:
    store(upload.root, a_record(1, token=a_token(uploads_enabled=False)))
    await upload.once()
    assert upload.portal.requests == []


# the loop


async def test_the_rhythm_of_passes(upload: Upload) -> None:
    """Off: look every 30 s. On: at once, each second while there is more, then at intervals."""

    async def sleep(seconds: float) -> None:
        await upload._sleep(seconds)
        if len(upload.waits) == 2:
            store(upload.root, *(a_record(n) for n in range(5)))
            files.write_settings(upload.root, FlowLogs(upload.portal.url(), 70, 2))
        elif len(upload.waits) == 5:
            store(upload.root, a_record(9))
        elif len(upload.waits) == 9:
            files.write_settings(upload.root, FlowLogs("", 0, 0))
        elif len(upload.waits) == 11:
            nursery.cancel_scope.cancel()

    upload.uploader._sleep = sleep
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upload.uploader.run)
    assert upload.waits == [30, 30, 1, 1, 30, 30, 10, 30, 30, 30, 30]
    assert upload.sent() == [[0, 1], [2, 3], [4], [9]]


async def test_what_lies_in_a_spool_is_sent_once_there_is_one(tmp_path: Path) -> None:
    """Without one, every 30 s is a look."""
    root, asked, waits = tmp_path / "flow_logs", trio.Event(), []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            store(root, a_record(1, token=a_token(exp=9_999_999_999)))  # by the real clock
            files.write_settings(root, FlowLogs(f"https://{HOST}", 60, 2))
        await trio.lowlevel.checkpoint()

    async def resolve(host: str) -> Sequence[str]:
        assert host == HOST
        asked.set()
        return await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(upload_flow_logs, root, resolve, sleep=sleep))
        await asked.wait()
        nursery.cancel_scope.cancel()
    assert waits == [30, 30, 30]


START, END = RecordKind.START, RecordKind.END
