"""The `firezone-portal` command."""

from __future__ import annotations

import sys

from fz_core.embedded.portal_command import main

if __name__ == "__main__":
    sys.exit(main())
