"""Log lines: spec/binaries.md §8."""

from __future__ import annotations

import json
import logging
import re

import pytest
import structlog

from fz_core.driver import logs

pytestmark = pytest.mark.usefixtures("restored_logs")


def test_human_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info")
    structlog.get_logger("tunnel").info("Tunnel ready", peer="a", why="two words", empty="", number=5)
    logging.getLogger("firezone_relay").warning("plain %d", 7)
    first, second = capsys.readouterr().out.splitlines()
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(stamp + r'  INFO tunnel: Tunnel ready peer=a why="two words" empty="" number=5', first)
    assert re.fullmatch(stamp + r"  WARN firezone_relay: plain 7", second)


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", as_json=True)
    structlog.get_logger("tunnel").error("gone", peer="a")
    line = json.loads(capsys.readouterr().out)
    assert line.pop("timestamp").endswith("Z")
    assert line == {"level": "ERROR", "message": "gone", "target": "tunnel", "peer": "a"}


@pytest.mark.parametrize(
    ("directives", "shown"),
    [
        ("info", ["tunnel info", "other info"]),
        ("debug", ["tunnel debug", "tunnel info", "other debug", "other info"]),
        ("warn,tunnel=debug", ["tunnel debug", "tunnel info"]),
        ("tunnel=off,INFO", ["other info"]),
        ("wire::api=trace,info", ["tunnel info", "other info"]),
        ("", []),
        ("off", []),
    ],
)
def test_directives(directives: str, shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(directives)
    for name in ("tunnel", "other"):
        logging.getLogger(name).debug("%s debug", name)
        logging.getLogger(name).info("%s info", name)
    assert [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()] == shown


def test_a_bad_directive_is_an_error_with_a_remedy() -> None:
    with pytest.raises(logs.LogFilterError, match="use off, error, warn, info, debug or trace"):
        logs.parse_directives("tunnel=loud")
