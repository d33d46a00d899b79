"""What an embedded portal remembers in one SQLite file: devices with their tunnel addresses, and grants.

Every call is one transaction. `":memory:"` serves tests and simulations. Not here: policy, connections.
"""

from __future__ import annotations

import os
import sqlite3
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

SCHEMA_VERSION = 1
POOL_SIZE = 1 << 21
V4_POOL = int(IPv4Address("100.64.0.0"))
V6_POOL = int(IPv6Address("fd00:2021:1111::"))
MAX_DEVICES_PER_OWNER = 1000
MAX_GRANTS = 100_000
SCHEMA = """
CREATE TABLE device (
    id TEXT PRIMARY KEY, role TEXT NOT NULL, owner TEXT NOT NULL, external_id TEXT NOT NULL, name TEXT NOT NULL,
    slot4 INTEGER NOT NULL UNIQUE, slot6 INTEGER NOT NULL UNIQUE, psk_base BLOB NOT NULL, seen_at INTEGER NOT NULL,
    UNIQUE (role, owner, external_id)
);
CREATE TABLE access (
    client_id TEXT NOT NULL, resource_id TEXT NOT NULL, receiver_id TEXT NOT NULL, fingerprint TEXT NOT NULL,
    expires_at INTEGER NOT NULL, PRIMARY KEY (client_id, resource_id, receiver_id)
);
CREATE INDEX access_receiver ON access (receiver_id);
"""


class StoreError(Exception):
    """The file cannot be used; one line with the remedy."""


class StoreFull(Exception):
    """A bound is reached and nothing can be evicted."""


@dataclass(frozen=True, slots=True)
class Device:
    """A client or gateway as the store knows it. `owner` is the client account's or site's id."""

    id: str
    role: str
    owner: str
    external_id: str
    name: str
    ipv4: IPv4Address
    ipv6: IPv6Address
    psk_base: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Grant:
    """A client may use a resource at a receiver until `expires_at` (unix seconds)."""

    client_id: str
    resource_id: str
    receiver_id: str
    fingerprint: str
    expires_at: int


