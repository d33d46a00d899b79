"""Uploads where there is something to upload: all they need takes 5 ms to import, and many portals want none."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from fz_core.driver.flow_logs.https import Resolve
    from fz_core.driver.flow_logs.upload import FlowUploader

LOOK_INTERVAL = 30.0


async def upload_flow_logs(
    root: Path, resolve: Resolve, *, sleep: Callable[[float], Awaitable[None]] = trio.sleep
) -> None:
    """Send what the spool in `root` holds, for ever. The spool makes that folder when there is something to keep."""
    while not os.path.lexists(root):
        await sleep(LOOK_INTERVAL)
    uploader = await trio.to_thread.run_sync(_uploader)
    await uploader(root, resolve).run()


def _uploader() -> type[FlowUploader]:
    from fz_core.driver.flow_logs.upload import FlowUploader

    return FlowUploader
