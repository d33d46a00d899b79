"""Flow records as log lines: target `flow_logs`, level TRACE (`spec/binaries.md` §10.1).

Who a flow belongs to is read from its token; the token itself is never written.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

from structlog.stdlib import ProcessorFormatter

from fz_core.driver.logs import TRACE
from fz_core.tunnel.flow_record import CLAIMS, FlowRecord, RecordKind, to_json

TARGET = "flow_logs"
WORDS = {RecordKind.START: "started", RecordKind.END: "completed"}
logger = logging.getLogger(TARGET)


def is_enabled() -> bool:
    """Whether somebody wants to see flow logs (`logs.configure(…, flow_logs=True)`)."""
    return logger.isEnabledFor(TRACE)


def log_record(record: FlowRecord) -> None:
    """One line for the start or the end of a flow, if they are wanted."""
    if not is_enabled():
        return
    event: dict[str, Any] = {
        "event": f"{record.protocol.upper()} flow {WORDS[record.kind]}",
        "logger": TARGET,
        "level_number": TRACE,
        "timestamp": datetime.now(UTC),
        **fields_of(record),
    }
    # structlog's own loggers know no level below DEBUG; this is what they would hand on.
    (message,), keywords = ProcessorFormatter.wrap_for_formatter(logger, "trace", event)
    logger.log(TRACE, message, extra=keywords["extra"])


def fields_of(record: FlowRecord) -> dict[str, Any]:
    """The fields of the line in their order, `outers` as compact JSON."""
    report, claims = to_json(record), record.token.claims
    fields = {"protocol": report.pop("protocol")}
    fields |= {name: claims[name] for name in CLAIMS if name in claims}
    report["outers"] = json.dumps(report["outers"], separators=(",", ":"))
    return fields | report
