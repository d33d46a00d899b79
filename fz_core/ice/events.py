"""What an ICE agent reports."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fz_core.ice.candidate import CandidateKind
from fz_core.packet import Address


class IceState(StrEnum):
    """NEW: no pair yet. CHECKING: none nominated. CONNECTED: one nominated. DISCONNECTED: no pair left."""

    NEW = "new"
    CHECKING = "checking"
    CONNECTED = "connected"
    DISCONNECTED = "disconnected"


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The agent is in another state now."""

    state: IceState


@dataclass(frozen=True, slots=True)
class Nominated:
    """Data goes from `local` (a base) to `remote` from now on."""

    local: Address
    remote: Address
    local_kind: CandidateKind
    remote_kind: CandidateKind


@dataclass(frozen=True, slots=True)
class PathSilent:
    """The pair in use gave no answers; if another one did, it is in use now."""

    local: Address
    remote: Address


IceEvent = StateChanged | Nominated | PathSilent
