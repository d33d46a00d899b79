"""Immutable values with slots: what `dataclass(frozen=True, slots=True)` makes, in a tenth of its time.

    @frozen
    class Hiccup:
        delay: float
        error: str = field(default="", repr=False)

A program declares more than a hundred messages and events before it does anything, so the difference is most
of a tenth of a second at every start. Not supported: inheritance, factories, `__post_init__`, and
`dataclasses.replace`; a class that needs one of these is a dataclass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar, dataclass_transform

T = TypeVar("T")


class Field(NamedTuple):
    """What is special about a field."""

    default: Any
    repr: bool
    compare: bool


_MISSING: Any = object()


def field(*, default: Any = _MISSING, repr: bool = True, compare: bool = True) -> Any:
    """As in `dataclasses`."""
    return Field(default, repr, compare)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[T]) -> type[T]:
    """The class with a constructor, slots, equality, a hash and a `repr` of its fields, and nothing to change."""
    plain = Field(_MISSING, True, True)
    fields: dict[str, Field] = {}
    for name in cls.__annotations__:
        given = cls.__dict__.get(name, plain)
        fields[name] = given if isinstance(given, Field) else plain._replace(default=given)
    names = tuple(fields)
    body = {name: value for name, value in cls.__dict__.items() if name not in fields}
    body.pop("__dict__", None)
    body.pop("__weakref__", None)
    body.update(
        __slots__=names,
        __match_args__=names,
        __init__=_constructor(fields),
        __reduce__=_reduce,
        __setattr__=_refuse,
        __delattr__=_refuse,
        _compared=_values([name for name in names if fields[name].compare]),
        _shown=[name for name in names if fields[name].repr],
    )
    for name, method in (("__eq__", _equals), ("__hash__", _hash), ("__repr__", _repr)):
        body.setdefault(name, method)
    made: type[T] = type(cls.__name__, cls.__bases__, body)
    return made


def _constructor(fields: dict[str, Field]) -> Callable[..., None]:
    scope: dict[str, Any] = {"_set": object.__setattr__}
    parameters, lines = ["self"], []
    for name, given in fields.items():
        scope[f"_default_{name}"] = given.default
        parameters.append(name if given.default is _MISSING else f"{name}=_default_{name}")
        lines.append(f" _set(self, {name!r}, {name})")
    exec(f"def __init__({', '.join(parameters)}):\n" + ("\n".join(lines) or " pass"), scope)
    constructor: Callable[..., None] = scope["__init__"]
    return constructor


def _values(names: list[str]) -> staticmethod[[Any], Any]:
    return staticmethod(attrgetter(*names) if names else lambda _: ())


def _equals(self: Any, other: object) -> Any:
    if type(other) is not type(self):
        return NotImplemented
    return self._compared(self) == self._compared(other)  # type: ignore[attr-defined]


def _hash(self: Any) -> int:
    return hash(self._compared(self))


def _repr(self: Any) -> str:
    return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._shown)})"


def _reduce(self: Any) -> tuple[Any, ...]:
    return type(self), tuple(getattr(self, name) for name in self.__slots__)


def _refuse(self: Any, name: str, value: object = None) -> None:
    raise FrozenInstanceError(f"cannot change field {name!r}")
