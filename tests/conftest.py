"""Shared rules: what a test may need, and that a missing need is a failure under CI=true."""

from __future__ import annotations

import os
import shutil

import pytest

MAY_SKIP_IN_CI = "wycheproof"


def missing_need(item: pytest.Item) -> str | None:
    """The reason this test cannot run here, or None."""
    if item.get_closest_marker("root"):
        if os.geteuid() != 0:
            return "needs root for network namespaces: run as root"
        if not os.path.exists("/dev/net/tun"):
            return "needs /dev/net/tun: load the tun module"
    for mark in item.iter_markers("peer"):
        for name in mark.args:
            if shutil.which(name) is None:
                return f"needs the program {name}: run 'make system-packages'"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = missing_need(item)
    if reason is not None:
        pytest.skip(reason)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("CI") == "true" and MAY_SKIP_IN_CI not in item.nodeid.lower():
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped under CI=true: {report.longrepr}"
