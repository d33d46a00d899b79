"""What the path agent tells the connection: what an ICE agent tells, and one thing more."""

from __future__ import annotations

from dataclasses import dataclass

from fz_core.ice import Nominated, PathSilent


@dataclass(frozen=True, slots=True)
class AllPathsSilent:
    """Data is sent, there is no primary, and nothing comes from the peer. Once per outage."""


PathEvent = Nominated | PathSilent | AllPathsSilent
