"""How many sockets this process may open: one or two per allocation of a relay, one per peer of a portal."""

from __future__ import annotations

import resource


def allow_open_files() -> int:
    """Raise the soft limit to the hard one; the limit in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
