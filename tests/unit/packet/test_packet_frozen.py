"""Values: what they share with frozen dataclasses."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, dataclass

import pytest

from fz_core.packet.frozen import field, frozen


@frozen
class Login:
    """What a value looks like."""

    name: str
    password: str = field(repr=False)
    tries: int = 3
    note: str = field(default="", compare=False)

    @property
    def is_new(self) -> bool:
        return self.tries == 3


@frozen
class Login2:
    name: str


@frozen
class Nothing:
    """No fields."""


@dataclass(frozen=True, slots=True)
class Reference:
    name: str
    password: str
    tries: int = 3


def test_arguments_by_position_by_name_and_by_default() -> None:
    login = Login("a", password="b", note="c")
    assert (login.name, login.password, login.tries, login.note) == ("a", "b", 3, "c")
    assert login.is_new
    for arguments in ((), ("a", "b", 3, "", 5)):
        with pytest.raises(TypeError):
            Login(*arguments)


def test_nothing_can_be_changed_or_added() -> None:
    login = Login("a", "b")
    with pytest.raises(FrozenInstanceError):
        login.name = "c"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        login.more = "c"  # type: ignore[attr-defined]
    with pytest.raises(FrozenInstanceError):
        del login.name
    assert not hasattr(login, "__dict__")


def test_equal_fields_make_equal_values_of_one_class() -> None:
    assert Login("a", "b", note="c") == Login("a", "b", note="d")
    assert hash(Login("a", "b", note="c")) == hash(Login("a", "b", note="d"))
    assert Login("a", "b") != Login("a", "c")
    assert Login2("a") != "a"
    assert Login2("a") != Nothing()
    assert Nothing() == Nothing()
    assert len({Nothing(), Nothing(), Login2("a"), Login2("a")}) == 2


def test_a_secret_is_not_shown() -> None:
    assert repr(Login("a", "b")) == "Login(name='a', tries=3, note='')"


def test_patterns_copies_and_pickles() -> None:
    match Login("a", "b", 4):
        case Login(name, password, tries):
            assert (name, password, tries) == ("a", "b", 4)
    login = Login("a", "b", 4, "c")
    for twin in (copy.copy(login), copy.deepcopy(login), pickle.loads(pickle.dumps(login))):
        assert (twin, twin.note) == (login, "c")


def test_it_looks_like_a_dataclass_from_outside() -> None:
    assert Login.__doc__ == "What a value looks like."
    assert Login.__match_args__ == ("name", "password", "tries", "note")
    assert Login2.__slots__ == ("name",)
    assert repr(Login2("a")).replace("Login2", "Reference") == "Reference(name='a')"
    assert Reference("a", "b").__match_args__ == Login.__match_args__[:3]
