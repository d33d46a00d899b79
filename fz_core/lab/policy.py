"""What a lab's portal allows, as values, and the policy file they become (docs/embedded-portal.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ResourceSpec:
    """One resource; `kind` is cidr, dns, internet, static_device_pool or dynamic_device_pool.

    `filters` are texts such as "tcp/80" and "icmp", `devices` the names of accounts.
    """

    kind: str = "cidr"
    address: str | None = None
    filters: tuple[str, ...] = ()
    ip_stack: str | None = None
    devices: tuple[str, ...] | None = None

    def table(self, name: str, site: str) -> dict[str, Any]:
        """Its table of the file."""
        has_site = not self.kind.endswith("_pool")
        values = {
            "name": name, "type": self.kind, "address": self.address, "site": site if has_site else None,
            "filters": list(self.filters) or None, "ip_stack": self.ip_stack,
            "devices": None if self.devices is None else list(self.devices),
        }  # fmt: skip
        return {key: value for key, value in values.items() if value is not None}


def dns(address: str, *filters: str, ip_stack: str | None = None) -> ResourceSpec:
    """A name or pattern."""
    return ResourceSpec("dns", address, filters, ip_stack)


def cidr(address: str, *filters: str) -> ResourceSpec:
    """A network."""
    return ResourceSpec("cidr", address, filters)


def static_pool(*devices: str, filters: tuple[str, ...] = ()) -> ResourceSpec:
    """The devices of these accounts."""
    return ResourceSpec("static_device_pool", filters=filters, devices=devices)


def dynamic_pool(address: str) -> ResourceSpec:
    """Names of devices, as `*.suffix`."""
    return ResourceSpec("dynamic_device_pool", address)


INTERNET = ResourceSpec("internet")


@dataclass(frozen=True, slots=True)
class Rules:
    """Everything the file says. `allowed` maps groups to the resources they may use.

    `iceless` lets peers that can do without ICE do so.
    """

    gateway_token: str = field(repr=False)
    relay_token: str = field(repr=False)
    accounts: Mapping[str, str] = field(repr=False)
    resources: Mapping[str, str | ResourceSpec]
    allowed: Mapping[str, Sequence[str]]
    expires_in: int | None = None
    dns_servers: Sequence[str] = ()
    search_domain: str | None = None
    old_clients: bool = False
    iceless: bool = False

    def text(self) -> str:
        """The file; every account is a group of its own."""
        top = {"account": "lab", "groups": list(self.accounts), "old_clients": self.old_clients}
        top["iceless"] = self.iceless
        servers: dict[str, Any] = {"servers": list(self.dns_servers)}
        if self.search_domain is not None:
            servers["search_domain"] = self.search_domain
        limit = {} if self.expires_in is None else {"expires_in": self.expires_in}
        specs = {n: ResourceSpec(address=s) if isinstance(s, str) else s for n, s in self.resources.items()}
        tables = [
            _table("", top),
            _table("[dns]", servers),
            _table("[relay]", {"token": self.relay_token}),
            _table("[[sites]]", {"name": "lab"}),
            _table("[[gateways]]", {"site": "lab", "token": self.gateway_token}),
            *(_table("[[clients]]", {"name": n, "groups": [n], "token": t}) for n, t in self.accounts.items()),
            *(_table("[[resources]]", spec.table(name, "lab")) for name, spec in specs.items()),
            *(
                _table("[[policies]]", {"group": group, "resource": name, **limit})
                for group, names in self.allowed.items()
                for name in names
            ),
        ]
        return "\n".join(tables)


def _table(header: str, values: Mapping[str, Any]) -> str:
    """A TOML table; its strings, lists and numbers are written as in JSON."""
    return "\n".join([header, *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""])
