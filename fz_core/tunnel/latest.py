"""A value that is told only when it differs from what was told last (`spec/tunnel.md` §13)."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """Changes between two looks are merged: intermediate values are never seen."""

    def __init__(self) -> None:
        self._told: T | None = None
        self.is_due = False

    def take(self, value: T | None) -> T | None:
        """The present value if it is news; None is never news."""
        self.is_due = False
        if value is None or value == self._told:
            return None
        self._told = value
        return value
