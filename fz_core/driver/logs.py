"""Log lines for people and machines, in the reference's two formats (`spec/binaries.md` §8).

Every logger of the process, structlog's and the standard library's, ends in one handler on stdout.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any

import structlog

TRACE = 5
LEVELS = {
    "off": logging.CRITICAL + 10,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": TRACE,
}
NAMES = {logging.CRITICAL: "ERROR", logging.ERROR: "ERROR", logging.WARNING: "WARN", TRACE: "TRACE"}
QUIET = {"pyroute2": "warn", "asyncio": "warn", "httpx": "info", "httpcore": "info", "trio-websocket": "warn"}

Event = MutableMapping[str, Any]


class LogFilterError(ValueError):
    """RUST_LOG has a directive that cannot be read."""


def parse_directives(text: str) -> dict[str, int]:
    """Read `info,target=debug,…`; the empty target is the default level. Spans and fields are ignored."""
    levels = {name: LEVELS[level] for name, level in QUIET.items()}
    levels[""] = LEVELS["off"] if not text.strip() else LEVELS["error"]
    for directive in filter(None, (d.strip() for d in text.split(","))):
        target, separator, level = directive.rpartition("=")
        target = target.split("[")[0]
        if not separator and level.lower() not in LEVELS:
            target, level = level.split("[")[0], "trace"
        if level.lower() not in LEVELS:
            raise LogFilterError(
                f"RUST_LOG: {level!r} in {directive!r} is not a level, use off, error, warn, info, debug or trace"
            )
        levels[target.replace("::", ".")] = LEVELS[level.lower()]
    return levels


def configure(directives: str = "info", *, as_json: bool = False, flow_logs: bool = False) -> None:
    """Send all logs to stdout; flow logs whatever the directives say. LogFilterError if those are malformed."""
    levels = parse_directives(directives)
    if flow_logs:
        levels["flow_logs"] = TRACE
    logging.addLevelName(TRACE, "TRACE")
    shared = [structlog.stdlib.add_logger_name, structlog.stdlib.add_log_level_number, _add_timestamp]
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _render_json if as_json else _render_human,
            ],
            foreign_pre_chain=shared,
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    for target, level in levels.items():
        logging.getLogger(target or None).setLevel(level)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _add_timestamp(_logger: Any, _method: str, event: Event) -> Event:
    event["timestamp"] = datetime.now(UTC)
    return event


def _render_human(_logger: Any, _method: str, event: Event) -> str:
    stamp = event.pop("timestamp").strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
    level, target, message = _head(event)
    fields = "".join(f" {key}={_value(value)}" for key, value in event.items())
    return f"{stamp}Z {level:>5} {target}: {message}{fields}"


def _render_json(_logger: Any, _method: str, event: Event) -> str:
    stamp = event.pop("timestamp").strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    level, target, message = _head(event)
    line = {"timestamp": stamp, "level": level, **event, "message": message, "target": target}
    return json.dumps(line, default=str)


def _head(event: Event) -> tuple[str, str, str]:
    number = event.pop("level_number", logging.INFO)
    target = event.pop("logger", None) or "fz_core"
    return NAMES.get(number, logging.getLevelName(number)), target, str(event.pop("event", ""))


def _value(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) and (" " in value or not value) else str(value)
