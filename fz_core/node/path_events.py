"""What the path agent tells the connection. All frozen."""

from __future__ import annotations

from dataclasses import dataclass

from fz_core.ice import CandidateKind
from fz_core.packet import Address


@dataclass(frozen=True, slots=True)
class PrimaryChanged:
    """Data now goes from `local` to `remote`. Sent again if the same pair wins again."""

    local: Address
    remote: Address
    local_kind: CandidateKind
    remote_kind: CandidateKind


@dataclass(frozen=True, slots=True)
class PathSilent:
    """The primary stopped answering while data was sent; data stays on it until the next `PrimaryChanged`."""

    local: Address
    remote: Address


@dataclass(frozen=True, slots=True)
class AllPathsSilent:
    """Data is sent, there is no primary, and nothing comes from the peer. Once per outage."""


PathEvent = PrimaryChanged | PathSilent | AllPathsSilent
