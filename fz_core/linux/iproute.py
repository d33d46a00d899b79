"""pyroute2's routing socket, without the rest of pyroute2.

The package's `__init__` imports all it has, databases and cluster transports included: 8 MiB and 0.1 s of every
process. Its modules import each other by full name, so an empty package in its place is enough for one of them.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec

# A program that imports pyroute2 itself, before or after, gets the whole.
is_placeholder = "pyroute2" not in sys.modules
if is_placeholder:
    spec = find_spec("pyroute2")
    if spec is None:
        raise ImportError("pyroute2 is not installed: run 'pip install pyroute2'")
    sys.modules["pyroute2"] = module_from_spec(spec)
try:
    from pyroute2.iproute import IPRoute  # type: ignore[import-untyped]
    from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]
finally:
    if is_placeholder:
        del sys.modules["pyroute2"]

__all__ = ["IPRoute", "NetlinkError"]
