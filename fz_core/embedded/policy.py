"""What an embedded portal lets whom do: the policy as values. Reading it from a file is `policy_file`.

Nothing here knows about connections. Ids are stable: those not given are made of the name.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

from fz_core.portal.types import Filter, Ip, Network

EVERYONE = "everyone"
NAMESPACE = uuid.UUID("6d3c6a3e-55c1-4b0e-9d0f-6f1f6b1f2f0a")


def name_id(kind: str, name: str) -> str:
    """The id of something that has only a name."""
    return str(uuid.uuid5(NAMESPACE, f"{kind}/{name}"))


@dataclass(frozen=True, slots=True)
class Site:
    """Gateways that reach the same resources."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class GatewayAccount:
    """Gateways of one site that share tokens (by hash)."""

    name: str
    site: str
    tokens: frozenset[str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class ClientAccount:
    """A person or service with its tokens (by hash); `expires_at` in unix seconds."""

    name: str
    groups: frozenset[str]
    tokens: frozenset[str] = field(repr=False)
    expires_at: int | None = None
    email: str | None = None

    @property
    def id(self) -> str:
        """The actor's id."""
        return name_id("client", self.name)


@dataclass(frozen=True, slots=True)
class ResourceRule:
    """Something clients may reach. `kind` is dns, cidr, internet, static_device_pool or dynamic_device_pool.

    `address` is a pattern or a network, `site` the name of one; pools have `devices`, names of clients.
    """

    id: str
    name: str
    kind: str
    address: str | Network | None = None
    site: str | None = None
    filters: tuple[Filter, ...] = ()
    description: str | None = None
    ip_stack: str = "dual"
    devices: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Changes whenever grants made before must not hold any more."""
        essence = repr((self.kind, str(self.address), self.ip_stack, self.site))
        return hashlib.sha256(essence.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class AccessRule:
    """A group may use a resource; each authorization lasts `expires_in` seconds, None: as long as the token."""

    group: str
    resource: str
    expires_in: int | None = None

    @property
    def id(self) -> str:
        """The policy's id."""
        return name_id("policy", f"{self.group}/{self.resource}")


@dataclass(frozen=True, slots=True)
class Policy:
    """A whole policy file."""

    account: str = "default"
    sites: dict[str, Site] = field(default_factory=dict)
    gateways: tuple[GatewayAccount, ...] = ()
    clients: dict[str, ClientAccount] = field(default_factory=dict)
    resources: dict[str, ResourceRule] = field(default_factory=dict)
    rules: tuple[AccessRule, ...] = ()
    dns_servers: tuple[Ip, ...] = ()
    doh_servers: tuple[str, ...] = ()
    search_domain: str | None = None
    relay_tokens: frozenset[str] = field(default=frozenset(), repr=False)
    allow_iceless: bool = False
    old_clients: bool = False

    @property
    def account_id(self) -> str:
        """The account's id."""
        return name_id("account", self.account)

    def client_of(self, token: str) -> ClientAccount | None:
        """The client a token hash belongs to."""
        return next((c for c in self.clients.values() if token in c.tokens), None)

    def gateway_of(self, token: str) -> GatewayAccount | None:
        """The gateways a token hash belongs to."""
        return next((g for g in self.gateways if token in g.tokens), None)

    def rules_of(self, client: ClientAccount) -> Iterable[AccessRule]:
        """The rules that hold for a client."""
        return (r for r in self.rules if r.group == EVERYONE or r.group in client.groups)

    def visible_to(self, client: ClientAccount) -> dict[str, ResourceRule]:
        """The resources a client may use, by id."""
        names = dict.fromkeys(r.resource for r in self.rules_of(client))
        return {self.resources[n].id: self.resources[n] for n in names}

    def resource(self, resource_id: str) -> ResourceRule | None:
        """A resource by id."""
        return next((r for r in self.resources.values() if r.id == resource_id), None)

    def pool_owners(self, pool: ResourceRule) -> tuple[str, ...]:
        """Ids of the clients whose devices belong to a pool; a dynamic one has everybody's."""
        names = pool.devices if pool.kind == "static_device_pool" else self.clients
        return tuple(self.clients[name].id for name in names if name in self.clients)

    def best_rule(self, client: ClientAccount, resource: ResourceRule) -> AccessRule | None:
        """Of the rules that allow it the one that lasts longest."""
        rules = [r for r in self.rules_of(client) if r.resource == resource.name]
        return max(rules, key=lambda r: float("inf") if r.expires_in is None else r.expires_in, default=None)
