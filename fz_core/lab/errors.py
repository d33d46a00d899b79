"""What goes wrong in a lab."""

from __future__ import annotations


class LabError(Exception):
    """A command, a program or the machine did not do what the lab needs; the message says which."""
