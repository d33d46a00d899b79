"""How a role's messages become events and payloads: two tables, and renaming for legacy endpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Reader = Callable[[Any], Any]
Writer = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class ParseFailure:
    """A message that was dropped, and why."""

    event: str
    reason: str


class Codec:
    """One direction of one role.

    `readers` maps event names to functions of the payload, `writers` message types to an event name and
    a function of the message, `legacy` v2 event names to those of the unversioned endpoints.
    """

    def __init__(
        self,
        readers: Mapping[str, Reader],
        writers: Mapping[type, tuple[str, Writer]],
        legacy: Mapping[str, str] | None = None,
    ) -> None:
        self._readers, self._writers = readers, writers
        self._to_legacy = dict(legacy or {})
        self._from_legacy = {old: new for new, old in self._to_legacy.items()}

    def parse(self, event: str, payload: Any, *, is_legacy: bool = False) -> Any:
        """The message, or a ParseFailure. Never raises on what a peer sent."""
        name = event
        if is_legacy:
            name = self._from_legacy.get(event, event)
            if event in self._to_legacy:
                return ParseFailure(event, "unknown event on this endpoint")
        reader = self._readers.get(name)
        if reader is None:
            return ParseFailure(event, "unknown event")
        try:
            return reader(payload)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            return ParseFailure(event, f"{type(error).__name__}: {error}")

    def build(self, message: Any, *, is_legacy: bool = False) -> tuple[str, Any]:
        """The event name and payload of a message."""
        event, writer = self._writers[type(message)]
        return (self._to_legacy.get(event, event) if is_legacy else event), writer(message)
