"""Device id, token file, SMBIOS, socket buffers, privileges (spec/io.md 11 and 14, spec/binaries.md 1.5 and 3.3)."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fz_core.linux import (
    HostError,
    device_id,
    has_net_admin,
    os_version,
    raise_socket_buffers,
    read_smbios,
    read_token_file,
)

ID_FILES = {"client": "var/lib/dev.firezone.client/config/firezone-id.json", "gateway": "var/lib/firezone/gateway_id"}
KEYS = {"client": b"e1e465ce763e4759945c650ac334501f", "gateway": b"753b38f9f96947ef8083802d5909a372"}
MACHINE_ID = b"0123456789abcdef0123456789abcdef\n"
# what the official programs told a portal on a machine with this id: clients 1.5.8 and 1.5.11, gateways 1.5.2 and 1.6.0
OFFICIAL_IDS = {
    "client": "25746dc26c1cc478780348a72316d3f4c2869a29b2a4836b38bc2ad3c3d69e8c",
    "gateway": "eeefe5d1cb3807dfc3ae24794878ec3147027390d839d1d718d8e42bcfde3336",
}


@pytest.mark.parametrize("role", ["client", "gateway"])
class TestDeviceId:
    @pytest.mark.shows("io", 49)
    def test_is_derived_from_the_machine_id_and_not_stored(self, role: str, tmp_path: Path) -> None:
        write_machine_id(tmp_path)
        assert device_id(role, root=tmp_path) == hmac.new(KEYS[role], MACHINE_ID, hashlib.sha256).hexdigest()
        assert device_id(role, root=tmp_path) == OFFICIAL_IDS[role]
        assert (tmp_path / ID_FILES[role]).parent.is_dir()
        assert not (tmp_path / ID_FILES[role]).exists()

    @pytest.mark.shows("io", 49)
    def test_a_stored_id_wins_and_gets_its_mode(self, role: str, tmp_path: Path) -> None:
        write_machine_id(tmp_path)
        path = store_id(tmp_path, role, '{"id":"kept"}')
        assert device_id(role, root=tmp_path) == "kept"
        assert path.stat().st_mode & 0o777 == 0o640

    def test_without_a_machine_id_a_random_one_is_kept(self, role: str, tmp_path: Path) -> None:
        made = device_id(role, root=tmp_path)
        assert len(bytes.fromhex(made)) == 32
        path = tmp_path / ID_FILES[role]
        assert json.loads(path.read_text()) == {"id": made}
        assert path.stat().st_mode & 0o777 == 0o640
        assert list(path.parent.iterdir()) == [path]
        assert device_id(role, root=tmp_path) == made

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"id": 5}', '{"id": ""}', '"x"', "\xff"])
    def test_a_corrupt_file_is_absent_and_never_overwritten(self, role: str, tmp_path: Path, content: str) -> None:
        path = store_id(tmp_path, role, content)
        with pytest.raises(HostError, match="FIREZONE_ID"):
            device_id(role, root=tmp_path)
        assert path.read_text() == content
        write_machine_id(tmp_path)
        assert device_id(role, root=tmp_path) == hmac.new(KEYS[role], MACHINE_ID, hashlib.sha256).hexdigest()

    def test_a_folder_that_cannot_be_made_is_one_clear_line(self, role: str, tmp_path: Path) -> None:
        (tmp_path / "var").write_text("a file")
        with pytest.raises(HostError, match=r"cannot create .*FIREZONE_ID"):
            device_id(role, root=tmp_path)


@pytest.mark.root
class TestTokenFile:
    def test_is_trimmed(self, tmp_path: Path) -> None:
        assert read_token_file(token(tmp_path, b"  secret\n")) == "secret"

    def test_a_link_is_followed_to_the_file_that_counts(self, tmp_path: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(token(tmp_path, b"secret"))
        assert read_token_file(link) == "secret"

    @pytest.mark.parametrize("mode", [0o700, 0o640, 0o604, 0o610, 0o602])
    def test_others_must_not_reach_it(self, tmp_path: Path, mode: int) -> None:
        path = token(tmp_path, b"secret")
        path.chmod(mode)
        with pytest.raises(HostError, match="chmod 600"):
            read_token_file(path)

    @pytest.mark.parametrize("owner", [(1, 0), (0, 1)])
    def test_it_must_be_roots(self, tmp_path: Path, owner: tuple[int, int]) -> None:
        path = token(tmp_path, b"secret")
        os.chown(path, *owner)
        with pytest.raises(HostError, match="chown root:root"):
            read_token_file(path)

    def test_a_missing_one_names_variable_and_path(self, tmp_path: Path) -> None:
        with pytest.raises(HostError, match=f"can't find the token.*FIREZONE_TOKEN.*{tmp_path}/none"):
            read_token_file(tmp_path / "none")

    def test_it_must_be_text(self, tmp_path: Path) -> None:
        with pytest.raises(HostError, match="UTF-8"):
            read_token_file(token(tmp_path, b"\xff"))


def test_smbios_drops_what_says_nothing(tmp_path: Path) -> None:
    assert read_smbios(tmp_path) == (None, None)
    (tmp_path / "product_serial").write_text("123456789\n")
    (tmp_path / "product_uuid").write_text("4c4c4544\n")
    assert read_smbios(tmp_path) == (None, "4c4c4544")
    (tmp_path / "product_serial").write_text("A1\n")
    assert read_smbios(tmp_path).serial == "A1"


@pytest.mark.shows("io", 26)
def test_socket_buffers_are_raised_and_never_lowered(tmp_path: Path) -> None:
    (tmp_path / "rmem_max").write_text("212992\n")
    (tmp_path / "wmem_max").write_text("999999999\n")
    told = raise_socket_buffers(tmp_path)
    assert (tmp_path / "rmem_max").read_text() == "16777216"
    assert (tmp_path / "wmem_max").read_text() == "999999999\n"
    assert set(told) == {"rmem_max", "wmem_max"}


def test_socket_buffers_that_cannot_be_raised_are_told(tmp_path: Path) -> None:
    assert "cannot be raised" in raise_socket_buffers(tmp_path)["rmem_max"]


@pytest.mark.root
def test_privileges_are_those_of_the_process() -> None:
    assert has_net_admin()
    child = os.fork()
    if child == 0:
        os.setresuid(65534, 65534, 65534)
        os._exit(7 if has_net_admin() else 0)
    assert os.waitpid(child, 0)[1] == 0


def test_core_dumps_are_forbidden_in_the_process() -> None:
    script = (
        "import ctypes, resource\n"
        "from fz_core.linux import forbid_core_dumps\n"
        "forbid_core_dumps()\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3))"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told == "(0, 0) 0\n"


def test_os_version_has_four_parts() -> None:
    assert all(os_version())


def write_machine_id(root: Path) -> None:
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc/machine-id").write_bytes(MACHINE_ID)


def store_id(root: Path, role: str, content: str) -> Path:
    path = root / ID_FILES[role]
    path.parent.mkdir(parents=True)
    path.write_text(content)
    return path


def token(folder: Path, content: bytes) -> Path:
    path = folder / "token"
    path.write_bytes(content)
    path.chmod(0o600)
    return path
