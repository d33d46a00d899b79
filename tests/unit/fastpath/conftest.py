"""A pump whose both sides a test holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.fastpath.pump_rig import Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Its device merges, its sockets segment."""
    rig = Rig()
    yield rig
    rig.close()