class Store:
    """One file, one user. Tunnel addresses come from 100.64.0.0/11 and fd00:2021:1111::/107."""

    def __init__(self, path: str | Path, random_bytes: Callable[[int], bytes]) -> None:
        self._random_bytes = random_bytes
        if str(path) != ":memory:":
            _make_private(Path(path))
        try:
            self._db = sqlite3.connect(path, timeout=1.0, isolation_level=None)
            try:
                self._prepare(path)
            except BaseException:
                self.close()
                raise
        except sqlite3.Error as error:
            raise StoreError(f"state file {path}: {error}; stop the other portal or move the file away") from None

    def close(self) -> None:
        """Give the file back."""
        self._db.close()

    def _prepare(self, path: str | Path) -> None:
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._migrate(path)

    def _migrate(self, path: str | Path) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise StoreError(f"state file {path} is of version {version}, this program knows {SCHEMA_VERSION}: upgrade")
        if version == 0:
            self._db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")

    # devices

    def find_or_create(
        self, role: str, owner: str, external_id: str, name: str, unix_now: int, online: Collection[str] = ()
    ) -> Device:
        """The device of this identity. StoreFull if its owner has too many that are all online."""
        found = self.find(role, owner, external_id)
        if found is not None:
            self._db.execute("UPDATE device SET name = ?, seen_at = ? WHERE id = ?", (name, unix_now, found.id))
            return self.device(found.id) or found
        self._make_room(role, owner, online)
        identity = str(uuid.UUID(bytes=self._random_bytes(16), version=4))
        self._db.execute(
            "INSERT INTO device VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (identity, role, owner, external_id, name, self._free("slot4"), self._free("slot6"),
             self._random_bytes(32), unix_now),
        )  # fmt: skip
        return self._select("WHERE id = ?", (identity,))[0]

    def find(self, role: str, owner: str, external_id: str) -> Device | None:
        """The device of this identity, if it is known."""
        found = self._select("WHERE role = ? AND owner = ? AND external_id = ?", (role, owner, external_id))
        return found[0] if found else None

    def device(self, device_id: str) -> Device | None:
        """A device by id."""
        found = self._select("WHERE id = ?", (device_id,))
        return found[0] if found else None

    def devices_of(self, owner: str) -> list[Device]:
        """All devices of an account or site."""
        return self._select("WHERE owner = ? ORDER BY id", (owner,))

    def _select(self, where: str, values: tuple[object, ...]) -> list[Device]:
        rows = self._db.execute(
            f"SELECT id, role, owner, external_id, name, slot4, slot6, psk_base FROM device {where}", values
        )
        return [
            Device(i, role, owner, external, name, IPv4Address(V4_POOL + s4), IPv6Address(V6_POOL + s6), base)
            for i, role, owner, external, name, s4, s6, base in rows
        ]

    def _make_room(self, role: str, owner: str, online: Collection[str]) -> None:
        rows = self._db.execute(
            "SELECT id FROM device WHERE role = ? AND owner = ? ORDER BY seen_at, id", (role, owner)
        ).fetchall()
        if len(rows) < MAX_DEVICES_PER_OWNER:
            return
        oldest = next((r[0] for r in rows if r[0] not in online), None)
        if oldest is None:
            raise StoreFull(f"{len(rows)} devices of one owner are online")
        with _Transaction(self._db):
            self._db.execute("DELETE FROM access WHERE client_id = ? OR receiver_id = ?", (oldest, oldest))
            self._db.execute("DELETE FROM device WHERE id = ?", (oldest,))

    def _free(self, column: str) -> int:
        """A random slot, or the next free one after it; the first and last addresses are never given out."""
        slot = 1 + int.from_bytes(self._random_bytes(8), "big") % (POOL_SIZE - 2)
        query = f"SELECT 1 FROM device WHERE {column} = ?"
        for _ in range(POOL_SIZE):
            if self._db.execute(query, (slot,)).fetchone() is None:
                return slot
            slot = slot + 1 if slot < POOL_SIZE - 2 else 1
        raise StoreFull("all tunnel addresses are taken")

    # grants

    def put_grant(self, grant: Grant) -> None:
        """Remember a grant. StoreFull beyond a bound that only a flood reaches."""
        (count,) = self._db.execute("SELECT count(*) FROM access").fetchone()
        if count >= MAX_GRANTS:
            raise StoreFull(f"{count} grants are remembered")
        row = (grant.client_id, grant.resource_id, grant.receiver_id, grant.fingerprint, grant.expires_at)
        self._db.execute("INSERT OR REPLACE INTO access VALUES (?, ?, ?, ?, ?)", row)

    def grants(self) -> list[Grant]:
        """All grants."""
        return self._grants("", ())

    def grants_at(self, receiver_id: str) -> list[Grant]:
        """The grants a gateway, or the target of a device pool, holds."""
        return self._grants("WHERE receiver_id = ?", (receiver_id,))

    def remove_grant(self, grant: Grant) -> None:
        """Forget a grant."""
        self._db.execute(
            "DELETE FROM access WHERE client_id = ? AND resource_id = ? AND receiver_id = ?",
            (grant.client_id, grant.resource_id, grant.receiver_id),
        )

    def _grants(self, where: str, values: tuple[object, ...]) -> list[Grant]:
        rows = self._db.execute(
            f"SELECT client_id, resource_id, receiver_id, fingerprint, expires_at FROM access {where}"
            " ORDER BY client_id, resource_id, receiver_id",
            values,
        )
        return [Grant(*row) for row in rows]


class _Transaction:
    """All or nothing."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")


def _make_private(path: Path) -> None:
    """Create the file readable by its owner alone; the companions SQLite makes inherit the mode."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        path.chmod(0o600)
    except OSError as error:
        raise StoreError(f"state file {path}: {error.strerror}; create its directory and let us write there") from None
