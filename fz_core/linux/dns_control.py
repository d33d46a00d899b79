"""Pointing the host's resolver at the tunnel, and back: systemd-resolved, /etc/resolv.conf, or not at all.

    control = make_dns_control("etc-resolv-conf")
    control.deactivate()                    # at start: undoes what a crashed run left
    control.activate("tun-firezone", ["100.100.111.1"], "corp.example")
    control.deactivate()

Everything here blocks, so a trio program calls it in a thread. Not here: when to call what, and removing
sentinels from `system_resolvers` (the core does). Source: spec/io.md 9, spec/binaries.md 3.6.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import stat
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from fz_core.linux.errors import HostError
from fz_core.linux.whole_file import sync_folder, write_whole

METHODS = ("systemd-resolved", "etc-resolv-conf", "disabled")
MARKER = "# BEGIN Firezone DNS configuration"
BACKUP_NAME = "resolv.conf.before-firezone"
RESOLVED_FILE = Path("/run/systemd/resolve/resolv.conf")
COMMAND_TIMEOUT = 10.0
MAX_FILE_BYTES = 1 << 20
KEPT_DIRECTIVES = ("sortlist", "lookup", "family")

log = logging.getLogger("firezone.dns_control")


class DnsControl(Protocol):
    """One way to configure the host's resolver. HostError, in one line, for what must end the client."""

    def deactivate(self) -> None:
        """Give the host its own configuration back; harmless when repeated or when there is nothing to undo."""

    def activate(self, device: str, sentinels: Sequence[str], search_domain: str | None) -> None:
        """Send the host's queries to these addresses. None of them: warn, and change nothing."""

    def system_resolvers(self) -> tuple[bytes, ...]:
        """The host's own name servers as packed IPs; none if they cannot be read."""

    def watched_files(self) -> tuple[Path, ...]:
        """Files that change when `system_resolvers` may."""

    def flush_caches(self) -> None:
        """Forget what the host's resolver remembers."""


def make_dns_control(method: str, etc: Path = Path("/etc")) -> DnsControl:
    """The control for one of METHODS; ValueError for another name."""
    match method:
        case "systemd-resolved":
            return SystemdResolved()
        case "etc-resolv-conf":
            return EtcResolvConf(etc)
        case "disabled":
            return Disabled(etc)
    raise ValueError(f"unknown DNS control method {method!r}, use one of {', '.join(METHODS)}")


class SystemdResolved:
    """Settings of our link in systemd-resolved; they vanish with the link."""

    def deactivate(self) -> None:
        """Nothing: there is no link, or it is about to go."""

    def activate(self, device: str, sentinels: Sequence[str], search_domain: str | None) -> None:
        """Servers, domains and LLMNR of the link. LLMNR, so that single-label names reach the tunnel too."""
        if not sentinels:
            log.warning("No DNS servers for the tunnel: the link's DNS settings stay as they are")
            return
        self._require("dns", device, *sentinels)
        self._require("domain", device, _one_domain(search_domain) or "~.")
        self._require("llmnr", device, "true")

    def system_resolvers(self) -> tuple[bytes, ...]:
        """The servers of all links."""
        try:
            result = _resolvectl("dns")
        except HostError as error:
            log.warning("Cannot read the system's resolvers: %s", error)
            return ()
        return _packed(result.stdout.split())

    def watched_files(self) -> tuple[Path, ...]:
        """What systemd-resolved writes whenever a link gets or loses servers."""
        return (RESOLVED_FILE,)

    def flush_caches(self) -> None:
        """Its exit code says nothing we could act on."""
        _resolvectl("flush-caches")

    def _require(self, *arguments: str) -> None:
        result = _resolvectl(*arguments)
        if result.returncode != 0:
            reason = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
            raise HostError(
                f"resolvectl {' '.join(arguments)} failed ({reason}): is systemd-resolved running? "
                "Otherwise use --dns-control etc-resolv-conf"
            )


