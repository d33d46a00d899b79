"""What a test of log lines changes in the process, and gives back."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture
def restored_logs() -> Iterator[None]:
    """Handlers and levels are as before when the test is over, and structlog is as it was imported."""
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {logger: logger.level for logger in loggers()}
    yield
    root.handlers[:] = handlers
    for logger in loggers():
        logger.setLevel(levels.get(logger, logging.NOTSET))
    structlog.reset_defaults()


def loggers() -> list[logging.Logger]:
    """The root, and all that were asked for by name."""
    named = logging.Logger.manager.loggerDict.values()
    return [logging.getLogger(), *(logger for logger in named if isinstance(logger, logging.Logger))]
