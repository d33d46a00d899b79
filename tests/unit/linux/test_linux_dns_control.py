"""Pointing the host's resolver at the tunnel (spec/io.md 9 and 14, items 45 and 46; spec/binaries.md 3.6)."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from ipaddress import ip_address
from pathlib import Path

import pytest

from fz_core.linux import HostError, make_dns_control, parse_resolv_conf

MARKER = "# BEGIN Firezone DNS configuration"
ORIGINAL = textwrap.dedent("""\
    # written by hand
    search home.example
    nameserver 192.0.2.1
    nameserver fe80::1%eth0
    options ndots:3 timeout:2 edns0
    sortlist 130.155.160.0/255.255.240.0
    """)
SENTINELS = ["100.100.111.1", "fd00:2021:1111:8000:100:100:111:0"]


class TestEtcResolvConf:
    @pytest.mark.shows("io", 45)
    def test_writes_ours_and_keeps_a_backup(self, etc: Path) -> None:
        inode = (etc / "resolv.conf").stat().st_ino
        activate(etc, "corp.example")
        lines = conf(etc).splitlines()
        assert lines[0] == MARKER
        assert [line for line in lines if not line.startswith("#") and line] == [
            "nameserver 100.100.111.1",
            "nameserver fd00:2021:1111:8000:100:100:111:0",
            "search corp.example",
            "options ndots:1 timeout:2 edns0",
            "sortlist 130.155.160.0/255.255.240.0",
        ]
        assert backup(etc) == ORIGINAL
        assert str(etc / "resolv.conf.before-firezone") in conf(etc)
        assert (etc / "resolv.conf").stat().st_ino == inode, "a bind-mounted file cannot be renamed"
        assert sorted(p.name for p in etc.iterdir()) == ["resolv.conf", "resolv.conf.before-firezone"]

    @pytest.mark.shows("io", 45)
    def test_revert_restores_every_byte_and_keeps_the_backup(self, etc: Path) -> None:
        control = activate(etc)
        for _ in range(2):
            control.deactivate()
            assert conf(etc) == ORIGINAL
            assert backup(etc) == ORIGINAL

    @pytest.mark.shows("io", 45)
    def test_applying_twice_keeps_the_first_original(self, etc: Path) -> None:
        activate(etc)
        control = activate(etc, sentinels=["100.100.111.7"])
        assert "nameserver 100.100.111.7" in conf(etc)
        assert "nameserver 100.100.111.1\n" not in conf(etc)
        assert backup(etc) == ORIGINAL
        control.deactivate()
        assert conf(etc) == ORIGINAL

    @pytest.mark.parametrize("length", [0, 5, 4000])
    def test_revert_to_a_shorter_or_longer_file(self, etc: Path, length: int) -> None:
        original = "#" * length
        (etc / "resolv.conf").write_text(original)
        activate(etc).deactivate()
        assert conf(etc) == original

    def test_without_a_search_domain_there_is_none(self, etc: Path) -> None:
        activate(etc, None)
        assert "search" not in [line.split(" ")[0] for line in conf(etc).splitlines()]

    @pytest.mark.shows("io", 45)
    def test_crash_then_restart(self, etc: Path) -> None:
        activate(etc)
        make_dns_control("etc-resolv-conf", etc).deactivate()
        assert conf(etc) == ORIGINAL

    def test_crash_then_activation_without_a_revert(self, etc: Path) -> None:
        activate(etc)
        activate(etc, "new.example")
        assert backup(etc) == ORIGINAL
        assert "search new.example" in conf(etc)
        assert "timeout:2" in conf(etc)

    @pytest.mark.shows("io", 45)
    def test_crash_then_manual_edit_then_restart(self, etc: Path) -> None:
        """Deleting the marker line makes it the administrator's file."""
        activate(etc)
        edited = conf(etc).replace(MARKER + "\n", "").replace("nameserver 100.100.111.1", "nameserver 192.0.2.9")
        (etc / "resolv.conf").write_text(edited)
        control = make_dns_control("etc-resolv-conf", etc)
        control.deactivate()
        assert conf(etc) == edited
        control.activate("tun-firezone", SENTINELS, None)
        assert backup(etc) == edited

    @pytest.mark.shows("io", 45)
    def test_an_edit_between_clean_runs_is_kept(self, etc: Path) -> None:
        """The backup of the first run still exists, and must not come back."""
        activate(etc).deactivate()
        (etc / "resolv.conf").write_text("nameserver 192.0.2.77\n")
        control = make_dns_control("etc-resolv-conf", etc)
        control.deactivate()
        assert conf(etc) == "nameserver 192.0.2.77\n"
        control.activate("tun-firezone", SENTINELS, None)
        control.deactivate()
        assert conf(etc) == backup(etc) == "nameserver 192.0.2.77\n"

    def test_somebody_else_rewrote_the_file_while_we_ran(self, etc: Path) -> None:
        control = activate(etc)
        (etc / "resolv.conf").write_text("nameserver 192.0.2.78\n")
        assert ips(control.system_resolvers()) == ["192.0.2.78"]
        control.deactivate()
        assert conf(etc) == "nameserver 192.0.2.78\n"

    @pytest.mark.shows("io", 45)
    def test_a_symlink_is_refused_and_untouched(self, etc: Path) -> None:
        (etc / "resolv.conf").rename(etc / "elsewhere")
        (etc / "resolv.conf").symlink_to("elsewhere")
        control = make_dns_control("etc-resolv-conf", etc)
        for attempt in (control.deactivate, lambda: control.activate("tun-firezone", SENTINELS, None)):
            with pytest.raises(HostError, match="symbolic link") as caught:
                attempt()
            assert "\n" not in str(caught.value)
        assert (etc / "elsewhere").read_text() == ORIGINAL

    def test_a_missing_file_is_an_error(self, etc: Path) -> None:
        (etc / "resolv.conf").unlink()
        with pytest.raises(HostError, match=r"resolv\.conf"):
            make_dns_control("etc-resolv-conf", etc).deactivate()

    @pytest.mark.shows("io", 45)
    def test_an_empty_list_leaves_the_file_alone(self, etc: Path) -> None:
        activate(etc, sentinels=[])
        assert conf(etc) == ORIGINAL
        assert not (etc / "resolv.conf.before-firezone").exists()

    @pytest.mark.parametrize("line", ["nameserver", "nameserver example.com", "nonsense 1"])
    def test_a_syntax_error_names_the_line_and_changes_nothing(self, etc: Path, line: str) -> None:
        (etc / "resolv.conf").write_text(f"nameserver 192.0.2.1\n{line}\n")
        with pytest.raises(HostError, match=r"resolv\.conf:2: "):
            activate(etc)
        assert conf(etc) == f"nameserver 192.0.2.1\n{line}\n"

    def test_our_file_without_its_backup(self, etc: Path) -> None:
        control = activate(etc)
        (etc / "resolv.conf.before-firezone").unlink()
        ours = conf(etc)
        control.deactivate()
        assert conf(etc) == ours
        with pytest.raises(HostError, match="backup"):
            control.activate("tun-firezone", SENTINELS, None)

    @pytest.mark.parametrize("domain", ["two words", "a\nnameserver 192.0.2.66", "-x", "\t"])
    def test_a_search_domain_cannot_smuggle_lines(self, etc: Path, domain: str) -> None:
        activate(etc, domain)
        assert "192.0.2.66" not in conf(etc)
        assert "search" not in [line.split(" ")[0] for line in conf(etc).splitlines()]

    @pytest.mark.parametrize("dies_at", range(8))
    @pytest.mark.parametrize("step", ["activate", "deactivate"])
    def test_killed_at_any_write_the_next_start_repairs(self, etc: Path, step: str, dies_at: int) -> None:
        """A real process ends between two system calls that change files."""
        if step == "deactivate":
            activate(etc)
        subprocess.run([sys.executable, "-c", DIES, str(etc), step, str(dies_at)], check=True)
        make_dns_control("etc-resolv-conf", etc).deactivate()
        assert conf(etc) == ORIGINAL


