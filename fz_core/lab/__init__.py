"""Whole systems in network namespaces, for the demo and the tests (floor 7)."""

from fz_core.lab.processes import LabError, Process
from fz_core.lab.topology import Host, Lab, Namespace, Router

__all__ = ["Host", "Lab", "LabError", "Namespace", "Process", "Router"]
