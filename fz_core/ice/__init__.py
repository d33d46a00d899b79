"""ICE: candidates, pairs, and the agent (floor 2)."""

from fz_core.ice.agent import Agent
from fz_core.ice.candidate import Candidate, CandidateKind, is_usable, optimistic_candidates
from fz_core.ice.credentials import Credentials
from fz_core.ice.events import IceEvent, IceState, Nominated, PathSilent, StateChanged
from fz_core.ice.iceless import (
    iceless_text,
    parse_iceless_candidate_untrusted,
    parse_iceless_untrusted,
    to_iceless_sdp,
)
from fz_core.ice.timing import CLIENT_DEFAULT, CLIENT_IDLE, SERVER_DEFAULT, SERVER_IDLE, TimingProfile

__all__ = [
    "CLIENT_DEFAULT",
    "CLIENT_IDLE",
    "SERVER_DEFAULT",
    "SERVER_IDLE",
    "Agent",
    "Candidate",
    "CandidateKind",
    "Credentials",
    "IceEvent",
    "IceState",
    "Nominated",
    "PathSilent",
    "StateChanged",
    "TimingProfile",
    "iceless_text",
    "is_usable",
    "optimistic_candidates",
    "parse_iceless_candidate_untrusted",
    "parse_iceless_untrusted",
    "to_iceless_sdp",
]