class Disabled:
    """Leaves the host alone, and reads /etc/resolv.conf."""

    def __init__(self, etc: Path = Path("/etc")) -> None:
        self._file = ResolvConf(etc)

    def deactivate(self) -> None:
        """Nothing was done."""

    def activate(self, device: str, sentinels: Sequence[str], search_domain: str | None) -> None:
        """Nothing: the administrator said so."""

    def system_resolvers(self) -> tuple[bytes, ...]:
        """Of /etc/resolv.conf; of its backup only while the file is still ours, after a crash."""
        return self._file.original_servers()

    def watched_files(self) -> tuple[Path, ...]:
        """The file, and the backup that counts after a crash."""
        return (self._file.path, self._file.backup)

    def flush_caches(self) -> None:
        """Nothing: no cache of ours."""


class EtcResolvConf:
    """Rewrites /etc/resolv.conf. Its first line tells our text from the administrator's."""

    def __init__(self, etc: Path = Path("/etc")) -> None:
        self._file = ResolvConf(etc)

    def deactivate(self) -> None:
        """Put the backup back if the file is ours; anybody else's text, however new, stays."""
        current = self._file.read()
        if not is_ours(current):
            return
        original = self._file.read_backup()
        if original is None:
            log.warning("%s is from Firezone and has no backup; it stays as it is", self._file.path)
            return
        self._file.overwrite(original)

    def activate(self, device: str, sentinels: Sequence[str], search_domain: str | None) -> None:
        """Back up what the administrator wrote, then write ours; a crash in between harms nothing."""
        current = self._file.read()
        if not sentinels:
            log.warning("No DNS servers for the tunnel: %s stays as it is", self._file.path)
            return
        original = self._file.read_backup() if is_ours(current) else current
        if original is None:
            raise HostError(
                f"{self._file.path} is from Firezone and its backup {self._file.backup} is gone: "
                "write your own name servers into it and delete its first line"
            )
        config = parse_resolv_conf(original, str(self._file.path))
        if original is current:
            self._file.write_backup(original)
        self._file.overwrite(_our_text(config, sentinels, search_domain, self._file.backup))

    def system_resolvers(self) -> tuple[bytes, ...]:
        """What the administrator's text says, also while ours is in place."""
        return self._file.original_servers()

    def watched_files(self) -> tuple[Path, ...]:
        """The file and its backup."""
        return (self._file.path, self._file.backup)

    def flush_caches(self) -> None:
        """Nothing: libc keeps no cache."""


class ResolvConf:
    """The file and its backup, as bytes on disk."""

    def __init__(self, etc: Path) -> None:
        self.path, self.backup = etc / "resolv.conf", etc / BACKUP_NAME

    def read(self) -> str:
        """The text. HostError unless it is a readable regular file."""
        return _read_regular(self.path)

    def read_backup(self) -> str | None:
        """The backup's text; None if there is none."""
        return _read_regular(self.backup) if self.backup.exists() else None

    def original_servers(self) -> tuple[bytes, ...]:
        """The name servers of the administrator's text; none if it cannot be read."""
        try:
            # A symlink is fine here: nothing is written.
            text = _decode(self.path.read_bytes(), self.path)
            if is_ours(text):
                text = self.read_backup() or text
        except (OSError, HostError) as error:
            log.warning("Cannot read the system's resolvers: %s", error)
            return ()
        words = [line.split() for line in text.splitlines()]
        return _packed(w[1] for w in words if len(w) > 1 and w[0] == "nameserver")

    def write_backup(self, text: str) -> None:
        """Replace the backup, all or nothing, also if power fails."""
        temporary = self.backup.with_name(f"{self.backup.name}.tmp")
        try:
            write_whole(self.backup, text.encode(), unfinished=temporary, mode=0o644)
            sync_folder(self.backup.parent)
        except OSError as error:
            raise HostError(f"cannot write {self.backup} ({error.strerror}), so {self.path} stays as it is") from None

    def overwrite(self, text: str) -> None:
        """Write in place: containers mount the file, so it cannot be renamed.

        At every instant the file begins with what it began with before or with the new text, never with
        nothing: a process killed in between leaves our marker, and with it a file the next start repairs.
        """
        data = text.encode()
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            with os.fdopen(fd, "wb", buffering=0) as file:
                if not is_ours(text) and os.fstat(fd).st_size > len(data):
                    os.ftruncate(fd, len(data))  # while our marker still stands: what is left is ours
                written = 0
                while written < len(data):
                    written += os.pwrite(fd, data[written:], written)
                os.ftruncate(fd, len(data))  # behind our marker: the rest of the old text
                os.fsync(file.fileno())
        except OSError as error:
            raise HostError(f"cannot write {self.path} ({error.strerror}): run as root") from None


