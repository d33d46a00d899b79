"""Command-line conventions: spec/binaries.md §1.1."""

from __future__ import annotations

import pytest

from fz_core.driver.options import OptionParser, boolean, duration, socket_address, url


def parser(environ: dict[str, str]) -> OptionParser:
    p = OptionParser(prog="program", environ=environ)
    p.add_option("--wait", env="WAIT", type=duration, default=30.0, help="how long")
    p.add_option("--loud", env="LOUD", action="store_true", default=False, help="more lines")
    p.add_option("--kind", env="KIND", choices=("one", "two"), default="one", help="which")
    p.add_option("token", nargs="?", env="TOKEN", help="secret")
    return p


def test_command_line_beats_environment_beats_default() -> None:
    assert parser({}).parse_args([]).wait == 30.0
    assert parser({"WAIT": "5m"}).parse_args([]).wait == 300.0
    assert parser({"WAIT": "5m"}).parse_args(["--wait", "1h"]).wait == 3600.0
    assert parser({"TOKEN": "a"}).parse_args([]).token == "a"
    assert parser({"TOKEN": "a"}).parse_args(["b"]).token == "b"


@pytest.mark.parametrize(
    ("environ", "arguments"),
    [
        ({}, ["--nonsense"]),
        ({}, ["--wai", "5s"]),
        ({}, ["--wait", "5"]),
        ({}, ["--wait", ""]),
        ({"WAIT": ""}, []),
        ({"WAIT": "5 parsecs"}, []),
        ({"LOUD": "1"}, []),
        ({"LOUD": "True"}, []),
        ({"LOUD": ""}, []),
        ({"KIND": "One"}, []),
        ({}, ["--kind", "three"]),
        ({}, ["--loud=true"]),
    ],
)
def test_usage_errors_exit_with_2_and_one_line(
    environ: dict[str, str], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parser(environ).parse_args(arguments)
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1


def test_help_names_variables_and_never_their_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parser({"TOKEN": "very-secret", "WAIT": "7m"}).parse_args(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "TOKEN" in text
    assert "WAIT" in text
    assert "very-secret" not in text
    assert "420" not in text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("5m", 300), ("1h 30m", 5400), ("30d", 2_592_000), ("1h30m", 5400), ("250ms", 0.25)],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


def test_booleans_are_true_and_false_only() -> None:
    assert boolean("true") is True
    assert boolean("false") is False
    assert parser({"LOUD": "true"}).parse_args([]).loud is True
    assert parser({"LOUD": "false"}).parse_args([]).loud is False
    assert parser({"LOUD": "false"}).parse_args(["--loud"]).loud is True


def test_urls_and_addresses() -> None:
    assert url("ws://portal:8081") == "ws://portal:8081"
    for bad in ("portal", "", "ws://", "ws://x:port/"):
        with pytest.raises(Exception, match="invalid URL"):
            url(bad)
    assert socket_address("[::]:8080") == ("::", 8080)
    for bad in ("8080", "localhost:80", "1.2.3.4:99999"):
        with pytest.raises(Exception, match="invalid address"):
            socket_address(bad)
