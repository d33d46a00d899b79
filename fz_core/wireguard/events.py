"""What a tunnel reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SessionEstablished:
    """A new session can be sent on: we are its initiator, or its initiator has confirmed it with data."""

    at: float
    initiator: bool


@dataclass(frozen=True, slots=True)
class Expired:
    """A handshake attempt went unanswered to its end, or the last keys were wiped for age."""

    at: float
