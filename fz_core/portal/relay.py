"""What a relay and a portal say to each other: nearly nothing (`spec/portal-protocol.md` §7)."""

from __future__ import annotations

from dataclasses import dataclass

from fz_core.portal.codec import Codec


@dataclass(frozen=True, slots=True)
class Init:
    """The portal knows the relay."""


TO_PORTAL = Codec(readers={}, writers={})
TO_RELAY = Codec(readers={"init": lambda p: Init()}, writers={Init: ("init", lambda m: {})})
