"""When each of many things is due next. Only what may have changed, or is due, is looked at.

    deadlines = Deadlines(deadline_of)
    deadlines.add(connection)
    deadlines.note(connection)              whenever its deadline may have changed: the cost of a set's `add`
    deadlines.poll_timeout()                the earliest; asks only those noted since the last time
    for connection in deadlines.take(now): ...

A heap with one true entry for each thing that has a deadline, and some that became untrue and are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
SLACK = 64


class Deadlines(Generic[T]):
    """The deadlines of things, None for none, as `deadline_of` tells them. Each of these calls is a look at a thing."""

    def __init__(self, deadline_of: Callable[[T], float | None]) -> None:
        self._deadline_of = deadline_of
        self._numbers: dict[T, int] = {}
        self._due: dict[T, float] = {}
        self._heap: list[tuple[float, int, T]] = []
        self._next_number = count()
        self._noted: set[T] = set()
        self.note: Callable[[T], None] = self._noted.add  # itself, not a method that calls it: this is done per packet

    def add(self, thing: T) -> None:
        """Mind its deadline from now on."""
        self._numbers[thing] = next(self._next_number)
        self.note(thing)

    def remove(self, thing: T) -> None:
        """Mind it no more; later notes of it mean nothing."""
        self._numbers.pop(thing, None)
        self._due.pop(thing, None)

    def poll_timeout(self) -> float | None:
        """The earliest deadline."""
        self._ask_noted()
        while self._heap and not self._is_true(self._heap[0]):
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take(self, now: float) -> list[T]:
        """Everything that is due, in the order in which it was added; handle all of it, for it counts as noted."""
        self._ask_noted()
        due = []
        while self._heap and self._heap[0][0] <= now:
            entry = heappop(self._heap)
            if self._is_true(entry):
                due.append(entry[1:])
                del self._due[entry[2]]
                self.note(entry[2])
        return [thing for _, thing in sorted(due)]

    def _ask_noted(self) -> None:
        while self._noted:
            thing = self._noted.pop()
            number = self._numbers.get(thing)
            at = None if number is None else self._deadline_of(thing)
            if number is None or at == self._due.get(thing):
                continue
            if at is None:
                del self._due[thing]
            else:
                self._due[thing] = at
                heappush(self._heap, (at, number, thing))
        if len(self._heap) > 2 * len(self._due) + SLACK:
            self._heap = [(at, self._numbers[thing], thing) for thing, at in self._due.items()]
            heapify(self._heap)

    def _is_true(self, entry: tuple[float, int, T]) -> bool:
        at, number, thing = entry
        return self._due.get(thing) == at and self._numbers[thing] == number
