"""Who this device is to the portal (`spec/binaries.md` §1.5); the same as the official programs say."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import tempfile
import uuid
from pathlib import Path

from fz_core.linux.errors import HostError

FILES = {
    "client": Path("/var/lib/dev.firezone.client/config/firezone-id.json"),
    "gateway": Path("/var/lib/firezone/gateway_id"),
}
APP_IDS = {"client": b"e1e465ce763e4759945c650ac334501f", "gateway": b"753b38f9f96947ef8083802d5909a372"}
MACHINE_ID = Path("/etc/machine-id")


def device_id(role: str, *, root: Path = Path("/")) -> str:
    """The id file's content, else one derived from the machine id, else a random one that is kept."""
    path = root / FILES[role].relative_to("/")
    try:
        path.parent.mkdir(mode=0o770, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"cannot create {path.parent} ({error.strerror}): run as root, or set FIREZONE_ID") from None
    known = _read(path)
    if known is not None:
        return known
    try:
        machine_id = (root / MACHINE_ID.relative_to("/")).read_bytes()
    except OSError:
        return _create(path)
    return hmac.new(APP_IDS[role], machine_id, hashlib.sha256).hexdigest()


def _read(path: Path) -> str | None:
    try:
        text = path.read_text()
        os.chmod(path, 0o640)
        identity = json.loads(text)["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return identity if isinstance(identity, str) and identity else None


def _create(path: Path) -> str:
    identity = hashlib.sha256(str(uuid.uuid4()).encode()).hexdigest()
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(json.dumps({"id": identity}))
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o640)
            os.link(name, path)  # unlike rename, never over an existing file
        finally:
            os.unlink(name)
    except OSError as error:
        raise HostError(f"cannot write {path} ({error.strerror}): set FIREZONE_ID, or remove the file") from None
    return identity
