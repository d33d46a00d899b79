"""Phoenix channel frames in the V1 object serialisation (`spec/portal-protocol.md` §2)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

MAX_FRAME = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Frame:
    """One WebSocket text message."""

    topic: str
    event: str
    payload: Any
    ref: int | None = None

    def encode(self) -> str:
        """The text on the wire."""
        return json.dumps(
            {"topic": self.topic, "event": self.event, "payload": self.payload, "ref": self.ref},
            separators=(",", ":"),
        )


class Truncated(ValueError):
    """The text ends in the middle of a value: the connection cannot be trusted any more."""


def parse_frame_untrusted(text: str) -> Frame | None:
    """Read a frame; None if it is not one. Truncated if the JSON ends early."""
    if len(text) > MAX_FRAME:
        return None
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        if _ends_early(text, error):
            raise Truncated("the frame ends early") from None
        return None
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    topic, event, ref = fields.get("topic"), fields.get("event"), fields.get("ref")
    if not isinstance(topic, str) or not isinstance(event, str):
        return None
    if ref is not None and (not isinstance(ref, int) or isinstance(ref, bool)):
        return None
    return Frame(topic, event, fields.get("payload"), ref)


def _ends_early(text: str, error: json.JSONDecodeError) -> bool:
    """Whether more text could have made it valid."""
    rest = text[error.pos :].rstrip()
    if error.msg.startswith("Invalid \\"):
        return len(rest) <= len("u1234")
    return error.msg.startswith("Unterminated string") or bool(BEGUN.fullmatch(rest))


BEGUN = re.compile(r"-?|[.]|[eE][+-]?|t|tr|tru|f|fa|fal|fals|n|nu|nul")