class ResolverConfig(NamedTuple):
    """A resolv.conf: name servers without scope, options, and lines kept as they are."""

    servers: tuple[bytes, ...]
    options: tuple[str, ...]
    other_lines: tuple[str, ...]


def parse_resolv_conf(text: str, name: str = "/etc/resolv.conf") -> ResolverConfig:
    """HostError, naming the line, for what is no resolv.conf."""
    servers: list[bytes] = []
    options: list[str] = []
    others: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith(("#", ";")):
            continue
        match words[0]:
            case "nameserver":
                found = _packed(words[1:2])
                if not found:
                    raise HostError(f"{name}:{number}: {' '.join(words)!r} names no IP address: correct the line")
                servers += found
            case "options":
                options += words[1:]
            case "search" | "domain":
                pass  # the portal's search domain takes its place
            case directive if directive in KEPT_DIRECTIVES:
                others.append(" ".join(words))
            case unknown:
                raise HostError(f"{name}:{number}: unknown directive {unknown!r}: correct or remove the line")
    return ResolverConfig(tuple(servers), tuple(options), tuple(others))


def is_ours(text: str) -> bool:
    """Whether this text, or the little of it that a crash left, is what we wrote."""
    return text.startswith(MARKER) or (bool(text.strip()) and MARKER.startswith(text))


def _our_text(config: ResolverConfig, sentinels: Sequence[str], search_domain: str | None, backup: Path) -> str:
    domain = _one_domain(search_domain)
    options = ["ndots:1", *(o for o in config.options if not o.startswith("ndots:"))]
    lines = [
        MARKER,
        "#",
        "# To keep changes of your own, delete the line above: the file is yours then.",
        "# If you see it while Firezone is stopped, Firezone crashed; its next start repairs this file.",
        f"# Your own configuration is in {backup}",
        "",
        *(f"nameserver {ip}" for ip in sentinels),
        *([f"search {domain}"] if domain else []),
        f"options {' '.join(options)}",
        *config.other_lines,
    ]
    return "\n".join(lines) + "\n"


def _one_domain(search_domain: str | None) -> str | None:
    """The portal's search domain, unless it would be read as an option, a second word or a second line."""
    if search_domain and (
        search_domain.startswith("-") or not re.fullmatch(r"[^\s\x00-\x1f\x7f]{1,255}", search_domain)
    ):
        log.warning("Search domain %r is no domain, going on without", search_domain)
        return None
    return search_domain


def _read_regular(path: Path) -> str:
    try:
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode):
            kind = "a symbolic link" if stat.S_ISLNK(info.st_mode) else "not a regular file"
            raise HostError(f"{path} is {kind}: use --dns-control systemd-resolved or disabled, or make it a file")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            return _decode(file.read(MAX_FILE_BYTES + 1), path)
    except OSError as error:
        raise HostError(f"cannot read {path} ({error.strerror}): create it, or use another --dns-control") from None


def _decode(data: bytes, path: Path) -> str:
    """Text in which every byte keeps its value, for backups that are byte by byte the original."""
    if len(data) > MAX_FILE_BYTES:
        raise HostError(f"{path} is larger than {MAX_FILE_BYTES} bytes: that is no resolver configuration")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise HostError(f"{path} is not UTF-8 text: correct it") from None


def _packed(words: Iterable[str]) -> tuple[bytes, ...]:
    """The IPs among words, without duplicates, scopes (`%eth0`) and server names (`#dns.example`)."""
    found: dict[bytes, None] = {}
    for word in words:
        with suppress(ValueError):
            found[ipaddress.ip_address(word.partition("#")[0].partition("%")[0]).packed] = None
    return tuple(found)


def _resolvectl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run resolvectl; it gets none of our descriptors."""
    try:
        return subprocess.run(
            ["resolvectl", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            close_fds=True,
            text=True,
            errors="replace",
            timeout=COMMAND_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise HostError(f"resolvectl {' '.join(arguments)} gave no answer within {COMMAND_TIMEOUT:.0f} s") from None
    except OSError as error:
        raise HostError(
            f"cannot run resolvectl ({error.strerror}): install systemd-resolved or use --dns-control etc-resolv-conf"
        ) from None
