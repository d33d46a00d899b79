"""Hosts that tests of several files live on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fz_core.lab import Host, Lab


@pytest.fixture
def laptop() -> Iterator[Host]:
    """A host with a LAN (172.30.0.0/24); this thread is in its namespace."""
    with Lab() as lab:
        host = lab.host("laptop", lab.router("home", 30))
        with host.entered():
            yield host
