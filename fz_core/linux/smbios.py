"""What the firmware says this machine is; the client tells the portal. Source: spec/io.md 11.

Only root can read these files; without them, or without firmware tables, the values are absent.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

DMI = Path("/sys/class/dmi/id")
PLACEHOLDER_SERIAL = "123456789"


class Smbios(NamedTuple):
    """Serial number and UUID, None where unknown."""

    serial: str | None
    uuid: str | None


def read_smbios(folder: Path = DMI) -> Smbios:
    """Read both; never fails."""
    serial = _read(folder / "product_serial")
    return Smbios(None if serial == PLACEHOLDER_SERIAL else serial, _read(folder / "product_uuid"))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None
