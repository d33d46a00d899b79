"""The policy file: TOML to `Policy`, or every mistake with its line (docs/embedded-portal.md).

policy = read_policy(Path("portal.toml"))      # PolicyErrors: one line each, "file:line: thing value remedy"
"""

from __future__ import annotations

import datetime
import re
import tomllib
import uuid
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from fz_core.embedded.policy import (
    EVERYONE,
    AccessRule,
    ClientAccount,
    GatewayAccount,
    Policy,
    ResourceRule,
    Site,
    name_id,
)
from fz_core.embedded.policy_text import KINDS, RESERVED, read_address, read_filter
from fz_core.embedded.portal_derivation import token_hash
from fz_core.portal.types import Filter, Ip

MAX_FILE = 4 * 1024 * 1024
MIN_TOKEN = 16
TOKEN_KEYS = ("token", "tokens", "token_file", "token_sha256")


class PolicyErrors(Exception):
    """Everything wrong with a policy file, one line each."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = tuple(lines)
        super().__init__("\n".join(self.lines))


def read_policy(path: Path) -> Policy:
    """Read and check a file. PolicyErrors lists all mistakes, OSError if it cannot be read."""
    data = path.read_bytes()
    if len(data) > MAX_FILE:
        raise PolicyErrors([f"{path}: {len(data)} bytes are too long for a policy, keep it under {MAX_FILE}"])
    try:
        text = data.decode()
        tables = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise PolicyErrors([f"{path}: byte {error.start} is not UTF-8, save the file as UTF-8"]) from None
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise PolicyErrors([f"{path}:{line[1] if line else 1}: not TOML: {error}"]) from None
    return _Reader(path, text).read(tables)


class _Reader:
    """Collects mistakes instead of stopping at the first."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._lines = path, text.splitlines()
        self._errors: list[str] = []
        self._token_owners: dict[str, str] = {}

    def read(self, tables: dict[str, Any]) -> Policy:
        self._known(tables, "the file", TOP_KEYS, ("", 0))
        groups = frozenset(self._texts(tables, "groups", ("", 0))) | {EVERYONE}
        sites = self._sites(tables)
        gateways = tuple(self._each(tables, "gateways", lambda t, at: self._gateway(t, at, sites)))
        clients = self._by_name(tables, "clients", lambda t, at: self._client(t, at, groups))
        resources = self._by_name(tables, "resources", lambda t, at: self._resource(t, at, sites, clients))
        rules = tuple(self._each(tables, "policies", lambda t, at: self._rule(t, at, groups, resources)))
        servers, doh, search = self._dns(tables)
        policy = Policy(
            self._text(tables, "account", ("", 0)) or "default", sites, gateways, clients, resources, rules,
            servers, doh, search, self._relay_tokens(tables), self._flag(tables, "iceless", ("", 0)),
            self._flag(tables, "old_clients", ("", 0)),
        )  # fmt: skip
        self._check_ids(policy)
        if self._errors:
            raise PolicyErrors(self._errors)
        return policy

    # tables

    def _sites(self, tables: dict[str, Any]) -> dict[str, Site]:
        def read(table: dict[str, Any], at: Place) -> Site | None:
            self._known(table, "a site", ("name", "id"), at)
            name = self._name(table, "a site", at)
            return None if name is None else Site(self._id(table, "site", name, at), name)

        return self._by_name(tables, "sites", read)

    def _gateway(self, table: dict[str, Any], at: Place, sites: dict[str, Site]) -> GatewayAccount | None:
        self._known(table, "a gateway", ("name", "site", *TOKEN_KEYS), at)
        site = self._reference(table, "site", sites, "[[sites]]", at)
        name = self._text(table, "name", at) or site or "?"
        tokens = self._tokens(table, f"gateway {name!r}", at)
        return GatewayAccount(name, site, tokens) if site else None

    def _client(self, table: dict[str, Any], at: Place, groups: frozenset[str]) -> ClientAccount | None:
        self._known(table, "a client", ("name", "groups", "expires", "email", *TOKEN_KEYS), at)
        name = self._name(table, "a client", at)
        if name is None:
            return None
        mine = frozenset(self._texts(table, "groups", at))
        for group in sorted(mine - groups):
            self._error(at, "groups", f"client {name!r} is in group {group!r}, which is not listed in groups = [...]")
        expires = table.get("expires")
        if expires is not None and not isinstance(expires, datetime.date):
            self._error(at, "expires", f"client {name!r} expires {expires!r}, write a date such as 2030-01-31")
            expires = None
        tokens = self._tokens(table, f"client {name!r}", at)
        return ClientAccount(name, mine, tokens, _unix_time(expires), self._text(table, "email", at))

    def _resource(
        self, table: dict[str, Any], at: Place, sites: dict[str, Site], clients: dict[str, ClientAccount]
    ) -> ResourceRule | None:
        name = self._name(table, "a resource", at)
        kind = self._text(table, "type", at)
        if name is None:
            return None
        if kind is None or kind not in KINDS:
            self._error(at, "type", f"resource {name!r} has type {kind!r}, use one of {', '.join(KINDS)}")
            return None
        self._known(table, f"a resource of type {kind}", ("name", "id", "type", "description", *KINDS[kind]), at)
        site = self._reference(table, "site", sites, "[[sites]]", at) if "site" in KINDS[kind] else None
        address = None
        if "address" in KINDS[kind]:
            try:
                address = read_address(kind, self._text(table, "address", at))
            except ValueError as error:
                self._error(at, "address", f"resource {name!r}: {error}")
        stack = self._text(table, "ip_stack", at) or "dual"
        if stack not in ("dual", "ipv4_only", "ipv6_only"):
            self._error(at, "ip_stack", f"resource {name!r} has ip_stack {stack!r}, use dual, ipv4_only or ipv6_only")
        devices = self._texts(table, "devices", at)
        for device in devices:
            if device not in clients:
                self._error(at, "devices", f"resource {name!r} names device {device!r}, which is no [[clients]] name")
        return ResourceRule(
            self._id(table, "resource", name, at), name, "cidr" if kind == "ip" else kind, address, site,
            self._filters(table, name, at), self._text(table, "description", at), stack, tuple(devices),
        )  # fmt: skip

    def _rule(
        self, table: dict[str, Any], at: Place, groups: frozenset[str], resources: dict[str, ResourceRule]
    ) -> AccessRule | None:
        self._known(table, "a policy", ("group", "resource", "expires_in"), at)
        group = self._reference(table, "group", groups, "groups = [...]", at)
        resource = self._reference(table, "resource", resources, "[[resources]]", at)
        expires_in = table.get("expires_in")
        if expires_in is not None and (type(expires_in) is not int or not 5 <= expires_in <= 10**9):
            self._error(at, "expires_in", f"expires_in is {expires_in!r}, write seconds from 5 to 1000000000")
        return AccessRule(group, resource, expires_in) if group and resource else None

    def _dns(self, tables: dict[str, Any]) -> tuple[tuple[Ip, ...], tuple[str, ...], str | None]:
        table, at = self._table(tables, "dns"), ("dns", 0)
        self._known(table, "[dns]", ("servers", "search_domain"), at)
        servers: list[Ip] = []
        doh: list[str] = []
        for text in self._texts(table, "servers", at):
            if text.startswith("https://") and len(text) > len("https://") and "?" not in text:
                doh.append(text)
                continue
            try:
                server = ip_address(text)
            except ValueError:
                self._error(at, "servers", f"DNS server {text!r} is neither an IP address nor an https:// URL")
                continue
            if any(server in network for network in RESERVED):
                self._error(at, "servers", f"DNS server {text} is inside the range reserved for tunnels")
            servers.append(server)
        return tuple(servers), tuple(doh), self._text(table, "search_domain", at)

    def _relay_tokens(self, tables: dict[str, Any]) -> frozenset[str]:
        if "relay" not in tables:
            return frozenset()
        table = self._table(tables, "relay")
        self._known(table, "[relay]", TOKEN_KEYS, ("relay", 0))
        return self._tokens(table, "relay", ("relay", 0))

    # values

    def _filters(self, table: dict[str, Any], name: str, at: Place) -> tuple[Filter, ...]:
        filters = []
        for text in self._texts(table, "filters", at):
            try:
                filters.append(read_filter(text))
            except ValueError as error:
                self._error(at, "filters", f"resource {name!r}: {error}")
        return tuple(filters)

    def _tokens(self, table: dict[str, Any], owner: str, at: Place) -> frozenset[str]:
        hashes = [h.lower() for h in self._texts(table, "token_sha256", at)]
        for digest in hashes:
            if not re.fullmatch("[0-9a-f]{64}", digest):
                self._error(at, "token_sha256", f"{owner}: token_sha256 is not 64 hex digits, see sha256sum")
        plain = [*self._texts(table, "token", at), *self._texts(table, "tokens", at)]
        for name in self._texts(table, "token_file", at):
            try:
                plain.append((self._path.parent / name).read_text())
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "not text"
                self._error(at, "token_file", f"{owner}: cannot read token_file {name!r}: {reason}")
        for token in plain:
            if len("".join(token.split())) < MIN_TOKEN:
                self._error(at, "token", f"{owner}: token is shorter than {MIN_TOKEN}, use openssl rand -hex 32")
        hashes += [token_hash(token) for token in plain]
        if not any(key in table for key in TOKEN_KEYS):
            self._error(at, "", f"{owner} has no token, add token, token_file or token_sha256")
        for digest in hashes:
            if self._token_owners.setdefault(digest, owner) != owner:
                self._error(at, "token", f"{owner} has the same token as {self._token_owners[digest]}, make another")
        return frozenset(hashes)

    def _name(self, table: dict[str, Any], what: str, at: Place) -> str | None:
        name = self._text(table, "name", at)
        if not name:
            self._error(at, "name", f'{what} has no name, add name = "..."')
        return name or None

    def _id(self, table: dict[str, Any], kind: str, name: str, at: Place) -> str:
        text = self._text(table, "id", at)
        if text is None:
            return name_id(kind, name)
        try:
            return str(uuid.UUID(text))
        except ValueError:
            self._error(at, "id", f"{kind} {name!r} has id {text!r}, write a UUID or leave it out")
            return name_id(kind, name)

    def _reference(self, table: dict[str, Any], key: str, known: Iterable[str], where: str, at: Place) -> str | None:
        name = self._text(table, key, at)
        if name is None or name not in known:
            found = "is missing" if name is None else f"{name!r} does not exist"
            self._error(at, key, f"{key} {found}, name one of {where}: {', '.join(sorted(known)) or '(none)'}")
            return None
        return name

    def _text(self, table: dict[str, Any], key: str, at: Place) -> str | None:
        value = table.get(key)
        if value is None or isinstance(value, str):
            return value
        self._error(at, key, f"{key} is {value!r}, write text in quotes")
        return None

    def _texts(self, table: dict[str, Any], key: str, at: Place) -> list[str]:
        value = table.get(key, [])
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(v, str) for v in values):
            return values
        self._error(at, key, f"{key} is not text or a list of texts in quotes")
        return []

    def _flag(self, table: dict[str, Any], key: str, at: Place) -> bool:
        value = table.get(key, False)
        if not isinstance(value, bool):
            self._error(at, key, f"{key} is {value!r}, write true or false")
        return value is True

    def _table(self, tables: dict[str, Any], key: str) -> dict[str, Any]:
        value = tables.get(key, {})
        if isinstance(value, dict):
            return value
        self._error(("", 0), key, f"{key} is no table, write [{key}] and its keys below")
        return {}

    def _each(self, tables: dict[str, Any], key: str, read: Callable[[dict[str, Any], Place], Any]) -> list[Any]:
        entries = tables.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            self._error(("", 0), key, f"{key} is no list of tables, write [[{key}]] before each")
            return []
        found = [read(entry, (key, n)) for n, entry in enumerate(entries)]
        return [item for item in found if item is not None]

    def _by_name(
        self, tables: dict[str, Any], key: str, read: Callable[[dict[str, Any], Place], Any]
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for n, item in enumerate(self._each(tables, key, read)):
            if item.name in found:
                self._error((key, n), "name", f"{key}: the name {item.name!r} is used twice, choose another")
            found[item.name] = item
        return found

    def _known(self, table: dict[str, Any], what: str, keys: Iterable[str], at: Place) -> None:
        for key in table:
            if key not in keys:
                self._error(at, key, f"{what} has no key {key!r}, use {', '.join(keys)}")

    def _check_ids(self, policy: Policy) -> None:
        owners: dict[str, str] = {}
        items: list[Site | ResourceRule] = [*policy.sites.values(), *policy.resources.values()]
        for item in items:
            if owners.setdefault(item.id, item.name) != item.name:
                self._error(("resources", 0), "id", f"{item.name!r} has the id of {owners[item.id]!r}, choose another")

    # places

    def _error(self, at: Place, key: str, message: str) -> None:
        self._errors.append(f"{self._path}:{self._line(at, key)}: {message}")

    def _line(self, at: Place, key: str) -> int:
        """The line of a key in the n-th table of this name, else of the table, else 1."""
        name, n = at
        start = 0
        if name:
            header = re.compile(rf"\s*\[\[?\s*{re.escape(name)}\s*\]")
            starts = [i for i, line in enumerate(self._lines) if header.match(line)]
            if n >= len(starts):
                return 1
            start = starts[n]
        wanted = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*=""")
        for i in range(start + bool(name), len(self._lines)):
            line = self._lines[i]
            if key and wanted.match(line):
                return i + 1
            if line.lstrip().startswith("["):
                if not name and re.match(rf"\s*\[+\s*{re.escape(key)}\b", line):
                    return i + 1
                if name:
                    break
        return start + 1


Place = tuple[str, int]
TOP_KEYS = (
    "account", "groups", "iceless", "old_clients", "dns", "relay", "sites", "gateways", "clients", "resources",
    "policies",
)  # fmt: skip


def _unix_time(value: datetime.date | None) -> int | None:
    """The end of a day, or a moment; without an offset it is UTC."""
    if value is None:
        return None
    if not isinstance(value, datetime.datetime):
        value = datetime.datetime.combine(value, datetime.time(23, 59, 59))
    if value.tzinfo is None:
        value = value.replace(tzinfo=datetime.UTC)
    return int(value.timestamp())