class TestSystemResolvers:
    @pytest.mark.parametrize("method", ["etc-resolv-conf", "disabled"])
    def test_are_the_administrators_before_during_and_after(self, etc: Path, method: str) -> None:
        reader, writer = make_dns_control(method, etc), make_dns_control("etc-resolv-conf", etc)
        expected = ["192.0.2.1", "fe80::1"]
        assert ips(reader.system_resolvers()) == expected
        writer.activate("tun-firezone", SENTINELS, None)
        assert ips(reader.system_resolvers()) == expected
        writer.deactivate()
        (etc / "resolv.conf").write_text("nameserver 192.0.2.5\nnameserver 192.0.2.5\nnameserver no\n")
        assert ips(reader.system_resolvers()) == ["192.0.2.5"], "a stale backup must not shadow the file"

    @pytest.mark.parametrize("method", ["etc-resolv-conf", "disabled"])
    def test_unreadable_means_none(self, tmp_path: Path, method: str) -> None:
        assert make_dns_control(method, tmp_path).system_resolvers() == ()
        (tmp_path / "resolv.conf").write_bytes(b"nameserver \xff\n")
        assert make_dns_control(method, tmp_path).system_resolvers() == ()

    def test_disabled_changes_nothing(self, etc: Path) -> None:
        control = make_dns_control("disabled", etc)
        control.activate("tun-firezone", SENTINELS, "corp.example")
        control.flush_caches()
        control.deactivate()
        assert conf(etc) == ORIGINAL
        assert len(list(etc.iterdir())) == 1


