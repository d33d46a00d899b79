"""What this machine refuses."""

from __future__ import annotations


class HostError(Exception):
    """Something of this machine is missing or forbidden; one line naming thing, value and remedy."""
