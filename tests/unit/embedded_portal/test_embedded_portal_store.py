"""The SQLite store: identity and addresses survive, bounds hold, the file is private."""

from __future__ import annotations

import os
import random
import shutil
import stat
from contextlib import closing
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from fz_core.embedded import store as store_module
from fz_core.embedded.store import Grant, Store, StoreError, StoreFull

V4_POOL, V6_POOL = ip_network("100.64.0.0/11"), ip_network("fd00:2021:1111::/107")


def open_store(path: Path | str = ":memory:", seed: int = 1) -> Store:
    return Store(path, random.Random(seed).randbytes)


def test_a_device_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    with closing(open_store(path)) as store:
        first = store.find_or_create("client", "owner", "ext", "name", 1)
        store.put_grant(Grant(first.id, "r", "g", "f", 9))
    with closing(open_store(path, seed=2)) as store:
        again = store.find_or_create("client", "owner", "ext", "new name", 2)
        assert (again.id, again.ipv4, again.ipv6, again.psk_base) == (first.id, first.ipv4, first.ipv6, first.psk_base)
        assert again.name == "new name"
        assert store.grants() == [Grant(first.id, "r", "g", "f", 9)]
    assert first.psk_base.hex() not in repr(first)


def test_role_owner_and_id_tell_devices_apart() -> None:
    store = open_store()
    keys = [(role, owner, ext) for role in ("client", "gateway") for owner in "ab" for ext in "xy"]
    devices = [store.find_or_create(*key, "n", 1) for key in keys]
    assert len({d.id for d in devices}) == len({d.ipv4 for d in devices}) == len({d.ipv6 for d in devices}) == 8
    assert all(d.ipv4 in V4_POOL and d.ipv6 in V6_POOL for d in devices)


def test_a_taken_address_is_probed_past_and_the_ends_are_never_used() -> None:
    def high(size: int) -> bytes:
        calls.append(size)
        # slot POOL_SIZE - 2, the last that may be used; ids differ
        return (2**21 - 3).to_bytes(8, "big") if size == 8 else random.Random(len(calls)).randbytes(size)

    calls: list[int] = []
    store = Store(":memory:", high)
    first, second = (store.find_or_create("client", "o", ext, "n", 1) for ext in "xy")
    assert (first.ipv4, second.ipv4) == (ip_address("100.95.255.254"), ip_address("100.64.0.1"))


def test_the_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    path.touch(0o644)
    with closing(open_store(path)) as store:
        store.find_or_create("client", "o", "x", "n", 1)
        for name in tmp_path.iterdir():
            assert stat.S_IMODE(name.stat().st_mode) == 0o600, name


def test_what_was_stored_survives_a_crash(tmp_path: Path) -> None:
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    with closing(open_store(tmp_path / "state.sqlite3")) as store:
        device = store.find_or_create("client", "o", "x", "n", 1)
        for path in tmp_path.glob("state.sqlite3*"):
            shutil.copy(path, crashed / path.name)  # as after a power cut: nothing was closed
    with closing(open_store(crashed / "state.sqlite3")) as store:
        assert store.device(device.id) == device


def test_two_portals_cannot_share_a_file(tmp_path: Path) -> None:
    with closing(open_store(tmp_path / "state.sqlite3")), pytest.raises(StoreError, match="locked"):
        open_store(tmp_path / "state.sqlite3")
    assert open_below(tmp_path) == []


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    path.write_text("no database at all, but long enough to be looked at" * 20)
    with pytest.raises(StoreError, match="not a database"):
        open_store(path)
    with pytest.raises(StoreError, match="create its directory"):
        open_store(tmp_path / "nowhere" / "state.sqlite3")
    assert open_below(tmp_path) == []


def test_the_oldest_device_that_is_offline_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_DEVICES_PER_OWNER", 3)
    store = open_store()
    old = [store.find_or_create("client", "o", f"{n}", "n", n) for n in range(3)]
    store.put_grant(Grant(old[1].id, "r", "g", "f", 9))
    store.find_or_create("client", "o", "new", "n", 9, online={old[0].id})
    assert [store.device(d.id) is not None for d in old] == [True, False, True]
    assert store.grants() == []
    everyone = {d.id for d in store.devices_of("o")}
    with pytest.raises(StoreFull):
        store.find_or_create("client", "o", "more", "n", 9, online=everyone)
    assert store.find_or_create("client", "other", "more", "n", 9, online=everyone)


def test_grants_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_GRANTS", 2)
    store = open_store()
    store.put_grant(Grant("c", "r1", "g", "f", 1))
    store.put_grant(Grant("c", "r2", "g", "f", 1))
    with pytest.raises(StoreFull):
        store.put_grant(Grant("c", "r3", "g", "f", 1))


def test_one_grant_per_client_resource_and_receiver() -> None:
    store = open_store()
    for expires_at in (1, 2):
        store.put_grant(Grant("c", "r", "g", "f", expires_at))
    store.put_grant(Grant("c", "r", "other", "f", 3))
    assert [g.expires_at for g in store.grants_at("g")] == [2]
    store.remove_grant(store.grants_at("g")[0])
    assert [g.receiver_id for g in store.grants()] == ["other"]


def open_below(folder: Path) -> list[str]:
    """Files in this folder that this process has open."""
    descriptors = Path("/proc/self/fd").iterdir()
    paths = [os.readlink(fd) for fd in descriptors if fd.is_symlink()]
    return [path for path in paths if path.startswith(str(folder))]