class TestSystemdResolved:
    """`resolvectl` is a script that notes its arguments: the real one needs a running system manager."""

    @pytest.mark.parametrize(("domain", "wanted"), [(None, "~."), ("corp.example", "corp.example"), ("-x", "~.")])
    def test_three_commands_in_order(self, resolvectl: Path, domain: str | None, wanted: str) -> None:
        control = make_dns_control("systemd-resolved")
        control.deactivate()
        control.activate("tun-firezone", SENTINELS, domain)
        control.deactivate()
        assert calls(resolvectl) == [
            f"dns tun-firezone {' '.join(SENTINELS)}",
            f"domain tun-firezone {wanted}",
            "llmnr tun-firezone true",
        ]

    @pytest.mark.parametrize("failing", ["dns", "domain", "llmnr"])
    def test_a_failing_command_is_fatal_in_one_line(self, resolvectl: Path, failing: str) -> None:
        (resolvectl / "fails").write_text(failing)
        with pytest.raises(HostError, match=f"resolvectl {failing} .*no such link") as caught:
            make_dns_control("systemd-resolved").activate("tun-firezone", SENTINELS, None)
        assert "\n" not in str(caught.value)
        assert calls(resolvectl)[-1].startswith(failing)

    def test_no_sentinels_change_nothing(self, resolvectl: Path) -> None:
        make_dns_control("systemd-resolved").activate("tun-firezone", [], None)
        assert calls(resolvectl) == []

    def test_resolvers_of_all_links(self, resolvectl: Path) -> None:
        (resolvectl / "output").write_text(
            "Global: 192.0.2.1 192.0.2.2#dns.example\nLink 2 (eth0): fe80::1%2 192.0.2.1\nLink 5 (tun-firezone):\n"
        )
        assert ips(make_dns_control("systemd-resolved").system_resolvers()) == ["192.0.2.1", "192.0.2.2", "fe80::1"]

    def test_flushing_ignores_the_exit_code(self, resolvectl: Path) -> None:
        (resolvectl / "fails").write_text("flush-caches")
        make_dns_control("systemd-resolved").flush_caches()
        assert calls(resolvectl) == ["flush-caches"]

    def test_children_inherit_no_descriptor(self, resolvectl: Path, tmp_path: Path) -> None:
        """Not even one that was opened without close-on-exec."""
        fd = os.open(tmp_path, os.O_RDONLY)
        os.set_inheritable(fd, True)
        try:
            make_dns_control("systemd-resolved").flush_caches()
        finally:
            os.close(fd)
        assert str(tmp_path) not in (resolvectl / "descriptors").read_text().split()

    def test_without_the_program(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        control = make_dns_control("systemd-resolved")
        assert control.system_resolvers() == ()
        for attempt in (control.flush_caches, lambda: control.activate("tun-firezone", SENTINELS, None)):
            with pytest.raises(HostError, match="--dns-control etc-resolv-conf"):
                attempt()


def test_an_unknown_method_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="systemd-resolved, etc-resolv-conf, disabled"):
        make_dns_control("network-manager")


def test_parse_reads_servers_and_options() -> None:
    config = parse_resolv_conf(ORIGINAL + "; remark\ndomain x.example\noptions rotate\n")
    assert ips(config.servers) == ["192.0.2.1", "fe80::1"]
    assert config.options == ("ndots:3", "timeout:2", "edns0", "rotate")


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    folder = tmp_path / "etc"
    folder.mkdir()
    (folder / "resolv.conf").write_text(ORIGINAL)
    return folder


@pytest.fixture
def resolvectl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder: `calls` and `descriptors` are written by the script, `fails` and `output` read by it."""
    folder = tmp_path / "resolvectl"
    folder.mkdir()
    (folder / "bin").mkdir()
    script = folder / "bin" / "resolvectl"
    script.write_text(RESOLVECTL.replace("FOLDER", str(folder)))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    return folder


def activate(etc: Path, domain: str | None = None, sentinels: list[str] = SENTINELS):  # type: ignore[no-untyped-def]
    control = make_dns_control("etc-resolv-conf", etc)
    control.activate("tun-firezone", sentinels, domain)
    return control


def conf(etc: Path) -> str:
    return (etc / "resolv.conf").read_text()


def backup(etc: Path) -> str:
    return (etc / "resolv.conf.before-firezone").read_text()


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def ips(packed: tuple[bytes, ...]) -> list[str]:
    return [str(ip_address(ip)) for ip in packed]


RESOLVECTL = """\
#!/bin/sh
echo "$@" >> FOLDER/calls
for fd in /proc/$$/fd/*; do readlink "$fd"; done > FOLDER/descriptors
if [ -f FOLDER/fails ] && [ "$(cat FOLDER/fails)" = "$1" ]; then
  echo "no such" >&2
  echo "link" >&2
  exit 1
fi
if [ -f FOLDER/output ]; then cat FOLDER/output; fi
"""

DIES = """\
import os, sys
from pathlib import Path
from fz_core.linux import make_dns_control

left = int(sys.argv[3])

def dying(call):
    def instead(*arguments, **more):
        global left
        if left == 0:
            os._exit(0)
        left -= 1
        return call(*arguments, **more)
    return instead

for name in ("ftruncate", "pwrite", "fsync", "rename", "unlink"):
    setattr(os, name, dying(getattr(os, name)))
control = make_dns_control("etc-resolv-conf", Path(sys.argv[1]))
if sys.argv[2] == "activate":
    control.activate("tun-firezone", ["100.100.111.1"], "corp.example")
else:
    control.deactivate()
"""
